# SPDX-License-Identifier: Apache-2.0
"""Activations cut over the axes of a mesh, inside `jax.shard_map`.

`Axes` names the mesh axes that cut one dimension, major first; () where it is whole, as all are outside a mesh: then
nothing here does anything.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

Axes: TypeAlias = tuple[str, ...]


def recut(x: Shaped[Array, "*lead n"], have: Axes, want: Axes) -> Shaped[Array, "*lead m"]:
    """The part of x that this device has when its last dimension is cut over `want`, from the part over `have`."""
    if have == want:
        return x
    if have:
        x = jax.lax.all_gather(x, have, axis=x.ndim - 1, tiled=True)
    if not want:
        return x
    size = part_of(x.shape[-1], want)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(want) * size, size, axis=x.ndim - 1)


def add_up(x: Shaped[Array, "..."], axes: Axes) -> Shaped[Array, "..."]:
    """The sum of every device's x along `axes`."""
    return jax.lax.psum(x, axes) if axes else x


def part_of(size: int, axes: Axes) -> int:
    """A device's part of `size` entries."""
    return size // jax.lax.axis_size(axes) if axes else size


def first_index(size: int, axes: Axes) -> Int[Array, ""] | int:
    """Where this device's part of `size` entries begins in the whole."""
    return jax.lax.axis_index(axes) * size if axes else 0


def offset_in_block(size: int, block: int, axes: Axes) -> Int[Array, ""] | int:
    """Where this device's part of `size` values begins in the first of the whole blocks that hold it.

    A weight cut inside a block keeps every block that its part touches (see `sharding.granules`).
    """
    return first_index(size, axes) % block


def into_blocks(x: Shaped[Array, "*lead k"], width: int, offset: Int[Array, ""] | int) -> Shaped[Array, "*lead width"]:
    """x at `offset` among the `width` inputs of a cut weight's whole blocks, zeros around it."""
    if x.shape[-1] == width:
        return x
    room = jnp.zeros((*x.shape[:-1], width), x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(room, x, offset, axis=x.ndim - 1)


def out_of_blocks(
    x: Shaped[Array, "*lead width"], size: int, offset: Int[Array, ""] | int
) -> Shaped[Array, "*lead size"]:
    """The inverse of `into_blocks`."""
    if x.shape[-1] == size:
        return x
    return jax.lax.dynamic_slice_in_dim(x, offset, size, axis=x.ndim - 1)
