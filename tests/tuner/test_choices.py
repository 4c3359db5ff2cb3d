"""From timings to the choices of a site."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from builders.records import SHAPE, WORKLOAD, make_site
from builders.search import INT8, ORIGINAL, WORKING_SET, facts, make_format, timings

from autoquant.candidates import Candidate, get_format, registry
from autoquant.profiler.timing_table import TimingTable
from autoquant.records import LinearShape, RouteStep, SiteUse, route_kernel
from autoquant.solver.planning import request_us
from autoquant.tuner.choices import ChoiceMaker, format_facts, numerics_of, scored

FACTS = facts(bfloat16=(200, 0.0), int8=(100, 0.01))
ALWAYS_16 = {("bfloat16/plain", "matmul", 1): 50.0, ("bfloat16/plain", "matmul", 8): 50.0}


@pytest.fixture(autouse=True)
def made_up_formats(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_registered", {})


def choices_of(table, formats=(INT8,), site=None, known=FACTS, within="site", may_tie=False):
    registry._registered |= {fmt.id: fmt for fmt in formats}
    candidates = [Candidate(fmt, kernel) for fmt in (ORIGINAL, *formats) for kernel in fmt.kernels]
    table = TimingTable(WORKING_SET, timings(table))
    maker = ChoiceMaker(candidates, table, known, WORKLOAD, "cpu", may_tie)
    return maker.choices(site or make_site(), within=within)


def rounds(choice):
    return " ".join(map(str, numerics_of(choice)))


def only(choices, fmt, numerics):
    (found,) = [c for c in choices.choices if c.format == fmt and rounds(c) == numerics]
    return found


def int8_times(weight_only, integer):
    """Times at m = 1 and 8 of the two kernels."""
    names = (("weight-only", weight_only), ("integer", integer))
    return ALWAYS_16 | {
        ("int8/plain", kernel, m): us
        for kernel, pair in names
        for m, us in zip((1, 8), pair, strict=True)
    }


def test_a_route_takes_the_fastest_kernel_for_each_m():
    choices = choices_of(int8_times(weight_only=(10.0, 40.0), integer=(20.0, 15.0)))
    mixed = only(choices, "int8/plain", "int8+a16 int8+a8-row")
    assert [route_kernel(mixed.route, m) for m in (1, 8)] == ["weight-only", "integer"]
    assert mixed.latency_us == {"prefill": 15.0, "decode": 10.0}


def test_there_is_a_route_without_rounding_and_one_that_rounds_where_it_pays():
    choices = choices_of(int8_times(weight_only=(10.0, 40.0), integer=(20.0, 15.0)))
    found = {
        rounds(c): [(s.upper_m, s.kernel) for s in c.route]
        for c in choices.choices
        if c.format == "int8/plain"
    }
    assert found["int8+a16"] == [(None, "weight-only")]
    assert found["int8+a16 int8+a8-row"] == [(3, "weight-only"), (None, "integer")]


def test_rounding_everywhere_is_dropped_where_rounding_only_sometimes_is_faster():
    choices = choices_of(int8_times(weight_only=(10.0, 40.0), integer=(20.0, 15.0)))
    assert "int8+a8-row" not in {rounds(c) for c in choices.choices}


def test_a_layer_of_a_group_keeps_rounding_that_does_not_pay_there():
    """It may pay in the others, which get the same."""
    table = int8_times(weight_only=(10.0, 40.0), integer=(20.0, 45.0))
    assert {rounds(c) for c in choices_of(table).choices} == {"bfloat16+a16", "int8+a16"}
    kept = choices_of(table, within="scheme")
    assert {rounds(c) for c in kept.choices} == {"bfloat16+a16", "int8+a16", "int8+a8-row"}


def test_rounding_is_dropped_where_the_original_is_faster_smaller_and_exact():
    rounding = make_format("rounding/plain", kernel="a8-row")
    table = ALWAYS_16 | {("rounding/plain", "kernel", m): 60.0 for m in (1, 8)}
    choices = choices_of(
        table, formats=(rounding,), known=facts(bfloat16=(200, 0.0), rounding=(300, 0.01))
    )
    assert [c.format for c in choices.choices] == ["bfloat16/plain"]


def test_a_dropped_format_is_told_which_other_one_is_better():
    table = int8_times(weight_only=(20.0, 20.0), integer=(30.0, 30.0))
    table |= {("other/plain", "kernel", m): 5.0 for m in (1, 8)}
    other = make_format("other/plain", kernel="a16")
    known = facts(bfloat16=(200, 0.0), int8=(100, 0.01), other=(100, 0.01))
    choices = choices_of(table, formats=(INT8, other), known=known)
    assert choices.dropped == {
        "int8/plain": "other/plain is at least as fast, as small and as exact"
    }


def test_a_kernel_that_is_fastest_everywhere_is_the_whole_route():
    choices = choices_of(int8_times(weight_only=(10.0, 10.0), integer=(20.0, 15.0)))
    assert only(choices, "int8/plain", "int8+a16").route == (
        RouteStep(upper_m=None, kernel="weight-only"),
    )


@pytest.mark.parametrize("rows", [(1, 2), (1, 3), (4, 9), (16, 512), (100, 101)])
def test_kernels_change_where_their_latencies_would_cross_if_they_grew_with_the_rows(rows):
    few, many = rows
    table = {("bfloat16/plain", "matmul", m): 50.0 for m in rows}
    table |= {("int8/plain", "weight-only", few): 1.0, ("int8/plain", "weight-only", many): 13.0}
    table |= {("int8/plain", "integer", few): 5.0, ("int8/plain", "integer", many): 5.0}
    route = only(
        choices_of(table, site=make_site(rows=(many, few))), "int8/plain", "int8+a16 int8+a8-row"
    ).route
    boundary = route[0].upper_m
    assert len(route) == 2 and few <= boundary < many
    assert boundary == few + (many - few) // 3


def test_a_kernel_that_is_for_few_rows_alone_is_used_up_to_the_geometric_mean():
    table = {("bfloat16/plain", "matmul", m): 50.0 for m in (1, 64)}
    table |= {("int8/plain", "weight-only", 1): 1.0}
    table |= {("int8/plain", "integer", 1): 9.0, ("int8/plain", "integer", 64): 1.0}
    found = choices_of(table, site=make_site(rows=(64, 1)))
    (route, *_) = {c.route for c in found.choices if len(c.route) == 2}
    assert route[0] == RouteStep(upper_m=8, kernel="weight-only")


def test_equal_kernels_of_neighbouring_m_are_merged():
    table = {("bfloat16/plain", "matmul", m): 50.0 for m in (1, 4, 16, 64)}
    table |= {
        ("int8/plain", "weight-only", m): us
        for m, us in zip((1, 4, 16, 64), (1, 1, 9, 9), strict=True)
    }
    table |= {
        ("int8/plain", "integer", m): us for m, us in zip((1, 4, 16, 64), (9, 9, 1, 1), strict=True)
    }
    uses = tuple(SiteUse(phase="prefill", m=m, calls=1) for m in (64, 1, 16, 4))
    choices = choices_of(table, site=make_site(uses=uses))
    route = only(choices, "int8/plain", "int8+a16 int8+a8-row").route
    assert route == (
        RouteStep(upper_m=10, kernel="weight-only"),
        RouteStep(upper_m=None, kernel="integer"),
    )


def test_times_count_every_call_of_a_phase():
    uses = (SiteUse(phase="prefill", m=8, calls=3), SiteUse(phase="prefill", m=1, calls=2))
    choices = choices_of(int8_times((10.0, 40.0), (20.0, 15.0)), site=make_site(uses=uses))
    mixed = only(choices, "int8/plain", "int8+a16 int8+a8-row")
    assert mixed.latency_us == {"prefill": 3 * 15.0 + 2 * 10.0}


def test_a_request_weighs_phases_by_their_calls():
    choices = choices_of(int8_times((10.0, 40.0), (20.0, 15.0)))
    assert (
        request_us(only(choices, "int8/plain", "int8+a16 int8+a8-row"), WORKLOAD) == 15.0 + 4 * 10.0
    )


@pytest.mark.parametrize(
    "outcome", ["failed: it broke", "incorrect: wrong numbers", "unsupported: not here"]
)
def test_a_kernel_that_did_not_work_is_never_used(outcome):
    choices = choices_of(int8_times(weight_only=(10.0, outcome), integer=(outcome, 15.0)))
    routes = [c.route for c in choices.choices if c.format == "int8/plain"]
    assert [[s.kernel for s in route] for route in routes] == [["weight-only", "integer"]]


def test_a_format_without_a_kernel_for_every_m_is_dropped_with_the_reason():
    choices = choices_of(
        int8_times(weight_only=(10.0, "failed: it broke"), integer=(9.0, "failed: it broke"))
    )
    assert {c.format for c in choices.choices} == {"bfloat16/plain"}
    assert choices.dropped == {"int8/plain": "it broke"}


def test_a_choice_that_another_beats_in_everything_is_dropped_with_the_reason():
    table = ALWAYS_16 | {("slow/plain", "kernel", m): 60.0 for m in (1, 8)}
    known = facts(bfloat16=(200, 0.0), slow=(300, 0.01))
    choices = choices_of(table, formats=(make_format("slow/plain", kernel="a16"),), known=known)
    assert [c.format for c in choices.choices] == ["bfloat16/plain"]
    assert choices.dropped == {
        "slow/plain": "bfloat16/plain is at least as fast, as small and as exact"
    }


@pytest.mark.parametrize("for_inputs", [False, True])
def test_a_weight_that_is_made_for_inputs_is_not_dropped_for_its_error_on_others(for_inputs):
    own = replace(
        make_format("own/plain", kernel="a16"),
        needs_inputs=for_inputs,
        without_inputs=(lambda weight: weight) if for_inputs else None,
    )
    table = int8_times(weight_only=(10.0, 10.0), integer=(90.0, 90.0))
    table |= {("own/plain", "kernel", m): 11.0 for m in (1, 8)}
    known = FACTS | facts(own=(100, 0.01))
    found = {c.format for c in choices_of(table, formats=(INT8, own), known=known).choices}
    assert ("own/plain" in found) is for_inputs


@pytest.mark.parametrize("better", ["time", "memory", "exactness"])
def test_a_choice_that_is_better_in_one_thing_is_kept(better):
    """`good` is as good as `int8` or better in everything but one."""
    good = make_format("good/plain", kernel="a16")
    table = int8_times(weight_only=(10.0, 10.0), integer=(90.0, 90.0))
    us = 11.0 if better == "time" else 9.0
    table |= {("good/plain", "kernel", m): us for m in (1, 8)}
    known = FACTS | facts(
        good=(103 if better == "memory" else 99, 0.02 if better == "exactness" else 0.005)
    )
    choices = choices_of(table, formats=(INT8, good), known=known)
    assert {c.format for c in choices.choices} == {"bfloat16/plain", "int8/plain", "good/plain"}


def test_a_choice_that_is_smaller_by_less_than_its_scales_is_dropped():
    """`good` is faster and more exact, and 1 % larger."""
    table = int8_times(weight_only=(10.0, 10.0), integer=(90.0, 90.0)) | {
        ("good/plain", "kernel", m): 9.0 for m in (1, 8)
    }
    good = make_format("good/plain", kernel="a16")
    choices = choices_of(table, formats=(INT8, good), known=FACTS | facts(good=(101, 0.005)))
    assert {c.format for c in choices.choices} == {"bfloat16/plain", "good/plain"}


def test_of_two_choices_that_differ_in_size_alone_the_smaller_is_kept():
    table = ALWAYS_16 | {
        (name, "kernel", m): 5.0 for name in ("larger/plain", "smaller/plain") for m in (1, 8)
    }
    formats = [make_format(f"{name}/plain", kernel="a16") for name in ("larger", "smaller")]
    known = facts(bfloat16=(400, 0.0), larger=(201, 0.01), smaller=(200, 0.01))
    choices = choices_of(table, formats=formats, known=known)
    assert {c.format for c in choices.choices} == {"bfloat16/plain", "smaller/plain"}


def test_rounding_activations_does_not_count_as_more_exact():
    """Faster, smaller and with better weights, but it rounds the activation where the other does not."""
    rounding = make_format("rounding/plain", kernel="a8-row")
    table = int8_times(weight_only=(10.0, 10.0), integer=(90.0, 90.0))
    table |= {("rounding/plain", "kernel", m): 1.0 for m in (1, 8)}
    choices = choices_of(table, formats=(INT8, rounding), known=FACTS | facts(rounding=(50, 0.001)))
    assert only(choices, "int8/plain", "int8+a16")


def test_the_original_is_never_dropped():
    table = ALWAYS_16 | {("other/plain", "kernel", m): 1.0 for m in (1, 8)}
    known = facts(bfloat16=(200, 0.1), other=(50, 0.0))
    choices = choices_of(table, formats=(make_format("other/plain", kernel="a16"),), known=known)
    assert choices.original.format == "bfloat16/plain"
    assert "bfloat16/plain" not in choices.dropped


def test_equal_choices_do_not_drop_each_other():
    twin = make_format("twin/plain", kernel="a16")
    table = int8_times(weight_only=(10.0, 10.0), integer=(90.0, 90.0))
    table |= {("twin/plain", "kernel", m): 10.0 for m in (1, 8)}
    choices = choices_of(table, formats=(INT8, twin), known=FACTS | facts(twin=(100, 0.01)))
    assert {"int8/plain", "twin/plain"} <= {c.format for c in choices.choices}


def test_whatever_is_dropped_is_beaten_by_something_that_is_kept():
    names = [f"f{number}" for number in range(6)]
    formats = [make_format(f"{name}/plain", kernel="a16") for name in names]
    for seed in range(40):
        draw = random.Random(seed)
        table = ALWAYS_16 | {
            (f"{name}/plain", "kernel", m): draw.randint(1, 6) * 10
            for name in names
            for m in (1, 8)
        }
        known = facts(
            bfloat16=(200, 0.0),
            **{name: (draw.randint(1, 4) * 50, draw.randint(1, 4) / 100) for name in names},
        )
        choices = choices_of(table, formats=formats, known=known)
        kept = {c.format: c for c in choices.choices}
        points = {
            name: (request_us(c, WORKLOAD), c.memory_bytes, known[name, SHAPE].weight_error)
            for name, c in kept.items()
        }
        for name in names:
            fmt = f"{name}/plain"
            if fmt in kept:
                continue
            times = sum(calls * table[fmt, "kernel", m] for m, calls in ((8, 1), (1, 4)))
            own = (times, known[fmt, SHAPE].memory_bytes, known[fmt, SHAPE].weight_error)
            assert any(
                all(a <= b for a, b in zip(point, own, strict=True)) for point in points.values()
            ), seed
            assert fmt in choices.dropped


def test_quantizing_a_weight_that_stays_beside_it_costs_both():
    tied = make_site(kept=("embedding.weight",))
    free = {
        c.format: c.memory_bytes for c in choices_of(int8_times((10.0, 10.0), (90.0, 90.0))).choices
    }
    kept = {
        c.format: c.memory_bytes
        for c in choices_of(int8_times((10.0, 10.0), (90.0, 90.0)), site=tied).choices
    }
    assert free == {"bfloat16/plain": 200, "int8/plain": 100}
    assert kept == {"bfloat16/plain": 200, "int8/plain": 300}


def test_a_slow_format_stays_for_a_tied_weight_where_one_tensor_may_stand_for_both():
    tied, slow = make_site(kept=("embedding.weight",)), int8_times((60.0, 60.0), (90.0, 90.0))
    assert [c.format for c in choices_of(slow, site=tied).choices] == ["bfloat16/plain"]
    found = choices_of(slow, site=tied, may_tie=True).choices
    assert {c.format: c.memory_bytes for c in found} == {"bfloat16/plain": 200, "int8/plain": 300}


def test_scores_fill_in_the_worst_numerics_of_a_route():
    choices = choices_of(int8_times((10.0, 40.0), (20.0, 15.0)))
    losses = {
        ("layer", "bfloat16+a16"): 0.0,
        ("layer", "int8+a16"): 0.3,
        ("layer", "int8+a8-row"): 0.2,
    }
    filled = {
        tuple(step.kernel for step in c.route): (c.numerics, c.loss)
        for c in scored(choices, losses).choices
    }
    assert filled["matmul",] == ("bfloat16+a16", 0.0)
    assert filled["weight-only",] == ("int8+a16", 0.3)
    # Rounding more is never better: that its loss is smaller is within the error of both.
    assert filled["weight-only", "integer"] == ("int8+a8-row", 0.3)


def test_a_choice_without_a_score_is_left_out():
    choices = choices_of(int8_times((10.0, 40.0), (20.0, 15.0)))
    losses = {
        ("layer", "bfloat16+a16"): 0.0,
        ("layer", "int8+a16"): 0.3,
        ("another", "int8+a8-row"): 0.2,
    }
    assert {c.numerics for c in scored(choices, losses).choices} == {"bfloat16+a16", "int8+a16"}


def test_facts_are_those_of_the_real_formats():
    formats = [get_format(name) for name in ("bfloat16/plain", "int8-row/plain", "float32/plain")]
    found = format_facts(formats, [SHAPE], "cpu")
    assert set(found) == {("bfloat16/plain", SHAPE), ("int8-row/plain", SHAPE)}, (
        "float32 is wider than the weight"
    )
    assert found["bfloat16/plain", SHAPE].memory_bytes == 64 * 64 * 2
    assert found["bfloat16/plain", SHAPE].weight_error == 0.0
    assert 64 * 64 <= found["int8-row/plain", SHAPE].memory_bytes < 64 * 64 * 1.1
    assert 0.001 < found["int8-row/plain", SHAPE].weight_error < 0.02


def test_facts_do_not_depend_on_what_was_drawn_before():
    shapes = [LinearShape(n=64, k=64, bias=bias, dtype="bfloat16") for bias in (False, True)]
    formats = [get_format("int8-row/plain")]
    torch.manual_seed(1)
    one = format_facts(formats, shapes, "cpu")
    torch.randn(7)
    assert format_facts(formats, list(reversed(shapes)), "cpu") == one
