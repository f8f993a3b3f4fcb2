"""Versions, aliases, idempotency, fencing and the outbox, on a real database."""

import contextlib
import json
import os
import threading

import pytest
from sqlalchemy import select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateTable

from kiln_common.adapter_names import (
    AdapterReference,
    InvalidAdapterName,
    ReservedAdapterName,
    parse_reference,
)
from kiln_common.errors import AdapterNotFound, IdempotencyConflict
from kiln_registry import schema
from kiln_registry.catalog import Catalog
from kiln_registry.domain import (
    AdapterInUse,
    AdapterNameTaken,
    BaseModelRecord,
    DefaultNeedsAdmin,
    InspectedAdapter,
    ModuleShape,
    Publication,
    StaleClaim,
    StoredBlob,
    UnknownBaseModel,
    VersionDeleted,
)
from kiln_registry.schema import CatalogTooNew, DatabaseUrlUnusable, open_engine
from kiln_registry.statements import raise_epoch

# What came after schema 1.
LATER_COLUMNS = [
    ("base_models", "max_adapter_rank"),
    ("aliases", "rolled_back_over"),
    ("versions", "data_sha256"),
    ("versions", "merge_json"),
    ("versions", "source_sha256"),
    ("adapters", "owner"),
]


@pytest.fixture
def catalog(tmp_path):
    """On SQLite; with KILN_TEST_DATABASE_URL on that database, whose tables are dropped first."""
    engine = open_engine(os.environ.get("KILN_TEST_DATABASE_URL", ""), tmp_path)
    schema.metadata.drop_all(engine)
    catalog = Catalog(engine)
    yield catalog
    catalog.close()


def publication(name: str = "helper", sha256: str = "a" * 64, **overrides) -> Publication:
    return Publication(
        name=name,
        base_model_hash="h",
        config_json="{}",
        blob=StoredBlob(sha256, 10),
        inspected=InspectedAdapter(2, 4.0, ("gate_proj",)),
        **overrides,
    )


def event_types(catalog: Catalog) -> list[str]:
    return [event.type for event in catalog.read_outbox(100)]


def test_versions_count_up_and_the_bare_name_means_the_newest(catalog):
    assert [catalog.publish(publication(), 1.0).version for _ in range(3)] == [1, 2, 3]
    assert catalog.resolve(AdapterReference("helper")).version == 3
    assert catalog.resolve(AdapterReference("helper", 1)).version == 1


def test_numbers_of_deleted_versions_are_not_reused(catalog):
    catalog.publish(publication(), 1.0)
    catalog.publish(publication(), 1.0)
    assert catalog.delete(AdapterReference("helper", 2), 2.0) == 1
    assert catalog.resolve(AdapterReference("helper")).version == 1
    assert catalog.delete(AdapterReference("helper"), 2.0) == 1
    with pytest.raises(AdapterNotFound):
        catalog.resolve(AdapterReference("helper"))
    assert catalog.list_adapters() == []
    assert catalog.publish(publication(), 3.0).version == 3


def test_a_publish_key_makes_one_version(catalog):
    first = catalog.publish(publication(publish_key="job_1"), 1.0)
    again = catalog.publish(publication(publish_key="job_1", sha256="b" * 64), 2.0)
    assert again == first
    assert event_types(catalog) == ["AdapterPublished"]
    with pytest.raises(IdempotencyConflict):
        catalog.publish(publication(name="other", publish_key="job_1"), 3.0)


def test_a_publish_key_does_not_bring_back_a_deleted_version(catalog):
    catalog.publish(publication(publish_key="job_1"), 1.0)
    catalog.delete(AdapterReference("helper", 1), 2.0)
    with pytest.raises(VersionDeleted):
        catalog.publish(publication(publish_key="job_1"), 3.0)


def test_an_older_claim_cannot_publish(catalog):
    catalog.publish(publication(job_id="job_1", publish_key="job_1:5", claim_epoch=2), 1.0)
    with pytest.raises(StaleClaim):
        catalog.publish(publication(job_id="job_1", publish_key="job_1:6", claim_epoch=1), 2.0)
    with pytest.raises(StaleClaim):
        catalog.find_published("job_1:6", "helper", "job_1", 1)
    assert catalog.resolve(AdapterReference("helper")).version == 1
    assert (
        catalog.publish(publication(job_id="job_1", publish_key="job_1:6", claim_epoch=3), 3.0).version == 2
    )


def test_attach_moves_the_default_in_the_same_transaction(catalog):
    catalog.publish(publication(attach=True), 1.0)
    assert catalog.get_default().version == 1
    assert catalog.get_adapter("helper").attached_version == 1
    assert event_types(catalog) == ["AdapterPublished", "DefaultChanged"]


def test_an_attached_version_cannot_be_deleted(catalog):
    catalog.publish(publication(attach=True), 1.0)
    catalog.publish(publication(), 1.0)
    for reference in (AdapterReference("helper", 1), AdapterReference("helper")):
        with pytest.raises(AdapterInUse):
            catalog.delete(reference, 2.0)
    assert len(catalog.get_adapter("helper").versions) == 2
    assert catalog.delete(AdapterReference("helper", 2), 2.0) == 1
    catalog.set_default(None, 3.0)
    assert catalog.delete(AdapterReference("helper"), 4.0) == 1


def test_a_rolled_back_name_means_the_older_version_until_the_next_publish(catalog):
    for _ in range(3):
        catalog.publish(publication(), 1.0)
    record, has_moved_default = catalog.roll_back(
        AdapterReference("helper", 1), may_move_default=False, now_s=2.0
    )
    assert (record.version, record.rolled_back_over, has_moved_default) == (1, 3, False)
    assert catalog.resolve(AdapterReference("helper")) == record
    assert catalog.get_adapter("helper").latest_version == 1
    assert catalog.resolve(AdapterReference("helper", 3)).version == 3  # still there by its number
    assert json.loads(catalog.read_outbox(100)[-1].data_json)["rolled_back_over"] == 3
    catalog.roll_back(AdapterReference("helper", 3), may_move_default=False, now_s=3.0)
    # Forward is a rollback too: engines must not keep to the older version.
    assert catalog.resolve(AdapterReference("helper")).rolled_back_over == 3
    catalog.roll_back(AdapterReference("helper", 2), may_move_default=False, now_s=4.0)
    assert catalog.publish(publication(), 5.0).version == 4
    newest = catalog.resolve(AdapterReference("helper"))
    assert (newest.version, newest.rolled_back_over) == (4, 0)
    catalog.delete(AdapterReference("helper", 4), 6.0)
    left = catalog.resolve(AdapterReference("helper"))
    assert (left.version, left.rolled_back_over) == (3, 4)


def test_a_rollback_takes_a_later_default_along_if_it_may(catalog):
    catalog.publish(publication(), 1.0)
    catalog.publish(publication(attach=True), 1.0)
    target = AdapterReference("helper", 1)
    with pytest.raises(DefaultNeedsAdmin, match="helper@2 is the default"):
        catalog.roll_back(target, may_move_default=False, now_s=2.0)
    assert catalog.resolve(AdapterReference("helper")).version == 2
    assert catalog.roll_back(target, may_move_default=True, now_s=2.0)[1]
    assert catalog.get_default().version == 1
    assert event_types(catalog)[-2:] == ["AdapterRolledBack", "DefaultChanged"]
    # Back up: the default is an earlier version now, and stays what somebody chose.
    assert not catalog.roll_back(AdapterReference("helper", 2), may_move_default=True, now_s=3.0)[1]
    assert catalog.get_default().version == 1
    with pytest.raises(AdapterNotFound):
        catalog.roll_back(AdapterReference("helper", 9), may_move_default=True, now_s=3.0)


def test_a_name_belongs_to_whom_published_its_first_version(catalog):
    assert catalog.publish(publication(owner="ann"), 1.0).owner == "ann"
    with pytest.raises(AdapterNameTaken):
        catalog.publish(publication(owner="ben"), 2.0)
    with pytest.raises(AdapterNameTaken):
        catalog.check_publish("helper", "ben", 2.0)
    catalog.check_publish("helper", "ann", 2.0)
    catalog.check_publish("new", "ben", 2.0)
    assert catalog.resolve(AdapterReference("helper")).version == 1
    # Where no keys are configured, nobody is told apart, and what exists stays whose it is.
    assert catalog.publish(publication(), 3.0).owner == "ann"
    catalog.delete(AdapterReference("helper"), 4.0)
    assert catalog.publish(publication(owner="ben"), 5.0).owner == "ben"
    # What was made without keys is nobody's to go on with.
    catalog.publish(publication(name="old"), 6.0)
    with pytest.raises(AdapterNameTaken):
        catalog.publish(publication(name="old", owner="ann"), 7.0)


def test_the_audit_log_only_grows(catalog):
    catalog.publish(publication(owner="ann", job_id="job_1"), 1.0)
    catalog.set_default(None, 2.0, actor="root")  # nothing was attached: nothing was done
    catalog.delete(AdapterReference("helper"), 3.0, actor="ann")
    entries = catalog.read_audit("", 0, 10)
    assert [(entry.actor, entry.action) for entry in entries] == [("ann", "delete"), ("ann", "publish")]
    assert json.loads(entries[1].detail_json)["job_id"] == "job_1"
    for statement in ("DELETE FROM audit", "UPDATE audit SET actor = 'x'"):
        with contextlib.suppress(IntegrityError), catalog._engine.begin() as connection:
            connection.execute(text(statement))
    assert catalog.read_audit("", 0, 10) == entries


def test_attaching_what_is_not_there_changes_nothing(catalog):
    catalog.publish(publication(attach=True), 1.0)
    with pytest.raises(AdapterNotFound):
        catalog.set_default(AdapterReference("helper", 9), 2.0)
    assert catalog.get_default().version == 1


def test_attaching_and_deleting_at_once_never_attaches_a_deleted_version(catalog):
    for round_number in range(8):
        name = f"adapter-{round_number}"
        catalog.publish(publication(name=name), 1.0)
        outcomes = []

        def run(action, outcomes=outcomes):
            try:
                action()
                outcomes.append("done")
            except (AdapterInUse, AdapterNotFound) as error:
                outcomes.append(error.code)

        threads = [
            threading.Thread(target=run, args=(action,))
            for action in (
                lambda name=name: catalog.set_default(AdapterReference(name, 1), 2.0),
                lambda name=name: catalog.delete(AdapterReference(name, 1), 2.0),
            )
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) in (["adapter_in_use", "done"], ["adapter_not_found", "done"])
        catalog.get_default()  # would raise AdapterNotFound if it named a deleted version


def test_publishing_and_deleting_at_once_never_leaves_a_version_without_its_name(catalog):
    for round_number in range(8):
        name = f"adapter-{round_number}"
        catalog.publish(publication(name=name), 1.0)
        threads = [
            threading.Thread(target=action)
            for action in (
                lambda name=name: catalog.publish(publication(name=name), 2.0),
                lambda name=name: catalog.delete(AdapterReference(name), 2.0),
            )
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for adapter in catalog.list_adapters():
            newest = adapter.versions[-1].version
            assert adapter.latest_version == catalog.resolve(AdapterReference(adapter.name)).version == newest


def test_an_older_claim_that_was_checked_in_time_cannot_bring_its_epoch_back(catalog):
    catalog.publish(publication(job_id="job_1", publish_key="job_1:5", claim_epoch=2), 1.0)
    with pytest.raises(IntegrityError), catalog._engine.begin() as connection:
        raise_epoch(connection, "job_1", 1)
    with pytest.raises(StaleClaim):
        catalog.find_published("job_1:6", "helper", "job_1", 1)


def test_base_models_announced_at_once_are_registered_once(catalog):
    threads = [
        threading.Thread(target=catalog.register_base_model, args=(BaseModelRecord("m", "h", {}, rank),))
        for rank in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert catalog.get_base_model("h").max_adapter_rank in range(6)


def test_a_base_model_that_is_announced_again_is_no_news_until_it_changes(catalog):
    record = BaseModelRecord("m", "h", {"p": ModuleShape(1, 2)}, 8)
    assert catalog.register_base_model(record)
    assert not catalog.register_base_model(record)
    assert catalog.register_base_model(BaseModelRecord("m", "h", {"p": ModuleShape(1, 3)}, 8))
    assert catalog.get_base_model("h").modules == {"p": ModuleShape(1, 3)}


def test_concurrent_publishes_get_different_numbers(catalog):
    versions = []
    threads = [
        threading.Thread(target=lambda: versions.append(catalog.publish(publication(), 1.0).version))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == [1, 2, 3, 4, 5, 6]


def test_the_catalogue_survives_being_reopened(tmp_path):
    first = Catalog(open_engine("", tmp_path))
    first.publish(publication(attach=True), 1.0)
    first.close()
    second = Catalog(open_engine("", tmp_path))
    assert second.get_default().version == 1
    assert event_types(second) == ["AdapterPublished", "DefaultChanged"]
    second.clear_outbox(second.read_outbox(1)[0].id)
    assert event_types(second) == ["DefaultChanged"]
    second.close()


def test_a_catalogue_of_schema_1_gets_its_missing_columns(tmp_path):
    engine = open_engine("", tmp_path)
    catalog = Catalog(engine)
    catalog.register_base_model(BaseModelRecord("m", "h", {"p": ModuleShape(1, 2)}, 8))
    catalog.publish(publication(), 1.0)
    with engine.begin() as connection:
        for table, column in LATER_COLUMNS:
            connection.execute(text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        connection.execute(text("UPDATE schema_version SET version = 1"))
    for _ in range(2):
        catalog = Catalog(engine)
        assert catalog.get_base_model("h").max_adapter_rank == 0
        assert catalog.resolve(AdapterReference("helper")).rolled_back_over == 0
    catalog.register_base_model(BaseModelRecord("m", "h", {}, 8))
    assert catalog.get_base_model("h").max_adapter_rank == 8
    engine.dispose()


@pytest.mark.parametrize("url", ["nonsense", "mysql+no_such_driver://h/d", "postgresql://u:p@h:secret/d"])
def test_a_database_that_cannot_be_opened_is_an_error_of_our_own(tmp_path, url):
    with pytest.raises(DatabaseUrlUnusable, match="database cannot be opened") as refused:
        open_engine(url, tmp_path)
    assert "secret" not in str(refused.value)


def test_a_newer_catalogue_is_left_alone(tmp_path):
    engine = open_engine("", tmp_path)
    Catalog(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE schema_version SET version = 99"))
    with pytest.raises(CatalogTooNew):
        Catalog(engine)
    engine.dispose()


def test_names_that_mean_the_base_model_are_reserved(catalog):
    catalog.register_base_model(BaseModelRecord("Demo-1", "h", {"m": ModuleShape(1, 1)}))
    for name in ("base", "BASE", "demo-1"):
        with pytest.raises(ReservedAdapterName):
            catalog.check_name(name)
    for name in ("", "-a", "a/b", "a@1", "ü", "a" * 129, "a\n"):
        with pytest.raises(InvalidAdapterName):
            catalog.check_name(name)
    catalog.check_name("Helpful-v3.1_x")


@pytest.mark.parametrize("reference", ["a@", "a@0", "a@-1", "a@1@2", "@1", "a@latest", "a@01"])
def test_malformed_references_are_refused(reference):
    with pytest.raises(InvalidAdapterName):
        parse_reference(reference)


def test_an_unknown_base_model_is_an_error(catalog):
    with pytest.raises(UnknownBaseModel):
        catalog.get_base_model("nope")


def test_the_schema_and_its_row_locks_exist_in_postgresql():
    dialect = postgresql.dialect()
    for table in schema.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=dialect))
    assert "BIGSERIAL" in str(CreateTable(schema.outbox).compile(dialect=dialect))
    assert "FOR UPDATE" in str(select(schema.versions).with_for_update().compile(dialect=dialect))
