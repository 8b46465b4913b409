# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax verify`: is this the published model, and is it computed right?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ktx_jax.commands.common import ModelOptions, follow_in_turn, load_llm, read_text, token_bar

_MARKS = {True: "pass", False: "FAIL", None: "  - "}


def verify(options: ModelOptions, text: Path | None) -> int:
    """Prints a line for each check as it is done, then the verdict; 1 if one failed."""
    from ktx_jax.evaluate.verify import AS_IT_RUNS, EXACT, verify

    if not options.leads():
        follow_in_turn(*(replace(options, **changes) for changes in (AS_IT_RUNS, EXACT)))
        return 0

    def load(**changes: Any) -> Any:
        return load_llm(replace(options, **changes))

    first = None
    with token_bar("Scoring") as bar:
        for check in verify(load, options.model, None if text is None else read_text(text), bar):
            print(f"{_MARKS[check.passed]}  {check.name:10}  {check.found}", flush=True)
            first = first or (check if check.passed is False else None)
    print("pass" if first is None else f"differs first in: {first.name}")
    return 0 if first is None else 1
