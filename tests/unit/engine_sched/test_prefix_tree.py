from kiln_engine.domain import AdapterUse
from kiln_engine.scheduling.page_pool import PagePool
from kiln_engine.scheduling.prefix_tree import Namespace, PrefixNode, PrefixTree
from kiln_engine.scheduling.state_pool import StatePool

BASE = Namespace()


class Tree:
    def __init__(self, num_pages: int = 8, num_slots: int = 8) -> None:
        self.pages = PagePool(num_pages)
        self.states = StatePool(num_slots)
        self.tree = PrefixTree(self.pages, self.states, page_tokens=2)

    def keep(self, tokens: list[int], checkpoints: tuple[int, ...] = (), namespace: Namespace = BASE):
        """Insert a prompt's pages as a sequence would that has just ended."""
        node: PrefixNode | None = None
        for start in range(0, len(tokens), 2):
            [page] = self.pages.take(1)
            node = self.tree.insert(namespace, node, tuple(tokens[start : start + 2]), page)
            self.pages.release(page)
            if start + 2 in checkpoints:
                [slot] = self.states.take(1)
                assert self.tree.add_checkpoint(node, slot)
        return node

    def hit(self, tokens: list[int], namespace: Namespace = BASE) -> tuple[int, int]:
        match = self.tree.match(namespace, tokens, len(tokens) - 1)
        return match.num_hit_tokens, match.num_matched_tokens


def test_a_hit_ends_at_the_deepest_checkpoint():
    tree = Tree()
    tree.keep([1, 2, 3, 4, 5, 6], checkpoints=(2, 4))
    assert tree.hit([1, 2, 3, 4, 5, 6, 7]) == (4, 6)


def test_a_hit_leaves_a_token_to_compute():
    tree = Tree()
    tree.keep([1, 2, 3, 4], checkpoints=(2, 4))
    assert tree.hit([1, 2, 3, 4]) == (2, 2)


def test_namespaces_share_nothing():
    tree = Tree()
    tree.keep([1, 2], checkpoints=(2,))
    for other in (
        Namespace(salt="s"),
        Namespace((AdapterUse("a"),)),
    ):
        assert tree.hit([1, 2, 3], other) == (0, 0)
    tree.keep([1, 2], checkpoints=(2,), namespace=Namespace((AdapterUse("a"), AdapterUse("b"))))
    assert tree.hit([1, 2, 3], Namespace((AdapterUse("b"), AdapterUse("a")))) == (0, 0)
    assert tree.hit([1, 2, 3], Namespace((AdapterUse("a", 0.5), AdapterUse("b")))) == (0, 0)


def test_the_least_recently_used_leaf_goes_first():
    tree = Tree()
    tree.keep([1, 2, 3, 4], checkpoints=(4,))
    tree.keep([5, 6], checkpoints=(2,))
    tree.hit([1, 2, 3, 4, 0])
    assert tree.tree.evict_pages(1) == 1
    assert tree.hit([5, 6, 0]) == (0, 0)
    assert tree.hit([1, 2, 3, 4, 0]) == (4, 4)


def test_evicting_a_page_evicts_its_checkpoint():
    tree = Tree()
    tree.keep([1, 2, 3, 4], checkpoints=(2, 4))
    assert tree.tree.evict_pages(1) == 1
    assert tree.states.num_referenced == 1
    assert tree.hit([1, 2, 3, 4, 5]) == (2, 2)


def test_pages_and_checkpoints_in_use_stay():
    tree = Tree()
    leaf = tree.keep([1, 2], checkpoints=(2,))
    tree.pages.retain(leaf.page_id)
    tree.states.retain(leaf.checkpoint_slot)
    assert tree.tree.evict_pages(1) == 0
    assert not tree.tree.evict_checkpoint()
    tree.pages.release(leaf.page_id)
    tree.states.release(leaf.checkpoint_slot)
    assert tree.tree.evict_checkpoint()
    assert tree.tree.evict_pages(1) == 1


def test_an_evicted_checkpoint_leaves_its_pages():
    tree = Tree()
    tree.keep([1, 2], checkpoints=(2,))
    assert tree.tree.evict_checkpoint()
    assert tree.hit([1, 2, 3]) == (0, 2)


def test_a_retired_adapters_pages_go_first():
    tree = Tree()
    retired, current = Namespace((AdapterUse("old"),)), Namespace((AdapterUse("new"),))
    tree.keep([1, 2], checkpoints=(2,), namespace=current)
    tree.keep([1, 2], checkpoints=(2,), namespace=retired)
    tree.tree.retire("old")
    assert tree.tree.evict_pages(1) == 1
    assert tree.hit([1, 2, 3], retired) == (0, 0)
    assert tree.hit([1, 2, 3], current) == (2, 2)


def test_everything_can_be_evicted():
    tree = Tree()
    tree.keep([1, 2, 3, 4], checkpoints=(4,))
    tree.keep([1, 2, 5, 6], checkpoints=(2,))
    assert tree.tree.evict_pages(100) == 3
    assert tree.pages.num_free == tree.pages.num_ids
    assert tree.states.num_free == tree.states.num_ids
    assert list(tree.tree.nodes()) == []
