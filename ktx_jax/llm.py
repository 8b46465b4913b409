# SPDX-License-Identifier: Apache-2.0
"""`LLM`: a model from a GGUF file, ready to be asked."""

import logging
import numbers
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
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ktx_jax.chat import Message, encode_chat
from ktx_jax.distributed import meeting
from ktx_jax.engine.branches import Window
from ktx_jax.engine.engine import Engine
from ktx_jax.engine.hosts import FollowingSteps, fingerprint, make_steps
from ktx_jax.engine.reply import Chunk, follow
from ktx_jax.engine.requests import FinishReason, Request, SamplingParams, TokenLogprob
from ktx_jax.engine.scoring import Score
from ktx_jax.engine.stage import Dtypes
from ktx_jax.engine.windows import Perplexity, pair_windows, perplexity_windows, rolling_windows, token_ids
from ktx_jax.errors import KtxError
from ktx_jax.execution import choose_implementations, dtype_of, limits_of, set_cpu_threads, use_compilation_cache
from ktx_jax.gguf.architecture import check_architecture
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.model.capture import check_seen, fnmatch_all, tap, tracing
from ktx_jax.model.config import Config, config_from_gguf
from ktx_jax.model.modules import causal_logits
from ktx_jax.sharding.auto import Sizes
from ktx_jax.sharding.load import Implementations, Progress, load_model
from ktx_jax.sharding.mesh import bind
from ktx_jax.sharding.rules import Rules
from ktx_jax.sharding.run import plan_run
from ktx_jax.tokenizer import Tokenizer

log = logging.getLogger("ktx_jax")

Prompt: TypeAlias = str | Sequence[int]

DEFAULT_CONTEXT = 4096


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
      context: the most tokens of a sequence, prompt and reply together; None for 4096, or what the model was made for
        if that is less.
      batch: the most sequences that run at once.
      cache_tokens: how many tokens the cache holds, at least one context; None for `batch` whole contexts. With fewer,
        sequences that do not fit together give way to older ones and are computed anew.
      dtype: "float32" (exact) or "bfloat16", of activations and cache. Weights stay as the file has them.
      implementation: of the heavy operations: "xla" is exact and runs everywhere, "ffi" is fast on CPUs, "pallas" is
        for Hopper GPUs, in bfloat16. None takes the fast one where it runs. With "ffi", activations become integers
        where they meet quantized weights: of 8 bits, or of 15 with `dtype="float32"`, for up to twice the time; between
        operations they are float32 with either.
      override: metadata values laid over the file's, e.g. `{"expert_group_count": 4}`.
      rules: which part lies on which device and how it is cut: a rule file, `Rules`, or "auto", which splits the layers
        over all devices by their free memory. None for one device.
      devices: those that `gpu:0`, `gpu:1`, ... stand for; None for all of JAX's default ones.
      chat_template: a Jinja template for `chat`, in place of the file's own.
      cpu_threads: threads that compute on the CPU, for the whole process; None for one a physical core. XLA's own heed
        it if no JAX device has been used yet.
      repack: with "ffi", copy weights into the kernels' own layout; False reads the mapped file as it is: it starts at
        once and computes more slowly.
      progress: called with bytes loaded and bytes in all.

    Raises:
      GGUFError: the file is not a whole, well-formed DeepSeek-V2 model.
      RulesError: the rules do not suit the model; everything that is wrong, each with its line.
      KtxError: an argument is out of range, or the model does not fit on the devices.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        context: int | None = None,
        batch: int = 8,
        cache_tokens: int | None = None,
        dtype: str = "bfloat16",
        implementation: str | None = None,
        override: Mapping[str, Any] | None = None,
        rules: str | os.PathLike[str] | Rules | None = None,
        devices: Sequence[jax.Device] | None = None,
        chat_template: str | None = None,
        cpu_threads: int | None = None,
        repack: bool = True,
        progress: Progress | None = None,
    ):
        begun = time.perf_counter()
        self.dtype = dtype_of(dtype)
        if cpu_threads is not None:
            set_cpu_threads(cpu_threads)
        devices = list(jax.devices() if devices is None else devices)
        if not devices:
            raise KtxError("devices should be a list of at least one device")
        use_compilation_cache()
        with meeting() as link, open_gguf(path) as gguf:
            implementations = choose_implementations(implementation, devices, dtype)
            self.implementation = implementations.devices
            check_architecture(gguf)
            self.path = Path(path)
            self.config = config_from_gguf(gguf.metadata, gguf.tensors, override=override, file=str(path))
            longest = self.config.max_position_embeddings
            wanted = Sizes(min(DEFAULT_CONTEXT, longest) if context is None else context, batch, dtype)
            self.plan = plan_run(gguf, self.config, rules, devices, wanted, implementation=implementations.devices)
            limits = limits_of(self.plan, implementations, cache_tokens)
            self.tokenizer = Tokenizer.from_gguf(gguf)
            self.chat_template: str | None = chat_template or gguf.metadata.get("tokenizer.chat_template")
            self._devices = devices
            bound = bind(self.plan, devices)
            if link is not None:
                link.agree(fingerprint(self.plan, limits, implementations))
            self._model = load_model(
                gguf, self.plan, bound, implementations=implementations, repack=repack, progress=progress
            )
            # Between the CPU kernels float32 costs nothing; what is rounded there is their inputs and the cache.
            activations = jnp.float32 if implementations.devices == "ffi" else self.dtype
            steps = make_steps(self.config, self._model, limits, dtypes=Dtypes(activations, self.dtype), link=link)
        self._engine = Engine(self.config, steps, limits, eos_ids=self.tokenizer.eos_ids)
        self.load_seconds = time.perf_counter() - begun

    @property
    def context(self) -> int:
        """The most tokens of a sequence, prompt and reply together."""
        return self._engine.limits.context

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
        pieces: dict[Request, list[Chunk]] = {request: [] for request in requests}
        live = {request: follow(self._engine, self.tokenizer, request) for request in requests}
        try:
            while live:
                ready = [request for request in live if request.unread or request.finish_reason is not None]
                for request in ready:
                    pieces[request].append(next(live[request]))
                    if pieces[request][-1].finish_reason is not None:
                        del live[request]
                if not ready:
                    self._engine.step()
        finally:
            for request in requests:
                self._engine.abort(request)
        return [_completion(request, pieces[request]) for request in requests]

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

    def score(
        self, pairs: Sequence[tuple[Prompt, Prompt]], done: Callable[[int, Score], object] | None = None
    ) -> list[Score]:
        """How likely each continuation is after its context: pairs of texts or token ids, see `pair_windows`.

        Beginnings that pairs share are computed once, and all is packed into full steps, in whatever order. `done` is
        called with a pair's place and score as soon as it is known.

        Raises:
          KtxError: a pair does not fit the context, or its context has no token. Nothing has been computed then.
        """
        return self.score_windows(pair_windows(self.tokenizer, pairs), done)

    def rolling(self, texts: Prompt | Sequence[Prompt]) -> list[Score]:
        """How likely each text is from its beginning on; one longer than the context window by window."""
        windows = [rolling_windows(self.tokenizer, text, self._engine.limits.context) for text in _as_list(texts)]
        scores = iter(self.score_windows([window for some in windows for window in some]))
        return [Score.join([next(scores) for _ in some]) for some in windows]

    def perplexity(self, text: Prompt, window: int = 512, stride: int | None = None) -> Perplexity:
        """The perplexity of a text: by default llama.cpp's figure, with `stride` that of sliding windows.

        See `perplexity_windows`; raises `KtxError` as that does, or if a window is longer than the context.
        """
        windows = perplexity_windows(self.tokenizer, text, window, stride)
        if windows[0].length > self.context:
            raise KtxError(
                f"a window of {window} tokens does not fit the context of {self.context}: "
                f"load the model with `context={window}`, or give a smaller window"
            )
        scores = self.score_windows(windows)
        return Perplexity.of([score.logprobs for score in scores])

    def score_windows(
        self, windows: Sequence[Window], done: Callable[[int, Score], object] | None = None
    ) -> list[Score]:
        """`score`, of token ids that are cut already."""
        scores: dict[int, Score] = {}

        def take(index: int, score: Score) -> None:
            scores[index] = score
            if done is not None:
                done(index, score)

        self._engine.score(windows, take)
        return [scores[index] for index in range(len(windows))]

    def follow(self) -> None:
        """In a process other than process 0: computes its part of every step, until process 0 closes the model or ends.

        Raises:
          KtxError: this is process 0, or the only one.
        """
        steps = self._engine.steps
        if not isinstance(steps, FollowingSteps):
            raise KtxError("follow() is for the processes other than process 0")
        steps.follow()

    def close(self) -> None:
        """In process 0: lets the other processes of the run go. The end of the program does it too."""
        self._engine.steps.close()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text with its special tokens added, ids as they are."""
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else token_ids(prompt)

    def encode_chat(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids of a conversation, up to where the reply begins.

        Raises:
          KtxError: the model has no chat template, or the template refuses the messages.
        """
        return encode_chat(self.tokenizer, self.chat_template, messages, tools=tools)

    def functional(self, capture: Sequence[str] = ()) -> tuple[Callable[..., Any], Any]:
        """The model as a pure function `fn(params, tokens, added={})` and its parameters.

        The function computes every position's logits [T, V] of one sequence `tokens` [T], without a cache, over the XLA
        path; it can be jitted, mapped, and differentiated with respect to activations. The parameters are a pytree of
        arrays; where this model runs on the CPU kernels, they are read from the file anew, for XLA.

        Args:
          capture: paths of modules, `*` for anything. With any, the function gives the logits and a mapping of module
            path to the module's value: of a router the expert ids and weights [T, k], else the array it computes.

        `added` maps module paths to arrays that are added to the modules' values: a gradient with respect to them is
        that of the value, and with "model.embed_tokens" they are a soft prompt.

        Raises:
          KtxError: the model runs in several stages. From the function: no module has such a path, or it has no value
            of its own; `tokens` is not one sequence of ids.
        """
        if isinstance(capture, str):
            raise KtxError(f"capture should be a list of paths; found the text {capture!r}")
        if len(self._model.stages) > 1:
            raise KtxError("functional() needs a model in one stage: load it with other rules, or none")
        model, dtype = self._model, self.dtype
        if self.implementation != "xla":
            with open_gguf(self.path) as gguf:
                xla, plan = Implementations("xla", "xla"), self.plan.on_xla()
                model = load_model(gguf, plan, bind(plan, self._devices), implementations=xla)
        [stage] = model.stages
        graphdef, params = stage.prefill.graphdef, stage.prefill.state

        def traced(params: Any, tokens: Int[Array, " T"], added: Mapping[str, Array]) -> Any:
            whole = nnx.merge(graphdef, params)
            if not (capture or added):
                return causal_logits(whole, tokens, dtype=dtype)
            tap(whole, capture, added)
            with tracing(added) as trace:
                logits = causal_logits(whole, tokens, dtype=dtype)
            check_seen(trace.seen, (*capture, *added))
            if patterns := sorted(path for path in added if path not in trace.seen):
                raise KtxError(f"`added` takes whole paths of modules; found {patterns[0]!r}")
            wanted = {path: value for path, value in trace.seen.items() if any(fnmatch_all([path], p) for p in capture)}
            return (logits, wanted) if capture else logits

        if stage.mesh.size > 1:
            specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
            everywhere = PartitionSpec()
            inputs = (specs, everywhere, everywhere)
            traced = jax.shard_map(
                traced, mesh=stage.mesh, in_specs=inputs, out_specs=everywhere, check_vma=False
            )  # fmt: skip

        def fn(params: Any, tokens: Int[Array, " T"], added: Mapping[str, Array] | None = None) -> Any:
            tokens = jnp.asarray(tokens)
            if tokens.ndim != 1 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
                raise KtxError(
                    f"tokens should be the ids of one sequence, whole numbers [T]; found {tokens.dtype} "
                    f"{list(tokens.shape)} (jax.vmap maps the function over a batch)"
                )
            return traced(params, tokens, added or {})

        return fn, params

    def _stream(self, prompt: list[int], params: SamplingParams) -> Iterator[Chunk]:
        # Queued when the first piece is asked for: a generator that is dropped before then could not take it back.
        yield from follow(self._engine, self.tokenizer, self._engine.add(prompt, params))


def _completion(request: Request, chunks: Sequence[Chunk]) -> Completion:
    wanted = request.params.logprobs is not None
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        finish_reason=chunks[-1].finish_reason or "abort",
        prompt_tokens=len(request.prompt),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs) if wanted else None,
    )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | bytes):
        return [prompts]
    whole: list[Any] = list(prompts)
    return [whole] if whole and isinstance(whole[0], numbers.Integral) else whole
