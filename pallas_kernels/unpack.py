# SPDX-License-Identifier: Apache-2.0
"""Records back to numbers: whole weights in `jax.numpy`, the reference; one tile inside a kernel."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels import mosaic
from pallas_kernels.formats import IQ4_VALUES, ROWS, Format, format_of
from pallas_kernels.mosaic import Ref


def _field_pairs(plane: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack._field_words`: `[..., rows, 64]` words -> fields `[..., 128, 16, 2]`, int32."""
    a_thread = plane.shape[-2] // 2  # words
    vector = min(a_thread, 4)
    words = plane.reshape(*plane.shape[:-2], a_thread // vector, 128, vector)
    words = jnp.moveaxis(words, -2, -3).reshape(*plane.shape[:-2], 128, a_thread, 1, 1)
    shifts = jnp.arange(16 // bits, dtype=jnp.int32)[:, None] * bits + jnp.arange(2, dtype=jnp.int32) * 16
    fields = lax.shift_right_logical(words, jnp.broadcast_to(shifts, (*words.shape[:-2], *shifts.shape)))
    return (fields & ((1 << bits) - 1)).reshape(*plane.shape[:-2], 128, 16, 2)


def _tile_numbers(quants: jax.Array, high: jax.Array | None, fmt: Format) -> jax.Array:
    """A tile's planes `[..., rows, 64]` -> its quants as numbers, float32 `[..., 64, 64]`."""
    bits = fmt.quant_rows // 2
    fields = _field_pairs(quants, bits)
    if high is not None:
        fields = fields | _field_pairs(high, fmt.high_rows // 2) << 4
    if fmt.name == "BF16":
        numbers = lax.bitcast_convert_type(fields << 16, jnp.float32)
    elif fmt.name == "IQ4_XS":
        numbers = jnp.zeros(fields.shape, jnp.float32)
        for i, value in enumerate(IQ4_VALUES):  # a table would be a constant, which a kernel cannot hold
            numbers = jnp.where(fields == i, float(value), numbers)
    elif bits == 8:
        numbers = (fields - 2 * (fields & 0x80)).astype(jnp.float32)
    else:
        numbers = (fields - fmt.zero).astype(jnp.float32)
    lead = numbers.shape[:-3]
    split = numbers.reshape(*lead, 4, 8, 4, 4, 2, 2, 2)  # warp, r, c | j, right, lower, e
    n = len(lead)
    return split.transpose(*range(n), *(n + i for i in (0, 5, 1, 3, 4, 2, 6))).reshape(*lead, 64, 64)


def tile_values(planes: Sequence[jax.Array], fmt: Format, interpret: bool) -> jax.Array:
    """Inside a kernel: a tile's quants `[64, 64]`, exact in bfloat16, from its planes (quants, high bits)."""
    if interpret:
        return _tile_numbers(planes[0], planes[1] if len(planes) > 1 else None, fmt).astype(jnp.bfloat16)

    from pallas_kernels.ptx import tile_values as inline

    return inline(tuple(planes), fmt)


def _byte(words: jax.Array, at: int | jax.Array) -> jax.Array:
    return (words >> (8 * at)) & 0xFF


def group_scales(
    words: jax.Array | None, factors: jax.Array | None, fmt: Format, tile: int | jax.Array, interpret: bool
) -> list[tuple[jax.Array | None, jax.Array | None]]:
    """(scale, minimum) of each group of a tile's columns, float32, of the shape of the words.

    A value is scale · quant - minimum; either is None where the format has none.

    Args:
      words: the row of the scales that holds this tile's; factors: the record's row of factors.
      tile: which of the record's tiles.
    """
    if words is None:
        return [(None, None)]
    if factors is None:
        return [(mosaic.float16_field(words, g, interpret), None) for g in range(fmt.groups)]
    d = mosaic.float16_field(factors, 0, interpret)
    if fmt.minima:
        dmin = mosaic.float16_field(factors, 1, interpret)
        return [
            (_byte(words, 2 * g).astype(jnp.float32) * d, _byte(words, 2 * g + 1).astype(jnp.float32) * dmin)
            for g in range(fmt.groups)
        ]
    if fmt.name == "Q6_K":
        return [(((words << (24 - 8 * g)) >> 24).astype(jnp.float32) * d, None) for g in range(fmt.groups)]
    at = [fmt.groups * (tile % 2) + g for g in range(fmt.groups)]
    return [((_byte(words, i) - 32).astype(jnp.float32) * d, None) for i in at]


def scale_row(fmt: Format, tile: int) -> int:
    """Which row of a record's scales holds those of a tile."""
    return tile * fmt.scale_rows // fmt.tiles


def tile_planes(record: Ref, fmt: Format, tile: int, interpret: bool) -> list[jax.Array]:
    """Inside a kernel: the planes of quants of one tile of a record in shared memory, in registers."""
    at = [(tile * fmt.quant_rows, fmt.quant_rows)]
    if fmt.high_rows:
        at.append((fmt.high_at + tile * fmt.high_rows, fmt.high_rows))
    return [mosaic.load(record.at[pl.ds(start, n)], mosaic.plane_layout(n), interpret) for start, n in at]


def record_scales(record: Ref, fmt: Format, tile: int, interpret: bool) -> list:
    """Inside a kernel: `group_scales` of one tile of a record in shared memory."""
    if not fmt.scale_rows:
        return group_scales(None, None, fmt, tile, interpret)
    words = mosaic.load(record.at[fmt.scale_at + scale_row(fmt, tile)], mosaic.BY_ROW, interpret)
    factors = mosaic.load(record.at[fmt.factor_at], mosaic.BY_ROW, interpret) if fmt.factor_rows else None
    return group_scales(words, factors, fmt, tile, interpret)


def scaled(values: jax.Array, scales: Sequence, fmt: Format, interpret: bool) -> jax.Array:
    """Inside a kernel: a tile of the weight, `[64, 64]` bfloat16, from its quants and the scales of their groups."""
    if not fmt.scale_rows:
        return values
    parts = []
    for g, (scale, minimum) in enumerate(scales):
        part = values[:, g * fmt.group : (g + 1) * fmt.group].astype(jnp.float32)
        if scale is not None:
            part = part * mosaic.along_rows(scale, (ROWS, fmt.group))
        if minimum is not None:
            part = part - mosaic.along_rows(minimum, (ROWS, fmt.group))
        parts.append(part.astype(jnp.bfloat16))
    return mosaic.joined(parts, interpret)


def dequantize(records: Int32[Array, "*lead n k rows 64"], name: str) -> Float[Array, "*lead N K"]:
    """The values of records, float32, bit-equal to those of the blocks they were packed from."""
    fmt = format_of(name)
    *lead, n, k = fmt.weight_shape(records.shape)
    tiles = []
    for tile in range(fmt.tiles):

        def rows(at: int, count: int) -> jax.Array:
            return records[..., at : at + count, :]

        high = rows(fmt.high_at + tile * fmt.high_rows, fmt.high_rows) if fmt.high_rows else None
        numbers = _tile_numbers(rows(tile * fmt.quant_rows, fmt.quant_rows), high, fmt)
        words = records[..., fmt.scale_at + scale_row(fmt, tile), :] if fmt.scale_rows else None
        factors = records[..., fmt.factor_at, :] if fmt.factor_rows else None
        for g, (scale, minimum) in enumerate(group_scales(words, factors, fmt, tile, interpret=True)):
            part = numbers[..., g * fmt.group : (g + 1) * fmt.group]
            if scale is not None:
                part = part * scale[..., None]
            tiles.append(part if minimum is None else part - minimum[..., None])
    values = jnp.concatenate(tiles, axis=-1)  # [*lead, n, k, 64, depth]
    return jnp.moveaxis(values, -2, -3).reshape(*lead, n, k)
