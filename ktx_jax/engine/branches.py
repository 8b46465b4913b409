# SPDX-License-Identifier: Apache-2.0
"""What sequences to score have in common: trees whose every branch is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from jaxtyping import Int

MIN_SHARED = 16  # tokens: a branch costs a copied page and a step of waiting


@dataclass(frozen=True, eq=False)
class Window:
    """A sequence of token ids whose tokens from `start` (at least 1) on are to be scored, each given all before it."""

    tokens: Int[np.ndarray, " n"]
    start: int

    @property
    def length(self) -> int:
        """Tokens to compute: the last one is only a target."""
        return len(self.tokens) - 1


@dataclass(eq=False)
class Branch:
    """Positions `begin` to `end` of sequences that agree up to `end`; what comes before is the parents'.

    Attributes:
      tokens: of one of these sequences.
      targets: for (position, token after it), where its score is wanted: (sequence, place among its scored tokens).
      need: the most pages that a way from here to a leaf takes, this branch's own left out.
    """

    tokens: Int[np.ndarray, " n"]
    begin: int
    end: int
    parent: "Branch | None" = None
    children: "list[Branch]" = field(default_factory=list)
    targets: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    need: int = 0

    def own_pages(self, page: int) -> int:
        """Pages that the branch takes; the first may be a copy of its parent's last."""
        return _pages(self.begin, self.end, page)

    def _add_targets(self, index: int, wanted: Window) -> None:
        for position in range(max(self.begin, wanted.start - 1), self.end):
            target = (position, int(wanted.tokens[position + 1]))
            self.targets.setdefault(target, []).append((index, position + 1 - wanted.start))


def lexicographic(wanted: Sequence[Window]) -> list[int]:
    """Indices of the sequences in the order of their tokens: what agrees lies together."""
    return sorted(range(len(wanted)), key=lambda i: wanted[i].tokens[:-1].astype(">u4").tobytes())


def grow(wanted: Sequence[Window], order: Sequence[int], *, page: int, pages: int) -> list[Branch]:
    """The trees of the sequences `order`, a part of `lexicographic`'s; each sequence alone fits `pages`.

    Where the pool of `pages` could not hold a branch and one way above it, its sequences share less.
    """
    trees: list[Branch] = []
    made: list[Branch] = []
    # Sequences that agree up to a position, the branch that ends there, and the pages from it down.
    todo: list[tuple[Sequence[int], int, Branch | None, int]] = [(order, 0, None, 0)]
    while todo:
        members, begin, parent, held = todo.pop()
        for group in _alike(wanted, members, begin):
            longest = max(wanted[i].length for i in group)
            end = begin + _agreement(wanted, group, begin)
            below = held + _pages(begin, end, page)
            shared = len(group) > 1 and below + _pages(end, longest, page) <= pages
            for some in [group] if shared else [[i] for i in group]:
                branch = Branch(wanted[some[0]].tokens, begin, end if shared else wanted[some[0]].length, parent)
                if branch.end == begin:
                    continue  # the sequence ends with the parent
                for i in some:
                    branch._add_targets(i, wanted[i])
                (trees if parent is None else parent.children).append(branch)
                made.append(branch)
                if shared:
                    todo.append((some, end, branch, below))
    for branch in reversed(made):  # parents are made before their children
        if branch.parent is not None:
            branch.parent.need = max(branch.parent.need, branch.own_pages(page) + branch.need)
    return trees


def _pages(begin: int, end: int, page: int) -> int:
    """Pages that positions `begin` to `end` touch."""
    return -(-end // page) - begin // page if end > begin else 0


def _alike(wanted: Sequence[Window], members: Sequence[int], begin: int) -> list[list[int]]:
    """The members, grouped by those that agree in the next `MIN_SHARED` tokens."""

    def head(i: int) -> bytes | int:
        tokens = wanted[i].tokens[begin : min(begin + MIN_SHARED, wanted[i].length)]
        return tokens.tobytes() if len(tokens) == MIN_SHARED else i

    return [list(group) for _, group in groupby(members, head)]


def _agreement(wanted: Sequence[Window], group: Sequence[int], begin: int) -> int:
    """How many tokens from `begin` on all of the group share: what its first and last share, as they are in order."""
    first, last = (wanted[i].tokens[begin : wanted[i].length] for i in (group[0], group[-1]))
    size = min(len(first), len(last))
    different = np.flatnonzero(first[:size] != last[:size])
    return int(different[0]) if len(different) else size
