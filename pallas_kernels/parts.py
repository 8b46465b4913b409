# SPDX-License-Identifier: Apache-2.0
"""Products whose sum over ranges of K is left to the kernel that reads them.

`decode_matmul` gives parts. Their sum is an array like any other to whoever asks for one; a kernel that reads it row by
row looks here for the parts it was made of, and adds them up itself. XLA then has no use for the sum and drops it, and
with it a kernel. That is known of the very array only: of what was made of it, and in another trace, it is not.
"""

import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32

from pallas_kernels import mosaic
from pallas_kernels.mosaic import Ref


class _Known(NamedTuple):
    total: weakref.ref
    parts: jax.Array


_known: dict[int, _Known] = {}


def total_of(parts: Float32[Array, "splits T N"]) -> BFloat16[Array, "T N"]:
    """The sum of the parts in order, bfloat16; `as_parts` of it gives them back."""
    total = parts.sum(0).astype(jnp.bfloat16)
    key = id(total)
    _known[key] = _Known(weakref.ref(total, lambda _: _known.pop(key, None)), parts)
    return total


def as_parts(x: BFloat16[Array, "T N"]) -> BFloat16[Array, "1 T N"] | Float32[Array, "splits T N"]:
    """The parts that x is the sum of, or x as the only one."""
    known = _known.get(id(x))
    return known.parts if known is not None and known.total() is x else x[None]


def row_total(parts_g: Ref, row: jax.Array | int, columns: slice, interpret: bool) -> jax.Array:
    """Inside a kernel: the sum of a row's parts in order, rounded to bfloat16, in float32, spread over a warpgroup."""
    size = columns.stop - columns.start
    total = None
    for split in range(parts_g.shape[0]):
        part = mosaic.load(parts_g.at[split, row, columns], mosaic.spread(size), interpret).astype(jnp.float32)
        total = part if total is None else total + part
    assert total is not None
    return total.astype(jnp.bfloat16).astype(jnp.float32)
