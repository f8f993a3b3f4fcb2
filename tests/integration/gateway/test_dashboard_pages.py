"""The dashboard's pages in a browser, before a gateway whose engine says what the test wants."""

import asyncio
import json
import re
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from playwright.async_api import async_playwright, expect

from kiln_common.pb import evaluations_pb2, trainer_pb2
from kiln_gateway.settings import ApiKey
from tests.support.browser import PATIENCE_MS, PageWatch, launch_options
from tests.support.gateway import gateway_rig, served

# One browser for all tests, so one event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "admin-key-0123456789"
INFER_KEY = "infer-key-0123456789"
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script> **bold**'
TOOL_CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser():
    async with async_playwright() as playwright:
        yield await playwright.chromium.launch(**launch_options())


@asynccontextmanager
async def opened(browser, rig, view, *, expected_statuses=()):
    """A page on a view of the rig's dashboard; at the end nothing may have gone wrong in it."""
    async with served(rig) as url:
        page = await browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        watch = PageWatch(page, url)
        page.watch = watch
        watch.expected_statuses = set(expected_statuses)
        await page.goto(f"{url}/#/{view}")
        yield page
        await page.close()
        assert watch.complaints == []


async def send(page, prompt):
    await page.get_by_label("Prompt", exact=True).fill(prompt)
    await page.keyboard.press("Enter")


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


async def test_what_the_model_says_is_text_whatever_it_says(tmp_path, browser):
    async with gateway_rig(tmp_path) as rig:
        rig.engine.script = lambda request: HOSTILE
        async with opened(browser, rig, "playground") as page:
            await send(page, HOSTILE)
            answer = page.get_by_role("article").first
            await expect(answer).to_contain_text(HOSTILE)
            await expect(page.get_by_role("region", name="Round 1").locator("header").first).to_contain_text(
                HOSTILE
            )
            assert await page.locator("main img, main script").count() == 0
            await expect(page).to_have_title("Playground · Kiln")


async def test_thinking_stands_apart_and_a_tools_result_goes_back(tmp_path, browser):
    async with gateway_rig(tmp_path, enable_thinking_default=None) as rig:
        rig.engine.script = lambda request: f"Let me look.\n</think>\n\n{TOOL_CALL}"
        async with opened(browser, rig, "playground") as page:
            await page.get_by_text("Sampling, system message, tools").click()
            await page.get_by_label("Tools, a JSON array").fill("[oops")
            await page.get_by_role("combobox", name="Thinking").select_option("on")
            await send(page, "Weather?")
            await expect(page.get_by_role("alert")).to_contain_text("JSON")
            await page.get_by_label("Tools, a JSON array").fill(json.dumps(TOOLS))
            await page.get_by_label("Answers each").fill("1")
            await send(page, "Weather?")
            answer = page.get_by_role("article")
            await expect(answer).to_contain_text("Calls get_weather")
            await expect(answer).to_contain_text('"city": "Oslo"')
            thinking = answer.locator("details")
            await thinking.locator("summary").click()
            await expect(thinking).to_contain_text("Let me look.")

            rig.engine.script = lambda request: "Fine.\n</think>\n\nIt is sunny."
            await page.get_by_label("Result of get_weather").fill("sunny, 20 degrees")
            await button(page, "Send the result").click()
            await expect(page.get_by_role("region", name="Round 2")).to_contain_text("It is sunny.")
        prompt = rig.tokenizer.decode(list(rig.engine.requests[-1].prompt_token_ids))
        assert "sunny, 20 degrees" in prompt
        assert "<tool_call>" in prompt


async def test_two_versions_answer_side_by_side_and_a_conversation_goes_on(tmp_path, browser):
    async with gateway_rig(tmp_path) as rig:
        rig.registry.add("helpful")
        rig.engine.script = lambda request: "with" if request.adapters else "without"
        async with opened(browser, rig, "playground") as page:
            await page.get_by_label("Answers each").fill("1")
            await page.get_by_label("Compare with").select_option("helpful@1")
            await send(page, "Hi")
            columns = page.get_by_role("region", name=re.compile("^Answers of"))
            await expect(columns).to_have_count(2)
            await expect(columns.nth(0)).to_contain_text("without")
            await expect(columns.nth(1)).to_contain_text("helpful@1")
            await expect(columns.nth(1).get_by_role("article")).to_contain_text("with")
            await button(columns.nth(1), "Continue").click()
            await expect(page.get_by_text("Goes on from 2 messages.")).to_be_visible()
            await send(page, "And now?")
            await expect(page.get_by_role("region", name="Round 2")).to_contain_text("after 2 messages")
            await expect(
                page.get_by_role("region", name="Round 2").get_by_role("article").first
            ).to_be_visible()
        prompt = rig.tokenizer.decode(list(rig.engine.requests[-1].prompt_token_ids))
        assert "with<|im_end|>" in prompt.replace("without<|im_end|>", "")


async def test_answers_are_stopped_and_errors_say_what_to_do(tmp_path, browser):
    async with gateway_rig(tmp_path) as rig:
        rig.engine.pause_after = 2
        async with opened(browser, rig, "playground", expected_statuses={400}) as page:
            await send(page, "Hi")
            await rig.engine.paused.wait()
            await page.keyboard.press("Escape")
            await expect(page.get_by_text("stopped")).to_be_visible()
            async with asyncio.timeout(60):  # the page says it before the gateway sees the connection end
                while not rig.engine.aborted:
                    await asyncio.sleep(0.01)

            await page.get_by_text("Sampling, system message, tools").click()
            await page.get_by_label("Temperature").fill("9")
            await send(page, "Hi")
            await expect(page.get_by_role("alert")).to_contain_text("emperature")


async def test_a_key_is_asked_for_kept_in_the_tab_and_forgotten(tmp_path, browser):
    keys = (
        ApiKey(key=KEY, scopes=("infer", "train", "admin")),
        ApiKey(key=INFER_KEY, scopes=("infer",)),
    )
    async with (
        gateway_rig(tmp_path, api_keys=keys) as rig,
        opened(browser, rig, "training", expected_statuses={401}) as page,
    ):
        await expect(page.get_by_text("This server asks for an API key")).to_be_visible()
        await page.get_by_label("API key").fill("wrong-key-0123456789")
        await button(page, "Use this key").click()
        await expect(page.get_by_role("alert")).to_contain_text("key is not known")
        await page.get_by_label("API key").fill(KEY)
        await button(page, "Use this key").click()
        await expect(page.get_by_text("No training jobs yet")).to_be_visible()
        await page.reload()
        await expect(page.get_by_text("No training jobs yet")).to_be_visible()
        assert await page.evaluate("Object.keys(localStorage).length") == 0
        await button(page, "Forget key").click()
        await page.get_by_label("API key").fill(INFER_KEY)
        await button(page, "Use this key").click()
        await expect(page.get_by_text("lacks the scope “train”")).to_be_visible()


async def test_a_forgotten_key_takes_what_it_saw_along(tmp_path, browser):
    other = "other-key-0123456789"
    keys = [ApiKey(key=key, scopes=("infer", "train")) for key in (KEY, other)]
    async with gateway_rig(tmp_path, api_keys=tuple(keys)) as rig:
        body = {"adapter": "secret", "prompt": "Hi", "completions": ["x", "y"], "rewards": [1, 0]}
        headers = {"Authorization": f"Bearer {KEY}"}
        (await rig.post("/v1/train/grpo", body, headers=headers)).raise_for_status()
        async with opened(browser, rig, "training", expected_statuses={401}) as page:
            await page.get_by_label("API key").fill(KEY)
            await button(page, "Use this key").click()
            jobs = page.get_by_role("navigation", name="Jobs")
            await expect(jobs).to_contain_text("secret")
            await page.keyboard.press("2")
            await send(page, "A question of my own")
            await expect(page.get_by_role("region", name="Round 1")).to_be_visible()
            await button(page, "Forget key").click()
            await page.get_by_label("API key").fill(other)
            await button(page, "Use this key").click()
            await expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
            await expect(page.get_by_text("A question of my own")).to_have_count(0)
            await page.get_by_role("link", name="Training", exact=True).click()
            await expect(page.get_by_text("No training jobs yet")).to_be_visible()


def add_versions(rig):
    """helpful@1, and helpful@2 that was trained from it."""
    rig.registry.add("helpful")
    version = rig.registry.add("helpful")
    version.parent_name, version.parent_version = "helpful", 1


async def test_versions_stand_below_their_parents_and_are_attached_and_detached(tmp_path, browser):
    async with gateway_rig(tmp_path) as rig:
        add_versions(rig)
        async with opened(browser, rig, "adapters") as page:
            child = page.get_by_role("listitem").get_by_role("listitem")
            await expect(child).to_contain_text("helpful@2")
            await button(child, "Attach").click()
            await expect(child).to_contain_text("answers now")
            assert rig.registry.default.version == 2
            await button(page, "Detach").click()
            await expect(page.get_by_text("none: the bare base model answers")).to_be_visible()
            assert rig.registry.default is None
            await button(child, "Details").click()
            await expect(child).to_contain_text("sha256")
            await expect(child).to_contain_text("helpful@1")


async def test_versions_are_drawn_with_what_their_answers_earned(tmp_path, browser):
    async with gateway_rig(tmp_path) as rig:
        earned = [
            ("base", 0.25, 8, "data 1"),
            ("helpful@1", 0.5, 6, "data 2"),
            ("helpful@1", 0.5, 6, "data 2"),  # the same data once more: does not count again
            ("helpful@1", 0.9, 2, "data 3"),
        ]
        for writer, mean, num_completions, data in earned:
            version = rig.registry.add("helpful")
            rewards = {writer: {"mean": mean, "num_completions": num_completions}}
            rewards["other@1"] = {"mean": 9.0, "num_completions": 1}
            version.metrics_json = json.dumps({"loss": 1.0, "rewards_by_version": rewards})
            version.data_sha256 = data
        rig.registry.add("uploaded")
        async with opened(browser, rig, "adapters") as page:
            curve = page.get_by_role("figure", name="Reward of helpful, by version")
            await expect(curve.get_by_role("img")).to_have_attribute(
                "aria-label", "Reward of helpful, by version: mean 0.6"
            )
            await expect(page.get_by_role("figure")).to_have_count(1)
            rows = page.get_by_role("listitem")
            await expect(rows.filter(has_text="helpful@1")).to_contain_text("its answers earned 0.6")
            await expect(rows.filter(has_text="helpful@2")).not_to_contain_text("earned")
            await page.get_by_role("button", name="Details").first.click()
            await expect(page.get_by_role("main")).not_to_contain_text("rewards_by_version")


async def evaluated(rig, adapter, score, job_id=""):
    """A run on a suite of one case that ended with this score."""
    store = rig.app.state.gateway.clients.evaluations
    suite = await store.put_suite("", "replies", "{}", 1)
    run = await store.submit_run(
        evaluations_pb2.SubmitRunRequest(
            suite_id=suite.id, adapter=adapter, settings_json="{}", job_id=job_id
        )
    )
    claimed = await store.claim_run(30.0)
    summary = {"score": {"mean": score, "low": 0, "high": 1}, "num_invalid": 0, "by_scorer": {}}
    await store.finish_run(run.id, claimed.claim_epoch, summary_json=json.dumps(summary))


async def test_scores_are_drawn_by_version_and_runs_are_deleted(tmp_path, browser):
    async with gateway_rig(tmp_path) as rig:
        add_versions(rig)
        rig.registry.adapters["helpful"].versions[1].job_id = "job_2"
        await evaluated(rig, "base", 0.25)
        await evaluated(rig, "helpful@1", 0.5)
        await evaluated(rig, "job_2@1", 0.875, job_id="job_2")  # the gate that helpful@2 passed
        async with opened(browser, rig, "adapters") as page:
            curve = page.get_by_role("figure", name="Scores of helpful, by version")
            await expect(curve).to_contain_text("replies@1 0.875")
            runs = page.get_by_role("region", name="Evaluations").get_by_role("row")
            await expect(runs).to_have_count(4)
            newest = runs.filter(has_text="job_2@1")
            await button(newest, "Delete").click()
            await button(newest, "For good?").click()
            await expect(runs).to_have_count(3)
            await expect(curve).to_contain_text("replies@1 0.5")
        left = await rig.app.state.gateway.clients.evaluations.list_runs("")
        assert [run.adapter for run in left] == ["helpful@1", "base"]


async def test_an_older_version_is_rolled_back_to_in_one_call(tmp_path, browser):
    async with gateway_rig(tmp_path) as rig:
        add_versions(rig)
        await rig.registry.set_default("helpful@2")
        async with opened(browser, rig, "adapters") as page:
            called = []

            async def answer(route):
                called.append(route.request.post_data_json)
                await route.fulfill(json={"object": "adapter.rollback"})

            await page.route("**/v1/adapters/helpful/rollback", answer)
            await button(page, "Roll back to it").click()
            await expect(button(page, "Roll back to it")).to_be_enabled()
            assert called == [{"version": 1}]


DIFF = {
    "from": "helpful@1",
    "to": "helpful@2",
    "parent": "helpful@1",
    "total": {
        "norm_from": 1.0, "norm_to": 1.5, "norm_change": 0.75, "cosine": 0.9, "cosine_to_parent": 0.9
    },
    "layers": [
        {"layer": 0, "norm_from": 1.0, "norm_to": 1.5, "norm_change": 0.5, "cosine": 0.9, "modules": []},
        {"layer": None, "norm_from": 0.0, "norm_to": 0.1, "norm_change": 0.25, "cosine": None, "modules": []},
    ],
    "metrics": {"reward_mean": {"from": 0.5, "to": 0.75, "delta": 0.25}},
}  # fmt: skip


async def test_two_versions_are_compared_and_what_is_not_built_says_so(tmp_path, browser):
    async with gateway_rig(tmp_path) as rig:
        add_versions(rig)
        async with opened(browser, rig, "adapters", expected_statuses={501}) as page:
            address = "**/v1/adapters/helpful/diff?from=1&to=2"
            error = {"message": "it is to come", "code": "not_built_yet", "hint": "Do this instead."}
            await page.route(address, lambda route: route.fulfill(status=501, json={"error": error}))
            await button(page, "Compare").click()
            notice = page.get_by_role("alert")
            for words in ("Not built yet", "It is to come.", "Do this instead.", "not_built_yet"):
                await expect(notice).to_contain_text(words)
            await page.route(address, lambda route: route.fulfill(json=DIFF))
            await button(page, "Compare").click()
            found = page.get_by_role("region", name="Differences")
            await expect(found.get_by_role("row").filter(has_text="layer 0")).to_contain_text("0.5")
            await expect(found.get_by_role("row").filter(has_text="others")).to_contain_text("0.25")
            await expect(found.get_by_role("row").filter(has_text="reward_mean")).to_contain_text("0.75")
            await expect(notice).to_have_count(0)


async def test_a_job_is_cancelled_and_done_again(tmp_path, browser):
    async with gateway_rig(tmp_path) as rig:
        body = {"adapter": "a", "prompt": "Hi", "completions": ["x", "y"], "rewards": [1, 0]}
        job_id = (await rig.post("/v1/train/grpo", body)).json()["id"]
        async with opened(browser, rig, f"training/{job_id}") as page:
            detail = page.get_by_role("region", name=f"Job {job_id}")
            await button(detail, "Cancel").click()
            await expect(detail).to_contain_text("cancelled")
            await button(detail, "Do it again").click()
            await expect(page.get_by_role("navigation", name="Jobs").get_by_role("link")).to_have_count(2)
            assert f"training/{job_id}" not in page.url


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ({"passed": True, "score": 0.875}, ["passed", "scored 0.875 on replies@2, at least 0.8 was needed"]),
        ({"passed": False, "score": 0.62}, ["held back", "scored 0.62 on replies@2", "polite means what it"]),
        ({"passed": False}, ["held back", "at least 0.8 is needed on replies@2", "no engine answers"]),
    ],
)
async def test_a_jobs_gate_says_whether_it_was_passed_with_its_numbers(tmp_path, browser, gate, words):
    async with gateway_rig(tmp_path) as rig:
        body = {"adapter": "polite", "prompt": "Hi", "completions": ["x", "y"], "rewards": [1, 0]}
        job_id = (await rig.post("/v1/train/grpo", body)).json()["id"]
        job = rig.trainer.jobs[job_id]
        job.config.gate.suite, job.config.gate.min_score = "replies@2", 0.8
        job.config.gate.settings_json = "{}"
        async with opened(browser, rig, f"training/{job_id}") as page:
            shown = page.get_by_role("region", name="Gate")
            await expect(shown).to_contain_text("at least 0.8 is needed on replies@2")
            kept = {"adapter": "polite"} if gate["passed"] else {"adapter": job_id}
            outcome = trainer_pb2.GateOutcome(
                suite="replies@2", min_score=0.8, reason="no engine answers", **gate
            )
            job.result.CopyFrom(trainer_pb2.JobResult(**kept, version=1, gate=outcome))
            job.status = "succeeded"
            for part in words:
                await expect(shown).to_contain_text(part)
            listed = page.get_by_role("navigation", name="Jobs")
            await expect(listed).to_contain_text("succeeded" if gate["passed"] else "held back")
            await expect(listed).to_contain_text("polite")


async def test_a_job_that_learns_from_anothers_answers_says_so(tmp_path, browser):
    async with gateway_rig(tmp_path) as rig:
        body = {"adapter": "kind", "prompt": "Hi", "completions": ["x", "y"], "rewards": [1, 0]}
        job_id = (await rig.post("/v1/train/grpo", body)).json()["id"]
        async with opened(browser, rig, f"training/{job_id}") as page:
            await expect(page.get_by_role("region", name=f"Job {job_id}")).to_be_visible()
            await expect(page.get_by_role("note")).to_have_count(0)
            rig.trainer.jobs[job_id].sampled_by["helpful@1"] = 2
            note = page.get_by_role("note")
            await expect(note).to_contain_text("2 of 2 completions were drawn by helpful@1")
            await expect(note).to_contain_text('Send "base_adapter": "helpful@1"')


async def test_views_are_reached_by_keys(tmp_path, browser):
    async with gateway_rig(tmp_path) as rig, opened(browser, rig, "live") as page:
        heading = page.get_by_role("heading", level=1)
        await expect(heading).to_have_text("Live")
        for key, title in (("3", "Training"), ("4", "Adapters"), ("5", "Logs"), ("1", "Live")):
            await page.keyboard.press(key)
            await expect(heading).to_have_text(title)
        await page.keyboard.press("/")
        await expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
        await page.keyboard.type("3")
        await expect(heading).to_have_text("Playground")
        await expect(page.get_by_label("Prompt", exact=True)).to_have_value("3")
        await page.get_by_label("Prompt", exact=True).blur()
        await page.keyboard.press("?")
        await expect(page.get_by_role("dialog")).to_be_visible()
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("dialog")).to_have_count(0)


async def test_a_broken_connection_is_said_and_mended(tmp_path, browser):
    async with gateway_rig(tmp_path) as rig, opened(browser, rig, "live") as page:
        banner = page.get_by_role("banner")
        await expect(banner).to_contain_text("Live")
        await page.route("**/v1/events", lambda route: route.abort())
        await page.reload()
        await expect(banner).to_contain_text("Connection lost")
        await page.unroute("**/v1/events")
        await expect(banner.get_by_role("status")).to_contain_text("kiln/tiny")
        page.watch.complaints = [line for line in page.watch.complaints if "net::ERR_FAILED" not in line]
