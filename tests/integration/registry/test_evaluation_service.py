"""Evaluations through a real registry: what is kept outlives it."""

import pytest
from sqlalchemy import event

from kiln_common.clients.evaluations import EvaluationsClient
from kiln_common.errors import KilnError
from kiln_common.pb import evaluations_pb2 as pb
from kiln_registry import schema
from kiln_registry.evaluations.store import EvaluationStore
from tests.support.registry import running_registry


async def test_suites_and_runs_outlive_the_registry(tmp_path):
    async with running_registry(tmp_path) as registry:
        client = EvaluationsClient(registry.address)
        suite = await client.put_suite("me", "small", "{}\n{}", 2)
        request = pb.SubmitRunRequest(
            owner="me", suite_id=suite.id, adapter="base", settings_json="{}", idempotency_key="k"
        )
        run = await client.submit_run(request)
        assert (await client.submit_run(request)).id == run.id
        claimed = await client.claim_run(0.0)  # a lease that is over at once
        assert (claimed.id, claimed.suite.content, claimed.claim_epoch) == (run.id, "{}\n{}", 1)
        case = pb.EvalCase(index=1, score=0.5, is_valid=True, answer="a", detail="d")
        await client.report_cases(run.id, 1, [case], 0.0)
        await client.close()
    async with running_registry(tmp_path) as registry:
        client = EvaluationsClient(registry.address)
        again = await client.claim_run(30.0)
        assert (again.id, again.claim_epoch, [*again.cases]) == (
            run.id,
            2,
            [pb.EvalCase(index=1, score=0.5, is_valid=True)],
        )
        assert [*(await client.get_run(run.id, "me", with_cases=True)).cases] == [case]
        assert await client.claim_run(30.0) is None
        with pytest.raises(KilnError) as refused:
            await client.report_cases(run.id, 1, [], 30.0)
        assert refused.value.code == "eval_claim_lost"
        failure = pb.EvalError(code="sandbox_unavailable", message="no", hint="some")
        ended = await client.finish_run(run.id, 2, error=failure)
        assert (ended.status, ended.error) == ("failed", failure)
        assert (await client.finish_run(run.id, 2, error=failure)).status == "failed"
        for call in (client.get_run(run.id, "you"), client.get_suite("you", suite.id)):
            with pytest.raises(KilnError, match="there is no"):
                await call
        assert [found.id for found in await client.list_suites("me")] == [suite.id]

        (found,) = await client.list_runs("me", ["base"], ["failed"], 5)
        assert (found.id, found.num_done, found.error, [*found.cases]) == (run.id, 1, failure, [])
        assert await client.list_runs("you") == []
        with pytest.raises(KilnError, match="there is no"):
            await client.delete_run(run.id, "you")
        await client.delete_run(run.id, "me")
        assert await client.list_runs("me") == []
        assert (await client.submit_run(request)).id != run.id
        await client.close()


async def test_a_key_stands_for_one_run_of_one_owner(tmp_path):
    async with running_registry(tmp_path) as registry:
        client = EvaluationsClient(registry.address)
        suite = await client.put_suite("me", "small", "{}", 1)
        fields = {
            "owner": "me", "suite_id": suite.id, "adapter": "a@1", "settings_json": "{}",
            "idempotency_key": "k",
        }  # fmt: skip
        run = await client.submit_run(pb.SubmitRunRequest(**fields))
        for change in ({"owner": "you"}, {"adapter": "a@2"}, {"settings_json": '{"seed":1}'}):
            with pytest.raises(KilnError) as refused:
                await client.submit_run(pb.SubmitRunRequest(**{**fields, **change}))
            assert refused.value.code == "idempotency_conflict"
        assert (await client.submit_run(pb.SubmitRunRequest(**fields))).id == run.id
        await client.close()


def test_a_suites_content_is_read_only_where_it_is_wanted(tmp_path):
    engine = schema.open_engine("", tmp_path)
    store = EvaluationStore(engine)
    suite = store.put_suite(pb.PutSuiteRequest(owner="me", name="small", content="{}", num_cases=1), 0.0)
    read = []

    @event.listens_for(engine, "before_cursor_execute")
    def _note(connection, cursor, statement, *_):
        if "eval_suites.content" in statement.partition("FROM")[0]:
            read.append(statement)

    run = store.submit_run(pb.SubmitRunRequest(owner="me", suite_id=suite.id, settings_json="{}"), 0.0)
    store.list_suites("me")
    store.get_suite("me", "small", with_content=False)
    store.get_run(run.id, "me", with_cases=True)
    store.put_suite(pb.PutSuiteRequest(owner="me", name="small", content="{}", num_cases=1), 0.0)
    assert read == []
    assert store.get_suite("me", suite.id, with_content=True).content == "{}"
    assert store.claim_run(30.0, 1.0).suite.content == "{}"
    assert len(read) == 2
    engine.dispose()


def test_runs_are_found_by_the_name_as_it_is_written(tmp_path):
    engine = schema.open_engine("", tmp_path)
    store = EvaluationStore(engine)
    suite = store.put_suite(pb.PutSuiteRequest(owner="me", name="small", content="{}", num_cases=1), 0.0)
    for adapter in ("kind@1", "kind@2", "Kind@1", "kinder@1", "k_nd@1"):
        run = pb.SubmitRunRequest(owner="me", suite_id=suite.id, adapter=adapter, settings_json="{}")
        store.submit_run(run, 0.0)

    def found(adapter):
        return {run.adapter for run in store.list_runs(pb.ListRunsRequest(owner="me", adapters=[adapter]))}

    assert found("kind") == {"kind@1", "kind@2"}
    assert found("Kind") == {"Kind@1"}
    assert found("k_nd") == {"k_nd@1"}
    assert found("kind@2") == {"kind@2"}
    engine.dispose()
