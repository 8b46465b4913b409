# SPDX-License-Identifier: Apache-2.0
"""Chooses rules: layers over devices of unequal memory, and experts to the host where they do not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ktx_jax.errors import KtxError
from ktx_jax.model.config import Config
from ktx_jax.sharding.choices import Ops
from ktx_jax.sharding.folding import fold_numbers
from ktx_jax.sharding.gpu_kernels import XLA
from ktx_jax.sharding.granules import stored_bytes
from ktx_jax.sharding.kernel_ops import Wanted, settle
from ktx_jax.sharding.memory import cache_bytes, chunk_tokens, host_workspace_bytes, show_bytes, workspace_bytes
from ktx_jax.sharding.parameters import Inventory, Types, inventory
from ktx_jax.sharding.split import split_evenly
from ktx_jax.sharding.units import Unit, units
from ktx_jax.sharding.write_native import layers_pattern, native_text, rule, stages_line


@dataclass(frozen=True)
class Sizes:
    """What the cache is made for: tokens of a sequence, sequences, and the number type."""

    context: int = 4096
    batch: int = 8
    dtype: str = "bfloat16"


def choose_rules(
    config: Config,
    types: Types | str,
    memory: Sequence[int],
    sizes: Sizes,
    host_memory: int | None = None,
    *,
    implementation: str = XLA,
) -> str:
    """A native rule file that puts the model on accelerators of `memory` usable bytes each, in their order.

    Layers are split so that the fullest device is as empty as can be. If they do not fit, as few layers as possible
    leave their experts on the host, the last ones first.

    Args:
      implementation: what computes on the accelerators: weights of "pallas" have bytes of their own.

    Raises:
      KtxError: it does not fit even with all experts on the host, or the host's memory is too small for them.
    """
    whole = inventory(config, types)
    model, weights = units(whole), _weights(whole, implementation)
    if config.tie_word_embeddings:  # its head is its embedding, so it has one stage
        largest = max(range(len(memory)), key=memory.__getitem__)
        memory = [size if index == largest else 0 for index, size in enumerate(memory)]
    moe = [unit.layer for unit in model if unit.experts and unit.layer is not None]
    for count in range(len(moe) + 1):
        away = moe[len(moe) - count :]
        if (split := _split(config, model, weights, set(away), memory, sizes)) is not None:
            break
    else:
        least = sum(_unit_bytes(config, unit, weights, sizes, with_experts=False) for unit in model)
        raise KtxError(
            f"the model does not fit: even with all experts on the host it needs {show_bytes(least)} on the devices, "
            f"and {show_bytes(workspace(config, sizes))} on each to compute in; they have "
            f"{', '.join(map(show_bytes, memory))}. Shorten the context, take fewer sequences, or a smaller file"
        )
    _check_host(config, model, set(away), sizes, host_memory)
    return _write(model, split, away, memory, sizes)


def workspace(config: Config, sizes: Sizes) -> int:
    """Temporaries of a stage on one device."""
    return workspace_bytes(
        config, config.num_attention_heads, sizes.context, sizes.batch, config.vocab_size, chunk_tokens(False)
    )


def _weights(model: Inventory, implementation: str) -> dict[str, int]:
    """Bytes of each parameter on an accelerator."""
    ops = Ops(implementation, implementation)
    wanted = {p.path: Wanted(p, (1,) * len(p.shape), ops, None) for p in model.parameters}
    return {path: settled.nbytes for path, settled in settle(wanted, model.config)[0].items()}


def _unit_bytes(config: Config, unit: Unit, weights: Mapping[str, int], sizes: Sizes, with_experts: bool) -> int:
    mine = sum(weights[p.path] for p in (unit.parameters if with_experts else unit.main))
    layers = 0 if unit.layer is None else 1
    return mine + cache_bytes(config, layers, sizes.context, sizes.batch, sizes.dtype)


def _split(
    config: Config,
    model: list[Unit],
    weights: Mapping[str, int],
    away: set[int | None],
    memory: Sequence[int],
    sizes: Sizes,
) -> list[int] | None:
    # Norm and head belong together: one cost for both.
    costs = [_unit_bytes(config, unit, weights, sizes, unit.layer not in away) for unit in model]
    tail = sum(1 for unit in model[1:] if unit.layer is None)
    joined = [*costs[: len(costs) - tail], sum(costs[len(costs) - tail :])]
    counts = split_evenly(joined, [max(0, size - workspace(config, sizes)) for size in memory])
    if counts is None:
        return None
    last = max(index for index, count in enumerate(counts) if count)
    counts[last] += tail - 1
    return counts


def _check_host(config: Config, model: list[Unit], away: set[int], sizes: Sizes, host_memory: int | None) -> None:
    need = sum(stored_bytes(p.shape, p.stored_type) for unit in model if unit.layer in away for p in unit.experts)
    need += host_workspace_bytes(config, sizes.context, sizes.batch, chunk_tokens(False)) if away else 0
    if host_memory is not None and need > host_memory:
        raise KtxError(
            f"the model does not fit: the experts of layers {fold_numbers(away)} must lie on the host, which takes "
            f"{show_bytes(need)}; it has {show_bytes(host_memory)}"
        )


def _write(model: list[Unit], split: list[int], away: list[int], memory: Sequence[int], sizes: Sizes) -> str:
    comments = [
        f"Chosen for {', '.join(map(show_bytes, memory))}: "
        f"{sizes.batch} sequences of {sizes.context} tokens, cache in {sizes.dtype}.",
    ]
    rules = [rule(layers_pattern(away, r"mlp\.experts\..*"), device="cpu")] if away else []
    used = [index for index, count in enumerate(split) if count]
    at = 0
    for stage, index in enumerate(used):
        mine = model[at : at + split[index]]
        at += split[index]
        layers = [unit.layer for unit in mine if unit.layer is not None]
        others = [unit.path.replace(".", r"\.") for unit in mine if unit.layer is None]
        before = [path for path in others if path.endswith("embed_tokens")]
        parts = [*before, *([layers_pattern(layers)] if layers else []), *(p for p in others if p not in before)]
        rules.append(rule("|".join(parts), stage=stage))
    return native_text(comments, [stages_line([(f"gpu:{index}",) for index in used])], rules)
