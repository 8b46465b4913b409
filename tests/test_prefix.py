# SPDX-License-Identifier: Apache-2.0
"""The pages of the cache, driven by random holders: none lost, none shared by different texts, the oldest go first."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from ktx_jax.engine.prefix import PrefixCache

PAGE = 2


class Holder:
    """A sequence as the scheduler would run it: takes what is there, writes the rest page by page."""

    def __init__(self, cache, tokens):
        self.cache, self.tokens = cache, tokens
        self.pages = cache.hold(tokens, len(tokens) // PAGE)
        self.kept = len(self.pages)

    def grow(self, contents):
        """Writes one page more; False if there is none."""
        page = self.cache.new()
        if page is None:
            return False
        at = len(self.pages) * PAGE
        contents[page] = tuple(self.tokens[: at + PAGE])  # what lies in a page depends on all before it
        self.pages.append(page)
        return True

    def keep(self):
        full = min(len(self.tokens) // PAGE, len(self.pages))
        mine = self.pages[:full]
        self.cache.keep(self.tokens[self.kept * PAGE : full * PAGE], mine, self.kept)
        self.pages[:full] = mine
        self.kept = max(self.kept, full)


def check(cache, holders, contents):
    held = Counter(page for holder in holders for page in holder.pages)
    tree = dict(cache._nodes)
    assert len(cache._free) == len(set(cache._free))
    assert not set(cache._free) & (set(held) | set(tree))
    assert set(cache._free) | set(held) | set(tree) == set(range(cache.total))
    assert cache.available == cache.total - len(held)
    for page, node in tree.items():
        assert node.holders == held[page]
        text, above = list(node.key), node.parent
        while above.parent is not None:
            assert above.holders >= node.holders
            assert above.page in tree
            text, above = [*above.key, *text], above.parent
        assert contents[page] == tuple(text)
    for holder in holders:
        for i, page in enumerate(holder.pages):
            assert contents[page] == tuple(holder.tokens[: (i + 1) * PAGE])
            assert page in tree or held[page] == 1
    assert len(cache._leaves) <= 2 * cache.total + 1


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 2**12 - 1)), max_size=80),
)
@settings(max_examples=300, deadline=None)
def test_no_page_is_lost_or_shared_wrongly(pages, actions):
    cache, holders, contents = PrefixCache(pages, PAGE), [], {}
    for action, which, bits in actions:
        holder = holders[which % len(holders)] if holders else None
        if action == 0 or holder is None:
            tokens = [bits >> i & 1 for i in range(2 + which)]  # few different ones, so that many begin alike
            most = len(tokens) // PAGE
            count, idle = cache.match(tokens, most)
            before = cache.available
            holders.append(Holder(cache, tokens))
            assert (len(holders[-1].pages), before - cache.available) == (count, idle)
        elif action == 1:
            grew, available = None, cache.available
            if len(holder.pages) * PAGE < len(holder.tokens):
                grew = holder.grow(contents)
                assert grew == (available > 0)
        elif action == 2:
            holder.keep()
        else:
            holders.remove(holder)
            cache.release(holder.pages)
        check(cache, holders, contents)
    for holder in holders:
        cache.release(holder.pages)
    assert cache.available == pages
    assert len({cache.new() for _ in range(pages)}) == pages  # and all of them can be had again
    assert cache.new() is None


def written(cache, contents, tokens):
    holder = Holder(cache, tokens)
    while len(holder.pages) * PAGE < len(tokens):
        assert holder.grow(contents)
    holder.keep()
    return holder


def test_what_was_held_last_stays_longest():
    cache, contents = PrefixCache(6, PAGE), {}
    for tokens in ([0, 0, 1, 1], [0, 0, 2, 2], [5, 5]):
        cache.release(written(cache, contents, tokens).pages)
    cache.release(cache.hold([0, 0, 1, 1], 2))  # used again
    assert cache.available == 6
    held = [cache.new() for _ in range(2)]  # the free ones
    for gone in ([0, 0, 2, 2], [5, 5], [0, 0, 1, 1], [0, 0]):
        assert cache.match(gone, 9)[0] == len(gone) // PAGE
        held.append(cache.new())
        assert cache.match(gone, 9)[0] < len(gone) // PAGE
    assert len(set(held)) == 6


def test_a_page_that_was_asked_for_alone_outlives_what_hangs_on_it():
    """The beginning that many prompts share is held again and again; old endings must not take it along."""
    cache, contents = PrefixCache(4, PAGE), {}
    cache.release(written(cache, contents, [0, 0, 1, 1]).pages)
    cache.release(written(cache, contents, [7, 7, 8, 8]).pages)
    cache.release(cache.hold([0, 0], 1))
    for _ in range(3):
        cache.new()
    assert cache.match([0, 0], 1) == (1, 1)


def test_the_same_text_written_twice_is_kept_once():
    cache, contents = PrefixCache(8, PAGE), {}
    first, second = Holder(cache, [3, 4, 5, 6]), Holder(cache, [3, 4, 5, 6])
    for holder in (first, second):
        holder.grow(contents)
        holder.grow(contents)
    assert cache.available == 4
    first.keep()
    second.keep()
    assert first.pages == second.pages
    assert cache.available == 6
    cache.release(first.pages)
    assert cache.available == 6
    cache.release(second.pages)
    assert cache.available == 8
