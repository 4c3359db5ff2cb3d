"""What else a layer could have got: the nearest choices that are better in something, and what they would change."""

from __future__ import annotations

from dataclasses import replace

from builders.records import STUDY, WORKLOAD
from builders.search import choice, make_plan

from autoquant.solver.alternatives import alternatives
from autoquant.study.study import Study

ORIGINAL = choice(us=1000.0, memory=100)
INT8 = choice(fmt="int8/plain", us=600.0, loss=0.002, memory=50)
INT8_GROUPS = choice(fmt="int8-g32/plain", us=700.0, loss=0.001, memory=60)
INT4 = choice(fmt="int4/plain", us=300.0, loss=0.05, memory=25)
INT3 = choice(fmt="int3/plain", us=200.0, loss=0.5, memory=20)
OPTIONS = [ORIGINAL, INT8, INT8_GROUPS, INT4, INT3]


def found(own, options=OPTIONS):
    return {each.choice.format: each for each in alternatives(own, options, WORKLOAD)}


def test_the_next_better_is_the_fastest_more_exact_and_the_next_cheaper_the_most_exact_that_costs_less():
    others = found(INT8)
    assert {name: each.gains for name, each in others.items()} == {
        "int8-g32/plain": ("more exact",),
        "int4/plain": ("faster", "smaller"),
    }


def test_differences_are_of_one_request_with_all_its_calls():
    slower_decode = replace(INT8_GROUPS, latency_us={"prefill": 700.0, "decode": 10.0})
    better = found(INT8, [ORIGINAL, INT8, slower_decode])["int8-g32/plain"]
    assert better.request_us == 100.0 + 4 * 10.0, "the workload decodes four times"
    assert (better.memory_bytes, round(better.loss, 9)) == (10, -0.001)


def test_faster_and_smaller_are_named_apart_where_they_are_not_the_same():
    small = choice(fmt="int4-packed/plain", us=900.0, loss=0.01, memory=20)
    others = found(INT8, [ORIGINAL, INT8, INT4, small])
    assert others["int4/plain"].gains == ("faster",)
    assert others["int4-packed/plain"].gains == ("smaller",)
    assert [each.gains[0] for each in alternatives(INT8, [small, INT4, ORIGINAL, INT8], WORKLOAD)] == [
        "more exact", "faster", "smaller",
    ]  # fmt: skip


def test_the_ends_of_the_line_have_nothing_further():
    assert [each.gains for each in found(INT3).values()] == [("more exact",)]
    assert [each.gains for each in found(ORIGINAL).values()] == [("faster", "smaller")]
    assert alternatives(ORIGINAL, [ORIGINAL], WORKLOAD) == ()
    assert alternatives(ORIGINAL, [], WORKLOAD) == ()


def test_a_choice_predicted_before_calibration_is_not_its_own_alternative():
    uncalibrated = replace(INT8, latency_us={"prefill": 650.0, "decode": 0.0})
    others = found(uncalibrated)
    assert set(others) == {"int8-g32/plain", "int4/plain"}
    assert others["int4/plain"].request_us == -300.0, (
        "against what the options say of the same choice"
    )


JOINED = replace(INT8, latency_us={"prefill": 400.0, "decode": 0.0}, joined=("layer", "other"))


def test_a_layer_computed_as_one_is_compared_by_its_share_of_that():
    assert found(JOINED)["int4/plain"].request_us == -100.0
    assert found(JOINED, [*OPTIONS, JOINED])["int4/plain"].request_us == -100.0


def test_being_computed_as_one_is_another_choice_than_the_same_format_alone():
    faster = next(
        each for each in alternatives(INT8, [*OPTIONS, JOINED], WORKLOAD) if "faster" in each.gains
    )
    assert (faster.choice, faster.request_us, faster.loss) == (JOINED, -200.0, 0.0)


def test_a_study_knows_them_by_layer_once_its_options_are_kept(store):
    plan = make_plan("p")
    store.put_plan(plan)
    study = Study(store, STUDY)
    assert study.alternatives(plan) is None
    store.put_options(STUDY, [OPTIONS])
    assert study.alternatives(plan) == {"layer": alternatives(plan.layers[0], OPTIONS, WORKLOAD)}
    assert study.alternatives(plan)["layer"][0].choice == INT8_GROUPS


def test_a_layer_that_was_not_solved_for_has_none(store):
    plan = replace(make_plan("p"), layers=(choice("another"),))
    store.put_options(STUDY, [OPTIONS])
    assert Study(store, STUDY).alternatives(plan) == {"another": ()}
