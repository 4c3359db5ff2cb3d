from itertools import product

from autoquant.report.names import fold, number_ranges


def test_names_that_differ_in_one_number_share_a_line():
    names = [f"model.layers.{block}.{role}" for block in range(28) for role in ("q", "k")]
    assert [pattern for pattern, _ in fold(names)] == ["model.layers.0-27.q", "model.layers.0-27.k"]


def test_names_that_differ_in_two_numbers_share_a_line_if_all_combinations_are_there():
    names = [f"layers.{block}.experts.{expert}.w1" for block, expert in product(range(4), range(8))]
    assert [pattern for pattern, _ in fold(names)] == ["layers.0-3.experts.0-7.w1"]


def test_no_name_is_implied_that_is_not_there():
    names = ["layers.0.experts.0", "layers.0.experts.1", "layers.1.experts.0"]
    groups = fold(names)
    assert sorted(name for _, members in groups for name in members) == sorted(names)
    assert len(groups) == 2


def test_names_without_numbers_stay_as_they_are():
    assert fold(["lm_head", "proj.a01"]) == [("lm_head", ("lm_head",)), ("proj.a01", ("proj.a01",))]
    assert [pattern for pattern, _ in fold(["a.01", "a.1"])] == ["a.01", "a.1"]


def test_gaps_are_written_out():
    assert number_ranges([0, 1, 2, 3, 5, 7, 8]) == "{0-3, 5, 7-8}"
