# SPDX-License-Identifier: Apache-2.0
"""Small models that the rule files of `configs` fit."""

import re
from pathlib import Path

from ktx_jax.presets import Shape
from ktx_jax.synth import synthesize

_SIZES = {"kv_lora": 64, "nope": 32, "rope": 16}
# Cut eight ways inside super-blocks: 96 of an expert's 768 hidden values, 32 of o_proj's 256 inputs.
SHAPES = {
    "deepseek-v2.5": Shape("V2.5", 60, 256, 1024, 768, 8, 128, 16, 8, 3, 16.0, 0.1, value=32, **_SIZES),
    "deepseek-v2-lite": Shape("V2-Lite", 60, 256, 1088, 384, 8, None, 16, 1, 1, 1.0, 0.0707, value=32, **_SIZES),
}


def small_model(shape: Shape, layers: int, folder: Path) -> Path:
    """A Q4_K_M file of the first `layers` layers of a shape, made on first use."""
    path = folder / f"{shape.name}-{shape.expert_ffn}-{layers}.gguf"
    return path if path.exists() else synthesize(shape, path, "q4_k_m", layers=layers)


def cut_layers(text: str) -> tuple[str, int]:
    """A rule file with two layers for each range of them that it names, and how many that makes."""
    ranges = list(dict.fromkeys(re.findall(r"layers\\+\.\(([^()]*)\)", text)))
    for index, numbers in enumerate(ranges):
        text = text.replace(f"({numbers})", f"([{2 * index}{2 * index + 1}])")
    for index, number in enumerate(re.findall(r"(\d+): \"cuda", text), 1):
        text = text.replace(f'{number}: "cuda', f'{2 * index}: "cuda')
    return text, max(2, 2 * len(ranges))
