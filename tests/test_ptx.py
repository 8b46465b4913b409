# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels' PTX, compiled for an H200 that is not there, executed block by block in NumPy (`ptx`).

Slow, and skipped without the extra `aot`. Errors are bounded as in the interpreter's tests of the same kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_cases import random_records, random_rows, relative_error
from ptx.machine import Machine

from ktx_jax.aot.compile import check_installed
from ktx_jax.errors import KtxError
from pallas_kernels import mosaic
from pallas_kernels.quantized_matmul import quantized_matmul, quantized_matmul_reference

pytestmark = pytest.mark.slow


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    """Kernels are executed while it is in use. They must be called eagerly, outside of `jax.jit`."""
    try:
        check_installed()
    except KtxError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    machine = Machine(tmp_path)
    monkeypatch.setattr(mosaic, "kernel", machine.kernel)
    monkeypatch.setattr(mosaic, "mutable", jax.new_ref)
    return machine


def _product(name: str, rows: int, n: int, k: int, dtype: jax.typing.DTypeLike) -> float:
    rng = np.random.default_rng(0)
    x, weight = random_rows((rows, k), rng), random_records(name, (n, k), rng)
    out = quantized_matmul(x, weight, name, dtype=dtype)
    return relative_error(out, quantized_matmul_reference(x, weight, name))


@pytest.mark.parametrize(
    ("name", "rows", "k"), [("Q5_0", 5, 704), ("Q4_K", 8, 1024), ("Q6_K", 13, 512), ("BF16", 16, 384)]
)
def test_products_of_few_rows(machine, name, rows, k):
    assert _product(name, rows, 64, k, jnp.float32) < 2e-6
