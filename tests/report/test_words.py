from dataclasses import replace

import pytest
from builders.records import make_choice, make_plan, make_proof

from autoquant.records import DISTURBED, PARTLY, STAND_IN, Interval, Workload
from autoquant.report.words import (
    as_run_lines,
    constraints_words,
    disturbed_proofs,
    engine_lines,
    exception_lines,
    memory_words,
    off_predictions,
    recommendation,
    source_name,
    spent_words,
    ties_lines,
)

ROW = {
    "plan_id": "p1", "label": "front 1", "kind": "front", "measured_request_ms": 100.0,
    "speedup": 2.0,
    "measure": "perplexity", "perplexity": 20.0, "perplexity_increase": 0.004,
    "perplexity_increase_low": 0.003,
    "perplexity_increase_high": 0.005, "memory_bytes": 2**20, "recommended": True,
    "within_limits": True,
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
WORKLOAD = Workload.parse("prefill=512,decode=128")
RUN = {
    "as_run_loop": "generate", "as_run_where": "new process", "as_run_request_ms": 2100.0,
    "as_run_original_request_ms": 4410.0, "as_run_speedup": 2.1, "as_run_speedup_low": 2.05,
    "as_run_speedup_high": 2.15,
    "as_run_first_token_ms": 100.0, "as_run_original_first_token_ms": 190.0, "as_run_step_ms": 15.0,
    "as_run_original_step_ms": 33.0, "as_run_notes": "",
}  # fmt: skip


def test_the_recommended_plan_is_compared_with_the_original():
    text = recommendation([ROW, ORIGINAL], LIMITS, WORKLOAD)
    assert "2.00 times faster than unquantized (100 ms a request instead of 200 ms)" in text
    assert "1.00 MiB instead of 2.00 MiB (50%)" in text


def test_a_slower_plan_is_called_slower():
    assert "2.00 times slower" in recommendation(
        [{**ROW, "speedup": 0.5}, ORIGINAL], LIMITS, WORKLOAD
    )


def test_a_uniform_winner_is_called_uniform():
    assert "choosing layer by layer brought nothing more" in recommendation(
        [{**ROW, "kind": "uniform"}], LIMITS, WORKLOAD
    )


def test_the_original_as_winner_and_no_winner_are_said_plainly():
    assert "the unquantized model" in recommendation(
        [{**ORIGINAL, "recommended": True}], LIMITS, WORKLOAD
    )
    assert "increase at most 1.00%" in recommendation([ORIGINAL], LIMITS, WORKLOAD)
    smallest = recommendation(
        [{**ORIGINAL, "recommended": True}], {**LIMITS, "minimize": "memory"}, WORKLOAD
    )
    assert "No smaller plan is within the limits (increase at most 1.00%, least memory)" in smallest
    assert "No plan has been proven yet" in recommendation([], LIMITS, WORKLOAD)


def test_what_the_user_gets_stands_first():
    said = recommendation([{**ROW, **RUN}, ORIGINAL], LIMITS, WORKLOAD).splitlines()
    assert said[1:4] == [
        "  As you will run it (generate, prompt 512 + 128): 4.41 s -> 2.10 s a request, 2.10 "
        "times faster"
        " (95% interval 2.05x to 2.15x)",
        "    first token 190 ms -> 100 ms, 33.0 ms -> 15.0 ms a further token",
        "  in the search: 2.00 times faster than unquantized (100 ms a request instead of 200 ms)",
    ]
    assert "Not timed yet as you will run it" in recommendation([ROW, ORIGINAL], LIMITS, WORKLOAD)


def test_what_disturbed_that_timing_is_said_and_a_forward_pass_has_no_tokens():
    forward = RUN | {
        "as_run_loop": "forward",
        "as_run_first_token_ms": None,
        "as_run_step_ms": None,
    }
    lines = as_run_lines({**ROW, **forward, "as_run_notes": "two things"}, Workload.single())
    assert lines[0].startswith("As you will run it (one forward pass): ") and lines[1:] == [
        "  note: two things"
    ]
    assert as_run_lines(ROW, WORKLOAD) == []
    assert "2.00 times slower" in as_run_lines({**ROW, **RUN, "as_run_speedup": 0.5}, WORKLOAD)[0]


def test_plans_that_do_not_win_there_are_named_with_the_reason():
    slower = {**ROW, "recommended": False, "not_recommended": "it takes 1.20 times as long"}
    said = recommendation([slower, {**ORIGINAL, "recommended": True}], LIMITS, WORKLOAD)
    assert (
        "Recommended: the unquantized model. No plan that is faster in the search is faster as "
        "you will run it." in said
    )
    assert "Not recommended: plan p1 (front 1): it takes 1.20 times as long" in said


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
    rows = [
        {**ROW, "plan_id": f"p{i}", "label": f"front {i}", "predicted_request_ms": 150.0 + i}
        for i in range(5)
    ]
    said, command = off_predictions(rows, "plan.db")
    assert "front 4 +54%" in said and "and 2 more" in said and command.count("--plan") == 3


def test_plans_that_were_timed_on_a_busy_machine_are_counted_with_the_command_that_repeats_it():
    quiet = make_proof("p0")
    busy = replace(quiet, plan_id="p1", notes=(f"{DISTURBED} 67% of the machine",))
    said, command = disturbed_proofs({"p0": quiet, "p1": busy}, "p1", "plan.db")
    assert "while 1 of 2 plans were timed, the recommended one among them." in said
    assert command.endswith("autoquant bench plan.db --compare uniform")
    assert "recommended" not in disturbed_proofs({"p0": quiet, "p1": busy}, "p0", "plan.db")[0]
    assert disturbed_proofs({"p0": quiet}, "p0", "plan.db") == []


def test_times_of_a_stand_in_are_said_once():
    note = f"{STAND_IN} 2 of 30 blocks, used again for the others"
    proofs = [make_proof("p0"), *(replace(make_proof("p1"), notes=(f"{note}; by regions",)),) * 2]
    (line,) = exception_lines(proofs)
    assert line == f"Unquantized times are a stand-in's: {note}."
    assert exception_lines(proofs[:1]) == []


def test_plans_whose_quality_comes_from_some_windows_are_counted():
    notes = f"{PARTLY} 14 of 48 windows, surely beyond the limit", "disturbed"
    proofs = [make_proof("p0"), *(replace(make_proof("p1"), notes=notes),) * 2]
    (line,) = exception_lines(proofs)
    assert "some windows only for 2 plans surely beyond the limit" in line
    assert "for 1 plan surely" in exception_lines(proofs[:2])[0]


def test_the_most_memory_of_stages_is_said_in_words():
    taken = {"score": {"host": 3 << 30, "device": 40 << 30}, "record": {"host": 200 << 20}}
    words = memory_words(taken)
    assert (
        words == "score 3072 MiB on the host and 40.0 GiB on the device, record 200 MiB on the host"
    )
    assert memory_words({}) == ""


def front_row(
    plan_id, kind="front", ms=10.0, increase=0.004, recommended=False, ties="", within=True
):
    return {
        "plan_id": plan_id, "label": f"{kind} {plan_id}", "kind": kind, "predicted_request_ms": ms,
        "measured_request_ms": ms, "speedup": 20.0 / ms, "measure": "perplexity",
        "perplexity": 10.0,
        "perplexity_increase": increase,
        "perplexity_increase_low": increase - 0.001, "perplexity_increase_high": increase + 0.001,
        "kl": 0.01,
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
    rows = [
        front_row("a", kind, recommended=True),
        front_row("b", ms=11.0),
        front_row("c", ms=9.0, increase=0.5),
    ]
    text = recommendation(rows, LIMITS, WORKLOAD)
    assert f"It is {words}: choosing layer by layer brought nothing more here." in text
    assert "The search's own plan b (front b) of such quality takes +10.0% time." in text
    beyond = [
        front_row("a", kind, recommended=True, ties="b"),
        front_row("b", ms=9.0, within=False),
    ]
    said = recommendation(beyond, LIMITS, WORKLOAD)
    assert "own plan" not in said and "A tie" not in said, (
        "it could not be recommended, however fast"
    )
    tied = [front_row("a", kind, recommended=True, ties="b"), front_row("b", ms=10.05, ties="a")]
    assert "own plan" not in recommendation(tied, LIMITS, WORKLOAD)


def test_ties_of_the_recommended_plan_are_said():
    rows = [
        front_row("a", recommended=True, ties="b c"),
        front_row("b", ties="a"),
        front_row("c", ties="a"),
    ]
    assert "A tie with front b (b), front c (c): neither speed nor quality" in recommendation(
        rows, LIMITS, WORKLOAD
    )
    assert ties_lines(rows, rows[0] | {"ties": ""}) == []


def test_the_time_of_a_search_names_the_stages_that_took_a_second():
    seconds = {"load": 20.6, "record": 0.1, "profile": 67.2}
    assert spent_words(seconds) == "Time: 1m 28s (load 21s, profile 1m 07s)"
    assert spent_words({"load": 0.4}) == "Time: 0s"


def test_constraints_are_written_as_options_those_of_earlier_versions_too():
    found = constraints_words({"keep": ["a", "b"], "pin": ["c=int8*"], "engine": "vllm"})
    assert found == "--keep a --keep b --pin c=int8* --for vllm"
    assert constraints_words({"fusable": "vllm"}) == "--fusable vllm"
    assert constraints_words({}) == ""


def test_a_plan_for_an_engine_is_said_with_what_writes_it_and_whose_times_these_are():
    assert engine_lines("llama.cpp", "p.db --plan a1") == [
        "Made for llama.cpp, which reads what this writes:"
        " autoquant export p.db --plan a1 --to gguf",
        "Times are those of autoquant's kernels; llama.cpp has kernels of its own.",
        "Memory is that of the weights as --to gguf writes them.",
    ]
    assert engine_lines(None, "p.db") == []


def test_a_plan_that_quantizes_nothing_is_written_only_for_engines_that_need_it():
    plan = make_plan("a1", layers=())
    (line,) = engine_lines("llama.cpp", "p.db", plan)
    assert line.startswith("autoquant export p.db --to gguf writes the unquantized model")
    assert "--plan ID" in line
    (line,) = engine_lines("vllm", "p.db", plan)
    assert "export" not in line and "vllm reads the unquantized model itself" in line
    quantized = make_plan("a1", layers=(make_choice(fmt="int8-row/plain"),))
    assert len(engine_lines("llama.cpp", "p.db", quantized)) == 3
    assert len(engine_lines("vllm", "p.db", quantized)) == 2  # its files have the plan's bytes
