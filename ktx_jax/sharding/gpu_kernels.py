# SPDX-License-Identifier: Apache-2.0
"""What the GPU kernels (`pallas`) can run on and compute with, and how a weight lies in memory for them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ktx_jax.model.config import Config
from ktx_jax.sharding.choices import Spec
from ktx_jax.sharding.granules import GRANULES, touched_blocks
from pallas_kernels.formats import FORMATS, LEAST_ROWS, ROWS, Format, format_of
from pallas_kernels.heuristics import MOST_EXPERTS, THREADS

_T = GGMLQuantizationType

PALLAS, XLA = "pallas", "xla"
_LATENT = (512, 64)  # cached values and rotated ones that the attention kernel is made for
_DENSE = (_T.F16, _T.F32)


def why_not_on(capability: str | None) -> str | None:
    """Why the kernels cannot run on a GPU, or None: they are written in Hopper's instructions.

    Args:
      capability: CUDA compute capability, "9.0" or "9.0a"; None for what has none.
    """
    if capability is not None and capability.rstrip("a") == "9.0":
        return None
    found = "another maker's" if capability is None else capability
    return f"the GPU kernels are for Hopper, compute capability 9.0, and this is {found}"


def why_not_in(dtype: str) -> str | None:
    """Why the kernels cannot compute in a number type, or None."""
    return None if dtype == "bfloat16" else f"the GPU kernels compute in bfloat16, not in {dtype}"


def default_implementation(capability: str | None, dtype: str) -> str:
    """What computes on a GPU where nothing is said."""
    return PALLAS if why_not_on(capability) is None and why_not_in(dtype) is None else XLA


def kernel_type(kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type in the kernels' memory of a weight of stored type `kind`.

    Dense ones become bfloat16, as the XLA path rounds them beside bfloat16 activations; other types without a layout
    become Q8_0, IQ4_NL exactly.
    """
    if kind.name in FORMATS:
        return kind
    return _T.BF16 if kind in _DENSE else _T.Q8_0


def has_kernel(path: str) -> bool:
    """Whether there is a kernel for what a parameter does: all but rows that are looked up."""
    return not path.endswith("embed_tokens")


def stays_float32(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter lies in memory as it does for XLA: norms, and routers, whose product is XLA's."""
    return len(shape) == 1 or path.endswith(".mlp.gate")


def float32_obstacle(path: str, shape: tuple[int, ...]) -> str | None:
    """Why the kernels cannot compute with a parameter that `stays_float32`, or None."""
    if len(shape) == 1:
        return (
            f"the kernel of norms takes rows in {THREADS}s, and they are of {shape[0]}" if shape[0] % THREADS else None
        )
    count = shape[0]
    if count > MOST_EXPERTS:
        return f"the router's kernel chooses among up to {MOST_EXPERTS} experts, and there are {count}"
    return None


@dataclass(frozen=True)
class KernelLayout:
    """A weight as the kernels read it.

    Attributes:
      shape: logical; ggml_type: in memory.
      cuts: into how many parts each dimension is cut.
      turned: whether its last two dimensions are swapped against the file's. A k_b that the file has the other way is,
        as bfloat16: blocks cannot be.
    """

    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    cuts: tuple[int, ...]
    turned: bool

    @property
    def format(self) -> Format:
        return format_of(self.ggml_type.name)

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Of a part, columns filled up to whole records where they are cut."""
        *rows, _ = (size // parts for size, parts in zip(self.shape, self.cuts, strict=True))
        block = GGML_QUANT_SIZES[self.ggml_type][0]
        columns = touched_blocks(self.shape[-1], self.ggml_type, self.cuts[-1]) * block
        if self.cuts[-1] > 1:
            columns = -(-columns // self.format.depth) * self.format.depth
        return (*rows, columns)

    @property
    def piece_bytes(self) -> int:
        *lead, rows, columns = self.piece_shape
        return math.prod(lead) * rows // ROWS * (columns // self.format.depth) * self.format.bytes

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Of the array of all parts' records."""
        *_, n, k = self.piece_shape
        return self.format.record_shape((*self.shape[:-2], n * self.cuts[-2], k * self.cuts[-1]))

    @property
    def obstacle(self) -> str | None:
        """Why the kernels cannot compute with such a part, or None."""
        rows, columns = self.piece_shape[-2:]
        piece = " of a piece" if max(self.cuts) > 1 else ""
        if rows < LEAST_ROWS:
            return f"the kernels take {LEAST_ROWS} rows and more, and there are {rows}{piece}"
        if rows % ROWS:
            return f"the kernels take rows in {ROWS}s, and there are {rows}{piece}"
        if columns % self.format.depth:
            return f"the kernels take columns of {self.ggml_type.name} in {self.format.depth}s, and there are {columns}"
        granule, size = GRANULES[self.ggml_type], self.shape[-1] // self.cuts[-1]
        if self.cuts[-1] > 1 and size % granule:
            return f"{self.ggml_type.name}, which they become, can be cut every {granule} columns, not every {size}"
        return None


def kernel_layout(
    path: str, shape: tuple[int, ...], stored: GGMLQuantizationType, cuts: tuple[int, ...], *, k_b_transposed: bool
) -> KernelLayout:
    """How a parameter of logical `shape` and type `stored` lies for the kernels.

    Args:
      k_b_transposed: whether the file holds k_b the way the kernels read it.
    """
    if path.endswith(".k_b_proj") and not k_b_transposed:
        return KernelLayout((shape[0], shape[2], shape[1]), _T.BF16, (cuts[0], cuts[2], cuts[1]), turned=True)
    return KernelLayout(shape, kernel_type(stored), cuts, turned=False)


def attention_obstacle(config: Config) -> str | None:
    """Why the attention kernel cannot run a model, or None."""
    sizes = (config.kv_lora_rank, config.qk_rope_head_dim)
    if sizes == _LATENT:
        return None
    return f"the kernel takes latents of {_LATENT[0]} + {_LATENT[1]} values, and the model has {sizes[0]} + {sizes[1]}"


def experts_obstacle(layouts: Iterable[KernelLayout]) -> str | None:
    """Why the kernel of experts cannot run a layer, or None, from the layouts of gate, up and down."""
    gate, up, down = layouts
    if gate.ggml_type != up.ggml_type:
        return f"the kernel takes gate and up of one type, and they are {gate.ggml_type.name} and {up.ggml_type.name}"
    return next(filter(None, (w.obstacle for w in (gate, up, down))), None)


def turned_spec(spec: Spec) -> Spec:
    """The spec of a weight whose last two dimensions are swapped."""
    return (*spec[:-2], spec[-1], spec[-2])
