# SPDX-License-Identifier: Apache-2.0
"""Gated MLPs: one, and a routed stack of them (DeepSeekMoE, arXiv:2401.06066)."""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import ktx_ffi
from jaxtyping import Array, Float, Int

from ktx_jax.ops.matmul import Weight, matmul
from ktx_jax.ops.parallel import into_blocks
from ktx_jax.ops.tiles import map_tiles
from ktx_jax.quantized import HostArray, PlanesArray, QuantizedArray

Offset: TypeAlias = Int[Array, ""] | int


def swiglu(
    x: Float[Array, "T D"], gate: Weight, up: Weight, down: Weight, *, offset: Offset = 0
) -> Float[Array, "T D"]:
    """down · (silu(gate · x) * (up · x)), for weights `[F, D]`, `[F, D]` and `[D, F]`.

    `down` may be wider than F where it has been cut inside a block: the F values then lie at `offset` in its inputs.
    """
    if isinstance(gate, HostArray) and isinstance(up, HostArray) and isinstance(down, HostArray):
        handles = (gate.handles, up.handles, down.handles)
        placed = None if down.shape[1] == gate.shape[0] else offset
        return ktx_ffi.mlp(x, *handles, offset=placed, precise=down.precise)
    hidden = jax.nn.silu(matmul(x, gate)) * matmul(x, up)
    return matmul(into_blocks(hidden, down.shape[1], offset), down)


class _Tiles(NamedTuple):
    """Token-expert pairs sorted by expert and cut into tiles of `rows` pairs of one expert each."""

    expert: jax.Array  # [n] the expert of a tile
    pair: jax.Array  # [n, rows] index into the flat pairs; out of range where the tile is not full
    place: jax.Array  # [T * k] the row, in the tiles laid end to end, that holds a pair; out of range for id -1


def _tiles(ids: jax.Array, experts: int) -> _Tiles:
    pairs = ids.size
    rows = 8
    while rows < 64 and rows * experts < pairs:
        rows *= 2
    n = min(pairs, experts + pairs // rows)
    flat = ids.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < experts), flat, experts)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=experts)
    first_pair = jnp.cumsum(counts) - counts
    last_tile = jnp.cumsum(-(-counts // rows))
    first_tile = last_tile - -(-counts // rows)
    tile = jnp.arange(n)
    expert = jnp.searchsorted(last_tile, tile, side="right")
    owner = jnp.minimum(expert, experts - 1)
    at = (tile - first_tile[owner])[:, None] * rows + jnp.arange(rows)
    filled = (at < counts[owner][:, None]) & (expert < experts)[:, None]
    pair = jnp.where(filled, order[jnp.minimum(first_pair[owner][:, None] + at, pairs - 1)], pairs)
    place = jnp.full(pairs, n * rows).at[pair.reshape(-1)].set(jnp.arange(n * rows), mode="drop")
    return _Tiles(expert, pair, place)


def _expert(w: Weight, index: jax.Array) -> Weight:
    if isinstance(w, QuantizedArray):
        return QuantizedArray(jax.lax.dynamic_index_in_dim(w.data, index, keepdims=False), w.ggml_type)
    return jax.lax.dynamic_index_in_dim(w, index, keepdims=False)


def experts(
    x: Float[Array, "T D"],
    ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate: Weight,
    up: Weight,
    down: Weight,
    *,
    offset: Offset = 0,
) -> Float[Array, "T D"]:
    """Sum over each token's k experts of weight times that expert's gated MLP.

    Only the experts that some token chose are dequantized, once a tile of tokens. A token's sum runs over its k slots
    in order, whatever the other tokens chose. An id outside 0..E-1 (padding) contributes nothing.

    Args:
      gate, up: `[E, F, D]`; down: `[E, D, F]`. Dense ones (as in training) go through every expert at once.
      offset: as in `swiglu`.
    """
    if isinstance(gate, HostArray) and isinstance(up, HostArray) and isinstance(down, HostArray):
        handles = (gate.handles, up.handles, down.handles)
        placed = None if down.shape[2] == gate.shape[1] else offset
        return ktx_ffi.experts(x, ids, weights, *handles, offset=placed, precise=down.precise)
    if isinstance(gate, jax.Array) and isinstance(up, jax.Array) and isinstance(down, jax.Array):
        return _all_experts(x, ids, weights, gate, up, down)
    if isinstance(gate, PlanesArray) and isinstance(up, PlanesArray) and isinstance(down, PlanesArray):
        return _on_planes(x, ids, weights, gate, up, down)
    tiles = _tiles(ids, gate.shape[0])
    k, (tokens, width) = ids.shape[1], x.shape

    @jax.checkpoint
    def one_tile(expert: jax.Array, pair: jax.Array) -> jax.Array:
        # An unfilled row reads a token that is there; `place` never points at what it gives.
        rows = x[jnp.minimum(pair // k, tokens - 1)]
        return swiglu(rows, _expert(gate, expert), _expert(up, expert), _expert(down, expert), offset=offset)

    def step(tile: tuple[jax.Array, jax.Array]) -> jax.Array:
        expert, pair = tile
        empty = jnp.zeros((pair.size, width), x.dtype)
        return jax.lax.cond(expert < gate.shape[0], one_tile, lambda *_: empty, expert, pair)

    rows = map_tiles(step, (tiles.expert, tiles.pair), after=x)
    by_pair = jnp.take(rows.reshape(-1, width), tiles.place, axis=0, mode="fill", fill_value=0)
    by_slot = by_pair.reshape(tokens, k, width).astype(jnp.float32)
    return jnp.einsum("tk,tkd->td", weights.astype(jnp.float32), by_slot, precision="highest").astype(x.dtype)


def _on_planes(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate: PlanesArray, up: PlanesArray, down: PlanesArray
) -> jax.Array:
    """The GPU kernels' form (imported here: it takes a second)."""
    from pallas_kernels.grouped_matmul import grouped_mlp

    if gate.ggml_type != up.ggml_type:
        raise NotImplementedError(
            f"the GPU kernel of experts takes gate, up of one type, not {gate.ggml_type.name} and {up.ggml_type.name}"
        )
    names = (gate.ggml_type.name, down.ggml_type.name)
    return grouped_mlp(x, ids, weights, gate.records, up.records, down.records, names).astype(x.dtype)


def _all_experts(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
) -> jax.Array:
    """Every expert on every token, masked: simple and differentiable, for the small models one trains here."""
    share = jnp.einsum("tk,tke->te", weights.astype(x.dtype), jax.nn.one_hot(ids, gate.shape[0], dtype=x.dtype))
    hidden = jax.nn.silu(jnp.einsum("td,efd->etf", x, gate)) * jnp.einsum("td,efd->etf", x, up)
    return jnp.einsum("etf,edf,te->td", hidden, down, share, optimize="optimal")
