from dataclasses import replace

import pytest

from autoquant.records import DISTURBED, Interval, Proof
from autoquant.report.words import disturbed_proofs, off_predictions, recommendation, source_name, ties_lines

ROW = {
    "plan_id": "p1", "label": "front 1", "kind": "front", "measured_request_ms": 100.0, "speedup": 2.0,
    "measure": "perplexity", "perplexity": 20.0, "perplexity_increase": 0.004, "perplexity_increase_low": 0.003,
    "perplexity_increase_high": 0.005, "memory_bytes": 2**20, "recommended": True, "within_limits": True,
}  # fmt: skip
ORIGINAL = {
    **ROW,
    "plan_id": "p0",
    "label": "original",
    "kind": "original",
    "memory_bytes": 2**21,
    "recommended": False,
}
NOTHING = Interval(value=0.0, low=0.0, high=0.0)
LIMITS = {"max_ppl_increase": 0.01, "max_memory_bytes": None}


def test_the_recommended_plan_is_compared_with_the_original():
    text = recommendation([ROW, ORIGINAL], LIMITS)
    assert "2.00 times faster than unquantized (100 ms a request instead of 200 ms)" in text
    assert "1.00 MiB instead of 2.00 MiB (50%)" in text


def test_a_slower_plan_is_called_slower():
    assert "2.00 times slower" in recommendation([{**ROW, "speedup": 0.5}, ORIGINAL], LIMITS)


def test_a_uniform_winner_is_called_uniform():
    assert "choosing layer by layer brought nothing more" in recommendation([{**ROW, "kind": "uniform"}], LIMITS)


def test_the_original_as_winner_and_no_winner_are_said_plainly():
    assert "the unquantized model" in recommendation([{**ORIGINAL, "recommended": True}], LIMITS)
    assert "increase at most 1.00%" in recommendation([ORIGINAL], LIMITS)
    smallest = recommendation([{**ORIGINAL, "recommended": True}], {**LIMITS, "minimize": "memory"})
    assert "No smaller plan is within the limits (increase at most 1.00%, least memory)" in smallest
    assert "No plan has been proven yet" in recommendation([], LIMITS)


def test_models_are_called_by_the_end_of_their_path():
    assert source_name({"path": "/models/tiny/"}) == "tiny"
    assert source_name({}) == "live module"


def test_plans_that_were_predicted_badly_are_named_with_the_command_that_says_why():
    rows = [
        {**ROW, "plan_id": "far", "label": "front 2", "predicted_request_ms": 60.0},
        {**ROW, "plan_id": "near", "predicted_request_ms": 91.0},
        {**ROW, "plan_id": "above", "label": "front 3", "predicted_request_ms": 112.0},
        {**ORIGINAL, "predicted_request_ms": 10.0},
    ]
    said, command = off_predictions(rows, "'my plan.db'")
    assert "by more than 10%: front 2 -40%, front 3 +12%." in said
    assert command.endswith("autoquant bench 'my plan.db' --plan far --plan above --attribute")
    assert off_predictions(rows[1:2], "plan.db") == []


def test_of_many_bad_predictions_the_worst_are_named():
    rows = [{**ROW, "plan_id": f"p{i}", "label": f"front {i}", "predicted_request_ms": 150.0 + i} for i in range(5)]
    said, command = off_predictions(rows, "plan.db")
    assert "front 4 +54%" in said and "and 2 more" in said and command.count("--plan") == 3


def test_plans_that_were_timed_on_a_busy_machine_are_counted_with_the_command_that_repeats_it():
    quiet = Proof(
        plan_id="p0", request_ms=1.0, phase_ms={}, original_request_ms=1.0, original_phase_ms={}, perplexity=2.0, loss=1.0,
        increase=NOTHING, selection_increase=NOTHING, kl=0.0, memory_bytes=1,
    )  # fmt: skip
    busy = replace(quiet, plan_id="p1", notes=(f"{DISTURBED} 67% of the machine",))
    said, command = disturbed_proofs({"p0": quiet, "p1": busy}, "p1", "plan.db")
    assert "while 1 of 2 plans were timed, the recommended one among them." in said
    assert command.endswith("autoquant bench plan.db --compare uniform")
    assert "recommended" not in disturbed_proofs({"p0": quiet, "p1": busy}, "p0", "plan.db")[0]
    assert disturbed_proofs({"p0": quiet}, "p0", "plan.db") == []


def front_row(plan_id, kind="front", ms=10.0, increase=0.004, recommended=False, ties="", within=True):
    return {
        "plan_id": plan_id, "label": f"{kind} {plan_id}", "kind": kind, "predicted_request_ms": ms,
        "measured_request_ms": ms, "speedup": 20.0 / ms, "measure": "perplexity", "perplexity": 10.0,
        "perplexity_increase": increase,
        "perplexity_increase_low": increase - 0.001, "perplexity_increase_high": increase + 0.001, "kl": 0.01,
        "memory_bytes": 1000, "on_front": True, "within_limits": within, "recommended": recommended,
        "ties": ties,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("heuristic", "the structural heuristic"),
        ("bits", "the allocation by bits alone"),
        ("uniform", "a uniform plan"),
    ],
)
def test_a_baseline_that_wins_is_named_and_the_searchs_own_plan_compared(kind, words):
    rows = [front_row("a", kind, recommended=True), front_row("b", ms=11.0), front_row("c", ms=9.0, increase=0.5)]
    text = recommendation(rows, LIMITS)
    assert f"It is {words}: choosing layer by layer brought nothing more here." in text
    assert "The search's own plan b (front b) of such quality takes +10.0% time." in text
    beyond = [front_row("a", kind, recommended=True, ties="b"), front_row("b", ms=9.0, within=False)]
    said = recommendation(beyond, LIMITS)
    assert "own plan" not in said and "A tie" not in said, "it could not be recommended, however fast"
    tied = [front_row("a", kind, recommended=True, ties="b"), front_row("b", ms=10.05, ties="a")]
    assert "own plan" not in recommendation(tied, LIMITS)


def test_ties_of_the_recommended_plan_are_said():
    rows = [front_row("a", recommended=True, ties="b c"), front_row("b", ties="a"), front_row("c", ties="a")]
    assert "A tie with front b (b), front c (c): neither speed nor quality" in recommendation(rows, LIMITS)
    assert ties_lines(rows, rows[0] | {"ties": ""}) == []
