# SPDX-License-Identifier: Apache-2.0
"""What a run computes with: number types, implementations, threads, lengths of steps, programs that are kept."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ktx_ffi

from ktx_jax.engine.scheduler import Limits
from ktx_jax.errors import KtxError
from ktx_jax.sharding.choices import IMPLEMENTATIONS
from ktx_jax.sharding.gpu_kernels import PALLAS, why_not_in, why_not_on
from ktx_jax.sharding.load import Implementations, op_of
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.run import capability

log = logging.getLogger("ktx_jax")

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory between runs, unless JAX is already told where."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "ktx-jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def dtype_of(name: str) -> Any:
    """The number type of a name: "float32" or "bfloat16"; raises `KtxError` for others."""
    if name not in _DTYPES:
        raise KtxError(f"dtype should be one of {', '.join(_DTYPES)}; found {name!r}")
    return _DTYPES[name]


def choose_implementations(name: str | None, devices: Sequence[jax.Device], dtype: str) -> Implementations:
    """What computes on the devices, and on the host beside them; None for the fastest that runs.

    Raises `KtxError` where what is asked for cannot run.
    """
    if name is not None and name not in IMPLEMENTATIONS:
        raise KtxError(f"implementation should be one of {', '.join(IMPLEMENTATIONS)}; found {name!r}")
    if devices[0].platform != "cpu":
        return Implementations(_on_gpus(name, devices, dtype), _on_host())
    if name == "pallas":
        raise KtxError(f"implementation 'pallas' computes on GPUs; the device is {devices[0]}")
    if name == "xla":
        return Implementations("xla", "xla")
    if name == "ffi" and not ktx_ffi.available():
        raise KtxError(f"implementation 'ffi' cannot run: {ktx_ffi.why_unavailable()}")
    return Implementations(*[_on_host()] * 2)


def _on_gpus(name: str | None, devices: Sequence[jax.Device], dtype: str) -> str:
    if name == "ffi":
        raise KtxError(f"implementation 'ffi' computes on CPUs; the device is {devices[0]}")
    if name == "xla":
        return name
    obstacle = why_not_on(capability(devices)) or why_not_in(dtype)
    if obstacle is None:
        return PALLAS
    if name is not None:
        raise KtxError(f"implementation 'pallas' cannot run: {obstacle}")
    log.warning("XLA computes: %s", obstacle)
    return "xla"


def _on_host() -> str:
    if ktx_ffi.available():
        return "ffi"
    log.warning("the CPU kernels cannot run, XLA computes in their place: %s", ktx_ffi.why_unavailable())
    return "xla"


def set_cpu_threads(count: int) -> None:
    """How many threads XLA, if it has none yet, and the CPU kernels compute with."""
    if count < 1:
        raise KtxError(f"cpu_threads should be at least 1; found {count}")
    os.environ["NPROC"] = str(count)  # read by XLA when it makes its thread pool
    if ktx_ffi.available():
        ktx_ffi.set_threads(count)


def limits_of(plan: Plan, implementations: Implementations, cache_tokens: int | None) -> Limits:
    """The sizes of a plan's steps, and a pool of pages for `cache_tokens` tokens in all (None: for every sequence)."""
    if cache_tokens is not None and cache_tokens < plan.context:
        raise KtxError(f"cache_tokens should be at least the context of {plan.context}; found {cache_tokens}")
    shards = plan.stages[0].data(plan.mesh)
    batch = -(-plan.batch // shards)
    prefill = {op_of(p, implementations, decode=False) for p in plan.parameters if p.path.endswith("self_attn.o_proj")}
    stream = plan.prefill_threshold
    # The CPU kernels compute every padded row, and take sequences of any length side by side.
    tile, growth = (1, 2) if prefill == {"ffi"} else (16, 4)
    limits = Limits(
        plan.context, batch, chunk=plan.chunk, tile=tile, growth=growth,
        stream_above=stream, shards=shards,
    )  # fmt: skip
    if cache_tokens is None:
        return limits
    pool = max(limits.pages_per_sequence, -(-cache_tokens // (shards * limits.page)))
    return replace(limits, pool=min(pool, limits.pages))
