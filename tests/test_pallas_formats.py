# SPDX-License-Identifier: Apache-2.0
"""GPU records: bit-exact, hardly larger than the file, in the order in which Mosaic lays a wgmma operand out."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu
from pallas_cases import random_records

from pallas_kernels import ptx
from pallas_kernels.formats import FORMATS, format_of
from pallas_kernels.pack import pack
from pallas_kernels.unpack import dequantize, tile_values


@pytest.mark.parametrize("name", FORMATS)
def test_records_hold_the_blocks_bit_for_bit(name):
    fmt = FORMATS[name]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 128, 768 // fmt.block, fmt.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(blocks.reshape(2, 128, -1), gguf.GGMLQuantizationType[name])
    records = pack(blocks, name)
    got = np.asarray(dequantize(jnp.asarray(records), name))
    same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
    assert same.all()
    assert records.nbytes <= 1.03 * blocks.nbytes
    assert records.nbytes == round(fmt.growth * blocks.nbytes)


def _wgmma_element(warp: int, lane: int, register: tuple[int, ...], e: int) -> tuple[int, int]:
    """The element of a 64 x 64 matrix that Mosaic keeps there, from its tiling of the layout."""
    index = np.arange(64 * 64).reshape(64, 64)
    for tile in mgpu.WGMMA_LAYOUT.tiling.tiles:
        lead, sizes = index.shape[: -len(tile)], index.shape[-len(tile) :]
        split = [n for size, t in zip(sizes, tile, strict=True) for n in (size // t, t)]
        n = len(lead)
        order = (*range(n), *(n + 2 * i for i in range(len(tile))), *(n + 2 * i + 1 for i in range(len(tile))))
        index = index.reshape(*lead, *split).transpose(order)
    a, b, c = register
    return divmod(int(index[a, b, warp, 0, c, 0, lane // 4, lane % 4, e]), 64)


class _Registers:
    """`pallas_kernels.ptx`'s instructions on NumPy words, one for each of 128 threads."""

    @staticmethod
    def const(value):
        return np.uint32(value)

    @staticmethod
    def shift_right(word, bits):
        return word >> np.uint32(bits) if bits >= 0 else word << np.uint32(-bits)

    @staticmethod
    def mask(word, bits):
        return word & np.uint32(bits)

    @staticmethod
    def merge(word, mask, base):
        return (word & np.uint32(mask)) | base

    @staticmethod
    def subtract(a, b):
        both = [np.broadcast_to(x, (128,)).astype(np.uint32).view(np.uint16).view(jnp.bfloat16) for x in (a, b)]
        return (both[0] - both[1]).view(np.uint16).view(np.uint32)

    @staticmethod
    def permute(a, b, selector):
        a, b, selector = (np.broadcast_to(x, (128,)).astype(np.uint32) for x in (a, b, selector))
        data = np.concatenate([a[:, None].view(np.uint8), b[:, None].view(np.uint8)], axis=1)
        chosen = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 7
        return np.take_along_axis(data, chosen.astype(np.int64), axis=1).copy().view(np.uint32)[:, 0]


def _thread_words(plane: np.ndarray) -> list[np.ndarray]:
    """A plane's words as a warpgroup loads them with `mosaic.plane_layout`: `[128]` for each word of a thread."""
    vector = min(plane.shape[0] // 2, 4)
    words = plane.reshape(-1, 128, vector)
    return [words[i, :, v] for i in range(words.shape[0]) for v in range(vector)]


@pytest.mark.parametrize("name", FORMATS)
def test_the_instructions_put_each_value_where_wgmma_wants_it(name, monkeypatch):
    """What runs on a GPU, instruction by instruction in NumPy, against the plain unpacking."""
    fmt = FORMATS[name]
    for instruction in ("const", "shift_right", "mask", "merge", "subtract", "permute"):
        monkeypatch.setattr(ptx, f"_{instruction}", getattr(_Registers, instruction))
    record = random_records(name, (64, fmt.depth), np.random.default_rng(1))[0, 0]
    tile = fmt.tiles - 1
    planes = [record[tile * fmt.quant_rows :][: fmt.quant_rows]]
    if fmt.high_rows:
        planes.append(record[fmt.high_at + tile * fmt.high_rows :][: fmt.high_rows])
    want = np.asarray(tile_values(planes, fmt, interpret=True), np.float32)

    words, high = [*(_thread_words(np.asarray(p).view(np.uint32)) for p in planes), []][:2]
    for p, pair in enumerate(ptx._pairs(words, high, fmt)):
        numbers = np.ascontiguousarray(pair, np.uint32).view(np.uint16).view(jnp.bfloat16).reshape(128, 2)
        for thread in range(128):
            for e in range(2):
                at = _wgmma_element(thread // 32, thread % 32, (0, p // 2, p % 2), e)
                assert np.float32(numbers[thread, e]) == want[at]


def test_shapes_that_records_cannot_take_are_named():
    with pytest.raises(NotImplementedError, match=r"rows in 64s: .* has 65"):
        FORMATS["Q8_0"].record_shape((65, 64))
    with pytest.raises(NotImplementedError, match=r"columns in 256s: .* has 320"):
        FORMATS["Q4_K"].record_shape((64, 320))
    with pytest.raises(NotImplementedError, match="no GPU layout for Q3_K"):
        format_of("Q3_K")
    with pytest.raises(ValueError, match="144 bytes"):
        pack(np.zeros((64, 1, 110), np.uint8), "Q4_K")
