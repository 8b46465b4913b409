# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels' compiled PTX, executed in NumPy: `tests/ptx/kernels.py`, in a process that compiles for CUDA."""

import subprocess
import sys
from pathlib import Path

import pytest

_KERNELS = Path(__file__).parent / "ptx" / "kernels.py"


@pytest.mark.slow
def test_the_compiled_kernels(gpu_compiler):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", str(_KERNELS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
