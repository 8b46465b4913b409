# SPDX-License-Identifier: Apache-2.0
"""The model `ktx` of lm-evaluation-harness, and runs of its tasks that survive being killed."""

import json
import os
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from ktx_jax.chat import render_chat
from ktx_jax.engine.branches import Window
from ktx_jax.engine.reply import Chunk
from ktx_jax.engine.requests import SamplingParams
from ktx_jax.engine.scoring import Score
from ktx_jax.engine.windows import agreement, rolling_windows
from ktx_jax.errors import KtxError
from ktx_jax.evaluate.identity import digest, model_identity
from ktx_jax.evaluate.journal import Journal
from ktx_jax.evaluate.perplexity import Advance
from ktx_jax.llm import LLM


class HarnessLM(TemplateLM):
    """An `LLM` that lm-eval's tasks can ask.

    Args:
      pretrained: a model file, or an `LLM` that is loaded.
      journal: where answers are kept and found; None keeps them in memory.
      advance: called with tokens done and in all, for each kind of request.
      options: arguments of `LLM`, if `pretrained` is a file. lm-eval's own `batch_size` and `device` are not used.
    """

    def __init__(
        self,
        pretrained: str | LLM,
        *,
        journal: Journal | None = None,
        advance: Advance | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **options: Any,
    ):
        super().__init__()
        self.llm = LLM(pretrained, **options) if isinstance(pretrained, str) else pretrained
        self._journal = Journal(None, {}) if journal is None else journal
        self._advance = advance or (lambda done, total: None)
        self._drawn: Counter[str] = Counter()

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return self.llm.plan.context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self.llm.tokenizer.eos_id is None:
            raise KtxError("the model names no token that ends a text")
        return self.llm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text without context."""
        first = self.llm.tokenizer.bos_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches of prompts."""
        return digest(f"{self.llm.path} {self.llm.chat_template}")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default with those that begin a text, unless the text has them."""
        bos = self.llm.tokenizer.bos_id
        begun = bos is not None and string.startswith(self._name(bos))
        return self.llm.tokenizer.encode(string, not begun if add_special_tokens is None else add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own template."""
        return self.llm.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        ids = (self.llm.tokenizer.bos_id, self.llm.tokenizer.eos_id)
        bos, eos = ("" if i is None else self._name(i) for i in ids)
        return render_chat(
            self.llm.chat_template, chat_history, bos_token=bos, eos_token=eos,
            add_generation_prompt=add_generation_prompt,
        )  # fmt: skip

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval puts in its results about the model."""
        return {"model": "ktx", "model_args": {"pretrained": str(self.llm.path)}, **model_identity(self.llm)}

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval; but where a token spans the seam, so that nothing of the continuation is left after the context's
        tokens, it is scored from that token on. Nothing would be certain, and every other answer less likely."""
        before, after = super()._encode_pair(context, continuation)
        if after or not continuation:
            return before, after
        whole = self.tok_encode(context + continuation)
        start = agreement(before, whole)
        return whole[:start] or [self.prefix_token_id], whole[start:]

    def _name(self, token: int) -> str:
        return self.llm.tokenizer.token_bytes(token).decode(errors="replace")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Continuations after their contexts."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Scores continuations; where context and continuation are too long together, the end of them counts."""
        windows = []
        for _, context, continuation in requests:
            tokens = np.asarray([*context, *continuation][-(self.max_length + 1) :], np.int32)
            windows.append(Window(tokens, max(len(tokens) - len(continuation), 1)))
        return [(score[0], score[1]) for score in self._scores("loglikelihood", [[window] for window in windows])]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Whole texts, each token scored once, from the beginning-of-text token on."""
        windows = [rolling_windows(self.llm.tokenizer, request.args[0], self.max_length) for request in requests]
        return [score[0] for score in self._scores("rolling", windows)]

    def _scores(self, kind: str, texts: Sequence[Sequence[Window]]) -> list[list[Any]]:
        """[log-probability, is greedy] of each text, given in windows; those in the journal are not computed."""
        keys = [_key(kind, [[window.tokens.tolist(), window.start] for window in windows]) for windows in texts]
        fresh = {key: windows for key, windows in zip(keys, texts, strict=True) if key not in self._journal}
        flat = [(key, window) for key, windows in fresh.items() for window in windows]
        parts: dict[str, dict[int, Score]] = {key: {} for key in fresh}
        total = sum(window.length for windows in texts for window in windows)
        done = total - sum(window.length for _, window in flat)

        def keep(index: int, score: Score) -> None:
            nonlocal done
            key, window = flat[index]
            parts[key][index] = score
            done += window.length
            if len(parts[key]) == len(fresh[key]):
                self._keep(key, [parts[key][at] for at in sorted(parts[key])])
            self._advance(done, total)

        self._advance(done, total)
        for key, windows in fresh.items():
            if not windows:
                self._keep(key, [])
        self.llm.score_windows([window for _, window in flat], keep)
        return [self._journal[key] for key in keys]

    def _keep(self, key: str, parts: list[Score]) -> None:
        whole = Score.join(parts)
        self._journal.add(key, [whole.logprob, whole.is_greedy])

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies, up to a stop text, an end token or the number of tokens that the task gives."""
        asked = [self._generation(*request.args) for request in requests]
        fresh = {one.key: one for one in asked if one.key not in self._journal}
        total = sum(len(one.prompt) for one in {one.key: one for one in asked}.values())
        done = total - sum(len(one.prompt) for one in fresh.values())
        waiting = deque(sorted(fresh.values(), key=lambda one: len(one.prompt)))
        live: dict[str, tuple[_Generation, Iterator[Chunk], list[str]]] = {}
        while waiting or live:
            while waiting and len(live) < self.llm.plan.batch:
                one = waiting.popleft()
                live[one.key] = (one, self.llm.stream(one.prompt, one.params), [])
            for key, (one, stream, pieces) in list(live.items()):
                chunk = next(stream)
                pieces.append(chunk.text)
                if chunk.finish_reason is not None:
                    del live[key]
                    self._journal.add(key, "".join(pieces))
                    done += len(one.prompt)
                    self._advance(done, total)
        return [self._journal[one.key] for one in asked]

    def _generation(self, context: str, options: dict[str, Any]) -> "_Generation":
        """A request, with a key and a seed of its own where it is one of several draws."""
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(options))
        room = self.max_length - wanted["max_gen_toks"]
        if room < 1:
            raise KtxError(
                f"the task generates up to {wanted['max_gen_toks']} tokens; the context of {self.max_length} leaves "
                "none for the question (raise --context)"
            )
        prompt = self.tok_encode(context)[-room:]
        key = _key("generate", [prompt, wanted])
        if wanted["do_sample"]:
            self._drawn[key] += 1
            key = _key("draw", [key, self._drawn[key]])
        params = SamplingParams(
            max_tokens=wanted["max_gen_toks"],
            temperature=wanted.get("temperature", 1.0) if wanted["do_sample"] else 0.0,
            top_p=wanted.get("top_p", 1.0),
            top_k=wanted.get("top_k", 0),
            seed=int(key.rpartition(" ")[2], 16),
            stop=[text for text in wanted["until"] if text],
        )
        return _Generation(key, prompt, params)


register_model("ktx")(HarnessLM)
# For standard errors lm-eval would fork this process, whose threads (JAX's, the kernels') could leave a fork hanging.
os.environ.setdefault("DISABLE_MULTIPROC", "1")


class _Generation(NamedTuple):
    key: str
    prompt: list[int]
    params: SamplingParams


def _key(kind: str, value: Any) -> str:
    return f"{kind} {digest(json.dumps(value, sort_keys=True))}"


def run_tasks(
    llm: LLM,
    tasks: Sequence[str],
    out: Path,
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    chat: bool = False,
    resume: bool = False,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Runs tasks, and writes their results and samples into `out` as lm-eval does.

    Answers are kept in `out/answers.jsonl` as they come.

    Raises:
      KtxError: there is no such task, answers of another run are there, or the results cannot be written.
    """
    if include_path is not None and not include_path.is_dir():
        raise KtxError(f"{include_path}: no such folder (--include-path names one with tasks of your own)")
    run = {"eval": model_identity(llm), "context": llm.plan.context}
    with Journal(out / "answers.jsonl", run, resume=resume) as journal:
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        if unknown := [task for task in tasks if not (manager.match_tasks([task]) or Path(task).exists())]:
            raise KtxError(f"lm-eval knows no task {', '.join(unknown)}; --include-path names a folder of your own")
        tracker = EvaluationTracker(output_path=str(out))
        results: Any = cast(Any, simple_evaluate)(  # whose decorator hides its signature
            HarnessLM(llm, journal=journal, advance=advance),
            model_args={"pretrained": str(llm.path)},
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            task_manager=manager,
            evaluation_tracker=tracker,
        )
        _write(tracker, out, results, results.pop("samples"))
    return results


def _write(tracker: EvaluationTracker, out: Path, results: dict[str, Any], samples: dict[str, Any]) -> None:
    """Writes what lm-eval writes, whole files only: a kill leaves none that is cut."""
    with tempfile.TemporaryDirectory(dir=out) as work:
        tracker.output_path = work
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        _check_written(Path(work), samples)
        for file in sorted(Path(work).rglob("*.json*")):
            place = out / file.relative_to(work)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)


def _check_written(folder: Path, samples: Mapping[str, Sequence[Any]]) -> None:
    """Raises `KtxError` where lm-eval could not write its files, of which it says nothing."""
    lines = sum(file.read_bytes().count(b"\n") for file in folder.rglob("samples_*.jsonl"))
    whole = any(file.read_bytes().endswith(b"}") for file in folder.rglob("results_*.json"))
    if not whole or lines != sum(map(len, samples.values())):
        raise KtxError(
            f"lm-eval could not write its results to {folder.parent}: is the disk full? "
            "The answers are kept: the same command with --resume writes them again"
        )


def table(results: Mapping[str, Any]) -> str:
    """lm-eval's table of tasks and, if there are, of groups."""
    parts = [make_table(results)]
    if results.get("groups"):
        parts.append(make_table(results, "groups"))
    return "\n".join(parts)
