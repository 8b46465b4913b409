# SPDX-License-Identifier: Apache-2.0
"""The tests of the CPU kernels once more on every lesser instruction set this machine has, and under the sanitizers."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ktx_ffi = pytest.importorskip("ktx_ffi")

TESTS = Path(__file__).parent
ORDER = ["avx512", "avx2", "portable"]


def lesser() -> list[str]:
    return ORDER[ORDER.index(ktx_ffi.isa()) + 1 :] if ktx_ffi.available() and "KTX_ISA" not in os.environ else []


@pytest.mark.slow
@pytest.mark.parametrize("isa", lesser())
def test_kernels_on(isa):
    files = [TESTS / f"test_ffi_{name}.py" for name in ("matmul", "experts", "attention")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, files)]
    env = os.environ | {"KTX_ISA": isa}
    result = subprocess.run(command, env=env, cwd=TESTS.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="sanitizers are run on Linux")
def test_cpp_tests_under_sanitizers(tmp_path):
    """Builds the C++ tests with AddressSanitizer and UBSan and runs them on every instruction set."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
    configure = ["cmake", "-S", TESTS.parent / "ffi", "-B", tmp_path, "-DKTX_FFI_TESTS=ON", "-DKTX_FFI_OPTIMIZE=-O1"]
    subprocess.run([*configure, f"-DCMAKE_CXX_FLAGS={flags}", "-DCMAKE_BUILD_TYPE=None"], check=True)
    subprocess.run(["cmake", "--build", tmp_path, "--parallel", "2"], check=True)
    for isa in [os.environ.get("KTX_ISA", ""), *lesser()]:
        env = os.environ | {"KTX_ISA": isa}
        result = subprocess.run([tmp_path / "ktx_ffi_tests"], env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
