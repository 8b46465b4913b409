# SPDX-License-Identifier: Apache-2.0
"""`LLM`: a model from a GGUF file, ready to be asked."""

import numbers
import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ktx_jax.chat import Message, encode_chat
from ktx_jax.engine.engine import Engine
from ktx_jax.engine.reply import Chunk, follow
from ktx_jax.engine.requests import FinishReason, Request, SamplingParams, TokenLogprob
from ktx_jax.engine.scheduler import Limits
from ktx_jax.errors import KtxError
from ktx_jax.gguf.architecture import check_architecture
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.model.config import Config, config_from_gguf
from ktx_jax.model.modules import causal_logits
from ktx_jax.sharding.load import Progress, load_model
from ktx_jax.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int]

IMPLEMENTATIONS = ("xla",)
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Completion:
    """A whole reply.

    Attributes:
      text: the reply, without end tokens and stop texts.
      token_ids: every token generated, an end token included.
      finish_reason: "stop" (end token or stop text) or "length".
      prompt_tokens: how many tokens the prompt had.
      logprobs: one for each token, if asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None


def load_config(path: str | os.PathLike[str], override: Mapping[str, Any] | None = None) -> Config:
    """The configuration of the model at `path` (a GGUF file, any part of a split set, or a directory); headers only.

    Raises:
      GGUFError: the file is not a whole, well-formed DeepSeek-V2 model.
    """
    with open_gguf(path) as gguf:
        check_architecture(gguf)
        return config_from_gguf(gguf.metadata, gguf.tensors, override=override, file=str(path))


class LLM:
    """A DeepSeek-V2 model.

    Args:
      path: a GGUF file, any part of a split set, or a directory that holds one model.
      context: the most tokens of a sequence, prompt and reply together.
      batch: the most sequences that run at once; the cache is made for `batch` whole contexts.
      dtype: "float32" (exact) or "bfloat16", of activations and cache. Weights stay as the file has them.
      implementation: of the heavy operations; "xla" is exact and runs everywhere. None chooses.
      override: metadata values laid over the file's, e.g. `{"expert_group_count": 4}`.
      devices: the device to run on, as a list of one; None for JAX's default.
      chat_template: a Jinja template for `chat`, in place of the file's own.
      progress: called with bytes loaded and bytes in all.

    Raises:
      GGUFError: the file is not a whole, well-formed DeepSeek-V2 model.
      KtxError: an argument is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        context: int = 4096,
        batch: int = 8,
        dtype: str = "bfloat16",
        implementation: str | None = None,
        override: Mapping[str, Any] | None = None,
        devices: Sequence[jax.Device] | None = None,
        chat_template: str | None = None,
        progress: Progress | None = None,
    ):
        begun = time.perf_counter()
        self.dtype = _dtype(dtype)
        self.implementation = _implementation(implementation)
        self.device = _device(devices)
        use_compilation_cache()
        with open_gguf(path) as gguf:
            check_architecture(gguf)
            self.path = Path(path)
            self.config = config_from_gguf(gguf.metadata, gguf.tensors, override=override, file=str(path))
            limits = _limits(self.config, context, batch)
            self.tokenizer = Tokenizer.from_gguf(gguf)
            self.chat_template: str | None = chat_template or gguf.metadata.get("tokenizer.chat_template")
            self._graphdef, self._state = load_model(gguf, self.config, device=self.device, progress=progress)
        self._engine = Engine(
            self.config, self._graphdef, self._state, limits,
            dtype=self.dtype, device=self.device, eos_ids=self.tokenizer.eos_ids,
        )  # fmt: skip
        self.load_seconds = time.perf_counter() - begun

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]:
        """Completes each prompt (text, or token ids taken as they are); all run together, `batch` at a time.

        Raises:
          KtxError: a prompt is empty or does not fit the context. Nothing has been computed then.
        """
        params = params or SamplingParams()
        ids = [self.encode(prompt) for prompt in _as_list(prompts)]
        for prompt in ids:
            self._engine.check_prompt(prompt, room=1)
        requests = [self._engine.add(prompt, params) for prompt in ids]
        try:
            return [self._complete(request) for request in requests]
        finally:
            for request in requests:
                self._engine.abort(request)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Completes one prompt piece by piece; the last piece has the finish reason. Errors come before the first."""
        return self._stream(self._engine.check_prompt(self.encode(prompt), room=1), params or SamplingParams())

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, tools: Sequence[Any] | None = None
    ) -> Completion:
        """Replies to a conversation, a list of `{"role": ..., "content": ...}`, through the model's chat template."""
        [reply] = self.generate([self.encode_chat(messages, tools=tools)], params)
        return reply

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, tools: Sequence[Any] | None = None
    ) -> Iterator[Chunk]:
        """`chat`, piece by piece."""
        return self.stream(self.encode_chat(messages, tools=tools), params)

    def logits(self, tokens: Prompt) -> Float[np.ndarray, "T vocab"]:
        """Logits after each token of one sequence, float32."""
        return self._engine.logits(self.encode(tokens))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text with its special tokens added, ids as they are."""
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else [operator.index(token) for token in prompt]

    def encode_chat(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids of a conversation, up to where the reply begins.

        Raises:
          KtxError: the model has no chat template, or the template refuses the messages.
        """
        return encode_chat(self.tokenizer, self.chat_template, messages, tools=tools)

    def functional(self) -> tuple[Callable[[Any, Int[Array, " T"]], Float[Array, "T vocab"]], Any]:
        """The model as a pure function `fn(params, tokens)` and its parameters.

        The function computes every position's logits of one sequence, without a cache, over the XLA path; it can be
        jitted, mapped, and differentiated with respect to activations. The parameters are a pytree of arrays.
        """
        graphdef, dtype = self._graphdef, self.dtype

        def fn(params: Any, tokens: Int[Array, " T"]) -> Float[Array, "T vocab"]:
            return causal_logits(nnx.merge(graphdef, params), tokens, dtype=dtype)

        return fn, self._state

    def _stream(self, prompt: list[int], params: SamplingParams) -> Iterator[Chunk]:
        # Queued when the first piece is asked for: a generator that is dropped before then could not take it back.
        yield from follow(self._engine, self.tokenizer, self._engine.add(prompt, params))

    def _complete(self, request: Request) -> Completion:
        chunks = list(follow(self._engine, self.tokenizer, request))
        wanted = request.params.logprobs is not None
        return Completion(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=chunks[-1].finish_reason or "abort",
            prompt_tokens=len(request.prompt),
            logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs) if wanted else None,
        )


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory between runs, unless JAX is already told where."""
    if jax.config.jax_compilation_cache_dir is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "ktx-jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], numbers.Integral) else prompts


def _dtype(name: str) -> Any:
    if name not in _DTYPES:
        raise KtxError(f"dtype should be one of {', '.join(_DTYPES)}; found {name!r}")
    return _DTYPES[name]


def _implementation(name: str | None) -> str:
    if name is not None and name not in IMPLEMENTATIONS:
        raise KtxError(f"implementation should be one of {', '.join(IMPLEMENTATIONS)}; found {name!r}")
    return name or "xla"


def _device(devices: Sequence[jax.Device] | None) -> jax.Device:
    if devices is None:
        return jax.devices()[0]
    if len(devices) != 1:
        raise KtxError(f"devices should be a list of one device; found {len(devices)}")
    return devices[0]


def _limits(config: Config, context: int, batch: int) -> Limits:
    if not 1 < context <= config.max_position_embeddings:
        raise KtxError(f"context should be from 2 to the model's {config.max_position_embeddings}; found {context}")
    if batch < 1:
        raise KtxError(f"batch should be at least 1; found {batch}")
    return Limits(context, batch)
