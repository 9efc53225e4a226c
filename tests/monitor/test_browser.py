"""The report and the live page in a real browser: Debian's Chromium, driven by playwright.

Screenshots are kept in normadapt-out/screenshots.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from monitor.live_server import served, shifted_story
from normadapt.monitor import app
from normadapt.monitor.kept import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SCREENSHOTS = Path(__file__).parents[2] / "normadapt-out" / "screenshots"

if CHROMIUM is None:
    pytest.skip("PAGES NOT TESTED IN A BROWSER: no Chromium -> apt-get install chromium", allow_module_level=True)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="PAGES NOT TESTED IN A BROWSER: no playwright -> pip install playwright"
)

SIZES = {"wide": (1280, 900), "narrow": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield found
        found.close()


class Tab:
    """A page, what its console said, and what it asked for."""

    def __init__(self, browser: Any) -> None:
        self.name = "wide-light"
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
        self.context.set_default_timeout(8000)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.errors.append(said.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.context.on("request", self._note)

    def _note(self, request: Any) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("file", "data", "blob") and address.hostname != "127.0.0.1":
            self.elsewhere.append(request.url)

    def looks(self) -> Iterator[str]:
        """Every size and scheme, one after the other; the page has to follow without being loaded again."""
        for scheme in ("light", "dark"):
            for size, (width, height) in SIZES.items():
                self.name = f"{size}-{scheme}"
                self.page.emulate_media(color_scheme=scheme)
                self.page.set_viewport_size({"width": width, "height": height})
                if self.page.query_selector("#map") is not None:
                    until(self.page, "(most) => document.getElementById('map')._fullLayout.width <= most", width)
                yield self.name

    def shoot(self, name: str, *, whole: bool = True) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}-{self.name}.png", full_page=whole)


@contextmanager
def tab(browser: Any, *, quiet: bool = True) -> Iterator[Tab]:
    """A page that must end without a word on the console and without having asked anybody else."""
    opened = Tab(browser)
    try:
        yield opened
        assert opened.elsewhere == []
        if quiet:
            assert opened.errors == []
    finally:
        opened.context.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def report(folder: Path) -> str:
    """The report of a store, as a file's address."""
    told = shifted_story(folder / "of-report")
    told.pilot.rollback("anna", reason="a smell")
    told.pilot.close()
    write_report(folder / "of-report", folder / "report.html")
    return (folder / "report.html").as_uri()


@pytest.fixture
def trial(tmp_path: Path) -> Any:
    return shifted_story(tmp_path / "store")


def until(page: Any, what: str, arg: Any = None, seconds: float = 8.0) -> None:
    """Until an expression is true. (`wait_for_function` evaluates texts within the page, which its policy forbids.)"""
    end = time.monotonic() + seconds
    while True:
        try:
            if page.evaluate(what, arg):
                return
        except playwright.Error as error:
            if "navigation" not in str(error):  # else the page is just being loaded
                raise
        assert time.monotonic() < end, what
        page.wait_for_timeout(15)


def ready(page: Any) -> None:
    """Until the figures are drawn."""
    until(page, "document.querySelectorAll('#map .heatmaplayer image').length > 0")


def click_row(page: Any, row: int) -> None:
    """A click in the midst of a layer's row of the heat map."""
    page.locator("#map").scroll_into_view_if_needed()
    place = page.evaluate(
        """(row) => {
        const plot = document.getElementById('map'), box = plot.getBoundingClientRect(), full = plot._fullLayout;
        return [box.x + full.margin.l + full.xaxis._length / 2, box.y + full.yaxis._offset + full.yaxis.d2p(row)]; }""",
        row,
    )
    page.mouse.move(*place)
    page.mouse.click(*place)


def chosen(page: Any) -> tuple[str, int]:
    """The layer's name in the select, and the row with a frame on the map."""
    name = page.eval_on_selector("#layer", "(select) => select.selectedOptions[0].textContent")
    row = page.evaluate("document.getElementById('map')._fullLayout.shapes.find((s) => s.type === 'rect').y0 + 0.5")
    return name, row


CHECKS = (Path(__file__).parent / "page_checks.js").read_text(encoding="utf-8").partition("\n")[2]


def ask(page: Any, what: str) -> Any:
    """One of the questions in page_checks.js."""
    return page.evaluate(f"() => {CHECKS.strip()}.{what}()")


def check_basics(opened: Tab) -> None:
    """No sideways scrolling, a name for everything that can be used, contrast of all text."""
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    assert ask(page, "nameless") == []
    contrast = ask(page, "faint")
    assert contrast["count"] > 50
    assert contrast["found"] == []


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_is_right_at_every_size(browser: Any, report: str) -> None:
    with tab(browser) as opened:
        opened.page.goto(report)
        ready(opened.page)
        for _ in opened.looks():
            check_basics(opened)
            opened.shoot("report")


def test_a_layer_is_chosen_on_the_map_and_by_the_select(browser: Any, report: str) -> None:
    with tab(browser) as opened:
        page = opened.page
        page.goto(report)
        ready(page)
        for row, name in ((1, "4"), (0, "1"), (1, "4")):
            if chosen(page)[1] == row:
                continue
            click_row(page, row)
            until(page, "(row) => Number(document.getElementById('layer').value) === row", row)
            assert chosen(page) == (name, row)
        before = page.inner_text("#channel-note")
        page.select_option("#layer", label="1")
        assert chosen(page) == ("1", 0)
        assert page.inner_text("#channel-note") != before
        page.click("button[data-measure=tail]")
        assert page.get_attribute("button[data-measure=tail]", "aria-pressed") == "true"
        assert "by chance" in page.inner_text("#map")


def test_the_report_prints(browser: Any, report: str) -> None:
    with tab(browser) as opened:
        page = opened.page
        page.goto(report)
        ready(page)
        page.emulate_media(media="print", color_scheme="dark")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.is_hidden(".controls >> nth=0")
        assert page.evaluate("[...document.querySelectorAll('details')].every((part) => part.open)")
        widths = page.evaluate("[...document.querySelectorAll('svg.main-svg')].map((svg) => svg.clientWidth)")
        assert 300 < max(widths) <= 690
        pdf = page.pdf(path=_made(SCREENSHOTS / "report.pdf"), format="A4", prefer_css_page_size=True)
        assert pdf.startswith(b"%PDF")


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# -- the live page -----------------------------------------------------------------------------------------------------


def test_the_live_page_is_right_at_every_size(browser: Any, trial: Any) -> None:
    with served(app(trial.recorder)) as base, tab(browser) as opened:
        page = opened.page
        page.goto(base)
        ready(page)
        for _ in opened.looks():
            check_basics(opened)
            opened.shoot("live")
            page.click("#rollback")
            check_basics(opened)
            assert page.evaluate("document.getElementById('ask').getBoundingClientRect().right <= innerWidth")
            opened.shoot("live-dialog", whole=False)
            page.click("#cancel")


def test_the_page_follows_and_keeps_what_was_chosen(browser: Any, trial: Any) -> None:
    with served(app(trial.recorder)) as base, tab(browser) as opened:
        page = opened.page
        page.goto(base)
        ready(page)
        page.select_option("#stream", "left")
        row = 1 - chosen(page)[1]
        click_row(page, row)
        until(page, "(row) => Number(document.getElementById('layer').value) === row", row)
        page.click("button[data-measure=tail]")
        page.select_option("#channel", index=1)
        version, lead = page.get_attribute("body", "data-version"), page.inner_text("#lead")
        page.evaluate("document.getElementById('map').same = true")
        trial.send(stream="left")
        until(page, "(lead) => document.getElementById('lead').textContent !== lead", lead)
        assert page.get_attribute("body", "data-version") != version
        assert chosen(page)[1] == row
        assert page.evaluate("figures.state.measure") == "tail"
        assert page.evaluate("figures.state.channel") == 1
        assert page.evaluate("document.getElementById('map').same"), "the figures were made anew"
        page.select_option("#stream", "right")
        until(page, "document.getElementById('lead').textContent.includes('right')")
        assert page.url.endswith("?stream=right")


def test_a_batch_is_seen_at_once(browser: Any, trial: Any) -> None:
    with served(app(trial.recorder)) as base, tab(browser) as opened:
        page = opened.page
        page.goto(base)
        ready(page)
        took = []
        for _ in range(5):
            time.sleep(0.4)  # else it would wait for the page's own pause
            told = page.inner_text(".standing")
            trial.send(stream="left")
            at = 1000 * time.time()
            until(page, "(told) => document.querySelector('.standing').innerText !== told", told)
            took.append(float(page.get_attribute("body", "data-shown")) - at)
        assert sorted(took)[len(took) // 2] < 1000, took  # benchmarks/live.py has the target, 200 ms


def test_a_roll_back_through_the_dialog_is_done_and_seen(browser: Any, trial: Any) -> None:
    with served(app(trial.recorder)) as base, tab(browser) as opened:
        page = opened.page
        page.goto(base)
        ready(page)
        page.click("#rollback")
        assert page.evaluate("document.activeElement.id") == "by"
        page.click("#confirm")  # the browser asks for the name
        assert page.is_visible("#ask")
        page.fill("#by", "anna")
        page.select_option("#to", "0")
        page.fill("#reason", "a <i>smell</i>")
        page.click("#confirm")
        page.wait_for_selector(".stages .rolled_back")
        until(page, "document.getElementById('done').textContent.includes('Rolled back')")
        assert page.is_hidden("#ask")
        assert page.evaluate("document.activeElement.id") == "rollback"
        assert trial.pilot.stage.value == "rolled_back"
        until(page, "document.getElementById('log-part').textContent.includes('by anna: a <i>smell</i>')")
        opened.shoot("live-rolled-back")
        page.click("#promote")
        assert page.input_value("#by") == "anna"
        assert page.is_hidden("#force-field")
        page.keyboard.press("Escape")
        assert page.is_hidden("#ask")


def test_what_is_refused_is_said_in_the_dialog(browser: Any, trial: Any) -> None:
    with served(app(trial.recorder)) as base, tab(browser, quiet=False) as opened:
        page = opened.page
        page.goto(base)
        ready(page)
        page.click("#promote")
        page.fill("#by", "anna")
        page.click("#confirm")
        page.wait_for_selector("#ask-problem:visible")
        assert "is not complete" in page.inner_text("#ask-problem")
        page.check("#force")
        page.click("#confirm")
        page.wait_for_selector("#ask", state="hidden")
        assert trial.pilot.position.step == 1


def test_everything_can_be_done_with_the_keyboard(browser: Any, trial: Any) -> None:
    with served(app(trial.recorder)) as base, tab(browser) as opened:
        page = opened.page
        page.goto(base)
        ready(page)
        wanted = page.evaluate(
            """[...document.querySelectorAll('main :is(button,select,summary,input,[tabindex="0"])')]
            .filter((e) => e.checkVisibility() && !e.disabled)
            .map((e, i) => { e.dataset.key = i; return String(i); })"""
        )
        reached = []
        for _ in range(2 * len(wanted) + 5):
            page.keyboard.press("Tab")
            key, outline = page.evaluate(
                "[document.activeElement.dataset.key, getComputedStyle(document.activeElement).outlineStyle]"
            )
            if key is not None:
                assert outline != "none", key
                reached.append(key)
        missed = [
            page.evaluate("(key) => document.querySelector(`[data-key='${key}']`).outerHTML.slice(0, 99)", key)
            for key in set(wanted) - set(reached)
        ]
        assert missed == []
        page.focus("#pause")
        page.keyboard.press("Enter")
        page.wait_for_selector("#ask:modal")
        page.keyboard.type("anna")
        inside = set()
        for _ in range(8):
            page.keyboard.press("Tab")
            inside.add(page.evaluate("document.activeElement.closest('dialog') ? document.activeElement.id : 'out'"))
        assert {"by", "cancel", "confirm"} <= inside
        page.focus("#confirm")
        page.keyboard.press("Space")
        until(page, "document.getElementById('pause').textContent === 'Resume'")
        assert trial.pilot.position.paused
        assert page.evaluate("document.activeElement.id") == "pause"


def test_the_page_comes_back_with_the_server(browser: Any, trial: Any) -> None:
    made = app(trial.recorder)
    with tab(browser, quiet=False) as opened:
        page = opened.page
        with served(made) as base:
            page.goto(base)
            ready(page)
            assert page.inner_text("#link") == "live"
        until(page, "document.getElementById('link').textContent.startsWith('not connected')")
        lead = page.inner_text("#lead")
        assert "instances seen" in lead
        trial.send(stream="left")
        with served(app(trial.recorder), int(base.rpartition(":")[2])):
            until(page, "document.getElementById('link').textContent === 'live'")
            until(page, "(lead) => document.getElementById('lead').textContent !== lead", lead)
            page.click("#pause")  # with the new process's own word against forgery
            page.fill("#by", "anna")
            page.click("#confirm")
            until(page, "document.getElementById('pause').textContent === 'Resume'")
        assert all("ERR_" in said or "Failed to load" in said for said in opened.errors), opened.errors


def test_a_page_with_a_token_is_opened_by_its_form(browser: Any, folder: Path, report: str) -> None:
    with served(app(folder / "of-report", token="a long token")) as base, tab(browser, quiet=False) as opened:
        page = opened.page
        page.goto(base)
        assert page.evaluate("document.activeElement.id") == "token"
        assert ask(page, "nameless") == []
        page.keyboard.type("something else")
        page.keyboard.press("Enter")
        page.wait_for_selector("[role=alert]")
        page.fill("#token", "a long token")
        page.keyboard.press("Enter")
        ready(page)
        assert page.url == f"{base}/"
        assert page.evaluate("document.cookie") == ""
        assert "ago" in page.inner_text("#saved")
        opened.shoot("live-of-store")


def test_a_page_that_was_open_before_the_first_batch_fills(browser: Any, tmp_path: Path) -> None:
    from monitor.live_server import story

    told = story(None, "")
    with served(app(told.pilot)) as base, tab(browser) as opened:
        page = opened.page
        page.goto(base)
        page.wait_for_selector(".stages")
        opened.shoot("live-empty")
        for _ in range(12):
            told.send(stream="camera")
        ready(page)
        until(page, "document.getElementById('stream').value === 'camera'")
