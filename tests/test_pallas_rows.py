# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of single rows in Mosaic's CPU interpreter: norms, the cache's rows; products yet to be summed."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_cases import interpreter, random_rows

from pallas_kernels import parts
from pallas_kernels.latents import write_latents, write_latents_reference
from pallas_kernels.parts import as_parts, total_of
from pallas_kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

_EPS = 1e-6


def _weight(size, rng):
    return jnp.asarray(rng.uniform(0.5, 2, size), jnp.float32)


def _parts(shape, rng):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def _assert_rounded_alike(got, want, apart=2e-3):
    """The same bfloat16 numbers but for few, a bit apart, where float32 sums in another order round otherwise."""
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    np.testing.assert_allclose(got, want, rtol=2**-7)
    assert (got != want).mean() <= apart


@pytest.mark.parametrize("size", [5120, 2048, 1536, 512, 640])
def test_norms(size):
    rng = np.random.default_rng(0)
    x, y, weight = random_rows((3, size), rng), random_rows((3, size), rng), _weight(size, rng)
    with interpreter():
        alone, both = rms_norm(x, weight, _EPS, interpret=True), add_rms_norm(x, y, weight, _EPS, interpret=True)
    _assert_rounded_alike(alone, rms_norm_reference(x, weight, _EPS))
    for got, want in zip(both, add_rms_norm_reference(x, y, weight, _EPS), strict=True):
        _assert_rounded_alike(got, want)


def test_norms_of_products_that_are_yet_to_be_summed():
    """The kernel reads the parts, and XLA has no sum to make."""
    rng = np.random.default_rng(1)
    summands, weight, x = _parts((3, 2, 256), rng), _weight(256, rng), random_rows((2, 256), rng)
    y = total_of(summands)
    assert as_parts(y) is summands
    assert as_parts(y + 0).shape == (1, 2, 256)
    with interpreter():
        alone, both = rms_norm(y, weight, _EPS, interpret=True), add_rms_norm(x, y, weight, _EPS, interpret=True)
    _assert_rounded_alike(alone, rms_norm_reference(y, weight, _EPS))
    for got, want in zip(both, add_rms_norm_reference(x, y, weight, _EPS), strict=True):
        _assert_rounded_alike(got, want)
    [kernel] = [
        equation
        for equation in jax.make_jaxpr(lambda p: rms_norm(total_of(p), weight, _EPS))(summands).eqns
        if equation.primitive.name == "mpmd_map"
    ]
    assert [operand.aval.shape for operand in kernel.invars] == [(3, 2, 256), (256,)]


def test_sums_are_forgotten_with_their_arrays():
    before = len(parts._known)
    y = total_of(jnp.ones((2, 1, 128)))
    assert len(parts._known) == before + 1
    del y
    gc.collect()
    assert len(parts._known) == before


def test_a_row_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(2)
    x, weight = random_rows((2, 512), rng), _weight(512, rng)
    among = jnp.full((5, 512), jnp.nan, jnp.bfloat16).at[2:4].set(x)
    with interpreter():
        alone, poisoned = (rms_norm(rows, weight, _EPS, interpret=True) for rows in (x, among))
    np.testing.assert_array_equal(alone, poisoned[2:4])


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("summed", [True, False])
def test_latents_go_where_they_belong(page, summed):
    rng = np.random.default_rng(3)
    places = jnp.array([page + 1, -1, 3 * page - 1, 0], jnp.int32)
    x = _parts((4, 4, 576), rng).at[:, 1].set(np.nan)
    angles = rng.uniform(0, 6, (4, 32))
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    pages = jax.lax.bitcast_convert_type(random_rows((3, page, 576), rng), jnp.uint16)
    rows = x.sum(0).astype(jnp.bfloat16)
    rest = (_weight(512, rng), _EPS, cos, sin, places)

    @jax.jit
    def written(pages, x):
        return write_latents(pages, total_of(x) if summed else rows, *rest, interpret=True)

    with interpreter():
        got = written(pages, x)
    want = write_latents_reference(pages, rows, *rest)
    got, want, before = (np.asarray(a).reshape(-1, 576) for a in (got, want, pages))
    live = np.asarray(places)[np.asarray(places) >= 0]
    _assert_rounded_alike(got[live].view(jnp.bfloat16), want[live].view(jnp.bfloat16))
    others = np.setdiff1d(np.arange(3 * page), live)
    np.testing.assert_array_equal(got[others], before[others])


def test_what_the_kernels_cannot_take_is_named():
    rows, weight = jnp.zeros((1, 512), jnp.bfloat16), jnp.ones(512)
    with pytest.raises(NotImplementedError, match="bfloat16 rows, not float32"):
        rms_norm(rows.astype(jnp.float32), weight, _EPS)
    with pytest.raises(NotImplementedError, match="rows in 128s, not of 200 values"):
        rms_norm(rows[:, :200], weight[:200], _EPS)
    cache, turn, place = jnp.zeros((1, 16, 576), jnp.uint16), jnp.zeros((1, 32)), jnp.zeros(1, jnp.int32)
    with pytest.raises(NotImplementedError, match=r"512 \+ 64, not 320 with 256"):
        write_latents(cache[..., :320], jnp.zeros((1, 320), jnp.bfloat16), weight[:256], _EPS, turn, turn, place)
    with pytest.raises(NotImplementedError, match="bfloat16 rows, not float32"):
        write_latents(cache, jnp.zeros((1, 576)), weight, _EPS, turn, turn, place)
