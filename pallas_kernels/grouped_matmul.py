# SPDX-License-Identifier: Apache-2.0
"""A routed stack of gated MLPs over packed weights (DeepSeekMoE, arXiv:2401.06066), and its reference in plain XLA."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, Int32

from pallas_kernels.decode_matmul import decode_products
from pallas_kernels.formats import format_of
from pallas_kernels.groups import group_pairs
from pallas_kernels.heuristics import DECODE_ROWS, decode_rows, decode_tiles, group_rows, prefill_rows
from pallas_kernels.prefill_matmul import prefill_products
from pallas_kernels.quantized_matmul import row_tiles
from pallas_kernels.unpack import dequantize


def _silu(x: jax.Array) -> jax.Array:
    return x / (1.0 + jnp.exp(-x))


def _among(hidden: jax.Array, inputs: int, offset: Int[Array, ""] | int) -> jax.Array:
    """The hidden values at `offset` among `inputs` of them, zeros around."""
    if hidden.shape[-1] == inputs:
        return hidden
    room = jnp.zeros((*hidden.shape[:-1], inputs), hidden.dtype)
    return jax.lax.dynamic_update_slice_in_dim(room, hidden, offset, axis=2)


def grouped_mlp_reference(
    x: BFloat16[Array, "T D"],
    ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate: Int32[Array, "E f d rows 64"],
    up: Int32[Array, "E f d rows 64"],
    down: Int32[Array, "E d_ f_ rows_ 64"],
    names: tuple[str, str],
) -> Float[Array, "T D"]:
    """`grouped_mlp` with every expert dequantized and applied to every token, in float32 throughout."""
    wide = x.astype(jnp.float32)
    gate_x, up_x = (jnp.einsum("td,efd->tef", wide, dequantize(w, names[0]), precision="highest") for w in (gate, up))
    out = jnp.einsum("tef,edf->ted", _silu(gate_x) * up_x, dequantize(down, names[1]), precision="highest")
    share = jnp.einsum("tk,tke->te", weights, jax.nn.one_hot(ids, gate.shape[0]))
    return jnp.einsum("ted,te->td", out, share, precision="highest")


def gated_matmul(
    x: Float[Array, "T D"],
    gate: Int32[Array, "f d rows 64"],
    up: Int32[Array, "f d rows 64"],
    name: str,
    *,
    interpret: bool = False,
) -> BFloat16[Array, "T F"]:
    """silu(gate x) * (up x) of one MLP, as `grouped_mlp` has it of many: rows are read once for both weights.

    Args:
      gate, up: records of type `name` of `[F, D]`.
      interpret: run in JAX's CPU interpreter of Mosaic kernels.

    Raises `NotImplementedError` for rows that are not bfloat16, and types without records.
    """
    fmt = format_of(name)
    width, d = fmt.weight_shape(gate.shape)
    tokens = x.shape[0]
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"gated_matmul takes bfloat16 rows, not {x.dtype}")
    if x.shape[1] != d or up.shape != gate.shape:
        raise ValueError(f"rows {x.shape} and up {fmt.weight_shape(up.shape)} do not go with gate {(width, d)}")
    few = tokens <= DECODE_ROWS
    rows = decode_rows(tokens) if few else prefill_rows(tokens, 2)
    tiles = x[None] if few else row_tiles(x, rows)
    pair, matrix = (gate[None], up[None]), jnp.zeros(-(-tokens // rows), jnp.int32)
    hidden = _gated(tiles, pair, matrix, name, rows, interpret)
    return hidden.reshape(-1, width)[:tokens]


def _gated(
    x: BFloat16[Array, "groups R D"],
    pair: tuple[Int32[Array, "E f d rows 64"], Int32[Array, "E f d rows 64"]],
    expert: Int32[Array, " tiles"],
    name: str,
    rows: int,
    interpret: bool,
) -> BFloat16[Array, "tiles R F"]:
    """silu(gate x) * (up x), in tiles of `rows` rows."""
    if rows > DECODE_ROWS:
        return prefill_products(x, pair, expert, name, interpret=interpret)
    fmt = format_of(name)
    how = decode_tiles(fmt, rows, expert.shape[0], fmt.weight_shape(pair[0].shape)[1], x.shape[2], 2)
    gate_x, up_x = (part.sum(0) for part in decode_products(x, pair, expert, name, how, interpret=interpret))
    return (_silu(gate_x) * up_x).astype(jnp.bfloat16)


def grouped_mlp(
    x: Float[Array, "T D"],
    ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate: Int32[Array, "E f d rows 64"],
    up: Int32[Array, "E f d rows 64"],
    down: Int32[Array, "E d_ f_ rows_ 64"],
    names: tuple[str, str],
    *,
    offset: Int[Array, ""] | int = 0,
    interpret: bool = False,
) -> Float[Array, "T D"]:
    """Sum over each token's k experts of weight · down(silu(gate x) * (up x)), float32.

    Pairs of token and expert are gathered in tiles of one expert's rows, 8 to 128 as there are tokens; only experts
    that some token chose are read. A token's sum runs over its k slots in order. Ids outside 0..E-1 contribute nothing,
    so under `jax.shard_map` over experts each device gives ids less its first expert, and the results are summed; over
    the width F, the same weights' slices and a sum.

    Args:
      gate, up: records of type `names[0]` of `[E, F, D]`; down: of type `names[1]`, of `[E, D, F]`, or wider where F is
        a slice that was cut inside a record.
      offset: where the F values then lie among down's inputs; what lies beside them is multiplied by zeros.
      interpret: run in JAX's CPU interpreter of Mosaic kernels.

    Raises `NotImplementedError` for rows that are not bfloat16, and types without records.
    """
    gate_fmt, down_fmt = format_of(names[0]), format_of(names[1])
    experts, width, d = gate_fmt.weight_shape(gate.shape)
    inputs = down_fmt.weight_shape(down.shape)[-1]
    tokens, k = ids.shape
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"grouped_mlp takes bfloat16 rows, not {x.dtype}")
    for what, got, want in (
        ("up", gate_fmt.weight_shape(up.shape), (experts, width, d)),
        ("down", down_fmt.weight_shape(down.shape), (experts, d, max(inputs, width))),
        ("x", x.shape, (tokens, d)),
    ):
        if tuple(got) != want:
            raise ValueError(f"{what} has shape {tuple(got)}; beside gate {(experts, width, d)} it must have {want}")
    rows = group_rows(tokens * k, experts)
    ids = ids.reshape(-1)
    if tokens == 1:  # its experts differ: each has a tile, which meets the one row there is
        expert, x_rows = ids, x[None]
        place = jnp.where((ids >= 0) & (ids < experts), jnp.arange(k), k)
    else:
        expert, pair, place = group_pairs(ids, experts, rows)
        # A row without a pair reads the last token: nothing will read what it gives.
        x_rows = x[jnp.minimum(pair // k, tokens - 1)].reshape(-1, rows, d)
    hidden = _among(_gated(x_rows, (gate, up), expert, names[0], rows, interpret), inputs, offset)
    if rows <= DECODE_ROWS:
        how = decode_tiles(down_fmt, rows, hidden.shape[0], d, inputs, 1)
        (parts,) = decode_products(hidden, (down,), expert, names[1], how, interpret=interpret)
        out = parts.sum(0)
    else:
        out = prefill_products(hidden, (down,), expert, names[1], interpret=interpret)
    by_pair = out.reshape(-1, d).at[place].get(mode="fill", fill_value=0).reshape(tokens, k, d)
    return jnp.einsum("tk,tkd->td", weights.astype(jnp.float32), by_pair.astype(jnp.float32), precision="highest")
