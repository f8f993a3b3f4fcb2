"""Evaluations through a real registry: what is kept outlives it."""

import pytest

from kiln_common.clients.evaluations import EvaluationsClient
from kiln_common.errors import KilnError
from kiln_common.pb import evaluations_pb2 as pb
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
        await client.close()
