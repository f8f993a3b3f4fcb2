"""Transactions that lose to another one, which on SQLite never happens by itself."""

import pytest
from sqlalchemy import Insert, event
from sqlalchemy.exc import IntegrityError, OperationalError

from kiln_registry import schema
from kiln_registry.datasets.catalog import DatasetCatalog, DatasetRecord


class Refusal(Exception):
    def __init__(self, sqlstate):
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


@pytest.fixture
def engine(tmp_path):
    engine = schema.open_engine("", tmp_path)
    yield engine
    engine.dispose()


def losing(*errors):
    """A change that raises these one after another, then says how often it was made."""
    left, num_calls = [*errors], 0

    def change(connection):
        nonlocal num_calls
        num_calls += 1
        if left:
            raise left.pop(0)
        return num_calls

    return change


def test_a_lost_race_and_a_deadlock_are_tried_again(engine):
    race = IntegrityError("", {}, Refusal("23505"))
    deadlock, conflict = (OperationalError("", {}, Refusal(state)) for state in ("40P01", "40001"))
    assert schema.write(engine, losing(race, deadlock, conflict)) == 4
    with pytest.raises(IntegrityError):
        schema.write(engine, losing(*[race] * 4))


def test_another_failure_is_told_at_once(engine):
    with pytest.raises(OperationalError):
        schema.write(engine, losing(OperationalError("", {}, Refusal("53100"))))


def test_a_dataset_that_another_registry_adds_meanwhile_is_found(engine):
    catalog = DatasetCatalog(engine)
    lost = []

    @event.listens_for(engine, "before_execute")
    def _lose_once(connection, statement, *_):
        if isinstance(statement, Insert) and not lost:
            lost.append(statement)
            raise IntegrityError("", {}, Refusal("23505"))

    record = DatasetRecord("ds_1", "me", "name", "chat", 1, "a" * 64, 10, 0.0)
    assert catalog.add(record) == record
    assert len(lost) == 1
    assert catalog.list("me") == [record]
