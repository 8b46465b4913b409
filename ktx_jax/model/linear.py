# SPDX-License-Identifier: Apache-2.0
"""Modules of one weight, which a mesh may cut: products, norms and the embedding.

Letters as in `ktx_jax.model.modules`. On a mesh they run inside `jax.shard_map`: a weight is this device's part of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ktx_jax import ops
from ktx_jax.ops.parallel import Axes, add_up, first_index, into_blocks, offset_in_block, out_of_blocks, part_of, recut

_INIT_STD = 0.02


class Cut(nnx.Module):
    """A module with one weight, which a mesh may cut.

    Attributes:
      cut: for each dimension of the weight the mesh axes that cut it; set when the model is loaded.
    """

    cut: tuple[Axes, ...]

    def __init__(self, weight: jax.Array):
        self.weight = nnx.Param(weight)
        self.cut = ((),) * weight.ndim


class Linear(Cut):
    """A weight `[out, in]`, or a stack of such."""

    def __init__(self, *shape: int, rngs: nnx.Rngs):
        super().__init__(jax.random.normal(rngs.params(), shape) * _INIT_STD)

    def __call__(
        self, x: Float[Array, "T K"], have: Axes = (), want: Axes = (), *, dtype: Any = None
    ) -> Float[Array, "T N"]:
        """x · weightᵀ; `have` and `want` are the cuts of the last dimensions of x and of the result."""
        y = add_up(self.partial(x, have, dtype=dtype), self.cut[1])
        return recut(y, self.cut[0], want)

    def partial(self, x: jax.Array, have: Axes = (), *, dtype: Any = None) -> jax.Array:
        """What this device adds to the product: to be summed over `cut[1]`, its last dimension cut over `cut[0]`."""
        weight, axes = self.weight.get_value(), self.cut[1]
        x = recut(x, have, axes)
        x = into_blocks(x, weight.shape[1], offset_in_block(x.shape[-1], ops.block_size(weight), axes))
        return ops.matmul(x, weight, dtype=dtype)


class HeadLinear(Cut):
    """A weight `[H, out, in]`, or `[H, in, out]` where `transposed`, for rows' first columns; only heads are cut."""

    def __init__(self, heads: int, out: int, size: int, *, transposed: bool = False, rngs: nnx.Rngs):
        shape = (heads, size, out) if transposed else (heads, out, size)
        super().__init__(jax.random.normal(rngs.params(), shape) * _INIT_STD)
        self.transposed = transposed

    def __call__(self, x: Float[Array, "T H columns"]) -> Float[Array, "T H N"]:
        return ops.head_matmul(x, self.weight.get_value(), transposed=self.transposed)


class RMSNorm(Cut):
    def __init__(self, size: int, eps: float):
        super().__init__(jnp.ones(size))
        self.eps = eps
        self.implementation = "xla"

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        return ops.rms_norm(x, self.whole, self.eps, implementation=self.implementation)

    def of_sum(self, x: Float[Array, "T D"], y: Float[Array, "T D"]) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
        """x + y, and its norm."""
        if self.implementation == "pallas":
            return ops.add_rms_norm(x, y, self.whole, self.eps)
        return x + y, self(x + y)

    @property
    def whole(self) -> Float[Array, " D"]:
        """The weight, from all devices' parts of it."""
        return recut(self.weight.get_value(), self.cut[0], ())


class Embedding(Linear):
    """The embedding `[V, D]`, and where there is no other, the head."""

    method = "rows"

    def __init__(self, vocab: int, size: int, rngs: nnx.Rngs):
        super().__init__(vocab, size, rngs=rngs)
        self.size = size

    def rows(self, tokens: Int[Array, " T"], dtype: Any) -> Float[Array, "T D"]:
        """The rows of `tokens`; a device looks up those that it has."""
        weight, (by_row, by_value) = self.weight.get_value(), self.cut
        count, part = weight.shape[0], part_of(self.size, by_value)
        at = tokens - first_index(count, by_row)
        found = ops.embedding_rows(weight, jnp.clip(at, 0, count - 1), dtype)
        if by_row:
            found = add_up(jnp.where(((at >= 0) & (at < count))[:, None], found, 0), by_row)
        found = out_of_blocks(found, part, offset_in_block(part, ops.block_size(weight), by_value))
        return recut(found, by_value, ())
