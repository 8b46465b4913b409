# SPDX-License-Identifier: Apache-2.0
"""The cache's pages: who holds which, and which are worth keeping: those that begin with the same tokens are shared.

Full pages of computed sequences form a tree: a page's place is the path of the tokens up to its end, so what lies in
it is known from where it stands. A sequence that begins with the same tokens holds the same pages. Pages that nobody
holds stay until their room is needed; the least recently held leaf of the tree goes first.
"""

import heapq
from collections.abc import Sequence

Key = tuple[int, ...]


class _Node:
    __slots__ = ("children", "holders", "key", "page", "parent", "used")

    def __init__(self, page: int, key: Key, parent: "_Node | None"):
        self.page, self.key, self.parent = page, key, parent
        self.children: dict[Key, _Node] = {}
        self.holders, self.used = 0, 0


class PrefixCache:
    """The pages of one shard.

    Whoever holds a page of the tree holds those above it too. Pages outside the tree have one holder.

    Args:
      pages: how many there are.
      page: positions in each.
    """

    def __init__(self, pages: int, page: int):
        self.total, self._page = pages, page
        self._free = list(range(pages))[::-1]
        self._root = _Node(-1, (), None)
        self._nodes: dict[int, _Node] = {}  # of pages in the tree
        self._idle = 0  # pages in the tree that nobody holds
        self._leaves: list[tuple[int, int]] = []  # a heap of (when last held, page), with entries that have passed
        self._clock = 0

    @property
    def available(self) -> int:
        """Pages that `new` could give."""
        return len(self._free) + self._idle

    def match(self, tokens: Sequence[int], most: int) -> tuple[int, int]:
        """How many full pages that begin `tokens` are here, at most `most`; and how many of those nobody holds."""
        path = self._path(tokens, most)
        return len(path), sum(not node.holders for node in path)

    def hold(self, tokens: Sequence[int], most: int) -> list[int]:
        """Takes the pages of `match`."""
        path = self._path(tokens, most)
        for node in path:
            self._hold(node)
        return [node.page for node in path]

    def new(self) -> int | None:
        """A page to write, held once; None if all are held."""
        if not self._free:
            self._evict()
        return self._free.pop() if self._free else None

    def keep(self, tokens: Sequence[int], pages: list[int], start: int) -> None:
        """Puts a holder's pages from number `start` into the tree; those before it are there already.

        Args:
          tokens: those in `pages[start:]`, all pages full.
          pages: the holder's pages in order. Where another has kept the same tokens first, that page takes the place
            of the holder's own.
        """
        parent = self._nodes[pages[start - 1]] if start else self._root
        for i in range(start, len(pages)):
            at = (i - start) * self._page
            key = tuple(tokens[at : at + self._page])
            node = parent.children.get(key)
            if node is None:
                node = parent.children[key] = self._nodes[pages[i]] = _Node(pages[i], key, parent)
                node.holders = 1
            elif node.page != pages[i]:
                self._hold(node)
                self._free.append(pages[i])
                pages[i] = node.page
            parent = node

    def release(self, pages: Sequence[int]) -> None:
        """Lets go of a holder's pages, given in their order."""
        for page in reversed(pages):  # the deepest has been used the longest ago
            node = self._nodes.get(page)
            if node is None:
                self._free.append(page)
                continue
            node.holders -= 1
            if not node.holders:
                self._idle += 1
                self._clock += 1
                node.used = self._clock
                self._offer(node)

    def _path(self, tokens: Sequence[int], most: int) -> list[_Node]:
        path, node = [], self._root
        for at in range(0, min(most * self._page, len(tokens) - self._page + 1), self._page):
            found = node.children.get(tuple(tokens[at : at + self._page]))
            if found is None:
                break
            path.append(node := found)
        return path

    def _hold(self, node: _Node) -> None:
        self._idle -= not node.holders
        node.holders += 1

    def _offer(self, node: _Node) -> None:
        """Notes a page that may be evicted as things stand."""
        if self._may_go(node):
            if len(self._leaves) > 2 * self.total:  # most have passed
                self._leaves = [(n.used, n.page) for n in self._nodes.values() if n is not node and self._may_go(n)]
                heapq.heapify(self._leaves)
            heapq.heappush(self._leaves, (node.used, node.page))

    @staticmethod
    def _may_go(node: _Node) -> bool:
        return not node.holders and not node.children and node.parent is not None

    def _evict(self) -> None:
        while self._leaves:
            used, page = heapq.heappop(self._leaves)
            node = self._nodes.get(page)
            if node is None or node.used != used or not self._may_go(node):
                continue
            parent = node.parent
            assert parent is not None
            del parent.children[node.key], self._nodes[page]
            self._idle -= 1
            self._free.append(page)
            self._offer(parent)
            return
