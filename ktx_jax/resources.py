# SPDX-License-Identifier: Apache-2.0
"""Where the files that come with the package lie, installed or in a checkout."""

from pathlib import Path

from ktx_jax.errors import KtxError

_PACKAGE = Path(__file__).parent


def demo_model() -> Path:
    """The embedded model: a tiny DeepSeek-V2 in GGUF, trained on Python's documentation.

    Raises:
        KtxError: this installation lacks it.
    """
    path = _PACKAGE / "data" / "tiny-q8_0.gguf"
    if not path.is_file():
        raise KtxError(f"the embedded model is not at {path}: install ktx-jax again, or run examples/train_tiny.py")
    return path


def configs() -> Path:
    """The folder of rule files and target descriptions.

    Raises:
        KtxError: this installation lacks it.
    """
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if folder.is_dir():
            return folder
    raise KtxError(f"the configuration files are not beside {_PACKAGE}: install ktx-jax again")
