# SPDX-License-Identifier: Apache-2.0
"""Quantizers to ggml blocks, in NumPy: for exporting small models. Inverse of `ktx_jax.gguf.blocks`.

Each function below takes values cut into blocks, `[n, block_size]`, and returns `[n, type_size]` bytes. Scales come
from a least-squares search (`ktx_jax.gguf.fit`) and are rounded to the format first; the levels are then chosen for
the rounded scale.
"""

from collections.abc import Callable

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import Float, UInt8

from ktx_jax.gguf.blocks import IQ4_VALUES
from ktx_jax.gguf.fit import F32, fit_affine, fit_scale, levels

_CHUNK = 1 << 20  # values quantized at a time: bounds the search's temporaries


def _half(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float16 fields as bytes `[..., 2]`, and the float32 values they hold."""
    stored = x.astype("<f2")
    return stored[..., None].view(np.uint8), stored.astype(F32)


def _pack(q: np.ndarray, bits: int, groups: int = 1) -> np.ndarray:
    """Bytes of `8 // bits` fields: a run's first values in the low bits, the next in the bits above (per group)."""
    fields = q.astype(np.uint8).reshape(len(q), groups, 8 // bits, -1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(fields << shifts, axis=2).reshape(len(q), -1)


def _bit_mask(q: np.ndarray) -> np.ndarray:
    """Bit 4 of 32 values as 4 bytes, value i in bit i."""
    return np.packbits((q.astype(np.uint8) >> 4) & 1, axis=-1, bitorder="little")


def _join(*fields: np.ndarray) -> np.ndarray:
    return np.concatenate([f.reshape(len(f), -1).view(np.uint8) for f in fields], axis=-1)


# --- blocks of 32 ---


def _linear(low: int, high: int) -> tuple[Callable[[np.ndarray], np.ndarray], list[float]]:
    """Rounding to the integers low..high, and the levels to try for a group's peak."""
    tries = (low * np.linspace(0.8, 1.2, 17)).tolist()
    return lambda y: np.clip(np.rint(y), low, high), tries


def _symmetric(x: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale bytes and unsigned levels (`level - low`) of x ~ d * level, level in low..high."""
    assign, tries = _linear(low, high)
    d_bytes, d = _half(fit_scale(x, assign, tries))
    return d_bytes, assign(levels(x, d)) - low


# How many levels more (or fewer) than the format's to spread a group's range over.
_STRETCHES = np.linspace(-0.9, 0.9, 13).tolist()


def _affine(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of scale and offset, and levels 0..top of x ~ d * level + m."""
    d, m = fit_affine(x, top, _STRETCHES, offset_at_most_zero=False)
    d_bytes, d = _half(d)
    m_bytes, m = _half(m)
    return _join(d_bytes, m_bytes), np.clip(np.rint(levels(x - m[:, None], d)), 0, top)


def _q4_0(x: np.ndarray) -> np.ndarray:
    d, q = _symmetric(x, -8, 7)
    return _join(d, _pack(q, 4))


def _q4_1(x: np.ndarray) -> np.ndarray:
    dm, q = _affine(x, 15)
    return _join(dm, _pack(q, 4))


def _q5_0(x: np.ndarray) -> np.ndarray:
    d, q = _symmetric(x, -16, 15)
    return _join(d, _bit_mask(q), _pack(q.astype(np.uint8) & 15, 4))


def _q5_1(x: np.ndarray) -> np.ndarray:
    dm, q = _affine(x, 31)
    return _join(dm, _bit_mask(q), _pack(q.astype(np.uint8) & 15, 4))


def _q8_0(x: np.ndarray) -> np.ndarray:
    d_bytes, d = _half(np.abs(x).max(-1) / F32(127))
    return _join(d_bytes, np.clip(np.rint(levels(x, d)), -127, 127).astype(np.int8))


_IQ4 = np.array(IQ4_VALUES, F32)
# The nearest value's index by floor(2 y) + 256: the edges between values are multiples of a half, so this is exact.
_IQ4_NEAREST = np.searchsorted((_IQ4[1:] + _IQ4[:-1]) / 2, (np.arange(512) - 255.5) / 2).astype(np.uint8)
# The values are not symmetric: the peak may map to either end.
_IQ4_TRIES = np.outer((-127, 113), np.linspace(0.75, 1.2, 10)).ravel().tolist()


def _iq4_index(y: np.ndarray) -> np.ndarray:
    return _IQ4_NEAREST[np.clip(np.floor(2 * y) + 256, 0, 511).astype(np.int16)]


def _iq4_scale(x: np.ndarray) -> np.ndarray:
    return fit_scale(x, lambda y: _IQ4[_iq4_index(y)], _IQ4_TRIES)


def _iq4_nl(x: np.ndarray) -> np.ndarray:
    d_bytes, d = _half(_iq4_scale(x))
    return _join(d_bytes, _pack(_iq4_index(levels(x, d)), 4))


# --- super-blocks of 256 ---


def _shared_scale(scales: np.ndarray, extreme: int) -> tuple[np.ndarray, np.ndarray]:
    """One float16 a super-block such that its largest group scale is `extreme` units: bytes and values."""
    peak = np.take_along_axis(scales, np.abs(scales).argmax(-1, keepdims=True), -1)[..., 0]
    return _half(peak / F32(extreme))


def _k_groups(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The 16 head bytes of Q4_K and Q5_K (d, dmin, eight 6-bit scales and minima) and the levels `[n, 8, 32]`."""
    x = x.reshape(-1, 8, 32)
    d, m = fit_affine(x, top, _STRETCHES, offset_at_most_zero=True)
    d_bytes, d_super = _shared_scale(d, 63)
    m_bytes, m_super = _shared_scale(-m, 63)
    scale = np.clip(np.rint(levels(d, d_super)), 0, 63)
    minimum = np.clip(np.rint(levels(-m, m_super)), 0, 63)
    offset = (m_super[:, None] * minimum)[..., None]
    q = np.clip(np.rint(levels(x + offset, d_super[:, None] * scale)), 0, top)
    s, m6 = scale.astype(np.uint8), minimum.astype(np.uint8)
    packed = (
        s[:, :4] | ((s[:, 4:] >> 4) << 6),
        m6[:, :4] | ((m6[:, 4:] >> 4) << 6),
        (s[:, 4:] & 15) | ((m6[:, 4:] & 15) << 4),
    )
    return _join(d_bytes, m_bytes, *packed), q.astype(np.uint8)


def _q4_k(x: np.ndarray) -> np.ndarray:
    head, q = _k_groups(x, 15)
    return _join(head, _pack(q, 4, groups=4))


def _q5_k(x: np.ndarray) -> np.ndarray:
    head, q = _k_groups(x, 31)
    return _join(head, _pack(q >> 4, 1), _pack(q & 15, 4, groups=4))


def _q6_k(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, 16, 16)
    assign, tries = _linear(-32, 31)
    d = fit_scale(x, assign, tries)
    d_bytes, d_super = _shared_scale(d, -128)
    scale = np.clip(np.rint(levels(d, d_super)), -128, 127)
    q = (assign(levels(x, d_super[:, None] * scale)) + 32).astype(np.uint8)
    # In each half of 128, the low nibbles are 64 values apart and the high pairs 32.
    return _join(_pack(q & 15, 4, groups=2), _pack(q >> 4, 2, groups=2), scale.astype(np.int8), d_bytes)


def _iq4_xs(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, 8, 32)
    d = _iq4_scale(x)
    d_bytes, d_super = _shared_scale(d, -32)
    scale = np.clip(np.rint(levels(d, d_super)), -32, 31)
    q = _iq4_index(levels(x, d_super[:, None] * scale))
    s = (scale + 32).astype(np.uint8)
    high = np.bitwise_or.reduce((s >> 4).reshape(-1, 2, 4) << np.array([0, 2, 4, 6], np.uint8), axis=-1)
    low = (s[:, 0::2] & 15) | ((s[:, 1::2] & 15) << 4)
    return _join(d_bytes, high, low, _pack(q, 4, groups=8))


# --- floats ---


def _bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").view(np.uint8)


_T = GGMLQuantizationType
_FORMATS: dict[GGMLQuantizationType, Callable[[np.ndarray], np.ndarray]] = {
    _T.F32: lambda x: x.astype("<f4").view(np.uint8),
    _T.F16: lambda x: x.astype("<f2").view(np.uint8),
    _T.BF16: _bf16,
    _T.Q4_0: _q4_0,
    _T.Q4_1: _q4_1,
    _T.Q5_0: _q5_0,
    _T.Q5_1: _q5_1,
    _T.Q8_0: _q8_0,
    _T.Q4_K: _q4_k,
    _T.Q5_K: _q5_k,
    _T.Q6_K: _q6_k,
    _T.IQ4_NL: _iq4_nl,
    _T.IQ4_XS: _iq4_xs,
}

QUANTIZABLE_TYPES: frozenset[GGMLQuantizationType] = frozenset(_FORMATS)


def quantize(x: Float[np.ndarray, "*lead K"], ggml_type: GGMLQuantizationType) -> UInt8[np.ndarray, "*lead nb ts"]:
    """Raw ggml blocks of `x`, `nb = K / block_size`, with about the least squared error the format allows.

    Raises `ValueError` for a type outside `QUANTIZABLE_TYPES`, a last axis that the block size does not divide,
    and values that are not finite or that float16 fields cannot hold.
    """
    if ggml_type not in _FORMATS:
        names = ", ".join(sorted(t.name for t in QUANTIZABLE_TYPES))
        raise ValueError(f"no quantizer for {ggml_type.name}; there is one for {names}")
    block_size, type_size = GGML_QUANT_SIZES[ggml_type]
    if x.shape[-1] % block_size:
        raise ValueError(f"{ggml_type.name} needs rows of a multiple of {block_size}; got shape {x.shape}")
    values = np.ascontiguousarray(x, F32).reshape(-1, block_size)
    # Float16 fields end at 65504, and a fitted offset may lie a little beyond the values.
    limit = 1e38 if ggml_type in (_T.F32, _T.BF16) else 6e4
    if values.size and not np.abs(values).max() <= limit:
        raise ValueError(f"{ggml_type.name}: values must be finite and within +-{limit:g}")
    out = np.empty((len(values), type_size), np.uint8)
    step = max(1, _CHUNK // block_size)
    for at in range(0, len(values), step):
        out[at : at + step] = _FORMATS[ggml_type](values[at : at + step])
    return out.reshape(*x.shape[:-1], x.shape[-1] // block_size, type_size)
