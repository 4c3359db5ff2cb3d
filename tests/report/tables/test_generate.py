"""How fast two models wrote is compared by what a user waits for."""

from __future__ import annotations

import pytest

from autoquant.report.tables.generate import Speed, Speeds, TextDifference

FAST = Speed(ready_s=1.0, first_token_s=1.0, tokens_per_s=10.0, new_tokens=10, total_s=2.0)
SLOW = Speed(ready_s=3.0, first_token_s=2.0, tokens_per_s=5.0, new_tokens=20, total_s=6.0)


def speeds(*models, sampled=False, difference=None):
    return Speeds(models=models, prompt_tokens=3, rounds=3, sampled=sampled, difference=difference)


def test_one_model_is_told_in_a_sentence():
    assert speeds(FAST).lines() == [
        "ready after 1.00 s; then 3 tokens of prompt, 10 new ones: first token after 1.00 s,"
        " 10.0 tokens/s after it, 2.00 s in all"
    ]
    assert set(speeds(FAST).as_object()) == {
        "prompt_tokens", "ready_s", "first_token_s", "tokens_per_s", "new_tokens", "total_s",
    }  # fmt: skip


def test_two_models_stand_in_a_table_of_one_width():
    *table, how, compared = speeds(FAST, SLOW).lines()
    assert {len(line) for line in table} == {64}
    assert table[-1].split() == ["times", "faster", "2.00x", "2.00x", "1.50x"]
    assert "3 requests to each in turn" in how
    assert compared == "greedy text: the same 10 tokens"


def test_a_text_that_ends_early_is_compared_by_the_token():
    compared = speeds(FAST, SLOW)
    faster = compared.as_object()["times_faster"]
    assert faster == {"first_token": 2.0, "tokens_per_s": 2.0, "total": pytest.approx(1.5)}
    assert "20 of the unquantized model" in compared.lines()[-2]


def test_a_model_without_a_pace_has_no_ratio_of_paces():
    one_token = Speed(ready_s=1, first_token_s=1.0, tokens_per_s=None, new_tokens=1, total_s=1.0)
    compared = speeds(one_token, SLOW)
    assert compared.as_object()["times_faster"]["tokens_per_s"] is None
    assert compared.lines()[1].split()[-3] == compared.lines()[3].split()[-2] == "-"


def test_the_first_token_that_differs_is_said():
    found = TextDifference(token=4, text="a", original_text="")
    compared = speeds(FAST, SLOW, difference=found)
    assert compared.lines()[-1] == "greedy text: differs from token 4 on ('a', unquantized '')"
    assert compared.as_object()["first_difference"] == 4
