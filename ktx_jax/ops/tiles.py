# SPDX-License-Identifier: Apache-2.0
"""A sequential map whose result takes memory only while it is needed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def map_tiles(f: Callable[[Any], Any], operands: Any, *, after: jax.Array) -> Any:
    """Stacks f of each slice (along the first axis of every leaf of `operands`), leaf by leaf, one after another.

    `lax.map` would start from zeros, which depend on nothing: XLA's CPU scheduler then makes those of every layer at
    the start of the step and keeps them all. Here the result starts as copies of a value of `after`, and so not before
    `after` is there. Every one of them is overwritten.
    """
    count = jax.tree.leaves(operands)[0].shape[0]

    def at(i: Any) -> Any:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), operands)

    def room(tile: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.broadcast_to(after[(0,) * after.ndim].astype(tile.dtype), (count, *tile.shape))

    def step(i: jax.Array, out: Any) -> Any:
        return jax.tree.map(lambda all_tiles, tile: all_tiles.at[i].set(tile), out, f(at(i)))

    return jax.lax.fori_loop(0, count, step, jax.tree.map(room, jax.eval_shape(lambda: f(at(0)))))
