# SPDX-License-Identifier: Apache-2.0
"""The model as a function for JAX's transformations, and what its steps compile to."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import LOGITS, golden_llm, relative_error, small_llm

from ktx_jax.engine.requests import Request, SamplingParams
from ktx_jax.engine.scheduler import Share, Work
from ktx_jax.engine.step import make_draw, make_run, next_tokens


def test_functional_is_exact():
    fn, params = small_llm().functional()
    logits = jax.jit(fn)(params, jnp.asarray(LOGITS["split.tokens"], jnp.int32))
    assert relative_error(LOGITS["split.logits"], np.asarray(logits)) < 1e-4


def test_gradient_with_respect_to_float_parameters():
    """Norms and routers are float leaves; quantized weights are bytes, through which gradients pass."""
    fn, params = small_llm().functional()
    leaves, tree = jax.tree.flatten(params)
    floats = [i for i, leaf in enumerate(leaves) if leaf.dtype == jnp.float32]
    tokens = jnp.arange(4, 10)

    def loss(values):
        merged = leaves.copy()
        for i, value in zip(floats, values, strict=True):
            merged[i] = value
        logits = fn(jax.tree.unflatten(tree, merged), tokens[:-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=-1).mean()

    values = [leaves[i] for i in floats]
    loss_and_grad = jax.jit(jax.value_and_grad(loss))
    _, grads = loss_and_grad(values)
    assert len(grads) == 10
    assert all(np.isfinite(grad).all() and np.abs(grad).max() > 0 for grad in grads)
    # Along its own direction the loss changes by the gradient's square.
    step = 1e-2 / math.sqrt(sum(float((grad**2).sum()) for grad in grads))
    up, down = ([v + sign * step * g for v, g in zip(values, grads, strict=True)] for sign in (1, -1))
    slope = (loss_and_grad(up)[0] - loss_and_grad(down)[0]) / (2 * step)
    np.testing.assert_allclose(slope, sum((grad**2).sum() for grad in grads), rtol=2e-2)


def compiled_step(llm, *, decode: bool) -> str:
    """The optimized HLO of the engine's step that samples."""
    limits = llm._engine.limits
    requests = [Request([5] * 20, SamplingParams(), 10, pages=[i]) for i in range(limits.batch)]
    work = Work(tuple(Share(request, 19 if decode else 0, 20) for request in requests), decode)
    run, last = make_run(work, limits)
    [stage] = llm._engine.steps.stages
    draw = make_draw(work, *last.shape)
    return (
        stage.lower(None, run, last, draw, tail=next_tokens, kind="decode" if decode else "prefill").compile().as_text()
    )


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", "u16"), ("float32", "f32")])
def test_a_step_writes_the_cache_in_place(dtype, kept):
    """No copy, conversion or other array of a cache's size: each token's row goes straight into its page."""
    llm = golden_llm("split", dtype, context=4096)
    limits = llm._engine.limits
    size = limits.pages * limits.page * llm.config.latent_dim
    text = compiled_step(llm, decode=True)
    assert text.count("may-alias") == llm.config.num_hidden_layers
    found = {
        (operation, kind)
        for kind, shape, operation in re.findall(r"= (\w+)\[([\d,]+)\]\S* ([\w-]+)\(", text)
        if math.prod(map(int, shape.split(","))) >= size
    }
    moving = {"parameter", "get-tuple-element", "bitcast", "scatter", "dynamic-update-slice", "fusion", "while", "call"}
    assert ("parameter", kept) in found  # else the pattern has lost its meaning
    assert {operation for operation, _ in found} <= moving
    assert {kind for _, kind in found} == {kept}
