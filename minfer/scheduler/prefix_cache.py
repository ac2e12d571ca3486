"""`PrefixCache`: finds the KV of a prompt's beginning if any earlier request computed it.

A radix tree (Zheng 2023, RadixAttention) whose edges are whole blocks: a node is one full block of KV, its key the
`block_size` tokens in it, its parent the block before. Walking down from the root by the prompt's tokens gives the longest
computed prefix. Tokens themselves are compared, never only a hash of them, so foreign KV can't be returned.

There is one root per `cache_key`: whatever else changes the KV (an adapter, a tenant's salt) gets a tree of its own.

Eviction is least recently used, and needs no tree logic: see `block_pool.py` for why a parent never goes before its children.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence


class PrefixNode:
    """One full block of KV. The root of a tree has no block (-1)."""

    __slots__ = ("block", "children", "key", "parent")

    def __init__(self, parent: PrefixNode | None, key: Hashable, block: int) -> None:
        self.parent = parent
        self.key = key
        self.block = block
        self.children: dict[Hashable, PrefixNode] = {}


class PrefixCache:
    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._roots: dict[Hashable, PrefixNode] = {}
        self._node_of: dict[int, PrefixNode] = {}  # block -> node

    def root(self, cache_key: Hashable) -> PrefixNode:
        if cache_key not in self._roots:
            self._roots[cache_key] = PrefixNode(None, cache_key, -1)
        return self._roots[cache_key]

    def match(self, cache_key: Hashable, tokens: Sequence[int]) -> tuple[list[int], PrefixNode | None]:
        """The blocks of the longest cached prefix of `tokens`, in order, and the node of the last one. Takes no reference."""
        node = self._roots.get(cache_key)
        blocks: list[int] = []
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            child = node.children.get(tuple(tokens[start : start + self.block_size])) if node is not None else None
            if child is None:
                break
            node = child
            blocks.append(node.block)
        return blocks, node if blocks else None

    def publish(self, parent: PrefixNode, tokens: Sequence[int], block: int) -> PrefixNode:
        """Adds a computed full block below `parent`. If these tokens stand there already, the node there is returned and
        the caller is to use its block instead: two copies of one prefix would break the eviction order.
        """
        key = tuple(tokens)
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = PrefixNode(parent, key, block)
            self._node_of[block] = node
        return node

    def forget(self, block: int) -> None:
        """The block is being given away: removes its node, which has no children by the order of release."""
        node = self._node_of.pop(block)
        assert not node.children, f"block {block} was evicted before the blocks that follow it"
        parent = node.parent
        assert parent is not None, "a root has no block to evict"
        del parent.children[node.key]
        if parent.parent is None and not parent.children:
            del self._roots[parent.key]  # an empty tree; a salt that is never seen again must not stay forever

    def nodes(self) -> Iterator[PrefixNode]:
        return iter(self._node_of.values())
