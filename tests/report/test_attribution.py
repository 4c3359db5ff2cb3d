"""Where a step's time goes, in tables, in JSON and as a trace."""

import io
from dataclasses import dataclass, field

import pytest
from builders.records import make_choice, make_plan
from rich.console import Console

from autoquant.records import RouteStep, Workload
from autoquant.report.attribution import (
    as_one,
    attribution_object,
    attribution_report,
    differences,
    responsible,
    slowed_notes,
    step_parts,
    trace_object,
)
from autoquant.runtime.steps import LINEAR, KernelTime, StepProfile

WORKLOAD = Workload.parse("prefill=8,decode=100")
QUERIES = ("model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj")
KEYS = ("model.layers.0.attn.k_proj", "model.layers.1.attn.k_proj")
ALONE_US = {"q_proj": 20.0, "k_proj": 10.0}


def layer(name):
    alone = ALONE_US[name.rpartition(".")[2]]
    return make_choice(
        name,
        "int8-row/plain",
        route=(RouteStep(upper_m=None, kernel="int-mm"),),
        latency_us={"prefill": 10 * alone, "decode": alone},
        memory_bytes=64,
    )


PLAN = make_plan(
    "p1",
    (layer(name) for pair in zip(QUERIES, KEYS, strict=True) for name in pair),
    {"request_ms": 10.0, "linear_ms": 6.6, "loss": 0.0, "memory_bytes": 256},
)


@dataclass(frozen=True)
class Row:
    """What `autoquant.tuner.bench.BenchRow` says of a model."""

    label: str = "front 1"
    phase_ms: dict = field(default_factory=lambda: {"prefill": 0.8, "decode": 0.15})
    request_ms: float = 15.8
    steps: dict = field(default_factory=dict)
    predicted_request_ms: float = 10.0


def step(phase, scale=1.0):
    """Queries and keys of each block as one, and attention between the blocks."""
    kernels = []
    start = 2.0
    for kind, layers, duration in (
        (LINEAR, (QUERIES[0], KEYS[0]), 30.0 * scale),
        ("attention", (), 25.0),
        (LINEAR, (QUERIES[1], KEYS[1]), 60.0 * scale),
    ):
        kernels.append(
            KernelTime(
                name=f"{kind}_kernel",
                kind=kind,
                layers=layers,
                start_us=start,
                duration_us=duration,
            )
        )
        start += duration + 1.0
    return StepProfile(phase=phase, step_us=start, kernels=tuple(kernels))


ROW = Row(steps={"prefill": step("prefill", 10.0), "decode": step("decode")})
ORIGINAL = Row(
    "original",
    {"prefill": 2.0, "decode": 0.2},
    22.0,
    {p: step(p, 20.0) for p in ("prefill", "decode")},
)


def drawn(report, width):
    out = io.StringIO()
    Console(width=width, file=out).print(report)
    return out.getvalue()


def test_a_step_is_layer_types_then_glue_then_gaps_and_nothing_is_left():
    parts = step_parts(ROW.steps["decode"], ORIGINAL.steps["decode"], PLAN)
    found = {part.what: (part.time_us, part.original_us, part.alone_us) for part in parts}
    assert found["model.layers.0-1.attn.q_proj"] == pytest.approx((60.0, 1200.0, 40.0))
    assert found["model.layers.0-1.attn.k_proj"] == pytest.approx((30.0, 600.0, 20.0))
    assert list(found)[2:] == ["attention", "gaps: nothing runs"]
    assert sum(part.time_us for part in parts) == pytest.approx(ROW.steps["decode"].step_us)


def test_both_sides_of_the_differences_add_up_to_the_request():
    found = differences(ROW, PLAN, WORKLOAD)
    assert sum(each.time_ms for each in found) == pytest.approx(ROW.request_ms)
    assert sum(each.predicted_ms for each in found) == pytest.approx(PLAN.prediction.request_ms)
    queries = next(each for each in found if each.what == "model.layers.0-1.attn.q_proj")
    assert queries.predicted_ms == pytest.approx(2 * (0.2 + 100 * 0.02))
    assert queries.time_ms == pytest.approx(2 / 3 * (0.9 + 100 * 0.09))
    assert [abs(each.excess_ms) for each in found] == sorted(
        (abs(each.excess_ms) for each in found), reverse=True
    )


def test_the_layers_responsible_are_those_that_pull_the_request_the_way_it_went():
    words = responsible(ROW, PLAN, WORKLOAD)
    assert words.startswith("all else +2.50 ms, model.layers.0-1.attn.q_proj +2.20 ms")
    faster = Row(request_ms=8.0, steps=ROW.steps)
    assert responsible(faster, PLAN, WORKLOAD) == "all else -5.30 ms"


@pytest.mark.parametrize("width", [80, 160])
def test_the_report_fits_the_terminal_and_names_types_layers_kernels_and_gaps(width):
    text = drawn(attribution_report(ROW, ORIGINAL, PLAN, WORKLOAD, width), width)
    assert all(len(line) <= width for line in text.splitlines())
    for words in (
        "model.layers.0-1.attn.q_proj",
        "attention",
        "gaps",
        "attention_kernel",
        "int8-row/plain",
        "request",
    ):
        assert words in text
    assert "3 kernels, 4 gaps between them, the longest 2.00 µs" in text


def test_a_model_that_is_no_plan_is_reported_without_predictions():
    assert "Largest differences" not in drawn(
        attribution_report(ROW, ORIGINAL, None, WORKLOAD, 80), 80
    )


def test_json_has_every_kernel_and_every_layer():
    found = attribution_object(ROW, ORIGINAL, PLAN, WORKLOAD)
    assert set(found["steps"]["decode"]["layers_us"]) == {*QUERIES, *KEYS}
    assert [kernel["kind"] for kernel in found["steps"]["decode"]["kernels"]] == [
        "linear",
        "attention",
        "linear",
    ]
    assert found["differences"][0]["what"] == "all else"


def test_a_trace_shows_kernels_below_their_layers():
    events = trace_object({"front 1": ROW.steps})["traceEvents"]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [
        "front 1, prefill",
        "front 1, decode",
    ]
    decode = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    layers = {event["name"]: (event["ts"], event["dur"]) for event in decode if event["tid"] == 0}
    assert layers == {
        "model.layers.0.attn.q_proj + k_proj": (2.0, 30.0),
        "attention": (33.0, 25.0),
        "model.layers.1.attn.q_proj + k_proj": (59.0, 60.0),
    }
    assert [event["name"] for event in decode if event["tid"] == 1] == [
        k.name for k in ROW.steps["decode"].kernels
    ]


def test_layers_of_different_parents_keep_their_full_names():
    assert as_one(("a.q", "b.q")) == "a.q + b.q" and as_one(("a.q",)) == "a.q" and as_one(()) == ""


def test_a_step_that_the_profiler_found_much_slower_is_said():
    assert slowed_notes(ROW) == []
    slow = Row(phase_ms={"prefill": 0.8, "decode": 0.05}, steps=ROW.steps)
    (note,) = slowed_notes(slow)
    assert "a decode step took 2.4 times longer with the profiler" in note
