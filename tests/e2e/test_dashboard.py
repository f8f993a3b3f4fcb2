"""The dashboard in a browser, on the demo model: chat, rate, train, watch, ask again, go back."""

import re

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.support.browser import (
    ARTEFACTS,
    PATIENCE_MS,
    WIDTHS,
    PageWatch,
    accessibility_findings,
    is_wider_than_screen,
    launch_options,
)

pytestmark = pytest.mark.processes

PROMPT = "Write a short email reply to Tom about the spare key."
TRAINING_MS = 3 * PATIENCE_MS


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(**launch_options())


@pytest.fixture(autouse=True)
def detached(stack):
    """Other tests of this stack find the bare base model as they left it."""
    yield
    stack.post("/v1/adapters/detach", {}).raise_for_status()


@pytest.fixture(params=WIDTHS)
def tour(request, browser, stack):
    columns, rows = WIDTHS[request.param]
    context = browser.new_context(viewport={"width": columns, "height": rows})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    yield Tour(page, PageWatch(page, stack.url), f"tour-{request.param}")
    context.close()


class Tour:
    """What a visitor does, step by step."""

    def __init__(self, page, watch, name):
        self.page, self.watch, self.name = page, watch, name
        self._num_shots = 0

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True)

    def go(self, view):
        self.page.get_by_role("navigation", name="Views").get_by_role("link", name=view).click()
        expect(self.page.get_by_role("heading", level=1)).to_have_text(view)

    def look(self, what):
        """In both themes: a screenshot is kept, and axe has nothing serious to say. Nothing is cut off."""
        self._num_shots += 1
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        self.page.evaluate("scrollTo(0, 0)")
        for theme in ("dark", "light"):
            self.page.emulate_media(color_scheme=theme)
            path = ARTEFACTS / f"{self.name}-{theme}-{self._num_shots}-{what}.png"
            self.page.screenshot(path=path, full_page=True)
            assert accessibility_findings(self.page) == []
        assert not is_wider_than_screen(self.page)

    def chat(self, round_number=1):
        """Two answers to one prompt."""
        self.page.get_by_label("Prompt", exact=True).fill(PROMPT)
        self.page.keyboard.press("Enter")
        expect(self.round(round_number).get_by_role("group", name="Rate answer")).to_have_count(2)

    def round(self, number):
        return self.page.get_by_role("region", name=f"Round {number}", exact=True)

    def rate(self, round_number):
        answers = self.round(round_number).get_by_role("article")
        answers.nth(0).get_by_role("button", name="Good").click()
        answers.nth(1).get_by_role("button", name="Bad").click()

    def train(self, round_number, version):
        """Sends the ratings and waits until the new version answers."""
        self.page.get_by_label("Adapter", exact=True).fill(self.name)
        self.button("Train on them").click()
        lesson = self.round(round_number).get_by_role("region", name="Training on these ratings")
        expect(lesson).to_contain_text(f"{self.name}@{version} was live", timeout=TRAINING_MS)
        return lesson


def test_a_visitor_teaches_the_model_and_takes_it_back(tour, stack):
    page = tour.page
    page.goto(stack.url)
    tour.go("Playground")
    tour.chat()
    tour.rate(1)
    tour.look("rated")

    lesson = tour.train(1, version=1)
    expect(lesson.get_by_role("img", name=re.compile(r"^Loss: loss -?\d"))).to_be_visible()
    tour.look("trained")

    # Before and after, side by side on the same prompt: the new version is the one that answers.
    lesson.get_by_role("button", name="Ask before and after").click()
    expect(tour.round(2).get_by_role("region", name="Answers of base")).to_contain_text("tok/s")
    expect(tour.round(2).get_by_role("region", name=f"Answers of {tour.name}@1")).to_contain_text("tok/s")
    assert stack.chat(PROMPT, max_tokens=1).headers["X-Kiln-Adapter"] == f"{tour.name}@1"
    tour.look("before-and-after")

    tour.go("Training")
    expect(page.get_by_role("img", name=re.compile("^Loss by step: loss -?[0-9]"))).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("^Clip fraction: clipped [0-9]"))).to_be_visible()
    expect(
        page.get_by_role("img", name=re.compile("^Training tokens per second: trained [0-9]"))
    ).to_be_visible()
    tour.look("curves")

    tour.go("Adapters")
    newest = page.get_by_role("listitem").filter(has_text=f"{tour.name}@1")
    expect(newest).to_contain_text("answers now")
    tour.look("adapters")

    tour.go("Playground")
    lesson.get_by_role("button", name="Roll back to base").click()
    expect(lesson).to_contain_text("base answers again.")
    expect(page.get_by_role("banner")).not_to_contain_text(f"{tour.name}@1")
    assert stack.chat(PROMPT, max_tokens=1).headers["X-Kiln-Adapter"] == "base"

    tour.go("Live")
    expect(page.get_by_role("img", name=re.compile(r"^Between tokens: p50 [\d.]+ ms"))).to_be_visible()
    expect(
        page.get_by_role("table").get_by_role("row").filter(has_text=f"{tour.name}@1").first
    ).to_be_visible()
    tour.look("live")

    tour.go("Logs")
    expect(page.get_by_role("list", name="Log lines")).to_contain_text("adapter_published")
    tour.look("logs")
    assert tour.watch.complaints == []


@pytest.mark.parametrize("tour", ["wide"], indirect=True)
def test_a_second_lesson_is_rolled_back_to_the_first(tour, stack):
    page = tour.page
    tour.name += "-again"
    page.goto(f"{stack.url}/#/playground")
    for number in (1, 2):
        tour.chat(number)
        tour.rate(number)
        lesson = tour.train(number, version=number)
    tour.go("Adapters")
    nested = page.get_by_role("listitem").get_by_role("listitem").filter(has_text=f"{tour.name}@2")
    expect(nested).to_contain_text("answers now")
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("region", name="Differences").get_by_role("row").first).to_be_visible()
    tour.look("compared")

    tour.go("Playground")
    tour.button(f"Roll back to {tour.name}@1").click()
    expect(lesson).to_contain_text(f"{tour.name}@1 answers again.")
    assert stack.chat(PROMPT, max_tokens=1).headers["X-Kiln-Adapter"] == f"{tour.name}@1"
    expect(page.get_by_role("banner")).to_contain_text(f"{tour.name}@1")
    tour.look("rolled-back")
    assert tour.watch.complaints == []


def test_the_accessibility_check_finds_what_is_wrong(browser):
    page = browser.new_page()
    page.set_content("<html lang='en'><title>x</title><main><button></button></main></html>")
    assert [finding.split(":")[0] for finding in accessibility_findings(page)] == ["button-name"]
    page.close()
