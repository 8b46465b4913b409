# SPDX-License-Identifier: Apache-2.0
"""Weights as they lie in memory: the file's own ggml blocks, a GPU's records of planes, or behind handles of a host."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import Array, Float, Int

from ktx_jax.gguf.blocks import dequantize
from pallas_kernels.formats import format_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class QuantizedArray:
    """Raw ggml blocks `[*lead, nb, type_size]` (uint8) standing for an array `[*lead, nb * block_size]`.

    A pytree with one leaf, `data`; the type is static. The logical shape follows from the leaf's, so the same
    object is right for a whole weight, for one device's shard inside `shard_map`, and for an abstract leaf.
    The leaf is not checked: JAX puts shapes, shardings and placeholders there.
    """

    data: Any  # UInt8[Array, "*lead nb ts"], or whatever JAX puts in a leaf's place
    ggml_type: GGMLQuantizationType = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape: that of the dequantized array."""
        *lead, nb, _ = self.data.shape
        return (*lead, nb * GGML_QUANT_SIZES[self.ggml_type][0])

    @property
    def ndim(self) -> int:
        """The number of logical axes."""
        return len(self.data.shape) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return self.data.size * self.data.dtype.itemsize

    def take(self, indices: Int[Array, "*n"]) -> "QuantizedArray":
        """Gathers along the first axis (embedding rows, experts of a stack): `[*n, *shape[1:]]`, quantized.

        `indices` must be in bounds; others give zero blocks.
        """
        if self.ndim < 2:
            raise ValueError(f"take gathers whole rows: a quantized array of shape {self.shape} has none")
        return QuantizedArray(jnp.take(self.data, indices, axis=0, mode="fill", fill_value=0), self.ggml_type)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*lead K"]:
        """The values, computed in float32 and then cast; bit-equal to gguf-py's in float32."""
        return dequantize(self.data, self.ggml_type, dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PlanesArray:
    """A quantized weight `[*lead, N, K]` in the layout of the GPU kernels (`pallas_kernels.formats`).

    A pytree with one leaf, the int32 records `[*lead, N/64, K/depth, rows, 64]`: its first axes are cut as the logical
    ones are. The logical shape follows from the leaf's, as that of a `QuantizedArray` does.
    """

    records: Any  # Int32[Array, "*lead n k rows 64"], or whatever JAX puts in a leaf's place
    ggml_type: GGMLQuantizationType = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape: that of the dequantized array."""
        return format_of(self.ggml_type.name).weight_shape(tuple(self.records.shape))

    @property
    def ndim(self) -> int:
        """The number of logical axes."""
        return len(self.records.shape) - 2

    @property
    def nbytes(self) -> int:
        """Bytes of the records."""
        return self.records.size * self.records.dtype.itemsize


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class HostArray:
    """A quantized weight in host memory, in the layout of the CPU kernels, behind handles of `ktx_ffi.Weights`.

    A pytree with one leaf: uint32 handles, one for each shard, in a grid with as many axes as the weight. The handles
    are data, so compiled programs do not depend on them; a shard's logical shape and type are static. Whoever makes
    one keeps the `Weights` alive.

    Attributes:
      precise: whether activations become fifteen bits in place of eight, for twice the arithmetic.
    """

    handles: Any  # UInt32[Array, "*grid"]
    shard_shape: tuple[int, ...] = field(metadata={"static": True})
    ggml_type: GGMLQuantizationType = field(metadata={"static": True})
    precise: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape of all shards together."""
        return tuple(n * size for n, size in zip(self.handles.shape, self.shard_shape, strict=True))

    @property
    def ndim(self) -> int:
        """The number of logical axes."""
        return len(self.shard_shape)
