# SPDX-License-Identifier: Apache-2.0
"""Intermediate values of the functional model: what is seen is what is computed, and what is added takes part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import small_llm

from ktx_jax.errors import KtxError

TOKENS = jnp.arange(3, 15)


@pytest.fixture(scope="module")
def plain():
    fn, params = small_llm().functional()
    return np.asarray(jax.jit(fn)(params, TOKENS))


def test_values_by_name(plain):
    llm = small_llm()
    wanted = ["model.embed_tokens", "model.layers.*.mlp.gate", "model.layers.*", "model.norm", "*.self_attn.q_a_proj"]
    fn, params = llm.functional(capture=wanted)
    logits, seen = jax.jit(fn)(params, TOKENS)
    np.testing.assert_allclose(logits, plain, atol=1e-5)
    layers = range(llm.config.num_hidden_layers)
    assert {f"model.layers.{i}" for i in layers} | {"model.embed_tokens", "model.norm"} <= set(seen)
    assert {f"model.layers.{i}.self_attn.q_a_proj" for i in layers} <= set(seen)
    ids, weights = seen["model.layers.1.mlp.gate"]
    assert ids.shape == weights.shape == (len(TOKENS), llm.config.num_experts_per_tok)
    assert weights.sum() > 0
    last = seen["model.layers.1"]
    mean = np.mean(np.float64(last) ** 2, -1, keepdims=True)
    norm = np.asarray(params["model"]["norm"]["weight"].get_value())
    np.testing.assert_allclose(seen["model.norm"], last / np.sqrt(mean + llm.config.rms_norm_eps) * norm, rtol=1e-4)


def test_parts_of_a_layer_add_up():
    fn, params = small_llm().functional(
        capture=["model.embed_tokens", "model.layers.0", "model.layers.0.self_attn", "model.layers.0.mlp"]
    )
    _, seen = jax.jit(fn)(params, TOKENS)
    whole = seen["model.embed_tokens"] + seen["model.layers.0.self_attn"] + seen["model.layers.0.mlp"]
    np.testing.assert_allclose(whole, seen["model.layers.0"], atol=1e-5)


def test_what_is_added_takes_part(plain):
    """A gradient with respect to a layer's output predicts what a small change there does."""
    llm = small_llm()
    fn, params = llm.functional()
    shape = (len(TOKENS), llm.config.hidden_size)

    @jax.jit
    def value(delta):
        return fn(params, TOKENS, {"model.layers.1": delta})[-1, 7]

    zero = jnp.zeros(shape)
    assert value(zero) == pytest.approx(plain[-1, 7], abs=1e-5)
    gradient = jax.grad(value)(zero)
    assert np.abs(gradient[:-1]).max() == 0  # the last layer: earlier positions are read by no one
    step = 1e-2 * gradient / jnp.linalg.norm(gradient)
    assert value(step) - value(-step) == pytest.approx(float(2 * (gradient * step).sum()), rel=1e-2)


def test_added_and_captured_of_shared_experts():
    fn, params = small_llm().functional(capture=["model.layers.1.mlp.shared_experts"])
    name = "model.layers.1.mlp.shared_experts"
    _, before = fn(params, TOKENS)
    _, after = fn(params, TOKENS, {name: jnp.ones_like(before[name])})
    np.testing.assert_allclose(after[name], before[name] + 1, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.layers.*.mlp.router", "no module matches 'model.layers.\\*.mlp.router'; there are .*mlp.gate"),
        ("model.layers.1.mlp.experts.gate_proj", "has no value of its own"),
    ],
)
def test_a_wrong_path_is_an_error(path, message):
    fn, params = small_llm().functional(capture=[path])
    with pytest.raises(KtxError, match=message):
        fn(params, TOKENS)


@pytest.mark.parametrize(
    ("tokens", "found"), [([[1, 2], [3, 4]], r"int32 \[2, 2\]"), ([1.0], r"float32 \[1\]"), ([], r"\[0\]")]
)
def test_tokens_that_are_no_sequence_are_an_error(unchecked, tokens, found):
    fn, params = small_llm().functional()
    with pytest.raises(KtxError, match=rf"one sequence, whole numbers \[T\]; found .*{found} \(jax.vmap"):
        fn(params, jnp.asarray(tokens))


def test_ids_in_a_list(unchecked, plain):
    fn, params = small_llm().functional()
    np.testing.assert_allclose(jax.jit(fn)(params, TOKENS.tolist()), plain, atol=1e-5)


def test_a_pattern_is_no_place_to_add_to():
    """It would match, and nothing would be added."""
    fn, params = small_llm().functional()
    with pytest.raises(KtxError, match=r"whole paths of modules; found 'model.layers.\*'"):
        fn(params, TOKENS, {"model.layers.*": jnp.zeros(())})
    with pytest.raises(KtxError, match=r"a list of paths; found the text .model\.norm."):
        small_llm().functional(capture="model.norm")  # a sequence of texts too


def test_nothing_can_be_added_to_ids():
    fn, params = small_llm().functional()
    with pytest.raises(KtxError, match="several values"):
        fn(params, TOKENS, {"model.layers.1.mlp.gate": jnp.zeros(())})


def test_without_capture_the_program_is_the_same():
    llm = small_llm()
    plain, params = llm.functional()
    tapped, _ = llm.functional(capture=["model.layers.*"])
    before = jax.jit(plain).lower(params, TOKENS).as_text()
    jax.jit(tapped).lower(params, TOKENS)
    assert jax.jit(plain).lower(params, TOKENS).as_text() == before
    assert before.count("func.func private @_layer") == 2  # one for each kind of layer
