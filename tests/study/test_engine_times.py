"""Times of types in an engine, shared out among layers, and kept with a study."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders.records import MODEL, STUDY, WORKLOAD, make_site
from builders.search import CONTEXT, choice

from autoquant.engines import engine
from autoquant.errors import PlanError
from autoquant.records import LinearShape
from autoquant.solver.limits import Limits
from autoquant.solver.planning import make_plan
from autoquant.solver.space import SearchSpace
from autoquant.study.engine_times import (
    EngineTimes,
    TypeTimes,
    in_engine,
    keep_times,
    known_times,
    types_of,
)
from autoquant.study.solve_again import prepare, solve_prepared
from autoquant.study.study import Study

LLAMA = engine("llama.cpp")
WIDE = LinearShape(n=192, k=64, bias=False, dtype="bfloat16")
ORIGINAL = {"prefill": 40.0, "decode": 10.0}
INT4_LOSS = {"small": 0.2, "wide": 0.01, "head": 0.01}


def layer(name, shape, *, fours=True):
    plain = replace(choice(name), shape=shape)
    int8 = replace(choice(name, "int8-row/plain", 900.0, 0.001, 50), shape=shape)
    int4 = replace(choice(name, "int4s-g32/lanes", 2000.0, INT4_LOSS[name], 25), shape=shape)
    return [plain, int8, int4] if fours else [plain, int8]


SPACE = SearchSpace(
    [layer("small", make_site().shape), layer("wide", WIDE), layer("head", WIDE, fours=False)],
    CONTEXT,
    logarithmic=True,
)
SITES = [
    make_site("small"),
    make_site("wide", shape=WIDE),
    make_site("head", rows=(1, 1), shape=WIDE),
]


def times(**types):
    made = {
        name: TypeTimes(phase_ms=phases, layers=layers) for name, (phases, layers) in types.items()
    }
    return EngineTimes(
        engine="llama.cpp", version="b1", device="d", original_ms=ORIGINAL, types=made
    )


HALF = ({"prefill": 20.0, "decode": 5.0}, ("small", "wide", "head"))
MOSTLY = ({"prefill": 60.0, "decode": 6.0}, ("small", "wide"))
TIMES = times(Q8_0=HALF, Q4_0=MOSTLY)


def request(space, *formats):
    chosen = [
        next(each for each in options if each.format.startswith(start))
        for options, start in zip(space.options, formats, strict=True)
    ]
    return make_plan(chosen, "x", "front", space.context).prediction


def test_a_whole_model_of_a_type_takes_what_was_measured():
    timed = in_engine(SPACE, TIMES, LLAMA, SITES)
    assert types_of(LLAMA, SPACE) == ["Q8_0", "Q4_0"]
    original = request(timed, "bfloat16", "bfloat16", "bfloat16")
    assert original.request_ms == pytest.approx(40 + 4 * 10)
    assert original.original_request_ms == pytest.approx(80)
    assert request(timed, "int8", "int8", "int8").request_ms == pytest.approx(20 + 4 * 5)
    # The head cannot have this type, and stayed unquantized when it was measured.
    assert request(timed, "int4s", "int4s", "bfloat16").request_ms == pytest.approx(60 + 4 * 6)


def test_what_a_type_changes_is_shared_out_by_the_products_of_each_phase():
    timed = in_engine(SPACE, TIMES, LLAMA, SITES)
    one = request(timed, "bfloat16", "int8", "bfloat16")
    # Of 8 rows, 8 and 1: 64 x 64, 3 times that, and 3 times that once.
    prefill, decode = 24 / (8 + 24 + 3), 3 / 7
    assert one.request_ms == pytest.approx(80 - 20 * prefill - 4 * 5 * decode)


def test_nothing_takes_less_than_no_time():
    few = times(Q8_0=({"prefill": 0.1, "decode": 0.1}, ("small",)), Q4_0=MOSTLY)
    timed = in_engine(SPACE, few, LLAMA, SITES)
    assert all(ms >= 0 for each in timed.options[1] for ms in each.latency_us.values())


def test_times_are_kept_with_their_study(store):
    assert known_times(store, STUDY, "llama.cpp") is None
    keep_times(store, STUDY, TIMES)
    other = replace(TIMES, engine="vllm", version="7")
    keep_times(store, STUDY, other)
    assert known_times(store, STUDY, "llama.cpp") == TIMES
    assert known_times(store, STUDY, "vllm") == other


def test_times_of_another_device_or_of_fewer_types_are_not_those():
    assert TIMES.are_of("d", WORKLOAD, ["Q8_0"])
    assert not TIMES.are_of("another", WORKLOAD, ["Q8_0"])
    assert not TIMES.are_of("d", WORKLOAD, ["Q8_0", "Q5_0"])
    assert not TIMES.are_of("d", WORKLOAD.parse("prefill=8"), ["Q8_0"])


def test_a_type_that_the_target_does_not_hold_is_refused():
    odd = SearchSpace([[choice("a", "float8-row/plain", 1.0)]], CONTEXT)
    with pytest.raises(PlanError, match="does not hold float8-row/plain"):
        types_of(LLAMA, odd)


def test_the_plan_is_fastest_there_and_kept_with_the_times_of_its_study(store):
    """Of the study's own kernels int4 is the slowest; in the engine it is the fastest."""
    store.put_options(STUDY, SPACE.options, SPACE.about())
    study = Study(store, STUDY)
    limits = Limits(max_ppl_increase=0.05)
    fast = times(Q8_0=HALF, Q4_0=({"prefill": 10.0, "decode": 2.0}, ("small", "wide")))
    prepared = prepare(study, limits, "llama.cpp")
    own = solve_prepared(study, prepared, limits)
    assert {each.format for each in own.plan.layers} == {"int8-row/plain"}
    solved = solve_prepared(study, prepared.with_times(fast, SITES), limits)
    assert [each.format for each in solved.plan.layers] == [
        "int8-row/plain",
        "int4s-g32/lanes",
        "int8-row/plain",
    ]
    assert solved.plan.label.startswith("solved for llama.cpp by its times: fastest")
    assert solved.plan.prediction.request_ms < 40
    kept = study.plan(solved.plan.plan_id)
    assert kept.prediction.request_ms == pytest.approx((900 + 2000 + 900) / 1e3 + 2)
    assert all(each.reason.startswith("in llama.cpp: ") for each in kept.layers)
    assert kept.model_hash == MODEL
