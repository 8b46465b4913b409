# SPDX-License-Identifier: Apache-2.0
"""Whole models on the GPU kernels, their weights random and made on the device: what `gpu.py` runs last."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktx_jax.engine.engine import Engine
from ktx_jax.engine.requests import SamplingParams
from ktx_jax.engine.scheduler import Limits
from ktx_jax.engine.stage import Dtypes
from ktx_jax.engine.step import Steps
from ktx_jax.gguf.random_blocks import random_pieces
from ktx_jax.presets import Shape, preset_config
from ktx_jax.quantized import PlanesArray, QuantizedArray
from ktx_jax.sharding.load import Implementations, Loaded, Part, abstract_stage
from ktx_jax.sharding.mesh import one_device_mesh
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.rules import Rules
from ktx_jax.sharding.run import free_memory
from pallas_kernels.formats import FORMATS
from pallas_kernels.unpack import dequantize

_HOST = "xla"  # nothing lies there


@dataclass(frozen=True)
class Run:
    """One measurement of a model.

    Attributes:
      shape, quant: the model, by its preset's name or its sizes, under a mix of types.
      batch: sequences at once; prompt, reply: tokens of each.
      goal: tokens a second, of the prompt where the reply is one token, else of the replies; None for none.
    """

    name: str
    shape: str | Shape
    quant: str
    batch: int
    prompt: int
    reply: int
    goal: float | None = None


RUNS = (
    Run("V2-Lite Q4_K_M, decode, batch 1", "v2-lite", "q4_k_m", 1, 64, 256, 500),
    Run("V2-Lite Q4_K_M, decode, batch 64", "v2-lite", "q4_k_m", 64, 64, 128, 8000),
    Run("V2-Lite Q4_K_M, prompt of 2048", "v2-lite", "q4_k_m", 1, 2048, 1),
    Run("V2.5 IQ4_XS, decode, batch 1", "v2.5", "iq4_xs", 1, 64, 128, 100),
    Run("V2.5 IQ4_XS, prompt of 2048", "v2.5", "iq4_xs", 1, 2048, 1, 5000),
)


def random_bits(key: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Records of random bits; the scales are not set. BF16: normal values."""
    shape = FORMATS[name].record_shape(shape)
    if name == "BF16":
        return jax.lax.bitcast_convert_type(jax.random.normal(key, (*shape, 2), jnp.bfloat16), jnp.int32)
    return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint32), jnp.int32)


def with_scales(records: jax.Array, name: str, d: jax.Array | float) -> jax.Array:
    """Records with d in all scales, and minima that make the mean of a group of equal quants zero.

    An array d, `[..., 64, 2 or 1]`, holds for each row of each record a value for each of its scales, or only one where
    the second is that of the minima.
    """
    fmt = FORMATS[name]
    if name == "BF16":
        return records
    middle = (2 ** (fmt.quant_rows // 2 + fmt.high_rows // 2) - 1) / 2
    pair = jnp.array([1.0, middle if fmt.minima else 1.0]) * d
    word = jax.lax.bitcast_convert_type(pair.astype(jnp.float16), jnp.int32)
    return records.at[..., fmt.factor_at if fmt.factor_rows else fmt.scale_at, :].set(word)


@cache
def _unit(name: str) -> float:
    """The standard deviation of such weights under d = 1."""
    if name == "BF16":
        return 1.0
    with jax.ensure_compile_time_eval():
        records = with_scales(random_bits(jax.random.key(0), name, (64, 1024)), name, 1.0)
        return float(jnp.sqrt(jnp.mean(dequantize(records, name) ** 2)))


def random_weight(key: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Records of a weight whose products keep the size of what it meets: a standard deviation of 1 / sqrt(K)."""
    std = shape[-1] ** -0.5
    if name == "BF16":
        bits = jax.random.normal(key, (*FORMATS[name].record_shape(shape), 2), jnp.bfloat16) * jnp.bfloat16(std)
        return jax.lax.bitcast_convert_type(bits, jnp.int32)
    records = random_bits(key, name, shape)
    # No two alike, so that one taken for another is seen.
    uneven = (*records.shape[:-2], 64, 1 if FORMATS[name].minima else 2)
    factors = jax.random.uniform(jax.random.fold_in(key, 1), uneven, minval=0.5, maxval=1.5)
    return with_scales(records, name, factors * (std / _unit(name)))


def _filled(key: jax.Array, value: Any) -> Any:
    """Random values in the place of a parameter's shapes."""
    if isinstance(value, PlanesArray):
        name, shape = value.ggml_type.name, value.shape
        _unit(name)
        make = jax.jit(partial(random_weight, name=name, shape=shape), out_shardings=value.records.sharding)
        return PlanesArray(make(key), value.ggml_type)
    if isinstance(value, QuantizedArray):
        rng, shape = np.random.default_rng(0), value.shape
        pieces = list(random_pieces(rng, value.ggml_type, int(np.prod(shape)), shape[-1] ** -0.5))
        blocks = np.concatenate(pieces).reshape(value.data.shape)
        return QuantizedArray(jax.device_put(blocks, value.data.sharding), value.ggml_type)
    if value.ndim == 1:
        return jax.device_put(jnp.ones(value.shape, value.dtype), value.sharding)
    return jax.device_put(jax.random.normal(key, value.shape, value.dtype) * value.shape[-1] ** -0.5, value.sharding)


def random_model(plan: Plan, device: jax.Device) -> Loaded:
    """A plan's only stage on a device."""
    mesh = one_device_mesh(device)
    stage = abstract_stage(plan, 0, mesh, mesh, Implementations(_HOST, _HOST))
    filled, key = [], jax.random.key(0)
    for i, (path, leaf) in enumerate(nnx.to_flat_state(stage.decode.state)):
        filled.append((path, leaf.replace(_filled(jax.random.fold_in(key, i), leaf.get_value()))))
    part = Part(stage.decode.graphdef, nnx.from_flat_state(filled))
    return Loaded((replace(stage, prefill=part, decode=part),), ())


def plan_of(run: Run) -> Plan:
    """Everything on the kernels, on one device."""
    context, rules = -(-(run.prompt + run.reply + 1) // 64) * 64, Rules.from_text("rules: []", "one device")
    return Plan.from_rules(
        preset_config(run.shape), rules, types=run.quant, context=context, batch=run.batch, implementation="pallas"
    )


@dataclass(frozen=True)
class Speed:
    """Tokens a second of the prompts, and of the replies after their first tokens (0 where there are none)."""

    prompt: float
    reply: float


def measure(plan: Plan, model: Loaded, run: Run) -> Speed:
    """Of a run after one that compiled everything: through the engine, from token to token as a user has it."""
    limits = Limits(plan.context, run.batch, chunk=min(plan.chunk, run.prompt), tile=16, growth=4)
    engine = Engine(
        plan.config,
        Steps(plan.config, model, limits, dtypes=Dtypes(jnp.bfloat16, jnp.bfloat16)),
        limits,
        eos_ids=frozenset(),
    )
    params = SamplingParams(max_tokens=run.reply, temperature=0, ignore_eos=True)
    speed = Speed(0.0, 0.0)
    for repeat in range(2):
        # Other prompts each time: the prefix cache would spare what has been seen.
        rng = np.random.default_rng(repeat)
        prompts = rng.integers(0, plan.config.vocab_size, (run.batch, run.prompt))
        begun = time.perf_counter()
        requests = [engine.add([int(token) for token in prompt], params) for prompt in prompts]
        while not all(request.length > run.prompt for request in requests):
            engine.step()
        first, drawn = time.perf_counter(), sum(request.length - run.prompt for request in requests)
        while not all(request.finish_reason for request in requests):
            engine.step()
        ended, left = time.perf_counter(), run.batch * run.reply - drawn
        speed = Speed(run.batch * run.prompt / (first - begun), left / (ended - first) if left else 0.0)
    return speed


def run_models(runs: tuple[Run, ...], device: jax.Device, say: Callable[[str], object] = print) -> list[dict]:
    """Measures each; a model is made once for the runs in a row that share it. One that has no room is left out."""
    results: list[dict] = []
    made: tuple[Any, Loaded] | None = None
    for run in runs:
        plan, what = plan_of(run), (run.shape, run.quant)
        if made is not None and made[0] != what:
            made = None
        need = plan.needs["gpu:0"].total
        if made is None and need > free_memory(device, 1):
            say(f"{run.name}: needs {need / 1e9:.0f} GB, more than this device has free: left out")
            continue
        if made is None:
            made = what, random_model(plan, device)
        speed = measure(plan, made[1], run)
        got = speed.prompt if run.reply == 1 else speed.reply
        of_goal = "" if run.goal is None else f", goal {run.goal:.0f}"
        say(f"{run.name:40} {got:9.1f} tokens/s{of_goal}")
        results.append({"name": run.name, "goal": run.goal, **asdict(speed)})
    return results
