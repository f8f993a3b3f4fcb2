"""What is collected, what never is, and what is refused for want of room; on a real database."""

import pytest

from kiln_common.adapter_names import AdapterReference
from kiln_registry.catalog import Catalog
from kiln_registry.domain import (
    AdapterQuotaExceeded,
    InspectedAdapter,
    Publication,
    Retention,
    StoredBlob,
)
from kiln_registry.schema import open_engine

GRACE_S = 60.0


class Shelf:
    """A catalogue whose versions were all looked up long ago, unless a test says otherwise."""

    def __init__(self, folder, **limits) -> None:
        self.now_s = 1000.0
        retention = Retention(grace_s=GRACE_S, **limits)
        self.catalog = Catalog(open_engine("", folder), retention, clock=lambda: self.now_s)
        self.num_published = 0

    def publish(self, name="a", *, parent="", **fields):
        self.now_s += 2 * GRACE_S
        self.num_published += 1
        if parent:
            parent_name, _, version = parent.partition("@")
            fields |= {"parent_name": parent_name, "parent_version": int(version)}
        publication = Publication(
            name=name,
            base_model_hash="h",
            config_json="{}",
            blob=StoredBlob(fields.pop("sha256", f"{self.num_published:064x}"), 10),
            inspected=InspectedAdapter(2, 4.0, ("gate_proj",)),
            **fields,
        )
        return self.catalog.publish(publication, self.now_s)

    def look_up(self, name, version):
        return self.catalog.resolve(AdapterReference(name, version))

    def hold(self, holder, *references, for_s=10_000.0):
        parsed = [
            AdapterReference(name, int(n) if n else None)
            for name, _, n in (r.partition("@") for r in references)
        ]
        self.catalog.hold(holder, parsed, self.now_s + for_s, self.now_s)

    def left(self, name="a"):
        return [record.version for record in self.catalog.get_adapter(name).versions]


@pytest.fixture
def shelf(tmp_path):
    def build(**limits):
        shelf = Shelf(tmp_path, **limits)
        shelves.append(shelf)
        return shelf

    shelves = []
    yield build
    for shelf in shelves:
        shelf.catalog.close()


def test_versions_beyond_those_kept_go_the_oldest_first(shelf):
    shelf = shelf(keep_versions=2)
    for _ in range(4):
        shelf.publish()
    assert shelf.left() == [3, 4]
    entries = shelf.catalog.read_audit("", 0, 100)
    collected = [(entry.actor, entry.version) for entry in entries if entry.action == "collect"]
    assert collected == [("retention", 2), ("retention", 1)]
    events = [event.type for event in shelf.catalog.read_outbox(100)]
    assert events.count("AdapterDeleted") == 2
    assert shelf.catalog.list_named_blobs() == {f"{number:064x}" for number in (3, 4)}


def test_nothing_is_collected_unless_that_was_asked_for(shelf):
    shelf = shelf()
    for _ in range(5):
        shelf.publish()
    assert shelf.left() == [1, 2, 3, 4, 5]


def test_what_is_attached_or_meant_by_the_name_stays(shelf):
    shelf = shelf(keep_versions=1)
    shelf.publish(attach=True)
    shelf.publish()
    assert shelf.left() == [1, 2]
    shelf.catalog.roll_back(AdapterReference("a", 1), may_move_default=False, now_s=shelf.now_s)
    shelf.catalog.set_default(None, shelf.now_s)
    shelf.publish("b")  # of another name: nothing to collect there
    assert shelf.left() == [1, 2]
    shelf.publish()  # the name means it now, and neither of the others
    assert shelf.left() == [3]


def test_parents_and_merge_sources_stay_as_long_as_what_came_from_them(shelf):
    shelf = shelf(keep_versions=1)
    for number in range(1, 4):
        shelf.publish("grown", parent=f"grown@{number - 1}" if number > 1 else "")
    assert shelf.left("grown") == [1, 2, 3]
    shelf.publish("a")
    shelf.publish("child", parent="a@1")
    merge = '{"mode": "ties", "sources": [{"name": "a", "version": 2, "weight": 1.0}]}'
    shelf.publish("a")
    shelf.publish("merged", merge_json=merge)
    shelf.publish("a")
    assert shelf.left("a") == [1, 2, 3]
    for name in ("child", "merged"):
        shelf.catalog.delete(AdapterReference(name), shelf.now_s)
    shelf.publish("a")
    assert shelf.left("a") == [4]


def test_a_branch_that_was_given_up_goes_as_a_whole(shelf):
    shelf = shelf(keep_versions=1)
    shelf.publish()
    shelf.publish(parent="a@1")
    shelf.publish(parent="a@2")
    assert shelf.left() == [1, 2, 3]
    shelf.publish()
    assert shelf.left() == [4]


def test_what_an_engine_or_a_job_holds_stays_until_it_is_let_go(shelf):
    shelf = shelf(keep_versions=1)
    for name in ("a", "b"):
        shelf.publish(name)
    shelf.hold("engine", "a@1")
    shelf.hold("trainer", "a", "b", "nobody@3")  # names mean what they mean now
    shelf.publish("a")
    shelf.publish("b")
    assert (shelf.left("a"), shelf.left("b")) == ([1, 2], [1, 2])
    shelf.hold("trainer")
    shelf.publish("a")
    shelf.publish("b")
    assert (shelf.left("a"), shelf.left("b")) == ([1, 3], [3])
    shelf.hold("engine", "a@1", for_s=GRACE_S)  # a report that is not repeated runs out
    shelf.publish("a")
    assert shelf.left("a") == [4]


def test_what_was_just_looked_up_stays_for_it_may_be_on_its_way_to_a_request(shelf):
    shelf = shelf(keep_versions=1)
    shelf.publish()
    shelf.publish(attach=True)
    shelf.publish()
    assert shelf.left() == [2, 3]
    shelf.now_s += GRACE_S  # publishing takes two of them
    shelf.look_up("a", 2)
    shelf.catalog.set_default(None, shelf.now_s)
    shelf.now_s -= 2 * GRACE_S  # so that the next publish comes at once
    shelf.publish()
    assert shelf.left() == [2, 4]
    shelf.publish()
    assert shelf.left() == [5]


def test_a_registry_that_was_just_started_knows_of_no_use_and_collects_nothing(tmp_path):
    first = Shelf(tmp_path)
    for _ in range(3):
        first.publish()
    second = Catalog(open_engine("", tmp_path), Retention(keep_versions=1), clock=lambda: first.now_s)
    first.catalog.close()
    first.catalog = second
    first.now_s -= 2 * GRACE_S
    first.publish()
    assert first.left() == [1, 2, 3, 4]
    first.publish()
    assert first.left() == [5]
    second.close()


def test_a_name_with_all_the_versions_it_may_have_gets_no_more(shelf):
    shelf = shelf(max_versions=2)
    for _ in range(2):
        shelf.publish(owner="ann")
    with pytest.raises(AdapterQuotaExceeded, match="'a' would have 3 versions, the limit is 2"):
        shelf.publish(owner="ann")
    with pytest.raises(AdapterQuotaExceeded):
        shelf.catalog.check_publish("a", "ann", shelf.now_s)
    assert shelf.left() == [1, 2]
    shelf.catalog.check_publish("b", "ann", shelf.now_s)
    shelf.catalog.delete(AdapterReference("a", 1), shelf.now_s)
    assert shelf.publish(owner="ann").version == 3


def test_what_can_be_collected_makes_room(shelf):
    shelf = shelf(keep_versions=2, max_versions=2)
    for _ in range(4):
        shelf.publish()
        shelf.now_s += GRACE_S
        shelf.catalog.check_publish("a", "", shelf.now_s)
    assert shelf.left() == [3, 4]
    shelf.hold("engine", "a@3")
    with pytest.raises(AdapterQuotaExceeded):
        shelf.publish()
    assert shelf.left() == [3, 4]


def test_a_keys_bytes_are_counted_once_for_each_file(shelf):
    shelf = shelf(max_bytes=25)
    shelf.publish("a", owner="ann", sha256="a" * 64)
    shelf.publish("b", owner="ann", sha256="a" * 64)  # the same file
    shelf.publish("b", owner="ann", sha256="b" * 64)
    shelf.publish("c", owner="ben", sha256="c" * 64)  # another key's room
    with pytest.raises(AdapterQuotaExceeded, match="30 bytes, the limit is 25"):
        shelf.publish("a", owner="ann", sha256="d" * 64)
    assert shelf.left("a") == [1]
