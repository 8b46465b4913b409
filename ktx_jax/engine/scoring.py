# SPDX-License-Identifier: Apache-2.0
"""Scoring given texts: many sequences packed into the steps that prompts run in, shared beginnings computed once."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from ktx_jax.engine.branches import Branch, Window, grow, lexicographic
from ktx_jax.engine.requests import Request, SamplingParams
from ktx_jax.engine.scheduler import Limits, Scheduler, Share, Work
from ktx_jax.engine.step import Steps, make_run

_ROW_TOKENS = 8  # a step has one row of the block table for so many tokens
_LOOK = 64  # how many branches a step looks at for one that finds pages

Place = tuple[int, int]
"""A sequence, and which of its scored tokens."""


@dataclass(frozen=True, eq=False)
class Score:
    """How likely a text is, given what comes before it.

    Attributes:
      logprobs: of each token, in nats.
      greedy: whether greedy decoding would draw each token.
    """

    logprobs: Float[np.ndarray, " n"]
    greedy: Bool[np.ndarray, " n"]

    @classmethod
    def join(cls, parts: "Sequence[Score]") -> "Score":
        """The score of a text from those of its parts, in order."""
        logprobs, greedy = ([getattr(part, name) for part in parts] for name in ("logprobs", "greedy"))
        return cls(np.concatenate([np.zeros(0, np.float32), *logprobs]), np.concatenate([np.zeros(0, bool), *greedy]))

    @property
    def logprob(self) -> float:
        """Of the whole text."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would give the whole text."""
        return bool(self.greedy.all())


class _Target(NamedTuple):
    row: int  # of the block table: the share
    position: int
    token: int
    places: list[Place]


@dataclass(eq=False)
class _Growing:
    """A branch in work: `request` carries its tokens, pages and shard, and how far it has come."""

    branch: Branch
    parent: "_Growing | None"
    request: Request
    own: list[int]  # pages; the others are its parents'
    targets: deque[tuple[tuple[int, int], list[Place]]]  # those left, in order of position
    open: int = 0  # children that have not given their pages back


@dataclass(eq=False)
class _Packed:
    """One shard's part of a step."""

    shares: list[Share] = field(default_factory=list)
    targets: list[_Target] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # pages, from and to, before the step


class _Lane:
    """One shard's sequences: the branches that are ready, and the one that a full step cut."""

    def __init__(self, shard: int, trees: list[Branch], limits: Limits, scheduler: Scheduler):
        self.shard, self._limits, self._scheduler = shard, limits, scheduler
        self._ready: deque[tuple[Branch, _Growing | None]] = deque((tree, None) for tree in trees)
        self._cut: _Growing | None = None

    @property
    def done(self) -> bool:
        return not self._ready and self._cut is None

    def pack(self) -> _Packed:
        """Fills one step. Children of what it finishes are ready for the next: their first page is copied before it."""
        packed, finished = _Packed(), []
        room, limits = self._limits.chunk, self._limits
        while room > 0 and len(packed.shares) < limits.batch and len(packed.targets) < limits.chunk:
            growing, self._cut = self._cut or self._begin(packed), None
            if growing is None:
                break
            share = self._share(growing, room, packed)
            room -= -(-(share.stop - share.start) // limits.tile) * limits.tile
            if growing.targets or share.stop < growing.branch.end:
                self._cut = growing
                break
            finished.append(growing)
        for growing in reversed(finished):
            self._finish(growing)
        return packed

    def _begin(self, packed: _Packed) -> _Growing | None:
        """The first of the ready branches that finds pages.

        One with children leaves free what a way down to a leaf takes. The youngest such branch can then always go on,
        and when it is done the one before it, so nothing waits for ever.
        """
        page = self._limits.page
        for at, (branch, parent) in enumerate(islice(self._ready, _LOOK)):
            count = branch.own_pages(page)
            pages = self._scheduler.borrow(count + branch.need, self.shard)
            if pages is None:
                continue
            own, spare = pages[:count], pages[count:]
            self._scheduler.give_back(spare, self.shard)
            del self._ready[at]
            above = [] if parent is None else parent.request.pages[: branch.begin // page]
            if branch.begin % page:
                assert parent is not None
                packed.copies.append((parent.request.pages[branch.begin // page], own[0]))
            request = Request(branch.tokens[: branch.end].tolist(), _SCORING, 0, computed=branch.begin)
            request.pages, request.shard = above + own, self.shard
            return _Growing(branch, parent, request, own, deque(sorted(branch.targets.items())))
        return None

    def _share(self, growing: _Growing, room: int, packed: _Packed) -> Share:
        """As much of the branch as there is room for, of tokens and of targets; adds it to the step.

        A position whose targets do not all fit is computed again in the next step.
        """
        request, targets, row = growing.request, growing.targets, len(packed.shares)
        start = min(request.computed, targets[0][0][0]) if targets else request.computed
        stop = min(growing.branch.end, start + room)
        taken = start
        while targets and targets[0][0][0] < stop:
            (position, token), places = targets[0]
            if len(packed.targets) == self._limits.chunk:
                stop = max(taken, position)
                break
            packed.targets.append(_Target(row, position, token, places))
            taken = position + 1
            targets.popleft()
        share = Share(request, start, stop)
        packed.shares.append(share)
        request.computed = stop
        return share

    def _finish(self, growing: _Growing) -> None:
        children = growing.branch.children
        growing.open = len(children)
        self._ready.extendleft((child, growing) for child in reversed(children))
        if not children:
            self._give_back(growing)

    def _give_back(self, growing: _Growing | None) -> None:
        """Steps write the cache in the order in which they start, so pages are free once their last step has."""
        while growing is not None and growing.open == 0:
            self._scheduler.give_back(growing.own, self.shard)
            growing = growing.parent
            if growing is not None:
                growing.open -= 1

    def close(self) -> None:
        """Gives back all that is borrowed."""
        holders: dict[int, _Growing] = {}
        for growing in (self._cut, *(parent for _, parent in self._ready)):
            while growing is not None and id(growing) not in holders:
                holders[id(growing)] = growing
                growing = growing.parent
        for growing in holders.values():
            self._scheduler.give_back(growing.own, self.shard)
        self._ready.clear()
        self._cut = None


class Scoring:
    """Scores `wanted` step by step. Whoever calls `step` holds the engine's lock."""

    def __init__(self, wanted: Sequence[Window], steps: Steps, scheduler: Scheduler, limits: Limits):
        self._steps = steps
        self._pages = limits.pages
        self._limits = replace(limits, batch=max(limits.batch, limits.chunk // max(_ROW_TOKENS, limits.tile)))
        self._wanted, self._scheduler, self._order = wanted, scheduler, lexicographic(wanted)
        counts = [len(one.tokens) - one.start for one in wanted]
        self._scores = [Score(np.zeros(n, np.float32), np.zeros(n, bool)) for n in counts]
        self._left = counts
        self._lanes = self._begin()
        self._complete = [(i, score) for i, score in enumerate(self._scores) if counts[i] == 0]
        self._flight: deque[tuple[list[_Packed], tuple[jax.Array, jax.Array]]] = deque()

    @property
    def done(self) -> bool:
        return not (self._complete or self._flight) and all(lane.done for lane in self._lanes)

    def step(self) -> list[tuple[int, Score]] | None:
        """Packs a step while the one before computes, then starts it.

        Returns:
          The sequences that are complete now, with their places in `wanted`; None if there is nothing that could be
          computed before others give pages back.
        """
        parts = [lane.pack() for lane in self._lanes]
        some = any(part.shares for part in parts)
        if not (some or self._flight or self._complete):
            return None
        complete, self._complete = self._complete, []
        while self._flight and (not some or len(self._flight) >= self._steps.depth):
            complete += self._collect()
        if some:
            self._flight.append((parts, self._start(parts)))
        return complete

    def _begin(self) -> list[_Lane]:
        """The lanes of all that is not complete."""
        limits, wanted = self._limits, self._wanted
        parts = _split(wanted, [i for i in self._order if self._left[i]], limits.shards)
        for i in self._order:
            self._left[i] = len(wanted[i].tokens) - wanted[i].start if self._left[i] else 0
        trees = (grow(wanted, part, page=limits.page, pages=self._pages) for part in parts)
        return [_Lane(shard, some, limits, self._scheduler) for shard, some in enumerate(trees)]

    def start_over(self) -> None:
        """Gives every page back to whoever waits for one, to begin again with what is not complete; no step is under
        way."""
        self.close()
        self._lanes = self._begin()

    def close(self) -> None:
        """Gives pages back that an interrupted run still holds."""
        for lane in self._lanes:
            lane.close()

    def _start(self, parts: list[_Packed]) -> tuple[jax.Array, jax.Array]:
        limits = self._limits
        if any(part.copies for part in parts):
            pages = np.full((2, len(parts), limits.batch), self._pages, np.int32)  # beyond the last page: dropped
            for shard, part in enumerate(parts):
                for at, pair in enumerate(part.copies):
                    pages[:, shard, at] = pair
            self._steps.copy_pages(*pages)
        run, last = make_run(Work(tuple(share for part in parts for share in part.shares), decode=False), limits)
        size = _score_bucket(limits, max(len(part.targets) for part in parts), run.tokens.shape[1])
        at, token = np.zeros((2, len(parts), size), np.int32)
        for shard, part in enumerate(parts):
            for i, target in enumerate(part.targets):
                at[shard, i] = last[shard, target.row] - (part.shares[target.row].stop - 1 - target.position)
                token[shard, i] = target.token
        return self._steps.score(run, at, token)

    def _collect(self) -> list[tuple[int, Score]]:
        """Takes the oldest step's scores to their places."""
        parts, out = self._flight.popleft()
        logprobs, greedy = jax.device_get(out)
        complete = []
        for shard, part in enumerate(parts):
            for i, target in enumerate(part.targets):
                for index, place in target.places:
                    self._scores[index].logprobs[place] = logprobs[shard, i]
                    self._scores[index].greedy[place] = greedy[shard, i]
                    self._left[index] -= 1
                    if self._left[index] == 0:
                        complete.append((index, self._scores[index]))
        return complete


_SCORING = SamplingParams(seed=0)


def _score_bucket(limits: Limits, targets: int, tokens: int) -> int:
    """The padded number of targets of a step of so many (padded) tokens: a quarter of them, or as many, or more."""
    quarter = max(tokens // 4, min(tokens, 16))
    return quarter if targets <= quarter else max(tokens, limits.bucket(targets, decode=False))


def _split(wanted: Sequence[Window], order: list[int], parts: int) -> list[list[int]]:
    """The order cut into parts of about as many tokens."""
    before = [0, *accumulate(wanted[i].length for i in order)]
    out: list[list[int]] = [[] for _ in range(parts)]
    for i, tokens in zip(order, before, strict=False):
        out[min(tokens * parts // max(before[-1], 1), parts - 1)].append(i)
    return out
