# SPDX-License-Identifier: Apache-2.0
"""Reads a parameter from the mapped file into the arrays of its layout."""

import logging
import threading
from typing import Any

import jax
import jax.numpy as jnp
import ktx_ffi
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from ktx_jax.gguf.convert import to_q8_0
from ktx_jax.gguf.reader import GGUF
from ktx_jax.sharding.granules import piece
from ktx_jax.sharding.layout import Layout, grid
from ktx_jax.sharding.sources import Source
from pallas_kernels.pack import pack

log = logging.getLogger("ktx_jax")

_ALIGNMENT = 64  # at which a CPU `jax.Array` takes host memory as it is


class Reader:
    """Turns blocks of the file into the arrays of a layout."""

    def __init__(self, gguf: GGUF, repack: bool):
        self._gguf, self._repack = gguf, repack
        self._lock = threading.Lock()  # the CPU kernels' repacking is parallel in itself
        self._errors: dict[str, dict[str, float]] = {}
        self.host_weights: list[ktx_ffi.Weights] = []

    def read(self, layout: Layout, source: Source) -> Any:
        blocks = self._blocks(layout, source)
        leaf = self._handles(layout, blocks) if layout.form == "host" else self._arrays(layout, blocks)
        if self._repack or layout.form != "host":
            self._gguf.release(source.tensor)
        return leaf

    def _blocks(self, layout: Layout, source: Source) -> np.ndarray:
        """The whole parameter as its layout has it, before it is cut: a view of the map wherever that is possible."""
        blocks, kind = source.blocks, source.ggml_type
        if layout.form == "dense":
            return _dense(blocks, kind)
        if layout.turned:
            return _as_floats(_dense(blocks, kind).swapaxes(1, 2), layout.ggml_type)
        if kind == layout.ggml_type:
            return blocks
        if layout.ggml_type == GGMLQuantizationType.Q8_0:
            blocks, error = to_q8_0(blocks, kind)
            if error:
                with self._lock:
                    self._errors.setdefault(kind.name, {})[source.path] = error
            return blocks
        # A router that the file does not have in float32, a dense weight for the GPU kernels.
        return _as_floats(_dense(blocks, kind), layout.ggml_type)

    def _piece(self, layout: Layout, whole: np.ndarray, part: tuple[int, ...]) -> np.ndarray:
        """One part of it."""
        *rows, last = (
            slice(index * size // count, (index + 1) * size // count)
            for index, size, count in zip(part, layout.shape, layout.cuts, strict=True)
        )
        if layout.form == "dense":
            return whole[(*rows, last)]
        mine = piece(whole[tuple(rows)], layout.ggml_type, layout.cuts[-1], part[-1])
        return _filled_up(mine, layout) if layout.form == "records" else mine

    def _arrays(self, layout: Layout, whole: np.ndarray) -> Any:
        arrays = []
        for part, devices in layout.places().items():
            value = self._piece(layout, whole, part)
            for device in devices:
                # Memory that only this array has: a CPU device takes it as it is, others copy from it.
                array = jax.device_put(_aligned_copy(value) if device.platform == "cpu" else value, device)
                arrays.append(pack(array, layout.ggml_type.name) if layout.form == "records" else array)
        jax.block_until_ready(arrays)
        return layout.wrap(jax.make_array_from_single_device_arrays(layout.leaf_shape, layout.sharding, arrays))

    def _handles(self, layout: Layout, whole: np.ndarray) -> Any:
        # Rows of the embedding are looked up one by one: they stay the file's blocks.
        repack = self._repack and not layout.path.endswith("embed_tokens")
        with self._lock:
            weights = {
                part: ktx_ffi.Weights(self._piece(layout, whole, part), layout.ggml_type, repack=repack)
                for part in layout.places()
            }
            self.host_weights.extend(weights.values())
        handles = grid(layout, {part: each.handle for part, each in weights.items()})
        return layout.wrap(
            jax.make_array_from_callback(layout.leaf_shape, layout.sharding, lambda index: handles[index])
        )

    def report(self) -> None:
        for kind, errors in self._errors.items():
            log.warning(
                "%d tensors of type %s were converted to Q8_0 while loading, at a relative error of %.1e (RMS)",
                len(errors), kind, float(np.sqrt(np.mean(np.square(list(errors.values()))))),
            )  # fmt: skip


def _dense(blocks: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    *lead, nb, size = blocks.shape
    return quants.dequantize(blocks.reshape(*lead, nb * size), kind).astype(np.float32)


def _as_floats(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Blocks of one float32, float16 or bfloat16 value."""
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}[kind.name]
    return np.ascontiguousarray(values.astype(dtype))[..., None].view(np.uint8)


def _filled_up(blocks: np.ndarray, layout: Layout) -> np.ndarray:
    """Blocks of a piece with blocks of zeros after them, up to whole records."""
    into = layout.for_kernels
    missing = into.piece_shape[-1] // GGML_QUANT_SIZES[layout.ggml_type][0] - blocks.shape[-2]
    if not missing:
        return blocks
    return np.concatenate([blocks, np.zeros((*blocks.shape[:-2], missing, blocks.shape[-1]), np.uint8)], axis=-2)


def _aligned_copy(value: np.ndarray) -> np.ndarray:
    """A copy at an address that a CPU array can adopt, so that the weights lie in memory once."""
    memory = np.empty(value.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    np.copyto(copy, value)
    return copy
