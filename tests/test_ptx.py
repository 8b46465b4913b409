# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels' compiled PTX, executed in NumPy: `tests/ptx/kernels.py`, in a process that compiles for CUDA."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ktx_jax.aot.compile import check_installed
from ktx_jax.errors import KtxError

_KERNELS = Path(__file__).parent / "ptx" / "kernels.py"


@pytest.mark.slow
def test_the_compiled_kernels():
    try:
        check_installed()
    except KtxError as error:
        pytest.skip(str(error))
    if jax.__version_info__ >= (0, 11):
        # 0.12 names the host function's values otherwise: `ptx.launch._Host` would have to find `%arg1` by its place.
        pytest.skip(f"Mosaic's dump is read as jax 0.10 writes it, not {jax.__version__}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", str(_KERNELS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
