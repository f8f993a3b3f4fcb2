"""Names of beginnings: the same in gateway and engine, and different where anything differs."""

from kiln_common.pb import common_pb2, engine_pb2
from kiln_common.prefix_path import path_names, root_name
from kiln_engine.domain.request import AdapterUse
from kiln_engine.scheduling.page_pool import PagePool
from kiln_engine.scheduling.prefix_tree import Namespace, PrefixTree
from kiln_engine.scheduling.state_pool import StatePool
from kiln_gateway.prompt_path import prompt_path

TOKENS = list(range(1000, 1072))


def request(**fields):
    return engine_pb2.GenerateRequest(prompt_token_ids=TOKENS, **fields)


def test_a_name_is_of_everything_before_it():
    names = path_names(root_name([], ""), TOKENS, 16)
    assert len(names) == 4
    assert path_names(root_name([], ""), TOKENS[:40], 16) == names[:2]
    changed = [TOKENS[0] + 1, *TOKENS[1:]]
    assert not set(path_names(root_name([], ""), changed, 16)) & set(names)


def test_adapters_their_order_their_strength_and_the_salt_are_part_of_the_name():
    roots = [
        root_name(uses, salt)
        for uses in ([], [("aa", 1.0)], [("aa", 0.5)], [("aa", 1.0), ("bb", 1.0)], [("bb", 1.0), ("aa", 1.0)])
        for salt in ("", "x")
    ]
    assert len(set(roots)) == len(roots)


def test_gateway_and_engine_use_the_same_names():
    adapter = common_pb2.AdapterRef(name="a", version=1, sha256="ab" * 32)  # scale 0 means 1
    path = prompt_path(request(adapters=[adapter], cache_salt="mine"), page_tokens=16)
    pages, states = PagePool(8), StatePool(4)
    tree = PrefixTree(pages, states, page_tokens=16)
    namespace = Namespace((AdapterUse("ab" * 32),), "mine")
    node = None
    for start in (0, 16, 32):
        node = tree.insert(namespace, node, tuple(TOKENS[start : start + 16]), pages.take(1)[0])
    assert tree.checkpoint_names() == frozenset()
    tree.add_checkpoint(node, states.take(1)[0])
    assert tree.checkpoint_names() == {path.names[2]}
    states.release(states.take(3)[0])
    assert node.checkpoint_slot is not None
    assert tree.evict_checkpoint()
    assert tree.checkpoint_names() == frozenset()


def test_what_a_request_leaves_behind_is_where_later_ones_start():
    path = prompt_path(request(num_stable_prefix_tokens=50, num_shared_prefix_tokens=20), page_tokens=16)
    assert set(path.kept) == {path.names[0], path.names[2], path.names[3]}


def test_prompts_that_are_read_out_leave_nothing_and_start_from_nothing():
    assert prompt_path(request(wants_embedding=True), page_tokens=16).names == []
