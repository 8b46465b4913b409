# SPDX-License-Identifier: Apache-2.0
"""Many rule files, kinds of devices, batches and contexts in one table."""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

from ktx_jax.model.config import Config
from ktx_jax.sharding.devices import HOST
from ktx_jax.sharding.fit import capacities
from ktx_jax.sharding.parameters import Types
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.problems import RulesError
from ktx_jax.sharding.roofline import Roofline, pipelined, roofline
from ktx_jax.sharding.rules import Rules
from ktx_jax.sharding.step_size import step_size
from ktx_jax.sharding.targets import HOST_TARGET, Target, load_target


@dataclass(frozen=True)
class SweepRow:
    """One plan on one kind of device.

    Attributes:
      rules, target: names; devices: accelerators in the plan.
      error: why the rules do not suit the model; the numbers are then 0.
      fits: whether every device has room; needed, usable: bytes of the fullest one.
      decode_s, prefill_s: least time of a step (`roofline`), its terms for decode after it.
      decode_tokens_per_second, prefill_tokens_per_second: one step at a time.
      pipelined_tokens_per_second: in decode, the batch in as many parts as there are stages.
      bound: the term that is longest in decode.
    """

    rules: str
    target: str
    devices: int = 0
    batch: int = 0
    context: int = 0
    error: str = ""
    fits: bool = False
    needed: int = 0
    usable: int = 0
    decode_s: float = 0.0
    memory_s: float = 0.0
    compute_s: float = 0.0
    collectives_s: float = 0.0
    host_s: float = 0.0
    transfer_s: float = 0.0
    decode_tokens_per_second: float = 0.0
    pipelined_tokens_per_second: float = 0.0
    prefill_s: float = 0.0
    prefill_tokens_per_second: float = 0.0
    bound: str = ""


def sweep(
    config: Config,
    rules: Sequence[Rules | str | os.PathLike[str]],
    targets: Sequence[Target | str],
    *,
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (4096,),
    types: Types | str = "q4_k_m",
    dtype: str = "bfloat16",
    host: Target | str = HOST_TARGET,
) -> list[SweepRow]:
    """Every combination, in the order of the arguments, the last varying fastest.

    Args:
      rules, targets: rule files and kinds of devices, read or by name.
      types, dtype: as in `Plan.from_rules`.
      host: what computes the parts of plans that lie on the host.

    Raises:
      KtxError: a file cannot be read, or a batch or context is impossible.
    """
    tables = [r if isinstance(r, Rules) else Rules.from_file(r) for r in rules]
    kinds = [t if isinstance(t, Target) else load_target(t) for t in targets]
    processor = host if isinstance(host, Target) else load_target(host)
    rows = []
    for table, kind in product(tables, kinds):
        try:
            plan = Plan.for_target(config, table, kind, types=types, dtype=dtype, context=2, batch=1)
        except RulesError as error:
            rows.append(SweepRow(table.name, kind.name, error=error.lines[0]))
            continue
        rows += [
            _row(plan.resized(batch=batch, context=context), kind, processor)
            for batch, context in product(batches, contexts)
        ]
    return rows


def _row(plan: Plan, target: Target, host: Target) -> SweepRow:
    room = capacities(plan, target.usable)
    fullest = max(room, key=lambda name: plan.needs[name].total - room[name])
    size = step_size(plan, "decode")
    decode, flowing = (estimate(plan, target, size, host=host) for estimate in (roofline, pipelined))
    prefill = roofline(plan, target, step_size(plan, "prefill"), host=host)
    memory, compute, collectives, host_s, transfer = _terms(decode)
    terms = {"memory": memory, "compute": compute, "collectives": collectives, "host": host_s, "transfer": transfer}
    return SweepRow(
        rules=plan.name, target=target.name, devices=sum(name != HOST for name in plan.devices),
        batch=plan.batch, context=plan.context,
        fits=all(plan.needs[name].total <= room[name] for name in room),
        needed=plan.needs[fullest].total, usable=room[fullest],
        decode_s=decode.seconds, memory_s=memory, compute_s=compute, collectives_s=collectives, host_s=host_s,
        transfer_s=transfer,
        decode_tokens_per_second=decode.tokens_per_second,
        pipelined_tokens_per_second=flowing.tokens_per_second,
        prefill_s=prefill.seconds, prefill_tokens_per_second=prefill.tokens_per_second,
        bound=max(terms, key=lambda name: terms[name]),
    )  # fmt: skip


def _terms(r: Roofline) -> tuple[float, float, float, float, float]:
    """Reading memory, operations, collectives, the host, and what goes between stages, each summed over the stages."""
    s = r.stages
    return (
        sum(t.memory_s for t in s), sum(t.compute_s for t in s), sum(t.collectives_s for t in s),
        sum(t.host_s for t in s), sum(t.transfer_s for t in s),
    )  # fmt: skip


def write_csv(rows: Iterable[SweepRow], path: str | os.PathLike[str]) -> None:
    """Writes rows as CSV, with the fields of `SweepRow` as the head."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(SweepRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
