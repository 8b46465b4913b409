# SPDX-License-Identifier: Apache-2.0
"""Where in the file each parameter's blocks lie: one view of the mapped file, whatever layout the file has."""

import math
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import UInt8

from ktx_jax.gguf.errors import GGUFError
from ktx_jax.gguf.names import module_path, tensor_name
from ktx_jax.gguf.reader import GGUF
from ktx_jax.model.config import Config

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """One parameter's blocks: a tensor of the file, or a slice of one that holds several parameters."""

    path: str
    tensor: str
    ggml_type: GGMLQuantizationType
    shape: Shape  # logical
    blocks: UInt8[np.ndarray, "*lead nb ts"]


def find_source(gguf: GGUF, config: Config, path: str, shape: Shape) -> Source:
    """The blocks of the parameter at `path`, checked against the logical shape that the model expects.

    Files differ in layout: old ones keep k_b and v_b of all heads in one `attn_kv_b`, some fuse the experts' gate and
    up. Both are cut here by rows, which no block straddles.

    Raises:
      GGUFError: the tensor is missing, or its shape is not the one that the metadata promises.
    """
    layer, _, module = path.rpartition(".")
    name = tensor_name(path)
    if name in gguf.tensors:
        return _whole(gguf, path, name, shape)
    if module in ("k_b_proj", "v_b_proj") and (fused := tensor_name(f"{layer}.kv_b_proj")) in gguf.tensors:
        nope, heads = config.qk_nope_head_dim, config.num_attention_heads
        rows = slice(0, nope) if module == "k_b_proj" else slice(nope, None)
        stacked = (heads, nope + config.v_head_dim, config.kv_lora_rank)
        return _rows(gguf, path, fused, (math.prod(stacked[:2]), stacked[2]), stacked, rows)
    if module in ("gate_proj", "up_proj") and layer.endswith(".experts"):
        fused = tensor_name(f"{layer}.gate_up_proj")
        if fused in gguf.tensors:
            experts, width, size = shape
            rows = slice(0, width) if module == "gate_proj" else slice(width, None)
            stacked = (experts, 2 * width, size)
            return _rows(gguf, path, fused, stacked, stacked, rows)
    raise gguf.missing_tensor_error(name)


def unused_tensors(gguf: GGUF, used: set[str], config: Config) -> list[str]:
    """Tensors of the file that no parameter reads, but for an `attn_kv_b` beside the split tensors."""
    return [
        name
        for name in gguf.tensors
        if name not in used and not (config.k_b_transposed and (module_path(name) or "").endswith("kv_b_proj"))
    ]


def _checked(gguf: GGUF, path: str, name: str, shape: Shape) -> GGMLQuantizationType:
    info = gguf.tensors[name]
    if info.shape != shape:
        raise GGUFError(
            f"{info.file}: tensor {name} ({path}) has shape {_show(info.shape)}, but the metadata describes a model "
            f"where it is {_show(shape)}; the file is inconsistent, or an override is wrong"
        )
    return info.ggml_type


def _show(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def _whole(gguf: GGUF, path: str, name: str, shape: Shape) -> Source:
    return Source(path, name, _checked(gguf, path, name, shape), shape, gguf.blocks(name))


def _rows(gguf: GGUF, path: str, name: str, shape: Shape, stacked: Shape, rows: slice) -> Source:
    kind = _checked(gguf, path, name, shape)
    block, size = GGML_QUANT_SIZES[kind]
    blocks = gguf.blocks(name).reshape(*stacked[:-1], stacked[-1] // block, size)[:, rows]
    return Source(path, name, kind, (*blocks.shape[:-2], stacked[-1]), blocks)
