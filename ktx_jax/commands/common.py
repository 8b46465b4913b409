# SPDX-License-Identifier: Apache-2.0
"""What several commands share: loading with a progress bar, printing a reply as it comes, stopping on Ctrl-C."""

import contextlib
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ktx_jax.errors import KtxError

_SAY_EVERY = 30.0  # seconds between lines of progress where there is no terminal
notes = Console(stderr=True, highlight=False, soft_wrap=True)
"""For all that is said beside a command's result."""


@dataclass(frozen=True)
class Processes:
    """Of a run of several, which one this is.

    Attributes:
      coordinator: HOST:PORT of process 0, or "auto" to find everything under a launcher that JAX knows.
      count, index: how many there are, and this one's number; None with "auto".
    """

    coordinator: str
    count: int | None = None
    index: int | None = None

    def join(self) -> bool:
        """Joins the others, unless that is done, before anything else uses JAX; whether this is process 0."""
        import jax

        from ktx_jax import distributed

        if not jax.distributed.is_initialized():
            if not sys.stdout.isatty():
                _keep_stdout()
            auto = self.coordinator == "auto"
            distributed.initialize(None if auto else self.coordinator, self.count, self.index)
            logging.getLogger("ktx_jax").addFilter(lambda record: distributed.leads())  # what all would say
        return distributed.leads()


@dataclass(frozen=True)
class ModelOptions:
    """Which model to load, and how: the options that all commands that compute share."""

    model: Path
    context: int | None = None
    batch: int = 1
    dtype: str = "bfloat16"
    implementation: str | None = None
    override: Mapping[str, Any] = field(default_factory=dict)
    rules: str | None = None
    cpu_threads: int | None = None
    repack: bool = True
    chat_template: Path | None = None
    processes: Processes | None = None

    @property
    def follows(self) -> bool:
        """Whether this is known, before the processes have met, to be another than process 0: it needs the model alone,
        and no text."""
        return self.processes is not None and bool(self.processes.index)

    def leads(self) -> bool:
        """Whether this is process 0, or alone; with several, joins them first."""
        return self.processes is None or self.processes.join()


def load_llm(options: ModelOptions, progress: Callable[[int, int], None] | None = None) -> Any:
    """The `LLM` that `options` ask for; `progress` is told of bytes done and in all, or else the terminal shows them.

    Only process 0 of several returns from here: the others do their part until it ends, and end then.
    """
    [llm] = load_llms(options, progress=progress)
    return llm


def load_llms(*options: ModelOptions, progress: Callable[[int, int], None] | None = None) -> list[Any]:
    """`load_llm`, of several that are in memory together."""
    leads = [one.leads() for one in options]
    llms = [_load(one, progress) for one in options]
    if not all(leads):
        _follow(llms)
        raise SystemExit(0)
    return llms


def follow_in_turn(*options: ModelOptions) -> None:
    """In a process other than process 0: its part in models that process 0 loads and closes one after another."""
    for one in options:
        _follow([_load(one, None)])


def _follow(llms: list[Any]) -> None:
    first, *others = llms
    threads = [threading.Thread(target=llm.follow, daemon=True) for llm in others]
    for thread in threads:
        thread.start()
    first.follow()
    for thread in threads:
        thread.join()


def _load(options: ModelOptions, progress: Callable[[int, int], None] | None) -> Any:
    from ktx_jax.llm import LLM

    template = None if options.chat_template is None else read_text(options.chat_template)
    with progress_bar("Loading") if progress is None else contextlib.nullcontext(progress) as told:
        return LLM(
            options.model,
            context=options.context,
            batch=options.batch,
            dtype=options.dtype,
            implementation=options.implementation,
            override=options.override or None,
            rules=options.rules,
            chat_template=template,
            cpu_threads=options.cpu_threads,
            repack=options.repack,
            progress=told,
        )


def _keep_stdout() -> None:
    """Leaves the standard output to Python's `sys.stdout`: Gloo writes to it, too, whenever it connects."""
    sys.stdout.flush()
    ours = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = open(ours, "w", encoding=sys.stdout.encoding, errors="replace")  # noqa: SIM115  until the end


def read_text(path: Path) -> str:
    """The text of a file that the user named.

    Raises:
        KtxError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KtxError(f"{path}: cannot be read as text: {error}") from error


def print_json(value: Any) -> None:
    """Prints a result as one line of JSON; what is not a finite number there is null."""
    print(json.dumps(_finite(value)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes and time left on the terminal; gives what to call with bytes done and bytes in all."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def token_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of tokens, rate and time left; gives what to call with tokens done and tokens in all.

    The rate is of this process: what is done when the first call is made was done before. Where there is no terminal,
    a line now and then tells the same.
    """
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"))
    begun, before, said = time.perf_counter(), None, time.perf_counter()
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def advance(done: int, total: int) -> None:
            nonlocal begun, before, said
            now = time.perf_counter()
            if before is None or done < before:
                begun, before = now, done
            rate = (done - before) / (now - begun) if now > begun else 0.0
            left = f", {timedelta(seconds=round((total - done) / rate))} left" if rate else ""
            line = f"{done} of {total} tokens, {rate:.0f} tokens/s{left}"
            bar.update(task, completed=done, total=total, description=line)
            if not notes.is_terminal and now - said > _SAY_EVERY:
                notes.print(f"{title}: {line}", markup=False)
                said = now

        yield advance


class Interrupt:
    """Turns Ctrl-C into a wish that a loop can look at: a model is never stopped halfway through a step."""

    def __init__(self) -> None:
        self.wished = False

    def __enter__(self) -> "Interrupt":
        self._before = signal.signal(signal.SIGINT, self._wish)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _wish(self, number: int, frame: FrameType | None) -> None:
        if self.wished:
            raise KeyboardInterrupt  # asked twice: the step takes too long
        self.wished = True


@dataclass
class Reply:
    """A reply as it was printed, and how fast it came."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    first_token_s: float | None = None
    decode_tok_s: float | None = None

    @property
    def stopped(self) -> bool:
        """Whether Ctrl-C ended it."""
        return self.finish_reason is None

    def summary(self) -> str:
        """Tokens and speed in one line."""
        parts = [f"{len(self.token_ids)} tokens"]
        if self.first_token_s is not None:
            parts.append(f"first after {self.first_token_s:.2f} s")
        if self.decode_tok_s is not None:
            parts.append(f"then {self.decode_tok_s:.1f} tokens/s")
        return ", ".join(parts)


def receive(chunks: Iterable[Any], show: Callable[[str], None], begun: float) -> Reply:
    """Passes the pieces of a reply to `show` as they come, until the end or Ctrl-C; times are from `begun`."""
    reply = Reply()
    first = last = begun
    with Interrupt() as interrupt:
        for chunk in chunks:
            last = time.perf_counter()
            if not reply.token_ids:
                first = last
            reply.token_ids += chunk.token_ids
            reply.text += chunk.text
            reply.finish_reason = chunk.finish_reason
            show(chunk.text)
            if interrupt.wished:
                break
    close = getattr(chunks, "close", None)
    if close is not None:
        close()  # the request leaves the engine
    if reply.token_ids:
        reply.first_token_s = first - begun
    if len(reply.token_ids) > 1 and last > first:
        reply.decode_tok_s = (len(reply.token_ids) - 1) / (last - first)
    return reply


def say(text: str) -> None:
    """Writes a model's text as it is; to a terminal, without the control codes that would steer it."""
    if sys.stdout.isatty():
        text = "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()
