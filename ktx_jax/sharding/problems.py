# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a rule file, gathered in one pass and said together, each with its line and column."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ktx_jax.errors import KtxError
from ktx_jax.sharding.folding import fold_paths


class Mark(NamedTuple):
    """A place in a file, counted from 1."""

    line: int
    column: int


START = Mark(1, 1)


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong, and where."""

    mark: Mark
    message: str


class RulesError(KtxError):
    """A rule file cannot be used.

    Attributes:
      problems: all that was found, in the file's order.
    """

    def __init__(self, name: str, problems: Iterable[Problem]):
        self.problems = tuple(sorted(set(problems)))
        self.lines = tuple(f"{name}:{p.mark.line}:{p.mark.column}: {p.message}" for p in self.problems)
        super().__init__("\n".join(self.lines))


class Findings:
    """Collects problems. Those that differ only in the path become one."""

    def __init__(self) -> None:
        self._plain: list[Problem] = []
        self._by_path: dict[tuple[Mark, str], list[str]] = {}

    def add(self, mark: Mark, message: str) -> None:
        self._plain.append(Problem(mark, message))

    def add_path(self, mark: Mark, message: str, path: str) -> None:
        """`message` has `{path}` where the module path belongs."""
        self._by_path.setdefault((mark, message), []).append(path)

    def extend(self, problems: Iterable[Problem]) -> None:
        self._plain.extend(problems)

    def problems(self) -> tuple[Problem, ...]:
        folded = [
            Problem(mark, message.replace("{path}", _show(paths))) for (mark, message), paths in self._by_path.items()
        ]
        return tuple(sorted({*self._plain, *folded}))

    def raise_if_any(self, name: str) -> None:
        if problems := self.problems():
            raise RulesError(name, problems)


def _show(paths: list[str]) -> str:
    """The first of the paths, its layers folded, and how many more there are."""
    first, *others = fold_paths(paths)
    return f"{first} (and {len(others)} more)" if others else first


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)", if something known is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
