"""`BlockPool`: the KV memory as numbered blocks with reference counts.

A block is in exactly one of three states:

    free        nobody uses it, its content is meaningless          -> in `_free`, given out last in, first out: what was
                used lately has its memory, and perhaps its place in a cache, while a block that was never used costs
                the system's page faults at the first write
    in use      referenced by one or more block tables              -> count > 0
    evictable   unreferenced, but the prefix cache knows its        -> in `_evictable`, oldest release first
                content; reusable as it is, or given away when
                nothing is free

Two invariants make the rest simple. A block that is shared or cached is full and never written again, so copy-on-write
happens at one place only: when a sequence is forked in the middle of a block. And a sequence releases its blocks tail
first, so a block always becomes evictable before the blocks that precede it in the sequence: taking the oldest evictable
block never takes a parent before its children, which keeps the prefix tree whole without looking at it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """`on_evict(block)` is told when an evictable block is given away, so that the prefix cache can forget it."""

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] = lambda block: None) -> None:
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self._on_evict = on_evict
        self._references = [0] * num_blocks
        self._cached = [False] * num_blocks
        self._free = list(reversed(range(num_blocks)))
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    def evictable(self) -> Iterable[int]:
        """Unreferenced blocks whose content the prefix cache knows, the next to be given away first."""
        return self._evictable.keys()

    def allocate(self) -> int:
        """A block with one reference and arbitrary content. The caller has checked `num_free`."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            self._cached[block] = False
            self.num_evictions += 1
            self._on_evict(block)
        self._references[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to blocks that are in use or evictable."""
        for block in blocks:
            if self._references[block] == 0:
                del self._evictable[block]
            self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drops one reference from each block of a sequence, given in sequence order."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was released more often than it was taken"
            if self._references[block] == 0:
                if self._cached[block]:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def mark_cached(self, block: int) -> None:
        """The prefix cache has published this block, which is in use and full."""
        assert self._references[block] > 0, f"block {block} was cached while nobody used it"
        self._cached[block] = True

    def references(self, block: int) -> int:
        return self._references[block]

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Asserts that references are exactly those of the given block tables, and that every block is in one state."""
        expected = [0] * self.num_blocks
        for table in tables:
            for block in table:
                expected[block] += 1
        assert expected == self._references, "reference counts differ from the block tables"
        free, evictable = set(self._free), set(self._evictable)
        assert len(free) == len(self._free), "a block is free twice"
        for block, count in enumerate(self._references):
            states = (block in free) + (block in evictable) + (count > 0)
            assert states == 1, f"block {block} is in {states} states"
            assert block not in evictable or self._cached[block], f"block {block} is evictable but not cached"
            assert block not in free or not self._cached[block], f"block {block} is free but still cached"
