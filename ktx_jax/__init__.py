# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2 models from GGUF files, in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktx_jax import distributed
    from ktx_jax.async_engine import AsyncEngine, DeadlineExceeded, EngineClosed, QueueFull, ReplyStream, Stats
    from ktx_jax.engine.branches import Window
    from ktx_jax.engine.grammar import Grammar
    from ktx_jax.engine.requests import SamplingParams
    from ktx_jax.engine.scoring import Score
    from ktx_jax.engine.windows import Perplexity
    from ktx_jax.errors import KtxError
    from ktx_jax.gguf.errors import GGUFError
    from ktx_jax.llm import LLM, Chunk, Completion, load_config
    from ktx_jax.model.config import Config
    from ktx_jax.sharding.plan import Plan
    from ktx_jax.sharding.rules import Rules
    from ktx_jax.tokenizer import Tokenizer

__all__ = [
    "LLM", "AsyncEngine", "Chunk", "Completion", "Config", "DeadlineExceeded", "EngineClosed", "GGUFError", "Grammar",
    "KtxError", "Perplexity", "Plan", "QueueFull", "ReplyStream", "Rules", "SamplingParams", "Score", "Stats",
    "Tokenizer", "Window", "distributed", "load_config",
]  # fmt: skip

_HOMES = {
    "ktx_jax.llm": ("LLM", "Chunk", "Completion", "load_config"),
    "ktx_jax.async_engine": ("AsyncEngine", "DeadlineExceeded", "EngineClosed", "QueueFull", "ReplyStream", "Stats"),
    "ktx_jax.engine.branches": ("Window",),
    "ktx_jax.engine.grammar": ("Grammar",),
    "ktx_jax.engine.requests": ("SamplingParams",),
    "ktx_jax.engine.scoring": ("Score",),
    "ktx_jax.engine.windows": ("Perplexity",),
    "ktx_jax.errors": ("KtxError",),
    "ktx_jax.gguf.errors": ("GGUFError",),
    "ktx_jax.model.config": ("Config",),
    "ktx_jax.sharding.plan": ("Plan",),
    "ktx_jax.sharding.rules": ("Rules",),
    "ktx_jax.tokenizer": ("Tokenizer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `ktx-jax --help` need not wait for JAX."""
    if name not in _HOME_OF and name != "distributed":
        raise AttributeError(f"module 'ktx_jax' has no attribute {name!r}")
    import importlib

    from ktx_jax.cuda_plugin import leave_out_cuda

    leave_out_cuda()
    if name == "distributed":
        return importlib.import_module("ktx_jax.distributed")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
