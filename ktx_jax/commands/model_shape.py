# SPDX-License-Identifier: Apache-2.0
"""A model's sizes and types, from a file's headers or by the name of a published model."""

from dataclasses import dataclass
from pathlib import Path

from ktx_jax.errors import KtxError
from ktx_jax.gguf.architecture import check_architecture
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.model.config import Config, config_from_gguf
from ktx_jax.presets import SHAPES, preset_config
from ktx_jax.sharding.parameters import Types, file_types, mix_types
from ktx_jax.sharding.problems import did_you_mean

PRESETS = {f"deepseek-{name}": name for name in SHAPES}


@dataclass(frozen=True)
class ModelShape:
    """What plans are made from. `name` is for people."""

    name: str
    config: Config
    types: Types


def model_shape(model: Path | None, preset: str | None, quant: str) -> ModelShape:
    """The shape of a model file, or of a preset under a mix of types; no weights are read.

    Raises:
      KtxError: neither or both are given, the file is no whole DeepSeek-V2 model, or the preset or mix is unknown.
    """
    if (model is None) == (preset is None):
        raise KtxError("give a model file or --preset, one of them")
    if model is not None:
        with open_gguf(model) as gguf:
            check_architecture(gguf)
            config = config_from_gguf(gguf.metadata, gguf.tensors, file=str(model))
            return ModelShape(str(model), config, file_types(gguf, config))
    if preset not in PRESETS:
        raise KtxError(
            f"no preset named {preset!r}{did_you_mean(str(preset), PRESETS)}; there are {', '.join(PRESETS)}"
        )
    config = preset_config(PRESETS[preset])
    return ModelShape(f"{preset}, {quant}", config, mix_types(config, quant))
