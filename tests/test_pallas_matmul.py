# SPDX-License-Identifier: Apache-2.0
"""The GPU matmul kernels in Mosaic's CPU interpreter, against plain XLA in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_cases import interpreter, random_records, random_rows, relative_error

from pallas_kernels import heuristics
from pallas_kernels.decode_matmul import decode_products
from pallas_kernels.formats import FORMATS
from pallas_kernels.heuristics import DecodeTiles, decode_tiles
from pallas_kernels.quantized_matmul import quantized_matmul, quantized_matmul_reference
from pallas_kernels.unpack import dequantize

# float32 sums in another order; and those of weights and results rounded to bfloat16.
_SUMS, _ROUNDED = 2e-6, 8e-3


@pytest.mark.parametrize("name", FORMATS)
def test_decode_meets_the_float32_reference(name):
    rng = np.random.default_rng(2)
    weight, x = random_records(name, (192, 512), rng), random_rows((5, 512), rng)
    with interpreter():
        out = quantized_matmul(x, weight, name, dtype=jnp.float32, interpret=True)
    assert relative_error(out, quantized_matmul_reference(x, weight, name)) < _SUMS


@pytest.mark.parametrize("name", [n if n == "Q4_K" else pytest.param(n, marks=pytest.mark.slow) for n in FORMATS])
def test_prefill_meets_the_reference_of_rounded_weights(name):
    rng = np.random.default_rng(3)
    weight, x = random_records(name, (192, 256), rng), random_rows((37, 256), rng)
    with interpreter():
        out = quantized_matmul(x, weight, name, interpret=True)
    rounded = dequantize(weight, name).astype(jnp.bfloat16).astype(jnp.float32)
    want = jnp.einsum("tk,nk->tn", x.astype(jnp.float32), rounded, precision="highest")
    assert relative_error(out, want.astype(jnp.bfloat16)) < _ROUNDED / 2
    assert relative_error(out, quantized_matmul_reference(x, weight, name)) < _ROUNDED


@pytest.mark.parametrize(
    ("name", "k", "how"),
    [
        ("Q5_0", 1408, DecodeTiles(16, 128, 11, 2)),
        pytest.param("Q6_K", 1536, DecodeTiles(16, 256, 3, 2), marks=pytest.mark.slow),
    ],
)
def test_ranges_of_k_are_summed(name, k, how):
    rng = np.random.default_rng(4)
    weight, x = random_records(name, (64, k), rng), random_rows((16, k), rng)
    with interpreter():
        (parts,) = decode_products(x[None], (weight[None],), jnp.zeros(1, jnp.int32), name, how, interpret=True)
    assert parts.shape == (how.splits, 1, 16, 64)
    assert relative_error(parts.sum(0)[0], quantized_matmul_reference(x, weight, name)) < _SUMS


@pytest.mark.parametrize("rows", [12, 20])
def test_a_row_does_not_depend_on_its_neighbours(rows, monkeypatch):
    # So few that two tiles of rows would do with fewer ranges of K than one.
    monkeypatch.setattr(heuristics, "MULTIPROCESSORS", 1)
    rng = np.random.default_rng(5)
    weight, x = random_records("Q4_K", (64, 2048), rng), random_rows((rows, 2048), rng)
    poisoned = x.at[7:].set(jnp.nan)
    with interpreter():
        alone = quantized_matmul(x[:7], weight, "Q4_K", dtype=jnp.float32, interpret=True)
        among = quantized_matmul(poisoned, weight, "Q4_K", dtype=jnp.float32, interpret=True)
    # Newer interpreters' own products round by how many rows they have.
    assert relative_error(among[:7], alone) <= (0 if jax.__version_info__ < (0, 11) else 1e-6)


@pytest.mark.parametrize(
    ("n", "k"), [(5120, 12288), (12288, 5120), (576, 2048), (2048, 10944), (1408, 2048), (2048, 1408)]
)
def test_how_k_is_cut_does_not_depend_on_the_rows(n, k):
    fmt = FORMATS["Q8_0"]
    eight, sixteen = (decode_tiles(fmt, rows, 1, n, k, 1) for rows in (8, 16))
    assert eight[1:3] == sixteen[1:3]
    assert k % (eight.step * eight.splits) == 0


def test_what_the_kernel_cannot_take_is_named():
    rng = np.random.default_rng(6)
    weight = random_records("Q8_0", (64, 64), rng)
    with pytest.raises(NotImplementedError, match="float32"):
        quantized_matmul(jnp.zeros((1, 64)), weight, "Q8_0")
    with pytest.raises(NotImplementedError, match="not float16"):
        quantized_matmul(random_rows((1, 64), rng), weight, "Q8_0", dtype=jnp.float16)
    with pytest.raises(NotImplementedError, match="128 rows and more: N is 64"):
        quantized_matmul(random_rows((32, 64), rng), weight, "Q8_0")
    with pytest.raises(ValueError, match="rows of 128 values"):
        quantized_matmul(random_rows((1, 128), rng), weight, "Q8_0")
