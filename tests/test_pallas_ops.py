# SPDX-License-Identifier: Apache-2.0
"""The model's operations on weights in the GPU kernels' layout."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from pallas_cases import interpreter, random_blocks, random_rows, relative_error

from ktx_jax import ops
from ktx_jax.quantized import PlanesArray, QuantizedArray
from pallas_kernels import grouped_matmul, mla_attention, quantized_matmul, rms_norm, router
from pallas_kernels.pack import pack


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    for module, name in (
        (quantized_matmul, "quantized_matmul"),
        (quantized_matmul, "batched_matmul"),
        (grouped_matmul, "grouped_mlp"),
        (grouped_matmul, "gated_matmul"),
        (mla_attention, "mla_attention"),
        (rms_norm, "rms_norm"),
        (rms_norm, "add_rms_norm"),
        (router, "choose_experts"),
    ):
        monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=True))


def _both(ggml_type: T, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[PlanesArray, QuantizedArray]:
    blocks = random_blocks(ggml_type.name, shape, rng)
    return (
        PlanesArray(pack(blocks, ggml_type.name), ggml_type),
        QuantizedArray(jnp.asarray(blocks), ggml_type),
    )


def test_the_logical_shape_follows_from_the_records():
    planes, blocks = _both(T.Q4_K, (3, 128, 512), np.random.default_rng(0))
    assert planes.shape == blocks.shape == (3, 128, 512)
    assert planes.ndim == 3
    assert blocks.nbytes < planes.nbytes < 1.03 * blocks.nbytes
    assert jax.eval_shape(lambda w: w, planes).shape == (3, 128, 512)
    one_expert = jax.tree.map(lambda leaf: leaf[1], planes)
    assert one_expert.shape == (128, 512)


def test_matmul_of_a_model_and_of_its_heads():
    rng = np.random.default_rng(1)
    planes, blocks = _both(T.Q5_0, (2, 64, 128), rng)
    x = random_rows((3, 2, 192), rng)  # of which the first 128 columns meet the weight
    with interpreter():
        out = ops.head_matmul(x, planes)
    assert relative_error(out, ops.head_matmul(x, blocks)) < 8e-3
    first, x = [jax.tree.map(lambda leaf: leaf[0], w) for w in (planes, blocks)], x[:, 0, :128]
    with interpreter():
        out = ops.matmul(x, first[0], dtype=jnp.float32)
    assert relative_error(out, ops.matmul(x, first[1], dtype=jnp.float32)) < 2e-6


def test_experts_of_a_model():
    rng = np.random.default_rng(2)
    (gate, gate_b), (up, up_b) = (_both(T.Q4_K, (3, 128, 256), rng) for _ in range(2))
    down, down_b = _both(T.Q8_0, (3, 256, 128), rng)
    x, ids = random_rows((2, 256), rng) * jnp.bfloat16(0.1), jnp.array([[2, 0], [2, -1]], jnp.int32)
    weights = jnp.array([[0.5, 0.25], [1.0, 1.0]], jnp.float32)
    with interpreter():
        out = ops.experts(x, ids, weights, gate, up, down)
    assert out.dtype == x.dtype
    assert relative_error(out, ops.experts(x, ids, weights, gate_b, up_b, down_b)) < 2e-2
    other = PlanesArray(up.records, T.Q5_K)
    with pytest.raises(NotImplementedError, match="not Q4_K and Q5_K"):
        ops.experts(x, ids, weights, gate, other, down)


def test_a_gated_mlp_of_a_model():
    rng = np.random.default_rng(5)
    (gate, gate_b), (up, up_b) = (_both(T.Q4_K, (128, 256), rng) for _ in range(2))
    down, down_b = _both(T.Q8_0, (256, 128), rng)
    for rows in (3, 20):
        x = random_rows((rows, 256), rng) * jnp.bfloat16(0.1)
        with interpreter():
            out = ops.swiglu(x, gate, up, down)
        assert relative_error(out, ops.swiglu(x, gate_b, up_b, down_b)) < 2e-2


def test_attention_of_a_model():
    rng = np.random.default_rng(3)
    q_latent, q_rope = random_rows((2, 16, 512), rng), random_rows((2, 16, 64), rng)
    pages = jax.lax.bitcast_convert_type(random_rows((3, 64, 576), rng), jnp.uint16)
    operands = (q_latent, q_rope, pages, jnp.array([[2], [0]]), jnp.array([1, 0]), jnp.array([40, 63]))
    with interpreter():
        out = ops.mla_attention(*operands, scale=0.05, tile=1, implementation="pallas")
    assert relative_error(out, ops.mla_attention(*operands, scale=0.05, tile=1)) < 2e-2


def test_norms_and_choices_of_a_model():
    rng = np.random.default_rng(6)
    x, y, weight = (
        random_rows((2, 256), rng),
        random_rows((2, 256), rng),
        jnp.asarray(rng.uniform(1, 2, 256), jnp.float32),
    )
    logits, live = jnp.asarray(rng.standard_normal((2, 32)), jnp.float32), jnp.array([True, False])
    choice = ops.Choice(experts=4, groups=4, kept_groups=2, normalized=True, scale=2.0)
    with interpreter():
        one, two = (
            (
                ops.rms_norm(x, weight, 1e-6, implementation=name),
                *ops.choose_experts(logits, live, choice, implementation=name),
            )
            for name in ("pallas", "xla")
        )
        total, normed = ops.add_rms_norm(x, y, weight, 1e-6)
    for got, want in zip((*one, total, normed), (*two, x + y, ops.rms_norm(x + y, weight, 1e-6)), strict=True):
        assert relative_error(got, want) < 8e-3


def test_layouts_that_lack_an_operation_say_so():
    planes, _ = _both(T.Q8_0, (1, 64, 64), np.random.default_rng(4))
    with pytest.raises(NotImplementedError, match="no single rows"):
        ops.embedding_rows(PlanesArray(planes.records[0], T.Q8_0), jnp.zeros(1, jnp.int32), jnp.float32)
    with pytest.raises(NotImplementedError, match="transposed one must be loaded for XLA"):
        ops.head_matmul(jnp.zeros((1, 1, 64), jnp.bfloat16), planes, transposed=True)
