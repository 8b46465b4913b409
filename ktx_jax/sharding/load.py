# SPDX-License-Identifier: Apache-2.0
"""Fills the model's parameters from a GGUF file, one tensor at a time."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from gguf import GGMLQuantizationType, quants

from ktx_jax.gguf.blocks import NATIVE_TYPES
from ktx_jax.gguf.convert import to_q8_0
from ktx_jax.gguf.reader import GGUF
from ktx_jax.model.config import Config
from ktx_jax.model.modules import DeepseekV2ForCausalLM
from ktx_jax.quantized import QuantizedArray
from ktx_jax.sharding.sources import Source, find_source, unused_tensors

log = logging.getLogger("ktx_jax")

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_ALIGNMENT = 64  # at which a CPU `jax.Array` takes host memory as it is


def abstract_model(config: Config) -> DeepseekV2ForCausalLM:
    """The model with shapes in place of values."""
    return nnx.eval_shape(lambda: DeepseekV2ForCausalLM(config, rngs=nnx.Rngs(0)))


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter's module path and logical shape."""
    state = nnx.state(abstract_model(config), nnx.Param)
    return {_path(key): tuple(leaf.get_value().shape) for key, leaf in nnx.to_flat_state(state)}


def _path(key: tuple[Any, ...]) -> str:
    return ".".join(map(str, key[:-1]))


def load_model(gguf: GGUF, config: Config, *, device: jax.Device, progress: Progress | None = None) -> tuple[Any, Any]:
    """Reads every parameter onto `device`: quantized weights as their blocks, norms and routers as float32.

    Each tensor is copied once, from the mapped file to the memory its array lives in, and let go of.

    Returns:
      The model's NNX graph definition and its state.

    Raises:
      GGUFError: a tensor is missing or misshapen; nothing has been read then.
    """
    graphdef, state = nnx.split(abstract_model(config))
    flat = nnx.to_flat_state(state)
    sources = [find_source(gguf, config, _path(key), tuple(leaf.get_value().shape)) for key, leaf in flat]
    _report(gguf, config, sources)
    total, done = sum(source.blocks.nbytes for source in sources), 0
    values: dict[str, Any] = {}
    costs: dict[str, list[float]] = {}
    for source in sorted(sources, key=lambda s: (gguf.tensors[s.tensor].file, gguf.tensors[s.tensor].offset)):
        values[source.path] = _value(source, device, costs)
        gguf.release(source.tensor)
        done += source.blocks.nbytes
        if progress is not None:
            progress(done, total)
    for kind, errors in costs.items():
        log.warning(
            "%d tensors of type %s were converted to Q8_0 while loading, at a relative error of %.1e (RMS)",
            len(errors), kind, float(np.sqrt(np.mean(np.square(errors)))),
        )  # fmt: skip
    filled = [(key, leaf.replace(values[_path(key)])) for key, leaf in flat]
    return graphdef, nnx.from_flat_state(filled)


def _report(gguf: GGUF, config: Config, sources: list[Source]) -> None:
    if unused := unused_tensors(gguf, {source.tensor for source in sources}, config):
        log.warning("%s: %d tensors are not part of the model and are not read: %s",
                    gguf.path, len(unused), ", ".join(unused[:8]) + (", ..." if len(unused) > 8 else ""))  # fmt: skip


def _value(source: Source, device: jax.Device, costs: dict[str, list[float]]) -> jax.Array | QuantizedArray:
    if len(source.shape) == 1 or source.path.endswith(".mlp.gate"):
        dense = quants.dequantize(source.blocks.reshape(*source.shape[:-1], -1), source.ggml_type)
        return jax.device_put(dense.astype(np.float32).reshape(source.shape), device)
    blocks, kind = source.blocks, source.ggml_type
    if kind not in NATIVE_TYPES:
        blocks, error = to_q8_0(blocks, kind)
        costs.setdefault(kind.name, []).append(error)
        kind = GGMLQuantizationType.Q8_0
    return QuantizedArray(jax.device_put(_aligned_copy(blocks), device), kind)


def _aligned_copy(blocks: np.ndarray) -> np.ndarray:
    """A copy at an address that a CPU array can adopt, so that the weights lie in memory once."""
    memory = np.empty(blocks.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + blocks.nbytes].reshape(blocks.shape)
    np.copyto(copy, blocks)
    return copy
