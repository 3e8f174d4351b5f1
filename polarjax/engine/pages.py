"""The numbers of a KV cache's pages: which are free, which held, which known.

Every page 1, 2, ... of a pool is in one of three places. *Free*: nothing is known of
what it holds. *Held*: as many tables of sequences name it as it has references. *Idle*:
no table names it, but it holds a known piece of a prompt, and whoever comes with the
same prompt may have it; where there are no free pages left, the one that has been idle
longest is taken for something else. Page 0 is trash, written by rows that are dead, and
never given.

    free --take---> held --release--> free    if nothing is known of what it holds
                    held --release--> idle    if something is
                    idle --share----> held    the same prompt again
                    idle --take-----> held    forgotten, for another's use

A page is known by a chain of hashes: of the page before it, its tokens, and the salt of
the request, from a root that says of which model, dtype and page size it is. So a hash
stands for a whole prefix. What it was made of is kept beside it and compared: two
prefixes with one hash stay two. A sequence makes known only pages whose predecessors in
its own table are known; thus whoever holds a page holds all that come before it, lets
them go after it, and the tail of a chain is always forgotten before its head.

Only whole pages of *prompt* tokens become known: they are read with the original
weights, and depend on nothing but these and the tokens. They may be made known as soon
as the program that computes them is on its way: programs run in order, and one that
reads prompts writes its keys, layer by layer, before it attends.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from polarjax.planning.sizes import at_least, positive
from polarjax.storage.quoted import quoted

_TOKEN_BYTES = 4


def chained(parent: bytes, tokens: bytes, salt: bytes) -> bytes:
    """The hash of a page after the page with hash `parent`: 32 bytes, of SHA-256."""
    # Two parts are of fixed lengths, so no two triples are joined to the same bytes.
    return hashlib.sha256(parent + tokens + salt).digest()


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as pools know it: `PagePool.prompt` makes it, once a sequence.

    Attributes:
      length: tokens.
      page: tokens of a page.
      salt: of the request.
      tokens: the ids, int32, as bytes.
      hashes: one for each whole page.
    """

    length: int
    page: int
    salt: bytes
    tokens: bytes
    hashes: tuple[bytes, ...]

    def piece(self, index: int) -> bytes:
        """The tokens of a whole page, as bytes."""
        size = _TOKEN_BYTES * self.page
        return self.tokens[index * size : (index + 1) * size]


@dataclasses.dataclass(frozen=True, slots=True)
class _Known:
    """What is in a page: its hash, and what that was made of."""

    hash: bytes
    parent: int  # the page before it; 0 for none
    tokens: bytes
    salt: bytes


class PagePool:
    """Pages of one cache: gives them, counts who holds them, and finds known ones.

    All methods take time in proportion to the pages that they are about.

    Args:
      pages: of the cache, the trash page 0 among them.
      page: positions of each.
      root: says what the contents depend on beside tokens: hashes of the weights, the
        dtype, the layout. Pools of equal roots know prompts by equal hashes.

    Attributes:
      queries: prompt tokens that were looked for, see `count`.
      hits: of these the tokens that were found.
      evictions: known pages that were taken for something else.
      releases: calls of `release`: a caller who found too little room need not look
        again before there are more.

    Raises:
      ValueError: if there is no page beside the trash page.
    """

    def __init__(self, pages: int, page: int = 64, root: bytes = b"") -> None:
        self.pages = at_least("pages", pages, 2)
        self.page = positive("page", page)
        self._root = hashlib.sha256(root).digest()
        self._free = list(range(self.pages - 1, 0, -1))
        self._references = [0] * self.pages
        self._known: dict[int, _Known] = {}
        self._by_hash: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest idle first
        self.queries = self.hits = self.evictions = self.releases = 0

    @property
    def free(self) -> int:
        """Pages of which nothing is known."""
        return len(self._free)

    @property
    def idle(self) -> int:
        """Known pages that nobody holds."""
        return len(self._idle)

    @property
    def available(self) -> int:
        """Pages that `take` could give now: free and idle ones."""
        return len(self._free) + len(self._idle)

    def pages_for(self, positions: int) -> int:
        """Pages that so many positions of one sequence need."""
        return -(-positions // self.page)

    def prompt(self, tokens: Sequence[int] | np.ndarray, salt: bytes = b"") -> Prompt:
        """Hash a prompt's pages.

        Args:
          tokens: ids, at least one.
          salt: requests of different salts never share pages.

        Raises:
          ValueError: if that is no list of token ids.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"a prompt must be one or more token ids, got {quoted(tokens)}"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > np.iinfo(np.int32).max:
            raise ValueError(
                f"token ids must be from 0 to 2**31 - 1, got {low if low < 0 else high}"
            )
        data = ids.astype("<i4").tobytes()
        size, last, hashes = _TOKEN_BYTES * self.page, self._root, []
        for index in range(ids.size // self.page):
            piece = data[index * size : (index + 1) * size]
            hashes.append(last := chained(last, piece, salt))
        return Prompt(ids.size, self.page, salt, data, tuple(hashes))

    def match(self, prompt: Prompt, most: int) -> list[int]:
        """Known pages that hold the beginning of a prompt; nothing changes.

        Args:
          prompt: from the `prompt` of a pool of the same page and root.
          most: tokens that they may hold: one fewer than the prompt has, where the
            logits after it are wanted.

        Returns:
          Page numbers, in order.
        """
        found, before = [], 0
        for index in range(min(most, prompt.length) // self.page):
            page = self._by_hash.get(prompt.hashes[index])
            if page is None:
                break
            known = self._known[page]
            if (known.parent, known.salt) != (before, prompt.salt):
                break
            if known.tokens != prompt.piece(index):
                break
            found.append(page)
            before = page
        return found

    def idle_among(self, pages: Iterable[int]) -> int:
        """How many of some known pages nobody holds: sharing them uses room."""
        return sum(page in self._idle for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """One more table names these known pages."""
        for page in pages:
            if page not in self._known:
                raise ValueError(f"page {page} is not known: only `match` finds pages")
            self._references[page] += 1
            self._idle.pop(page, None)

    def count(self, queries: int, hits: int) -> None:
        """Count what a request asked the pool for.

        Args:
          queries: tokens that were looked for.
          hits: tokens that were found.
        """
        self.queries += queries
        self.hits += hits

    def take(self, count: int) -> list[int]:
        """Pages for a table, held once, with whatever is in them.

        Raises:
          ValueError: if fewer are available; none is taken then.
        """
        if count > self.available:
            raise ValueError(
                f"{count} pages are asked for, and {self.available} of "
                f"{self.pages - 1} are available: look at `available` first"
            )
        taken = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._references[page] = 1
            taken.append(page)
        return taken

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._by_hash[self._known.pop(page).hash]
        self.evictions += 1
        return page

    def enter(self, prompt: Prompt, table: Sequence[int], pieces: range) -> None:
        """Make pages of a table known, now that a program computes them.

        It stops at the first whose content another page is known for, or whose
        predecessor is not known itself: such pages serve this sequence alone.

        Args:
          prompt: that they are of.
          table: the pages of the sequence, in order; it holds all of them.
          pieces: which of its whole pages.
        """
        for index in pieces:
            parent = table[index - 1] if index else 0
            hashed = prompt.hashes[index]
            if (index and parent not in self._known) or hashed in self._by_hash:
                return
            page = table[index]
            if page in self._known:
                raise ValueError(f"page {page} is known as another content's already")
            piece = prompt.piece(index)
            self._known[page] = _Known(hashed, parent, piece, prompt.salt)
            self._by_hash[hashed] = page

    def release(self, table: Sequence[int]) -> None:
        """One table fewer names these pages.

        Args:
          table: the pages of a sequence, in order: the last is let go first.

        Raises:
          ValueError: if nobody holds one of them.
        """
        for page in reversed(table):
            if not 0 < page < self.pages or not self._references[page]:
                raise ValueError(f"page {page} is released, and nobody holds it")
            self._references[page] -= 1
            if not self._references[page]:
                if page in self._known:
                    self._idle[page] = None
                else:
                    self._free.append(page)
        self.releases += 1

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare all that the pool knows of itself; for tests, as it looks at all.

        Args:
          tables: those of all sequences that hold pages.

        Raises:
          AssertionError: naming what does not agree.
        """
        named = Counter(page for table in tables for page in table)
        free, idle = set(self._free), set(self._idle)
        held = {page for page, count in enumerate(self._references) if count}
        assert 0 not in named, "a table names the trash page"
        assert len(free) == len(self._free), "a page is free twice"
        for one, other in ((free, idle), (free, held), (idle, held)):
            assert not one & other, f"pages in two places: {sorted(one & other)}"
        everywhere = free | idle | held
        lost = set(range(1, self.pages)) - everywhere
        assert not lost, f"pages are lost: {sorted(lost)}"
        assert len(everywhere) == self.pages - 1, "there are pages that are none"
        wrong = {p for p in held | set(named) if self._references[p] != named[p]}
        assert not wrong, f"references are not those of the tables: {sorted(wrong)}"
        assert idle <= set(self._known), "an idle page is not known"
        assert not free & set(self._known), "a free page is known"
        by_hash = {known.hash: page for page, known in self._known.items()}
        assert by_hash == self._by_hash, "hashes and known pages do not agree"
        age = {page: i for i, page in enumerate(self._idle)}
        for page, known in self._known.items():
            if known.parent:
                assert known.parent in self._known, f"page {page} has lost its parent"
                if known.parent in idle:
                    assert page in idle, f"page {page} is held, and not its parent"
                    assert age[page] < age[known.parent], f"{page} outlives its parent"
