"""The report in a real Chromium.

What a reader does with it, in both looks, on a desktop and on a phone.
"""

import re
import shutil

import pytest
from builders import reported
from builders.reported import FAST, FRONT, INT4, UNIFORM

from autoquant.report.html.page import render_report
from autoquant.store import open_store
from autoquant.study.study import Study

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

POSITION = """(label) => {
  const chart = document.getElementById("front-chart");
  const data = JSON.parse(document.getElementById("data").textContent);
  const plan = data.plans.find((each) => each.label === label);
  const box = chart.querySelector(".nsewdrag").getBoundingClientRect();
  const at = (value, axis) => (value - axis.range[0]) / (axis.range[1] - axis.range[0]);
  const x = at(plan.x, chart.layout.xaxis), y = at(plan.y, chart.layout.yaxis);
  return [box.x + x * box.width, box.y + (1 - y) * box.height];
}"""
TOO_WIDE = """[...document.querySelectorAll(".chart, td, tbody th, select, pre")]
  .filter((each) => each.offsetParent)
  .filter((each) => each.getBoundingClientRect().right > innerWidth
    || each.scrollWidth > each.clientWidth + 1)
  .map((each) => each.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A report of 12 blocks, opened as a file."""
    folder = tmp_path_factory.mktemp("report")
    store = open_store(folder / "plan.db")
    reported.fill(store, blocks=12)
    path = folder / "report.html"
    path.write_bytes(render_report(Study(store), "plan.db"))
    store.close()
    return path.as_uri()


@pytest.fixture
def opened(chromium, address):
    """Open the report. At the end, no error and no request of the network may have occurred."""
    pages, complaints = [], []

    def open_page(viewport=DESKTOP, look="light", fragment=""):
        page = chromium.new_page(viewport=viewport, color_scheme=look)
        pages.append(page)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                complaints.append(request.url) if request.url.startswith("http") else None
            ),
        )
        page.goto(address + fragment)
        page.wait_for_selector("#latency-chart .main-svg")
        return page

    yield open_page
    for page in pages:
        assert page.evaluate("window.broken") is None
        page.close()
    assert complaints == []


def title(page):
    return page.text_content("#plan-title")


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_scrolls_sideways_and_every_chart_is_as_wide_as_its_place(opened, viewport, look):
    page = opened(viewport, look)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    assert page.evaluate(TOO_WIDE) == []
    for chart in page.locator(".chart").all():
        assert (
            chart.locator(".main-svg").first.bounding_box()["width"]
            == chart.bounding_box()["width"]
            > 0
        )


def test_hovering_over_a_point_tells_what_the_plan_is_made_of(opened):
    page = opened()
    hover_over(page, FAST)
    hover = page.text_content("#front-chart .hoverlayer")
    assert "front 2" in hover and f"24 x {INT4}" in hover and "perplexity 20.400" in hover


def test_no_chart_offers_to_be_sent_away(opened):
    page = opened()
    titles = page.locator(".modebar-btn").evaluate_all(
        "(all) => [...new Set(all.map((each) => each.dataset.title))]"
    )
    assert sorted(titles) == ["Download plot as a PNG", "Pan", "Reset axes", "Zoom"]


def hover_over(page, plan_id):
    """Move the mouse to a plan's point of the front; returns where that is."""
    page.locator("#front-chart").scroll_into_view_if_needed()
    x, y = page.evaluate(POSITION, reported.PLANS[plan_id][0])
    page.mouse.move(x, y)
    page.wait_for_selector("#front-chart .hoverlayer .hovertext")
    return x, y


def test_a_click_on_a_point_picks_its_plan(opened):
    page = opened()
    assert "front 1" in title(page)
    page.mouse.click(*hover_over(page, UNIFORM))
    playwright.expect(page.locator("#plan-title")).to_contain_text("uniform int8-row")
    assert page.input_value("#plan-select") == str(4 - 1)


def test_the_keyboard_picks_a_plan_and_everything_of_it_follows(opened):
    page = opened()
    page.focus("#plan-select")
    page.keyboard.press("ArrowUp")
    assert "front 2" in title(page)
    assert page.locator("#formats li").all_text_contents() == [
        f"i4b {INT4}, 24 layers",
        "b16 bfloat16/plain (left alone), 1 layer",
    ]
    cells = page.locator("#layers-chart .heatmap-label").all_text_contents()
    assert cells.count("i4b") == 24 and cells.count("b16") == 1
    assert page.locator("#layers-table tbody tr").count() == 25
    assert page.locator("tr.picked").inner_text().startswith("2")
    assert page.evaluate("location.hash") == "#plan-dddddd"


def test_a_button_of_the_table_picks_a_plan(opened):
    page = opened()
    page.get_by_role("button", name="uniform int8-row").press("Enter")
    assert "uniform int8-row" in title(page)


def test_an_address_may_name_the_plan(opened):
    assert "front 2" in title(opened(fragment="#plan-dddddd"))


def test_plans_far_from_the_front_are_shown_when_asked_for(opened):
    page = opened()
    assert "1 of 5 plans lie above" in page.text_content("#beyond")
    page.click("#beyond button")
    assert page.evaluate("document.getElementById('front-chart').layout.yaxis.type") == "log"
    page.click("#beyond button")
    assert page.evaluate("document.getElementById('front-chart').layout.yaxis.type") == "linear"


def test_another_shape_draws_its_own_latencies_and_table(opened):
    page = opened()
    before = page.evaluate("document.getElementById('latency-chart').data.at(-1).y[0]")
    page.select_option("#shape-select", "2")
    assert page.evaluate(
        "document.getElementById('latency-chart').data.at(-1).y[0]"
    ) == pytest.approx(3 * before)
    assert page.locator("table.shape:not([hidden]) caption").all_text_contents() == [
        "768 x 256, bfloat16: layers as one"
    ]


@pytest.mark.parametrize(
    ("look", "button", "dark"), [("light", "Dark look", True), ("dark", "Light look", False)]
)
def test_the_button_switches_the_look_of_page_and_charts(opened, look, button, dark):
    page = opened(look=look)
    before = [brightness(page, name) for name in ("background-color", "color")]
    page.get_by_role("button", name=button).click()
    after = [brightness(page, name) for name in ("background-color", "color")]
    assert (after[0] < before[0], after[1] > before[1]) == (dark, dark)
    ink = page.evaluate("getComputedStyle(document.querySelector('#front-chart .xtick text')).fill")
    assert ink == page.evaluate("getComputedStyle(document.body).color")


def brightness(page, name):
    colour = page.evaluate("(name) => getComputedStyle(document.body).getPropertyValue(name)", name)
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


@pytest.mark.parametrize("look", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(opened, look):
    """At least 4.5 to 1, as WCAG 2.1 (1.4.3) asks for."""
    page = opened(look=look)
    colours = page.evaluate(
        """() => { const probe = document.body.appendChild(document.createElement("i"));
        const read = (name) => { probe.style.color = `var(--${name})`;
          return getComputedStyle(probe).color.match(/[0-9]+/g).map(Number); };
        const names = ["page", "panel", "picked", "ink", "muted", "accent",
          ...Array.from({length: 9}, (_, n) => `h${n}`)];
        return Object.fromEntries(names.map((name) => [name, read(name)])); }"""
    )
    pairs = [
        (text, behind)
        for text in ("ink", "muted", "accent")
        for behind in ("page", "panel", "picked")
    ]
    pairs += [("ink", f"h{number}") for number in range(9)]
    low = {pair: contrast(*(colours[name] for name in pair)) for pair in pairs}
    assert {pair: ratio for pair, ratio in low.items() if ratio < 4.5} == {}


def contrast(one, other):
    lights = sorted(
        sum(
            weight * linear(part / 255)
            for weight, part in zip((0.2126, 0.7152, 0.0722), colour, strict=True)
        )
        for colour in (one, other)
    )
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def linear(part):
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4


def test_charts_are_laid_out_again_when_the_window_changes(opened):
    page = opened()
    page.set_viewport_size(PHONE)
    playwright.expect(page.locator("#front-chart .main-svg").first).to_have_attribute(
        "width", re.compile("^3[0-9]{2}")
    )
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.locator("#layers-chart .heatmap-label").count() == 25


def test_front_is_picked_at_first(opened):
    assert FRONT[:6] in title(opened())
