# SPDX-License-Identifier: Apache-2.0
"""Which of the parameters they are asked to the GPU kernels take, what computes with the others, and all bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ktx_jax.model.config import Config
from ktx_jax.sharding.choices import Ops
from ktx_jax.sharding.folding import fold_paths
from ktx_jax.sharding.gpu_kernels import (
    PALLAS,
    XLA,
    KernelLayout,
    attention_obstacle,
    experts_obstacle,
    float32_obstacle,
    has_kernel,
    kernel_layout,
    stays_float32,
)
from ktx_jax.sharding.granules import stored_bytes
from ktx_jax.sharding.parameters import Parameter

_EXPERTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Wanted:
    """A parameter, into how many parts each dimension is cut, what is asked to compute with it, and where it goes for
    long prompts."""

    parameter: Parameter
    cuts: tuple[int, ...]
    ops: Ops
    prefill_device: str | None

    @property
    def asks(self) -> bool:
        return PALLAS in (self.ops.prefill, self.ops.decode)

    def layout(self, config: Config) -> KernelLayout:
        p = self.parameter
        return kernel_layout(p.path, p.shape, p.stored_type, self.cuts, k_b_transposed=config.k_b_transposed)


class Settled(NamedTuple):
    """What computes with a parameter, the bytes of a piece, and those of one that is streamed."""

    ops: Ops
    nbytes: int
    streamed: int


def settle(wanted: Mapping[str, Wanted], config: Config) -> tuple[dict[str, Settled], tuple[str, ...]]:
    """What computes with each parameter: where `pallas` was to, but cannot, XLA does. Also what to say of that."""
    obstacles: dict[str, str] = {}
    for path, want in wanted.items():
        if want.asks and has_kernel(path):
            obstacle = _obstacle(path, wanted, config)
            if obstacle is not None:
                obstacles[path] = obstacle
    settled = {}
    for path, want in wanted.items():
        ops = want.ops
        if path in obstacles or not has_kernel(path):
            ops = Ops(*(XLA if op == PALLAS else op for op in (ops.prefill, ops.decode)))
        settled[path] = _with_bytes(want, ops, config)
    taken = [want for path, want in wanted.items() if PALLAS in (settled[path].ops.prefill, settled[path].ops.decode)]
    packed = [want for want in taken if not stays_float32(want.parameter.path, want.parameter.shape)]
    return settled, (*_left_notices(obstacles), *_attention_notice(taken, config), *_type_notices(packed, config))


def _obstacle(path: str, wanted: Mapping[str, Wanted], config: Config) -> str | None:
    """Why the kernels cannot compute with a parameter, or None; a layer's experts are computed together."""
    parameter = wanted[path].parameter
    if stays_float32(path, parameter.shape):
        return float32_obstacle(path, parameter.shape)
    if not parameter.is_expert:
        return wanted[path].layout(config).obstacle
    parent = path.rpartition(".")[0]
    return experts_obstacle(wanted[f"{parent}.{name}"].layout(config) for name in _EXPERTS)


def _with_bytes(want: Wanted, ops: Ops, config: Config) -> Settled:
    p = want.parameter
    one_form = stays_float32(p.path, p.shape)

    def nbytes(op: str | None) -> int:
        if op == PALLAS and not one_form:
            return want.layout(config).piece_bytes
        return stored_bytes(p.shape, p.stored_type, want.cuts)

    if want.prefill_device is not None:
        return Settled(ops, nbytes(ops.decode), nbytes(ops.prefill))
    both = (ops.decode, ops.prefill)
    forms = set(both) if PALLAS in both and not one_form else {ops.decode}
    return Settled(ops, sum(map(nbytes, forms)), 0)


def _left_notices(obstacles: Mapping[str, str]) -> list[str]:
    paths: dict[str, list[str]] = {}
    for path, obstacle in obstacles.items():
        paths.setdefault(obstacle, []).append(path)
    return [f"XLA computes with {', '.join(fold_paths(some))}: {why}" for why, some in paths.items()]


def _attention_notice(taken: list[Wanted], config: Config) -> list[str]:
    obstacle = attention_obstacle(config)
    if obstacle is None or not any(want.parameter.kind == "self_attn.o_proj" for want in taken):
        return []
    return [f"XLA computes the attention itself: {obstacle}"]


def _type_notices(taken: list[Wanted], config: Config) -> list[str]:
    """Of types that have no layout on GPUs."""
    changed: dict[tuple[str, str], list[Wanted]] = {}
    for want in taken:
        stored, now = want.parameter.stored_type, want.layout(config).ggml_type
        if stored != now:
            changed.setdefault((stored.name, now.name), []).append(want)
    notices = []
    for (stored, now), some in changed.items():
        before = sum(stored_bytes(w.parameter.shape, w.parameter.stored_type, w.cuts) for w in some)
        after = sum(w.layout(config).piece_bytes for w in some)
        names = ", ".join(fold_paths(w.parameter.path for w in some))
        notices.append(f"{stored} becomes {now} for 'pallas', {after / before:.1f} times the bytes: {names}")
    return notices
