"""The report as a whole: what is in the page, and that nothing in it can break out."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest
from builders import reported
from builders.reported import EVIL, FAR, FRONT, INT4, INT8, LEFT_ALONE, NOISE, PLANS, WORKLOAD

from autoquant.errors import PlanError
from autoquant.records import Interval
from autoquant.report.html.page import embedded, render_report
from autoquant.store import open_store
from autoquant.store.schema import RooflineRow
from autoquant.store.transactions import transaction
from autoquant.study.study import Study

OWN_TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "section", "div", "p",
    "h1", "h2", "h3", "button",
    "noscript", "dl", "dt", "dd", "ul", "li", "span", "details", "summary", "table", "caption",
    "thead", "tbody", "tr", "th",
    "td", "select", "option", "label", "code", "pre", "meter", "script",
}  # fmt: skip


class Outline(HTMLParser):
    """Every element with its attributes, and the text of each."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag):
        return [
            text.strip()
            for (name, _), text in zip(self.elements, self.texts, strict=True)
            if name == tag
        ]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    path = tmp_path_factory.mktemp("filled") / "plan.db"
    store = open_store(path)
    reported.fill(store)
    store.close()
    return path


@pytest.fixture(scope="module")
def study(filled):
    """Read by all tests, and changed by none."""
    store = open_store(filled)
    yield Study(store)
    store.close()


@pytest.fixture
def own_study(filled, tmp_path):
    """One to change."""
    store = open_store(shutil.copy(filled, tmp_path / "plan.db"))
    yield Study(store)
    store.close()


@pytest.fixture(scope="module")
def page(study):
    return render_report(study, "plan.db").decode()


@pytest.fixture(scope="module")
def outline(page):
    return Outline(page)


@pytest.fixture(scope="module")
def data(outline):
    return json.loads(next(text for text in outline.text("script") if text.startswith("{")))


def plan_of(data, plan_id):
    return next(plan for plan in data["plans"] if plan["id"] == plan_id)


def test_the_page_fetches_nothing(outline):
    assert not {"src", "href", "srcset", "action"} & {
        name for _, attributes in outline.elements for name in attributes
    }
    policy = next(
        meta["content"]
        for meta in outline.all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")


def test_what_others_wrote_stays_text(page, outline):
    assert EVIL not in page
    assert {tag for tag, _ in outline.elements} <= OWN_TAGS
    assert len(outline.all("script")) == 3
    assert outline.text("h1") == ["<b>tiny"]
    assert not any("onerror" in attributes for _, attributes in outline.elements)


def test_data_comes_back_as_it_was_and_cannot_end_its_element():
    value = {"name": f"<!--{EVIL}\u2028&amp;", "none": float("nan"), "many": [1, float("inf")]}
    text = embedded(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"name": value["name"], "none": None, "many": [1, None]}


def test_texts_of_charts_are_escaped_since_plotly_reads_markup(data):
    drawn = json.dumps([data["front"], data["shapes"], [plan["time"] for plan in data["plans"]]])
    assert "<img" not in drawn and "<script" not in drawn


def test_every_section_has_a_heading_and_every_chart_a_table(outline):
    ids = {attributes.get("id") for _, attributes in outline.elements}
    assert {section["aria-labelledby"] for section in outline.all("section")} <= ids
    assert [text for text in outline.text("h2")][1:] == [
        "Speed against quality", "One plan", "Kernels on this device", "What was searched",
        "What could not be used",
        "How this came about",
    ]  # fmt: skip
    charts = [
        attributes for tag, attributes in outline.elements if attributes.get("class") == "chart"
    ]
    assert len(charts) == 6 and all("table" in chart["aria-label"] for chart in charts)
    assert (
        {label["for"] for label in outline.all("label")} == {"plan-select", "shape-select"} <= ids
    )


def test_the_table_of_plans_has_what_the_front_has(page, study):
    for row in study.rows():
        assert f"{row['speedup']:.2f}x</td>" in page
    assert (
        "+0.40..+0.60%" in page
        and "4 x int4-g64/packed, 4 x int8-row/plain, 1 x bfloat16/plain" in page
    )


def test_a_point_has_its_interval_and_tells_what_the_plan_is_made_of(data, study):
    trace = next(trace for trace in data["front"]["data"] if trace.get("name") == "recommended")
    assert (trace["x"], trace["y"]) == ([50.0], [pytest.approx(20.1)])
    assert trace["error_y"]["array"] == [pytest.approx(0.02)]
    hover = trace["hovertext"][0]
    assert "front 1" in hover and f"4 x {INT4}" in hover and INT8 in hover
    assert data["picked"] == trace["customdata"][0] == plan_of(data, FRONT)["number"] - 1


def test_families_are_told_apart_by_shape(data):
    symbols = [trace["marker"]["symbol"] for trace in data["front"]["data"] if "marker" in trace]
    assert len(symbols) == len(set(symbols)) >= 4


def test_larger_plans_have_larger_points(data):
    sizes = {}
    for trace in data["front"]["data"]:
        for index, size in zip(
            trace.get("customdata", ()), trace.get("marker", {}).get("size", ()), strict=True
        ):
            sizes[data["plans"][index]["id"]] = size
    by_memory = sorted(
        (plan_id for plan_id in PLANS if plan_id != FRONT), key=lambda plan_id: PLANS[plan_id][5]
    )
    assert sorted(by_memory, key=sizes.get) == by_memory


def test_plans_far_from_the_front_are_counted_and_can_be_shown(data):
    assert data["front"]["beyond"] == 1
    far = plan_of(data, FAR)["y"]
    assert far > data["front"]["layout"]["yaxis"]["range"][1]
    assert 10 ** data["front"]["everything"]["range"][1] > far


def test_every_layer_of_every_plan_has_its_cell(data, study):
    for plan in study.plans():
        if plan.plan_id in study.proofs():
            shown = plan_of(data, plan.plan_id)["choices"]
            formats = [data["formats"][data["choices"][place]["format"]]["id"] for place in shown]
            assert formats == [layer.format for layer in plan.layers]
    assert data["rows"] == ["attn.q_proj", "mlp.down_proj", "lm_head"] and data["columns"] == [
        "0",
        "1",
        "2",
        "3",
        "-",
    ]
    assert data["layers"][2] | {"shape": ""} == {
        "name": "model.layers.1.attn.q_proj",
        "row": 0,
        "column": 1,
        "shape": "",
    }


def test_a_choice_that_plans_share_is_written_once(data):
    used = [place for plan in data["plans"] for place in plan["choices"]]
    assert sorted(set(used)) == list(range(len(data["choices"]))) and len(set(used)) < len(used)


def test_times_by_type_add_up_to_the_predicted_request(data, study):
    for plan in study.plans():
        if plan.plan_id in study.proofs():
            shown = plan_of(data, plan.plan_id)
            bars = [trace for trace in shown["time"]["data"] if trace["type"] == "bar"]
            assert [trace["name"] for trace in bars] == ["prefill", "decode", "everything else"]
            total = sum(value or 0.0 for trace in bars for value in trace["x"])
            assert total == pytest.approx(plan.prediction.request_ms)
            assert sum(shown["loss"]["data"][0]["x"]) == pytest.approx(plan.prediction.loss)


def test_a_types_time_counts_every_call(data, study):
    decode = next(
        trace for trace in plan_of(data, FRONT)["time"]["data"] if trace["name"] == "decode"
    )
    assert decode["x"][0] == pytest.approx(4 * WORKLOAD.calls()["decode"] * 50.0 / 1e3)


def test_what_a_plan_leaves_alone_has_its_reason(data):
    assert plan_of(data, FRONT)["left_alone"] == [["lm_head", "256 x 256, bfloat16", LEFT_ALONE]]
    original = next(plan for plan in data["plans"] if plan["label"] == "original")
    assert original["left_alone"][0][:2] == [
        "model.layers.0-3.attn.q_proj",
        "4 of 256 x 256, bfloat16",
    ]


def test_predicted_stands_beside_realised(data, page):
    facts = dict(plan_of(data, reported.UNIFORM)["facts"])
    assert facts["Predicted"].startswith("60.0 ms a request (-9% against measured)")
    assert plan_of(data, FRONT)["phases"][0] == ["prefill", "1", "1.00 ms", "5.00 ms", "10.0 ms"]
    assert "differ by more than 10%" not in page


def test_the_kernel_map_has_a_chart_with_the_limits_for_every_shape(data, outline):
    assert len(data["shapes"]) == 3 == len([option for option in outline.all("option")])
    names = [trace["name"] for trace in data["shapes"][0]["data"]]
    assert names == [
        "limit, 16-bit weights",
        "limit, 8-bit weights",
        "limit, 4-bit weights",
        "unquantized",
        INT8,
    ]
    assert data["shapes"][0]["data"][4]["y"] == [
        10.5,
        pytest.approx(26.4),
        pytest.approx(71.2),
    ]  # the faster kernel at each m


def test_a_timing_that_others_disturbed_says_so(outline):
    assert outline.text("td").count(NOISE) == 27


def test_without_a_roofline_the_page_says_how_to_get_one(own_study):
    with transaction(own_study.store.engine) as session:
        session.query(RooflineRow).delete()
    page = render_report(own_study, "plan.db").decode()
    assert "autoquant profile MODEL --db plan.db" in page and "limit, 16-bit weights" not in page


def test_failures_are_shown_with_their_reasons(outline):
    cells = outline.text("td") + outline.text("th")
    assert "float8-row/plain/scaled-mm" in cells
    assert any(text.startswith("the kernel failed </script>") for text in cells)
    assert any(text.startswith("the compiler failed") for text in cells)
    assert any(text.startswith("conv") for text in cells) and "not a linear layer" in cells


@pytest.mark.parametrize(
    "fact",
    ["Test & Co CPU", "torch 2.13", "1 x prefill of 64 tokens, 16 x decode; batch 1", "5tudy001"],
)
def test_where_the_numbers_come_from_is_told(outline, fact):
    assert fact in outline.text("dd")


def test_plotly_takes_every_chart(data):
    charts = [data["front"], data["prediction"], *data["shapes"]]
    charts += [plan[name] for plan in data["plans"] for name in ("time", "loss")]
    for chart in charts:
        go.Figure(without_colours({"data": chart["data"], "layout": chart["layout"]}))


def without_colours(value):
    """plotly.py checks colours, and those of the page are names of its style."""
    if isinstance(value, dict):
        return {name: without_colours(each) for name, each in value.items() if "color" not in name}
    return [without_colours(each) for each in value] if isinstance(value, list) else value


def test_a_loss_of_ones_own_takes_the_place_of_perplexity(tmp_path):
    store = open_store(tmp_path / "own.db")
    reported.fill(store, limits={"max_ppl_increase": None, "max_memory_bytes": None})
    for plan_id, proof in store.proofs(reported.STUDY).items():
        store.put_proof(plan_id, replace(proof, perplexity=None, kl=None), replaces=True)
    page = render_report(Study(store), "own.db").decode()
    assert '<th scope="col" class="number">Loss</th>' in page and "Perplexity" not in Outline(
        page
    ).text("th")
    assert "--quality k3y" in page


def test_without_a_proven_plan_there_is_nothing_to_report(tmp_path):
    store = open_store(tmp_path / "none.db")
    reported.fill(store, plans=())
    with pytest.raises(PlanError, match="no plan has been proven yet"):
        render_report(Study(store), "none.db")


def test_a_plan_of_other_layers_is_refused(own_study):
    plan = own_study.plan(FRONT)
    first, *rest = plan.layers
    own_study.store.put_plan(replace(plan, layers=(replace(first, name="iayers"), *rest)))
    with pytest.raises(PlanError, match="have layer iayers"):
        render_report(own_study, "plan.db")


def test_plans_without_finite_quality_are_told_and_not_drawn(own_study):
    broken = Interval(value=float("inf"), low=float("inf"), high=float("inf"))
    proof = own_study.proofs()[FAR]
    own_study.store.put_proof(
        FAR, replace(proof, perplexity=float("inf"), increase=broken), replaces=True
    )
    page = render_report(own_study, "plan.db").decode()
    assert "not shown: 1 plans without finite quality" in page


def test_the_page_is_made_without_torch():
    code = "import sys, autoquant.report.html.page; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}
        ).returncode
        == 0
    )
