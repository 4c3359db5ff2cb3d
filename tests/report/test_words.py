from autoquant.report.words import recommendation, source_name

ROW = {
    "plan_id": "p1", "label": "front 1", "kind": "front", "measured_request_ms": 100.0, "speedup": 2.0,
    "perplexity": 20.0, "perplexity_increase": 0.004, "perplexity_increase_low": 0.003,
    "perplexity_increase_high": 0.005, "memory_bytes": 2**20, "recommended": True,
}  # fmt: skip
ORIGINAL = {
    **ROW,
    "plan_id": "p0",
    "label": "original",
    "kind": "original",
    "memory_bytes": 2**21,
    "recommended": False,
}
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
