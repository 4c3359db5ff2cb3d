"""When two proven plans are a tie, and which of tied plans is recommended."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from builders.search import make_proof

from autoquant.records import Interval
from autoquant.solver.ties import same_quality, same_speed, ties

LOSSES = tuple(random.Random(0).gauss(3.0, 0.2) for _ in range(20))


def proof(plan_id, ms=10.0, spread=0.0, shift=0.0, noise=0.0, kl=None, **changes):
    """Timed with this relative half interval; its losses are `LOSSES` moved by `shift`, and by `noise` from sample to sample."""
    draw = random.Random(plan_id)
    ratio = ms / 20.0
    return replace(
        make_proof(plan_id, ms=ms, **changes),
        time_ratio=Interval(value=ratio, low=ratio * (1 - spread), high=ratio * (1 + spread)),
        selection_losses=tuple(loss + shift + draw.gauss(0, noise) for loss in LOSSES),
        selection_kl=None if kl is None else Interval(value=kl, low=0.9 * kl, high=1.1 * kl),
    )


@pytest.mark.parametrize(
    ("ms", "spread", "same"),
    [
        (10.09, 0.0, True),
        (10.2, 0.0, False),
        (10.2, 0.02, True),
        (10.4, 0.02, False),
        (10.4, 0.5, True),
        (10.6, 0.5, False),
    ],
)
def test_speeds_are_the_same_within_their_spread_from_one_to_five_percent(ms, spread, same):
    assert same_speed(proof("a", 10.0, spread), proof("b", ms, spread)) is same
    assert same_speed(proof("b", ms, spread), proof("a", 10.0, spread)) is same


def test_qualities_are_compared_sample_by_sample():
    """All samples a little worse is a difference, though samples differ from one another by far more."""
    base = proof("a")
    assert not same_quality(base, proof("b", shift=0.01, noise=0.001))
    assert same_quality(base, proof("c", shift=0.001, noise=0.05))
    assert same_quality(base, base)


def test_plans_whose_losses_are_not_known_are_told_apart():
    old = make_proof("a")
    assert not same_quality(old, old)
    assert not same_quality(old, proof("b"))


def test_ties_go_both_ways_and_not_to_oneself():
    found = ties(
        {
            p.plan_id: p
            for p in (proof("a"), proof("b", 10.05), proof("c", 12.0), proof("d", shift=0.1))
        }
    )
    assert found == {"a": ["b"], "b": ["a"], "c": [], "d": []}


def test_of_tied_plans_one_with_clearly_less_divergence_is_recommended(study_of):
    original = replace(
        make_proof("original", ms=20.0), selection_losses=tuple(x - 1 for x in LOSSES)
    )
    fast = proof("fast", 10.0, spread=0.02, kl=0.02, noise=0.01)
    exact = proof("exact", 10.2, spread=0.02, kl=0.005, noise=0.01)
    slow = proof("slow", 11.0, spread=0.02, kl=0.001, noise=0.01)
    worse = proof("worse", 10.1, spread=0.02, kl=0.0, shift=0.3)
    study = study_of(original, fast, exact, slow, worse)
    assert study.best().plan_id == "exact"
    rows = {row["plan_id"]: row for row in study.rows()}
    assert (rows["exact"]["ties"], rows["fast"]["ties"], rows["slow"]["ties"]) == (
        "fast",
        "exact",
        "",
    )


def test_the_faster_of_tied_plans_stays_where_no_other_diverges_clearly_less(study_of):
    fast = proof("fast", 10.0, spread=0.02, kl=0.0115, noise=0.01)
    slower = proof("slower", 10.2, spread=0.02, kl=0.01, noise=0.01)
    assert study_of(fast, slower).best().plan_id == "fast"


def test_without_divergence_the_smallest_of_tied_plans_is_recommended(study_of):
    plans = [
        proof("large", 10.0, memory=120),
        proof("small", 10.05, memory=90),
        proof("slow", 12.0, memory=10),
    ]
    assert study_of(*plans).best().plan_id == "small"


def test_a_search_for_the_smallest_is_not_made_larger_by_a_tie(study_of):
    plans = [proof("small", 10.0, memory=90, kl=0.01), proof("large", 10.0, memory=120, kl=0.001)]
    assert study_of(*plans).best(minimize="memory").plan_id == "small"
