# SPDX-License-Identifier: Apache-2.0
"""What a plan's steps cost, as text and as JSON: the estimate, and what the compiler says."""

import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from ktx_jax.aot.compile import Compilation, CompiledStep
from ktx_jax.aot.exchanges import Exchange, exchanges
from ktx_jax.aot.hlo import MOSAIC
from ktx_jax.sharding.memory import show_bytes
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.roofline import Roofline

_WIDTH = 160
_SHOWN = 3  # places of alike collectives that are named


def roofline_text(rooflines: Sequence[tuple[Roofline, Roofline]]) -> str:
    """A row for each stage of each kind of step, with every term.

    Args:
      rooflines: of each kind a lone step, and steps in flight.
    """
    table = _table("step", "stage")
    for name in ("weights", "cache", "Gop", "exchanged", "memory", "compute", "exchange", "host", "pass on", "sum"):
        table.add_column(name, justify="right")
    for lone, _ in rooflines:
        for index, s in enumerate(lone.stages):
            times = (s.memory_s, s.compute_s, s.collectives_s, s.host_s, s.transfer_s, s.seconds)
            table.add_row(
                lone.size.phase, str(index), show_bytes(s.weight_bytes), show_bytes(s.cache_bytes),
                f"{s.operations / 1e9:.1f}", show_bytes(s.collective_bytes), *map(_ms, times),
            )  # fmt: skip
    lines = [_speed(lone, flowing) for lone, flowing in rooflines]
    return "Roofline, the least time of a step (bytes and operations of the busiest device):\n" + _text(table, lines)


def _speed(lone: Roofline, flowing: Roofline) -> str:
    at = f" at {lone.size.cached} cached positions" if lone.size.phase == "decode" else " of a prompt"
    said = f"{lone.size.phase}: {lone.tokens} tokens{at} in {_ms(lone.seconds)}, {lone.tokens_per_second:.0f} tokens/s"
    if flowing.in_flight > 1:
        said += f"; {flowing.tokens_per_second:.0f} with {flowing.in_flight} steps of {flowing.tokens} in flight"
    return said


def roofline_json(lone: Roofline, flowing: Roofline) -> dict[str, Any]:
    """All terms, in seconds, bytes and operations."""
    return {
        "tokens": lone.tokens,
        "cached": lone.size.cached,
        "seconds": lone.seconds,
        "tokens_per_second": lone.tokens_per_second,
        "in_flight": flowing.in_flight,
        "in_flight_tokens_per_second": flowing.tokens_per_second,
        "stages": [asdict(stage) | {"seconds": stage.seconds} for stage in lone.stages],
    }


def compiled_text(plan: Plan, made: Compilation) -> str:
    """The programs' bytes beside the plan's, the kernels they start (and how many are `pallas_kernels`'), and their
    collectives beside the predicted ones."""
    programs = _table("step", "stage")
    for name in ("arguments", "planned", "temporaries", "planned", "results", "launches", "of ours", "compiled in"):
        programs.add_column(name, justify="right")
    collectives = _table("step", "stage", "collective")
    for name in ("devices", "bytes", "predicted", "compiled"):
        collectives.add_column(name, justify="right")
    collectives.add_column("of", overflow="ellipsis", no_wrap=True)
    notes = []
    for step in made.steps:
        if step.error is not None:
            notes.append(f"error: stage {step.stage} does not compile for {step.phase}: {step.error}")
            continue
        need = _planned(plan, step)
        sizes = (step.arguments, need["arguments"], step.temporaries, need["temporaries"], step.results)
        launches = (str(step.launches()), str(step.launches(MOSAIC)))
        programs.add_row(step.phase, str(step.stage), *map(show_bytes, sizes), *launches, f"{step.seconds:.1f} s")
        for e in _exchanges(plan, made, step):
            mark = " !" if e.surprising else ""
            count = f"{e.compiled}{' in an unknown loop' if e.unbounded else ''}{mark}"
            row = (e.kind, str(e.devices), show_bytes(e.nbytes), str(e.predicted), count, _places(e.where))
            collectives.add_row(step.phase, str(step.stage), *row)
    layers = plan.config.num_hidden_layers
    which = f"{made.layers} of {layers} layers, which stand for all" if made.layers < layers else f"{layers} layers"
    said = f"{which}; {made.seconds:.0f} s, {show_bytes(made.peak_memory)} of memory"
    parts = [f"Compiled by XLA: {said}\n", _text(programs, notes)]
    if collectives.row_count:
        parts.append("\n" + _text(collectives, []))
    return "".join(parts)


def compiled_json(plan: Plan, made: Compilation) -> dict[str, Any]:
    """Everything that the compiler said, bytes of a device."""
    return {
        "layers": made.layers,
        "seconds": made.seconds,
        "peak_memory": made.peak_memory,
        "steps": [_step_json(plan, made, step) for step in made.steps],
    }


def _step_json(plan: Plan, made: Compilation, step: CompiledStep) -> dict[str, Any]:
    if step.error is not None:
        return {"phase": step.phase, "stage": step.stage, "error": step.error}
    return {
        "phase": step.phase,
        "stage": step.stage,
        "error": None,
        "arguments": step.arguments,
        "temporaries": step.temporaries,
        "results": step.results,
        "planned": _planned(plan, step),
        "seconds": step.seconds,
        "launches": step.launches(),
        "launches_of_ours": step.launches(MOSAIC),
        "collectives": [asdict(e) for e in _exchanges(plan, made, step)],
    }


def _planned(plan: Plan, step: CompiledStep) -> dict[str, int]:
    need = plan.needs[plan.stages[step.stage].devices[0]]
    return {"arguments": need.weights + need.cache, "temporaries": need.workspace}


def _exchanges(plan: Plan, made: Compilation, step: CompiledStep) -> list[Exchange]:
    size = next(size for size in made.sizes if size.phase == step.phase)
    return exchanges(plan, size, step)


def _places(names: tuple[str, ...]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def _text(table: Table, lines: Sequence[str]) -> str:
    console = Console(file=io.StringIO(), width=_WIDTH, highlight=False)
    console.print(table)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())
