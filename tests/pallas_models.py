# SPDX-License-Identifier: Apache-2.0
"""A small model in the sizes that the GPU kernels take, and the kernels' plain references in their place."""

from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as T

from ktx_jax import presets
from ktx_jax.engine.scheduler import Limits
from ktx_jax.engine.stage import Dtypes
from ktx_jax.engine.step import Steps, whole_logits
from ktx_jax.gguf.random_blocks import random_pieces
from ktx_jax.gguf.reader import GGUF
from ktx_jax.gguf.writer import TensorSource, write_gguf
from ktx_jax.model.cache import Run
from ktx_jax.model.config import Config
from ktx_jax.sharding.load import Implementations, Loaded, load_model
from ktx_jax.sharding.mesh import bind
from ktx_jax.sharding.parameters import file_types
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.rules import Rules
from pallas_kernels import (
    grouped_matmul,
    latents,
    mla_attention,
    mla_prefill,
    prefill_plan,
    quantized_matmul,
    rms_norm,
    router,
)
from pallas_kernels.unpack import dequantize

# Latents and heads of the published sizes, which the attention kernels are made for; all else small.
TINY = presets.Shape("tiny", 2, 256, 512, 256, 2, None, 8, 1, 1, 1.0, 0.0707)
LONG = 140
"""Tokens of a prompt that attends in expanded form."""

VOCAB = 256
ONE = Rules.from_text("rules: []", "one device")


def write_tiny(
    path: Path, quant: str = "q4_k_m", types: Sequence[tuple[str, T]] = (), old: bool = False, seed: int = 0
) -> Path:
    """Writes the model without a vocabulary.

    Args:
      types: other types, for tensors whose names contain a text.
      old: k_b and v_b in one tensor, as in older files.
    """
    rng, sources, s = np.random.default_rng(seed), [], TINY
    with mock.patch.object(presets, "VOCAB_SIZE", VOCAB):
        tensors, metadata = presets.planned_tensors(s, quant), presets.architecture_metadata(s)
    for t in tensors:
        name, dims, kind = t.name, t.shape, next((kind for part, kind in types if part in t.name), t.ggml_type)
        if old and ".attn_v_b." in name:
            continue
        if old and ".attn_k_b." in name:
            name, kind, dims = name.replace("k_b", "kv_b"), T.Q4_K, (s.heads * (s.nope + s.value), s.kv_lora)
        if "norm" in name:
            pieces = [np.ones((*dims, 1), np.float32).view(np.uint8)]
        else:
            pieces = list(random_pieces(rng, kind, int(np.prod(dims)), dims[-1] ** -0.5))
        sources.append(TensorSource(name, dims, kind, partial(list, pieces)))
    if old:
        sizes = {"head_count_kv": s.heads, "key_length": s.nope + s.rope, "value_length": s.value}
        metadata |= {f"deepseek2.attention.{key}": value for key, value in sizes.items()}
        metadata = {key: value for key, value in metadata.items() if not key.endswith("_mla")}
    write_gguf(path, {"general.architecture": "deepseek2", **metadata}, iter(sources))
    return path


def plan_of(gguf: GGUF, config: Config, rules: Rules = ONE, implementation: str = "pallas", **options) -> Plan:
    """A plan for GPUs, which may be bound to CPUs."""
    types = file_types(gguf, config)
    return Plan.from_rules(config, rules, types=types, context=64, batch=2, implementation=implementation, **options)


def loaded(gguf: GGUF, plan: Plan) -> Loaded:
    """The model on this machine's CPU devices."""
    return load_model(gguf, plan, bind(plan, jax.devices("cpu")), implementations=Implementations("xla", "xla"))


def logits(gguf: GGUF, config: Config, plan: Plan, dtype: Any = jnp.bfloat16, prompt: int = 20) -> np.ndarray:
    """After each of a prompt's tokens, whose last tile is not full, and after a token that follows."""
    length, pages = -(-prompt // 16) * 16, prompt // 64 + 1
    limits = Limits(64 * pages, 2, page=64, chunk=length, tile=16)
    steps = Steps(config, loaded(gguf, plan), limits, dtypes=Dtypes(dtype, dtype))
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, length + 1)).astype(np.int32)
    at = np.arange(length, dtype=np.int32)[None]
    table = np.zeros((1, 2, pages), np.int32)
    table[0, 0] = np.arange(pages)[::-1] + 1
    first = steps.logits(Run(tokens[:, :-1], np.where(at < prompt, at, -1), at * 0, table, tile=16), at)
    one = np.zeros((1, 1), np.int32)
    second = steps._through(Run(tokens[:, -1:], one + prompt, one, table, tile=1), one, None, whole_logits, "decode")
    return np.concatenate([np.asarray(first)[0, :prompt], np.asarray(second)[0]])


def _batched_reference(x: jax.Array, weight: jax.Array, name: str) -> jax.Array:
    dense = dequantize(weight, name)
    x = x[..., : dense.shape[-1]]
    return jnp.einsum("thk,hnk->thn", x.astype(jnp.float32), dense, precision="highest").astype(x.dtype)


def _matmul_reference(x: jax.Array, weight: jax.Array, name: str, *, dtype=jnp.bfloat16) -> jax.Array:
    return quantized_matmul.quantized_matmul_reference(x, weight, name, dtype)


def _experts_reference(x, ids, weights, gate, up, down, names, *, offset=0):
    wide, width = x.astype(jnp.float32), gate.shape[1] * 64
    g, u = (jnp.einsum("td,efd->tef", wide, dequantize(w, names[0]), precision="highest") for w in (gate, up))
    inputs = jax.lax.dynamic_slice_in_dim(dequantize(down, names[1]), offset, width, axis=2)
    out = jnp.einsum("tef,edf->ted", jax.nn.silu(g) * u, inputs, precision="highest")
    return jnp.einsum("ted,tk,tke->td", out, weights, jax.nn.one_hot(ids, gate.shape[0]), precision="highest")


def _gated_reference(x, gate, up, name):
    g, u = (quantized_matmul.quantized_matmul_reference(x, w, name) for w in (gate, up))
    return (jax.nn.silu(g) * u).astype(x.dtype)


def _attention_reference(*operands, scale, tile):
    return mla_attention.mla_attention_reference(*operands, scale).astype(jnp.bfloat16)


def _plan_reference(*where, **_):
    return where


def _prefill_reference(q_nope, q_rope, k_b, v_b, names, pages, where, into, *, scale):
    out = mla_prefill.mla_prefill_reference(q_nope, q_rope, k_b, v_b, names, pages, *where, scale)
    return jnp.where((where[-1] >= 0)[:, None, None], out, into).astype(into.dtype)


@contextmanager
def references():
    """What the model's operations call in place of the kernels: fast on CPUs, and no interpreter's state."""
    with (
        mock.patch.object(quantized_matmul, "quantized_matmul", _matmul_reference),
        mock.patch.object(quantized_matmul, "batched_matmul", _batched_reference),
        mock.patch.object(grouped_matmul, "grouped_mlp", _experts_reference),
        mock.patch.object(grouped_matmul, "gated_matmul", _gated_reference),
        mock.patch.object(mla_attention, "mla_attention", _attention_reference),
        mock.patch.object(rms_norm, "rms_norm", rms_norm.rms_norm_reference),
        mock.patch.object(rms_norm, "add_rms_norm", rms_norm.add_rms_norm_reference),
        mock.patch.object(latents, "write_latents", latents.write_latents_reference),
        mock.patch.object(router, "choose_experts", router.choose_experts_reference),
        mock.patch.object(mla_prefill, "mla_prefill", _prefill_reference),
        mock.patch.object(prefill_plan, "prefill_plan", _plan_reference),
    ):
        yield


@contextmanager
def interpreted():
    """The kernels themselves, in the interpreter."""
    kernels = (
        (quantized_matmul, "quantized_matmul"),
        (quantized_matmul, "batched_matmul"),
        (grouped_matmul, "grouped_mlp"),
        (grouped_matmul, "gated_matmul"),
        (mla_attention, "mla_attention"),
        (rms_norm, "rms_norm"),
        (rms_norm, "add_rms_norm"),
        (latents, "write_latents"),
        (router, "choose_experts"),
    )
    before = [getattr(module, name) for module, name in kernels]
    try:
        for (module, name), kernel in zip(kernels, before, strict=True):
            setattr(module, name, partial(kernel, interpret=True))
        yield
    finally:
        for (module, name), kernel in zip(kernels, before, strict=True):
            setattr(module, name, kernel)


@contextmanager
def prompts_interpreted():
    """The kernels of expanded attention in the interpreter, references in place of all others."""
    attend, plan = partial(mla_prefill.mla_prefill, interpret=True), prefill_plan.prefill_plan
    with (
        references(),
        mock.patch.object(mla_prefill, "mla_prefill", attend),
        mock.patch.object(prefill_plan, "prefill_plan", plan),
    ):
        yield
