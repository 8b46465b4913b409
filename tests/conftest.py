# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def oracle() -> Path:
    """Folder of reference models and logits; tests that need it skip where it is absent."""
    path = Path(os.environ.get("KTX_ORACLE", ROOT.parent / "shared" / "oracle"))
    if not path.is_dir():
        pytest.skip("no oracle folder: set KTX_ORACLE to run these cases")
    return path
