# SPDX-License-Identifier: Apache-2.0
"""Which ggml type each tensor of a file gets under a named mix (`q4_k_m`, ...), as llama.cpp's quantizer chooses.

Exports and synthetic files follow it, so that their sizes and type mixes are those of the files people download.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from ktx_jax.errors import KtxError

_T = GGMLQuantizationType


def _use_more_bits(layer: int, n_layers: int) -> bool:
    """The first and last eighth, and every third layer between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _first_eighth(layer: int, n_layers: int) -> bool:
    return layer < n_layers // 8


@dataclass(frozen=True)
class Mix:
    """A named mix: `base` for most matrices, `better` for the sensitive ones in the layers that `where` picks."""

    base: GGMLQuantizationType
    file_type: LlamaFileType
    output: GGMLQuantizationType
    better: GGMLQuantizationType | None = None
    where: Callable[[int, int], bool] = _use_more_bits
    sensitive: tuple[str, ...] = ("ffn_down", "attn_kv_b")


MIXES: dict[str, Mix] = {
    "f32": Mix(_T.F32, LlamaFileType.ALL_F32, _T.F32),
    "f16": Mix(_T.F16, LlamaFileType.MOSTLY_F16, _T.F16),
    "bf16": Mix(_T.BF16, LlamaFileType.MOSTLY_BF16, _T.BF16),
    "q8_0": Mix(_T.Q8_0, LlamaFileType.MOSTLY_Q8_0, _T.Q8_0),
    "q6_k": Mix(_T.Q6_K, LlamaFileType.MOSTLY_Q6_K, _T.Q6_K),
    "q5_k_m": Mix(_T.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, _T.Q6_K, _T.Q6_K),
    "q4_k_m": Mix(_T.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, _T.Q6_K, _T.Q6_K),
    "q4_0": Mix(_T.Q4_0, LlamaFileType.MOSTLY_Q4_0, _T.Q6_K),
    "iq4_xs": Mix(_T.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS, _T.Q6_K, _T.Q5_K, _first_eighth, ("ffn_down",)),
}

# What a row that 256 does not divide gets instead.
_FALLBACK = {_T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0, _T.IQ4_XS: _T.IQ4_NL}


def mix_type(name: str, shape: tuple[int, ...], n_layers: int, mix: str) -> GGMLQuantizationType:
    """The type of tensor `name` (GGUF name) of `shape` (row-major, input dimension last) under `mix`.

    Vectors, norms and the router stay F32. Models of exactly eight experts, which llama.cpp treats apart, and tied
    embeddings are not distinguished.

    Raises `KtxError` for a mix not in `MIXES`.
    """
    if mix not in MIXES:
        raise KtxError(f"no mix named {mix!r}; there are {', '.join(MIXES)}")
    rule = MIXES[mix]
    if len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight") or "ffn_gate_inp" in name:
        return _T.F32
    chosen = rule.output if name == "output.weight" else rule.base
    if name.startswith("blk.") and rule.better is not None:
        _, layer, part, *_ = name.split(".")
        if part.startswith(rule.sensitive) and rule.where(int(layer), n_layers):
            chosen = rule.better
    if shape[-1] % GGML_QUANT_SIZES[chosen][0]:
        chosen = _FALLBACK.get(chosen, _T.F16)
    return _T.F16 if shape[-1] % GGML_QUANT_SIZES[chosen][0] else chosen
