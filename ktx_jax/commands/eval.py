# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax eval`: tasks of lm-evaluation-harness."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

from ktx_jax.commands.common import ModelOptions, load_llm, print_json, token_bar
from ktx_jax.errors import KtxError


@dataclass(frozen=True)
class EvalOptions:
    """What `ktx-jax eval` was asked for, beside the model."""

    tasks: list[str]
    include_path: Path | None
    num_fewshot: int | None
    limit: float | None
    chat: bool
    out: Path
    resume: bool
    as_json: bool


def eval_(options: ModelOptions, wanted: EvalOptions) -> int:
    """Runs the tasks, writes what lm-eval writes, prints its table; returns the exit code."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise KtxError("evaluation needs lm-evaluation-harness: pip install 'ktx-jax[eval]'") from error
    from ktx_jax.evaluate.harness import run_tasks, table

    llm = load_llm(options)
    # Standard output is for the results alone: lm-eval prints to it what it is busy with.
    with token_bar("Evaluating") as bar, contextlib.redirect_stdout(sys.stderr):
        results = run_tasks(
            llm, wanted.tasks, wanted.out, include_path=wanted.include_path, num_fewshot=wanted.num_fewshot,
            limit=wanted.limit, chat=wanted.chat, resume=wanted.resume, advance=bar,
        )  # fmt: skip
    if wanted.as_json:
        print_json(results["results"])
    else:
        print(table(results))
    return 0
