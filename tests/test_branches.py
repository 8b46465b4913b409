# SPDX-License-Identifier: Apache-2.0
"""Trees of shared beginnings: every sequence is a way through one, and a pool of pages holds each way."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ktx_jax.engine.branches import MIN_SHARED, Branch, Window, grow, lexicographic

PAGE, PAGES = 8, 12


@st.composite
def windows(draw) -> list[Window]:
    """Sequences of a few letters, many of them going on from where another was cut."""
    made: list[np.ndarray] = [np.zeros(0, np.int32)]
    out = []
    for _ in range(draw(st.integers(1, 12))):
        stem = made[draw(st.integers(0, len(made) - 1))]
        stem = stem[: draw(st.integers(0, len(stem)))]
        new = draw(st.lists(st.integers(0, 1), min_size=2, max_size=40))
        tokens = np.asarray([*stem, *new], np.int32)[: PAGE * PAGES + 1]
        made.append(tokens)
        out.append(Window(tokens, draw(st.integers(1, len(tokens) - 1))))
    return out


def all_branches(trees: list[Branch]) -> list[Branch]:
    return [branch for tree in trees for branch in (tree, *all_branches(tree.children))]


@given(windows())
def test_every_token_is_scored_once_where_it_belongs(wanted):
    trees = grow(wanted, lexicographic(wanted), page=PAGE, pages=PAGES)
    seen = set()
    for branch in all_branches(trees):
        assert branch.begin < branch.end
        assert branch.begin == (branch.parent.end if branch.parent else 0)
        for (position, token), places in branch.targets.items():
            assert branch.begin <= position < branch.end
            for index, place in places:
                one = wanted[index]
                assert (index, place) not in seen
                seen.add((index, place))
                assert place == position + 1 - one.start
                assert one.tokens[position + 1] == token
                np.testing.assert_array_equal(one.tokens[: position + 1], branch.tokens[: position + 1])
    assert len(seen) == sum(len(one.tokens) - one.start for one in wanted)


@given(windows())
def test_any_way_to_a_leaf_fits_the_pool(wanted):
    trees = grow(wanted, lexicographic(wanted), page=PAGE, pages=PAGES)
    for branch in all_branches(trees):
        assert branch.need == max((c.own_pages(PAGE) + c.need for c in branch.children), default=0)
    assert all(tree.own_pages(PAGE) + tree.need <= PAGES for tree in trees)


def test_shared_beginnings_are_held_once():
    stem = list(range(100))
    wanted = [Window(np.asarray([*stem, n, *range(n, n + 5)], np.int32), 100) for n in (7, 3, 5)]
    [tree] = grow(wanted, lexicographic(wanted), page=PAGE, pages=100)
    assert (tree.begin, tree.end, len(tree.children)) == (0, 100, 3)
    assert [len(child.targets) for child in tree.children] == [5, 5, 5]  # and the first token after the stem
    assert sorted(token for _, token in tree.targets) == [3, 5, 7]
    assert len(all_branches(grow(wanted, lexicographic(wanted), page=PAGE, pages=14))) == 3  # no page for a copy
    short = [Window(np.asarray([*stem[: MIN_SHARED - 1], n, 1, 1], np.int32), 1) for n in (50, 51)]
    assert len(all_branches(grow(short, lexicographic(short), page=PAGE, pages=100))) == 2


def test_equal_sequences_are_one_branch():
    tokens = np.arange(40, dtype=np.int32)
    [tree] = grow([Window(tokens, 1), Window(tokens, 20)], [0, 1], page=PAGE, pages=100)
    assert (tree.begin, tree.end, tree.children) == (0, 39, [])
    assert tree.targets[38, 39] == [(0, 38), (1, 19)]
