# SPDX-License-Identifier: Apache-2.0
"""One multiple-choice task of lm-evaluation-harness, by our model and through llama-cpp-python's server."""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, cast

import numpy as np
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from ktx_jax import LLM
from ktx_jax.evaluate.harness import HarnessLM
from ktx_jax.tokenizer import Tokenizer

_SERVER = Path(__file__).parent.parent / "workers" / "llama_server.py"
_START_SECONDS = 300
WORDS, _CHOICES = 4, 4  # of a choice; of a question


@dataclass(frozen=True)
class Answers:
    """What a task took, and each choice's log-probability in the order of the task's requests."""

    seconds: float
    accuracy: float
    logprobs: np.ndarray


def write_task(folder: Path, name: str, questions: int, words: int) -> None:
    """A task: passages of some text, and which of four pieces goes on. Every passage is its own."""
    text = " ".join(" ".join(topics[topic] for topic in sorted(topics)).split())
    pieces = text.split(" ")
    step = words + WORDS
    if questions * step > len(pieces):
        raise SystemExit(f"the text has {len(pieces)} words: too few for {questions} questions of {step}")
    rng = np.random.default_rng(0)
    rows = []
    for start in range(0, questions * step, step):
        begins = [start + words, *rng.integers(0, len(pieces) - WORDS, _CHOICES - 1)]
        choices = [" ".join(pieces[at : at + WORDS]) for at in begins]
        order = rng.permutation(_CHOICES)
        question = " ".join(pieces[start : start + words])
        answer = int(np.flatnonzero(order == 0)[0])
        rows.append({"question": question, "choices": [choices[i] for i in order], "answer": answer})
    (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": name, "output_type": "multiple_choice", "dataset_path": "json", "test_split": "train",
        "dataset_kwargs": {"data_files": {"train": str(folder / f"{name}.json")}},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def evaluate(lm: Any, folder: Path, name: str) -> Answers:
    """Runs a task; the time is that of lm-eval's one call for all log-likelihoods."""
    ask, timed = lm.loglikelihood, []

    def loglikelihood(requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        begun = time.perf_counter()
        found = ask(requests, **options)
        timed.append((time.perf_counter() - begun, np.asarray([logprob for logprob, _ in found])))
        return found

    lm.loglikelihood = loglikelihood
    manager: Any = TaskManager(include_path=str(folder))
    try:
        results: Any = cast(Any, simple_evaluate)(model=lm, tasks=[name], task_manager=manager, bootstrap_iters=0)
    finally:
        lm.loglikelihood = ask
    [(seconds, logprobs)] = timed
    return Answers(seconds, results["results"][name]["acc,none"], logprobs)


def ours(llm: LLM) -> HarnessLM:
    """lm-eval's model `ktx`; it keeps no answers from one run to the next."""
    return HarnessLM(llm)


class Peer(LocalCompletionsAPI):
    """lm-eval's `local-completions` for a server that takes text and adds the beginning-of-text token itself.

    The harness asks for a tokenizer, to tell where contexts end; a Hugging Face one is not at hand, so it gets ours.
    """

    def __init__(self, tokenizer: Tokenizer, url: str, context: int):
        super().__init__(
            base_url=f"{url}/v1/completions", tokenizer_backend="None", model="peer", max_length=context, batch_size=1
        )
        self.tokenizer: Any = tokenizer

    def tok_encode(self, string: str, *arguments: Any, **options: Any) -> list[int]:
        return self.tokenizer.encode(string, add_special_tokens=False)

    def decode_batch(self, tokens: list[list[int]]) -> list[str]:
        return [self.tokenizer.decode(row) for row in tokens]


@contextlib.contextmanager
def llama_server(python: str, model: Path, *, context: int, repack: bool, log: Path) -> Iterator[str]:
    """llama-cpp-python's server on a free port, all threads; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    threads = str(len(os.sched_getaffinity(0)))
    command = [
        python, str(_SERVER), str(int(repack)), "--model", str(model), "--port", str(port), "--n_ctx", str(context),
        "--n_threads", threads, "--n_threads_batch", threads, "--logits_all", "true",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            _wait(process, f"{url}/v1/models", log)
            yield url
        finally:
            process.terminate()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"llama-cpp-python's server did not start:\n{log.read_text()[-1500:]}") from None
            time.sleep(0.2)
