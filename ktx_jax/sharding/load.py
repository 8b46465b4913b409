# SPDX-License-Identifier: Apache-2.0
"""Fills the model's parameters from a GGUF file, one tensor at a time."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import ktx_ffi
import numpy as np
from flax import nnx
from gguf import GGMLQuantizationType, quants

from ktx_jax.gguf.blocks import NATIVE_TYPES
from ktx_jax.gguf.convert import to_q8_0
from ktx_jax.gguf.reader import GGUF
from ktx_jax.model.config import Config
from ktx_jax.model.modules import Attention, DeepseekV2ForCausalLM, RMSNorm
from ktx_jax.quantized import HostArray, QuantizedArray
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


@dataclass(frozen=True)
class Loaded:
    """A model's NNX graph definition and state, and the host memory behind its handles, to be kept as long."""

    graphdef: Any
    state: Any
    host_weights: tuple[ktx_ffi.Weights, ...]


def load_model(
    gguf: GGUF,
    config: Config,
    *,
    device: jax.Device,
    implementation: str,
    repack: bool = True,
    progress: Progress | None = None,
) -> Loaded:
    """Reads every parameter: quantized weights as their blocks, norms and routers as float32, onto `device`.

    For "xla" each tensor is copied once, from the mapped file to the memory its array lives in. For "ffi" it is
    repacked once into the CPU kernels' layout; without `repack` the kernels read the mapped file itself.

    Raises:
      GGUFError: a tensor is missing or misshapen; nothing has been read then.
    """
    ffi = implementation == "ffi"
    shapes = parameter_shapes(config)
    sources = [find_source(gguf, config, path, shape) for path, shape in shapes.items()]
    _report(gguf, config, sources)
    reader = _Reader(config, device, ffi, repack)
    values: dict[str, Any] = {}
    total, done = sum(source.blocks.nbytes for source in sources), 0
    for source in sorted(sources, key=lambda s: (gguf.tensors[s.tensor].file, gguf.tensors[s.tensor].offset)):
        values[source.path] = reader.value(source)
        if repack:
            gguf.release(source.tensor)
        done += source.blocks.nbytes
        if progress is not None:
            progress(done, total)
    reader.report()
    # The CPU kernels read k_b by rows of the latent, as new files hold it: see `_Reader.value`.
    model = abstract_model(dataclasses.replace(config, k_b_transposed=True) if ffi else config)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Attention | RMSNorm):
            module.implementation = implementation
    graphdef, state = nnx.split(model)
    filled = [(key, leaf.replace(values[_path(key)])) for key, leaf in nnx.to_flat_state(state)]
    return Loaded(graphdef, nnx.from_flat_state(filled), tuple(reader.host_weights))


def _report(gguf: GGUF, config: Config, sources: list[Source]) -> None:
    if unused := unused_tensors(gguf, {source.tensor for source in sources}, config):
        log.warning("%s: %d tensors are not part of the model and are not read: %s",
                    gguf.path, len(unused), ", ".join(unused[:8]) + (", ..." if len(unused) > 8 else ""))  # fmt: skip


class _Reader:
    """Turns blocks of the file into the leaves that the chosen implementation computes with."""

    def __init__(self, config: Config, device: jax.Device, ffi: bool, repack: bool):
        self._config, self._device, self._ffi, self._repack = config, device, ffi, repack
        self._errors: dict[str, list[float]] = {}
        self.host_weights: list[ktx_ffi.Weights] = []

    def value(self, source: Source) -> jax.Array | QuantizedArray | HostArray:
        blocks, kind = source.blocks, source.ggml_type
        if len(source.shape) == 1 or (source.path.endswith(".mlp.gate") and not self._ffi):
            return jax.device_put(_dense(blocks, kind), self._device)
        if kind not in NATIVE_TYPES:
            blocks, error = to_q8_0(blocks, kind)
            self._errors.setdefault(kind.name, []).append(error)
            kind = GGMLQuantizationType.Q8_0
        if not self._ffi:
            return QuantizedArray(jax.device_put(_aligned_copy(blocks), self._device), kind)
        if source.path.endswith(".k_b_proj") and not self._config.k_b_transposed:
            # Old files hold k_b the other way round, and blocks cannot be turned: as float16 they can, at 2**-11.
            turned = np.ascontiguousarray(_dense(blocks, kind).swapaxes(1, 2).astype(np.float16))
            blocks, kind = turned[..., None].view(np.uint8), GGMLQuantizationType.F16
        # Rows of the embedding are looked up one by one: they stay the file's blocks.
        lookup = source.path.endswith("embed_tokens")
        weights = ktx_ffi.Weights(blocks, kind, repack=self._repack and not lookup)
        self.host_weights.append(weights)
        handles = weights.operand.reshape((1,) * len(weights.shape))
        return HostArray(jax.device_put(handles, self._device), weights.shape, kind)

    def report(self) -> None:
        for kind, errors in self._errors.items():
            log.warning(
                "%d tensors of type %s were converted to Q8_0 while loading, at a relative error of %.1e (RMS)",
                len(errors), kind, float(np.sqrt(np.mean(np.square(errors)))),
            )  # fmt: skip


def _dense(blocks: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    *lead, nb, size = blocks.shape
    return quants.dequantize(blocks.reshape(*lead, nb * size), kind).astype(np.float32)


def _aligned_copy(blocks: np.ndarray) -> np.ndarray:
    """A copy at an address that a CPU array can adopt, so that the weights lie in memory once."""
    memory = np.empty(blocks.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + blocks.nbytes].reshape(blocks.shape)
    np.copyto(copy, blocks)
    return copy
