"""What a study answers: the best plan under limits, and the front."""

from __future__ import annotations

import random

import pytest
from builders.records import STUDY
from builders.search import make_plan, make_proof

from autoquant.errors import PlanError
from autoquant.study.columns import COLUMNS, request_times
from autoquant.study.study import Study


def original(**changes):
    return make_proof("original", ms=20.0, **({"memory": 200} | changes))


def test_the_best_plan_is_the_fastest_within_the_limit(study_of):
    study = study_of(
        original(),
        make_proof("a", ms=5, increase=0.02),
        make_proof("b", ms=8, increase=0.004),
        make_proof("c", ms=12),
    )
    assert study.best(0.01).plan_id == "b"
    assert study.best(0.03).plan_id == "a"
    assert study.best(0.001).plan_id == "c"
    assert study.best().plan_id == "a"


def test_the_limit_is_held_against_the_upper_end_of_the_selection_interval(study_of):
    study = study_of(
        original(), make_proof("wide", ms=5, increase=0.001, high=0.02), make_proof("sure", ms=8)
    )
    assert study.best(0.01).plan_id == "sure"
    assert study.best(0.02).plan_id == "wide"


def test_the_report_part_is_not_looked_at(study_of):
    report_says_bad = make_proof("a", ms=5, increase=0.001, perplexity=99.0)
    assert study_of(original(), report_says_bad).best(0.01).plan_id == "a"


def test_the_original_is_within_every_limit_of_quality(study_of):
    assert (
        study_of(original(high=0.5), make_proof("a", ms=5, increase=0.3)).best(0.0).plan_id
        == "original"
    )


def test_a_memory_limit_counts_what_was_measured(study_of):
    study = study_of(
        original(), make_proof("a", ms=5, memory=150), make_proof("b", ms=8, memory=90)
    )
    assert study.best(None, 150).plan_id == "a"
    assert study.best(None, 149).plan_id == "b"
    assert study.best(0.01, 90).plan_id == "b"


def test_a_limit_of_divergence_is_held_against_the_upper_end_of_its_interval(study_of):
    from dataclasses import replace

    from autoquant.records import Interval

    def proof(plan_id, ms, kl, high):
        return replace(
            make_proof(plan_id, ms=ms), selection_kl=Interval(value=kl, low=0.0, high=high)
        )

    study = study_of(
        original(), proof("a", 5, 0.01, 0.03), proof("b", 8, 0.015, 0.02), make_proof("old", ms=4)
    )
    assert study.best(max_kl=0.03).plan_id == "a"
    assert study.best(max_kl=0.02).plan_id == "b"
    assert study.best(max_kl=0.01).plan_id == "original"
    assert study.best(max_ppl_increase=0.01, max_kl=0.02).plan_id == "b"


def test_ties_in_time_go_to_the_better_quality(study_of):
    study = study_of(
        original(),
        make_proof("fast", ms=10.0, increase=0.009),
        make_proof("good", ms=10.09, increase=0.001),
        make_proof("better", ms=10.3, increase=-0.05),
    )
    assert study.best(0.01).plan_id == "good"


def test_the_smallest_plan_within_the_limits_can_be_asked_for(study_of):
    study = study_of(
        original(),
        make_proof("small", ms=9, memory=50, increase=0.02),
        make_proof("slow", ms=15, memory=100, increase=0.001),
        make_proof("quick", ms=5, memory=101, increase=0.009),
        make_proof("large", ms=4, memory=102, increase=0.0),
    )
    assert study.best(0.03, minimize="memory").plan_id == "small"
    assert study.best(0.01, minimize="memory").plan_id == "quick", (
        "sizes within 1 % are a tie, and the faster plan wins"
    )


def test_without_a_plan_within_the_limits_the_error_says_what_there_is(study_of):
    study = study_of(original(), make_proof("a", memory=90))
    with pytest.raises(
        PlanError, match=r"no proven plan has at most 89 bytes \(smallest: 90\); allow more"
    ):
        study.best(None, 89)
    with pytest.raises(PlanError, match=r"an increase of at most 1\.000% and at most 1 bytes"):
        study.best(0.01, 1)


def test_without_proofs_the_error_says_to_finish_the_search(study_of):
    with pytest.raises(PlanError, match="run `autoquant search` to the end"):
        study_of().best(0.01)


def test_errors_are_one_line(study_of):
    for limits in ((0.01, 1), (None, 1)):
        with pytest.raises(PlanError) as caught:
            study_of(original()).best(*limits)
        assert "\n" not in str(caught.value)


def test_the_recommended_plan_is_the_best_under_the_limits_of_the_search(study_of):
    study = study_of(
        original(), make_proof("a", ms=5, increase=0.02), make_proof("b", ms=8, increase=0.004)
    )
    assert study.recommended().plan_id == "b"


def test_a_search_for_the_smallest_plan_recommends_it(study_of, store):
    study = study_of(
        original(), make_proof("a", ms=5, memory=150), make_proof("b", ms=8, memory=90)
    )
    facts = study.facts
    limits = {"max_ppl_increase": 0.01, "max_memory_bytes": None}
    same = {
        "model_hash": "m0del",
        "device": facts.device,
        "identity": {},
        "workload": facts.workload,
    }
    store.put_study(STUDY, limits=limits, **same)
    assert study.recommended().plan_id == "a"
    store.put_study(STUDY, limits=limits | {"minimize": "memory"}, **same)
    assert study.recommended().plan_id == "b"


def test_nothing_is_recommended_where_nothing_is_within_the_limits(study_of, store):
    study = study_of(original(), make_proof("a"))
    store.put_study(
        STUDY,
        model_hash="m0del",
        device=study.facts.device,
        identity={},
        workload=study.facts.workload,
        limits={"max_ppl_increase": 0.01, "max_memory_bytes": 1},
    )
    assert study.recommended() is None
    assert not study.pareto()["recommended"].any()


def test_the_front_has_its_columns_and_a_row_for_each_proven_plan_fastest_first(study_of, store):
    study = study_of(
        original(), make_proof("b", ms=8, increase=0.004), make_proof("a", ms=5, increase=0.02)
    )
    store.put_plan(make_plan("unproven"))
    store.put_plan(make_plan("failed"))
    store.put_proof("failed", None, "it broke")
    frame = study.pareto()
    assert tuple(frame.columns) == COLUMNS
    assert list(frame["plan_id"]) == ["a", "b", "original"]
    assert list(frame["recommended"]) == [False, True, False]
    assert list(frame["speedup"]) == pytest.approx([4.0, 2.5, 1.0])
    row = study.rows()[1]
    assert (row["perplexity"], row["perplexity_increase"]) == pytest.approx((10.04, 0.004))
    assert (row["perplexity_increase_low"], row["perplexity_increase_high"]) == pytest.approx(
        (0.003, 0.005)
    )


def test_predictions_are_shown_beside_the_unquantized_model_as_it_was_timed_since(study_of, store):
    study = study_of(original(), make_proof("a", ms=5), make_proof("b", ms=6))
    store.put_plan(make_plan("a", request_ms=4.0, original_request_ms=10.0))
    predicted = {row["plan_id"]: row["predicted_request_ms"] for row in study.rows()}
    assert predicted["a"] == pytest.approx(8.0), "the unquantized model takes 20 ms in all proofs"
    assert predicted["b"] == 5.0, "of an older database nobody knows"


def test_an_empty_study_has_an_empty_front(study_of):
    frame = study_of().pareto()
    assert (len(frame), tuple(frame.columns)) == (0, COLUMNS)


def test_the_front_holds_exactly_the_plans_that_none_beats(study_of):
    draw = random.Random(0)
    proofs = [
        make_proof(
            f"p{number}",
            ms=draw.randint(1, 6),
            increase=draw.randint(0, 5) / 100,
            memory=draw.randint(1, 5),
        )
        for number in range(40)
    ]
    rows = study_of(*proofs).rows()
    points = {
        row["plan_id"]: (row["measured_request_ms"], row["perplexity"], row["memory_bytes"])
        for row in rows
    }
    for row in rows:
        own = points[row["plan_id"]]
        beaten = any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True))
            for other in points.values()
        )
        assert row["on_front"] is not beaten
    assert 0 < sum(row["on_front"] for row in rows) < len(rows)


def test_without_perplexity_the_front_compares_the_increase(study_of):
    from dataclasses import replace

    proofs = [
        replace(make_proof("a", ms=5, increase=0.1), perplexity=None),
        replace(original(), perplexity=None),
    ]
    worse = replace(make_proof("b", ms=6, increase=0.2), perplexity=None)
    assert {row["plan_id"]: row["on_front"] for row in study_of(*proofs, worse).rows()} == {
        "a": True, "b": False, "original": True,
    }  # fmt: skip


def test_request_times_are_freed_of_the_drift_of_the_machine():
    """The second half of the proofs ran while the machine was twice as slow: both models took twice as long."""
    proofs = [make_proof(f"p{i}", ms=10.0 + i, original_ms=20.0) for i in range(3)]
    slow = [make_proof(f"s{i}", ms=2 * (10.0 + i), original_ms=40.0) for i in range(2)]
    times = request_times([*proofs, *slow])
    assert times == pytest.approx({"p0": 10.0, "p1": 11.0, "p2": 12.0, "s0": 10.0, "s1": 11.0})


def test_the_best_plan_is_found_free_of_drift(study_of):
    early = make_proof("early", ms=9.0, original_ms=10.0)
    late = make_proof("late", ms=16.0, original_ms=20.0)
    assert study_of(original(), early, late).best().plan_id == "late"


def test_times_of_nothing_are_nothing():
    assert request_times([]) == {}


def test_a_study_is_opened_from_its_file_and_a_missing_file_stays_missing(study_of, tmp_path):
    from autoquant.errors import StoreError

    study_of(original())
    assert Study.open(tmp_path / "plan.db").study_id == STUDY
    with pytest.raises(PlanError, match="no study 'nope'"):
        Study.open(tmp_path / "plan.db", "nope")
    with pytest.raises(StoreError):
        Study.open(tmp_path / "missing.db")
    assert not (tmp_path / "missing.db").exists()
