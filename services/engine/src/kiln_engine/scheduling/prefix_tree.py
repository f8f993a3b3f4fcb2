"""Which pages and states of earlier requests a new one can start from."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from kiln_common.prefix_path import page_name, root_name
from kiln_engine.domain.request import AdapterUse
from kiln_engine.scheduling.page_pool import PagePool
from kiln_engine.scheduling.state_pool import StatePool


@dataclass(frozen=True, slots=True)
class Namespace:
    """What besides tokens decides K, V and state: ordered adapters with scales, and the salt."""

    adapters: tuple[AdapterUse, ...] = ()
    salt: str = ""


@dataclass(eq=False, slots=True)
class PrefixNode:
    """One page of tokens after its parent's. A root stands for a namespace and has no page."""

    namespace: Namespace
    tokens: tuple[int, ...]
    page_id: int
    parent: PrefixNode | None
    num_tokens: int  # from the start of the prompt through this page
    children: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)
    checkpoint_slot: int | None = None
    last_used: int = 0
    is_in_tree: bool = True
    # Its path's name for other processes; empty until somebody asks.
    name: bytes = b""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest known path along a prompt.

    `nodes` lead from the first page to the deepest checkpoint within reach, which is where the hit
    ends; `num_matched_tokens` counts the pages that are known, with or without a checkpoint.
    """

    nodes: tuple[PrefixNode, ...]
    num_matched_tokens: int

    @property
    def num_hit_tokens(self) -> int:
        return self.nodes[-1].num_tokens if self.nodes else 0


class PrefixTree:
    """Keeps one reference on each page and state slot it knows.

    Invariants: a page's ancestors are in the tree; whoever holds a page of the tree holds its
    ancestors too, so a page nobody else holds has only such pages below it, and eviction from the
    leaves can free them all. Evicting a page evicts its checkpoint.
    """

    def __init__(self, pages: PagePool, states: StatePool, page_tokens: int) -> None:
        self._pages = pages
        self._states = states
        self._page_tokens = page_tokens
        self._roots: dict[Namespace, PrefixNode] = {}
        self._ticks = itertools.count(1)
        self._entries = itertools.count()
        # (last_used when queued, tie-breaker, node): an entry is stale when the node moved on.
        self._leaves: list[tuple[int, int, PrefixNode]] = []
        self._checkpoints: list[tuple[int, int, PrefixNode]] = []
        self._with_checkpoint: set[PrefixNode] = set()

    def match(self, namespace: Namespace, tokens: list[int], max_hit_tokens: int) -> PrefixMatch:
        """Walk the known pages of `tokens`; the hit is at most `max_hit_tokens` long.

        Takes no references. Marks what the hit uses as recently used.
        """
        node = self._roots.get(namespace)
        path: list[PrefixNode] = []
        num_hit_pages = 0
        while node is not None and (len(path) + 1) * self._page_tokens <= max_hit_tokens:
            start = len(path) * self._page_tokens
            node = node.children.get(tuple(tokens[start : start + self._page_tokens]))
            if node is None:
                break
            path.append(node)
            if node.checkpoint_slot is not None:
                num_hit_pages = len(path)
        self._touch(path)
        return PrefixMatch(tuple(path[:num_hit_pages]), len(path) * self._page_tokens)

    def insert(
        self, namespace: Namespace, parent: PrefixNode | None, tokens: tuple[int, ...], page_id: int
    ) -> PrefixNode:
        """Make `page_id` the page after `parent` (None: the first), unless these tokens have one.

        Returns the node; when its page is another one, the caller must go over to that page.
        """
        assert len(tokens) == self._page_tokens
        if parent is None:
            parent = self._roots.setdefault(namespace, PrefixNode(namespace, (), -1, None, 0))
        known = parent.children.get(tokens)
        if known is not None:
            self._touch([known])
            return known
        node = PrefixNode(namespace, tokens, page_id, parent, parent.num_tokens + self._page_tokens)
        parent.children[tokens] = node
        self._pages.retain(page_id)
        self._pages.mark_cached(page_id)
        self._touch([node])
        self._queue(self._leaves, node)
        return node

    def add_checkpoint(self, node: PrefixNode, slot: int) -> bool:
        """Hand a slot's only reference over to the tree as the state after `node`.

        Returns False, and takes nothing, when the node has a checkpoint already.
        """
        if node.checkpoint_slot is not None:
            return False
        node.checkpoint_slot = slot
        self._with_checkpoint.add(node)
        self._states.mark_cached(slot)
        self._queue(self._checkpoints, node)
        return True

    def evict_pages(self, count: int) -> int:
        """Free up to `count` pages that only the tree holds, least recently used leaves first.

        Returns how many it freed.
        """
        in_use: list[tuple[int, int, PrefixNode]] = []
        num_evicted = 0
        while self._leaves and num_evicted < count:
            entry = heapq.heappop(self._leaves)
            node = entry[2]
            if not node.is_in_tree or node.children:
                continue
            if entry[0] < node.last_used:
                self._queue(self._leaves, node)
            elif not self._pages.is_only_cached(node.page_id):
                in_use.append(entry)
            else:
                self._remove(node)
                num_evicted += 1
        for entry in in_use:
            heapq.heappush(self._leaves, entry)
        return num_evicted

    def evict_checkpoint(self) -> bool:
        """Free the least recently used checkpoint nobody reads; False when there is none."""
        in_use: list[tuple[int, int, PrefixNode]] = []
        evicted = False
        while self._checkpoints and not evicted:
            entry = heapq.heappop(self._checkpoints)
            node = entry[2]
            if not node.is_in_tree or node.checkpoint_slot is None:
                continue
            if entry[0] < node.last_used:
                self._queue(self._checkpoints, node)
            elif not self._states.is_only_cached(node.checkpoint_slot):
                in_use.append(entry)
            else:
                self._drop_checkpoint(node)
                evicted = True
        for entry in in_use:
            heapq.heappush(self._checkpoints, entry)
        return evicted

    def retire(self, sha256: str) -> None:
        """Make everything computed with an adapter the first to be evicted."""
        for namespace, root in self._roots.items():
            if any(use.sha256 == sha256 for use in namespace.adapters):
                for node in self._below(root):
                    node.last_used = 0
                    if not node.children:
                        self._queue(self._leaves, node)
                    if node.checkpoint_slot is not None:
                        self._queue(self._checkpoints, node)

    def checkpoint_names(self) -> frozenset[bytes]:
        """Where a hit can end now, by the names of kiln_common.prefix_path."""
        return frozenset(map(_name_of, self._with_checkpoint))

    def nodes(self) -> Iterator[PrefixNode]:
        """Every page of the tree, parents first."""
        for root in self._roots.values():
            yield from self._below(root)

    def _below(self, root: PrefixNode) -> Iterator[PrefixNode]:
        stack = list(root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _touch(self, path: list[PrefixNode]) -> None:
        tick = next(self._ticks)
        for node in path:
            node.last_used = tick

    def _queue(self, heap: list[tuple[int, int, PrefixNode]], node: PrefixNode) -> None:
        heapq.heappush(heap, (node.last_used, next(self._entries), node))

    def _remove(self, node: PrefixNode) -> None:
        parent = node.parent
        assert parent is not None
        assert not node.children
        if node.checkpoint_slot is not None:
            self._drop_checkpoint(node)
        del parent.children[node.tokens]
        node.is_in_tree = False
        self._pages.uncache(node.page_id)
        if not parent.children:
            if parent.parent is None:
                del self._roots[parent.namespace]
            else:
                self._queue(self._leaves, parent)

    def _drop_checkpoint(self, node: PrefixNode) -> None:
        assert node.checkpoint_slot is not None
        self._states.uncache(node.checkpoint_slot)
        node.checkpoint_slot = None
        self._with_checkpoint.discard(node)


def _name_of(node: PrefixNode) -> bytes:
    """Each page is named once, from the nearest named page above it on."""
    unnamed = []
    at: PrefixNode | None = node
    while at is not None and not at.name:
        unnamed.append(at)
        at = at.parent
    for page in reversed(unnamed):
        if page.parent is None:
            uses = ((use.sha256, use.scale) for use in page.namespace.adapters)
            page.name = root_name(uses, page.namespace.salt)
        else:
            page.name = page_name(page.parent.name, page.tokens)
    return node.name
