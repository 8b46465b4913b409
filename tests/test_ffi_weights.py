# SPDX-License-Identifier: Apache-2.0
"""Weight handles, embedding rows, errors, threads and concurrent callers of the CPU kernels."""

import gc
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ffi_reference import TYPES, dequantize, random_blocks
from gguf import GGMLQuantizationType as T

ktx_ffi = pytest.importorskip("ktx_ffi")
pytestmark = pytest.mark.skipif(not ktx_ffi.available(), reason=ktx_ffi.why_unavailable())

# A ValueError where JAX ran the call asynchronously and the result is used.
ERROR = (jax.errors.JaxRuntimeError, ValueError)


@pytest.fixture
def q8():
    return random_blocks(np.random.default_rng(0), T.Q8_0, 24, 64)


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_embed_is_bit_equal_to_gguf(ggml_type):
    raw = random_blocks(np.random.default_rng(1), ggml_type, 40, 512)
    w = ktx_ffi.Weights(raw, ggml_type, repack=False)
    ids = jnp.asarray([[3, 39, 0], [7, 7, 21]])
    rows = ktx_ffi.embed(ids, w, 512)
    np.testing.assert_array_equal(rows, dequantize(raw, ggml_type)[np.asarray(ids)])
    half = ktx_ffi.embed(ids, w, 512, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(half, rows.astype(jnp.bfloat16))


def test_embed_checks_ids_and_form(q8):
    w = ktx_ffi.Weights(q8, T.Q8_0, repack=False)
    for bad in (-1, 24):
        with pytest.raises(ERROR, match=rf"ktx_embed: id {bad} at 1 is outside weights Q8_0\[24, 64\]"):
            jax.block_until_ready(ktx_ffi.embed(jnp.asarray([0, bad]), w, 64))
    with pytest.raises(ERROR, match="repack=False"):
        jax.block_until_ready(ktx_ffi.embed(jnp.asarray([0]), ktx_ffi.Weights(q8, T.Q8_0), 64))


def test_attributes(q8):
    w = ktx_ffi.Weights(q8, T.Q8_0)
    assert w.shape == (24, 64)
    assert w.ggml_type == int(T.Q8_0)
    assert w.nbytes == 32 * 2 * 34  # rows rounded up to panels of sixteen
    assert w.operand.dtype == np.uint32
    assert w.operand.shape == ()
    assert set(map(int, TYPES)) == set(ktx_ffi.SUPPORTED_TYPES)


def test_a_closed_handle_is_an_error(q8):
    w = ktx_ffi.Weights(q8, T.Q8_0)
    handle = w.operand
    w.close()
    w.close()
    with pytest.raises(ValueError, match="closed"):
        _ = w.handle
    x = jnp.ones((1, 64))
    with pytest.raises(ERROR, match=rf"no weights have the handle {int(handle)} \(freed\?\)"):
        jax.block_until_ready(ktx_ffi.matmul(x, jnp.asarray(handle), 24))
    w = ktx_ffi.Weights(q8, T.Q8_0)
    handle = w.operand
    del w
    gc.collect()
    with pytest.raises(ERROR, match="freed"):
        jax.block_until_ready(ktx_ffi.matmul(x, handle, 24))


def test_unrepacked_weights_keep_their_array(q8):
    expected = ktx_ffi.matmul(jnp.ones((2, 64)), ktx_ffi.Weights(q8, T.Q8_0), 24)
    w = ktx_ffi.Weights(q8.copy(), T.Q8_0, repack=False)
    gc.collect()
    np.testing.assert_array_equal(ktx_ffi.matmul(jnp.ones((2, 64)), w, 24), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: (b, 29), "do not read ggml type 29"),
        (
            lambda b: (b[..., :-1], T.Q8_0),
            r"Q8_0 blocks must be uint8 \[\*lead, N, K / 32, 34\], but are \[24, 2, 33\]",
        ),
        (lambda b: (b[:0], T.Q8_0), "not empty"),
        (lambda b: (b[:, ::2][:, :1].repeat(2, 1)[:, ::-1], T.Q8_0), "contiguous in the last two axes"),
    ],
    ids=["type", "block", "empty", "strides"],
)
def test_wrong_blocks_are_errors(q8, change, message):
    with pytest.raises(ValueError, match=message):
        ktx_ffi.Weights(*change(q8))


def test_wrong_shapes_are_errors(q8):
    w = ktx_ffi.Weights(q8, T.Q8_0)
    with pytest.raises(ERROR, match=r"ktx_matmul: axis 1 of x f32\[2, 32\] must be 64, for weights Q8_0\[24, 64\]"):
        jax.block_until_ready(ktx_ffi.matmul(jnp.ones((2, 32)), w, 24))
    with pytest.raises(ERROR, match=r"axis 1 of the result f32\[2, 25\] must be 24"):
        jax.block_until_ready(ktx_ffi.matmul(jnp.ones((2, 64)), w, 25))
    with pytest.raises(ERROR, match="x must be f32 or bf16, but is f16"):
        jax.block_until_ready(ktx_ffi.matmul(jnp.ones((2, 64), jnp.float16), w, 24))
    with pytest.raises(ERROR, match="must have rank 2"):
        jax.block_until_ready(ktx_ffi.batched_matmul(jnp.ones((2, 1, 64)), w, 24))
    with pytest.raises(ValueError, match="one integer"):
        ktx_ffi.matmul(jnp.ones((2, 64)), jnp.ones(2, jnp.uint32), 24)
    with pytest.raises(ERROR, match=r"ktx_experts: weights must be gate and up \[E, F, D\], down \[E, D, F\]"):
        jax.block_until_ready(ktx_ffi.mlp(jnp.ones((2, 64)), w, w, w))
    with pytest.raises(ValueError, match="at least 1"):
        ktx_ffi.set_threads(0)


def test_no_rows(q8):
    assert ktx_ffi.matmul(jnp.ones((0, 64)), ktx_ffi.Weights(q8, T.Q8_0), 24).shape == (0, 24)


def test_concurrent_callers_and_changing_threads():
    rng = np.random.default_rng(2)
    w = ktx_ffi.Weights(random_blocks(rng, T.Q4_K, 256, 512), T.Q4_K)
    x = jnp.asarray(rng.standard_normal((8, 512)), jnp.float32)
    f = jax.jit(lambda x, handle: ktx_ffi.matmul(x, handle, 256))
    expected = np.asarray(f(x, w.operand))
    wrong = []
    before = ktx_ffi.threads()

    def call():
        for _ in range(100):
            if not np.array_equal(f(x, w.operand), expected):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(6)]
    try:
        for caller in callers:
            caller.start()
        for n in (1, 3, 2, 5) * 5:
            ktx_ffi.set_threads(n)
        for caller in callers:
            caller.join(60)
    finally:
        ktx_ffi.set_threads(before)
    assert not wrong


def test_idle_threads_use_no_time(q8):
    w = ktx_ffi.Weights(random_blocks(np.random.default_rng(3), T.Q8_0, 2048, 512), T.Q8_0)
    ktx_ffi.matmul(jnp.ones((64, 512)), w, 2048).block_until_ready()
    time.sleep(0.05)
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.05


DEVICES = """
import jax, jax.numpy as jnp, numpy as np, ktx_ffi
from jax.sharding import AxisType, PartitionSpec as P
mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
raw = rng.integers(0, 256, (64, 8, 34), dtype=np.uint8)
raw[..., :2] = np.float16(0.01).reshape(1).view(np.uint8)
whole = ktx_ffi.Weights(raw, 8)
shards = [ktx_ffi.Weights(raw[16 * i : 16 * (i + 1)], 8) for i in range(4)]
handles = jnp.asarray([s.handle for s in shards], jnp.uint32)
body = lambda x, handle: ktx_ffi.matmul(x, handle, 16)
f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(P(), P("tensor")), out_specs=P(None, "tensor"), check_vma=False))
x = jnp.asarray(rng.standard_normal((40, 256)), jnp.float32)
for _ in range(20):
    y = f(x, handles).block_until_ready()
np.testing.assert_array_equal(y, ktx_ffi.matmul(x, whole, 64))
"""


def test_several_virtual_devices_share_the_pool():
    flags = "--xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", DEVICES], check=True, env=env, timeout=120)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "neon"])
def test_forcing_an_instruction_set(isa):
    code = "import ktx_ffi; print(ktx_ffi.isa() if ktx_ffi.available() else ktx_ffi.why_unavailable())"
    env = os.environ | {"KTX_ISA": isa}
    output = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True).stdout
    if isa == "neon":
        assert "KTX_ISA=neon is not one of" in output
    else:
        assert output.strip() == isa or "this CPU does not have" in output or "is not one of" in output
