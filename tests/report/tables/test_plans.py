import io
from dataclasses import dataclass

import pytest
from builders.records import make_choice, make_plan
from rich.console import Console

from autoquant.records import (
    LinearShape,
    Recording,
    RouteStep,
    Skipped,
)
from autoquant.report.tables import plans

ROUTE = (RouteStep(upper_m=16, kernel="weight-only"), RouteStep(upper_m=None, kernel="dynamic"))


def drawn(table, width=80):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(table)
    return console.file.getvalue()


def row(plan_id, label="front 1", **changes):
    values = {
        "plan_id": plan_id, "label": label, "kind": "front", "predicted_request_ms": 11.0,
        "measured_request_ms": 12.5,
        "speedup": 1.6, "measure": "perplexity",
        "perplexity": 20.0, "perplexity_increase": 0.004, "perplexity_increase_low": 0.003,
        "perplexity_increase_high": 0.005, "kl": 0.001, "memory_bytes": 2**25, "on_front": True,
        "within_limits": True,
        "recommended": False,
    }  # fmt: skip
    return {**values, **changes}


def layer(name, fmt="int8-row", reason="it is fastest", n=64):
    return make_choice(
        name,
        fmt,
        shape=LinearShape(n=n, k=64, bias=False, dtype="bf16"),
        route=ROUTE,
        latency_us={"prefill": 600.0, "decode": 20.0},
        memory_bytes=4096,
        loss=0.001,
        reason=reason,
    )


def plan(*layers):
    return make_plan("p", layers, label="l")


def test_the_front_marks_plans_and_fits_80_columns():
    rows = [
        row("a" * 12, recommended=True),
        row("b" * 12, label="a rather long label of a plan [x]"),
        row("c" * 12, on_front=False),
    ]
    lines = drawn(plans.front_table(rows)).splitlines()
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if "aaaaaa" in line).startswith(">*")
    assert next(line for line in lines if "bbbbbb" in line).startswith(" *")
    assert next(line for line in lines if "cccccc" in line).startswith("  ")
    assert "[ms]" in "".join(lines)
    assert "[MiB]" in "".join(lines)


def test_plans_beyond_the_limits_are_marked_and_only_then_is_the_mark_explained():
    rows = [
        row("a" * 12, recommended=True, ties="b" * 12),
        row("b" * 12, within_limits=False, on_front=False),
    ]
    lines = drawn(plans.front_table(rows)).splitlines()
    assert next(line for line in lines if "bbbbbb" in line).startswith("! "), (
        "not a tie either: it cannot be recommended"
    )
    assert any(line.startswith("! beyond the limits") for line in lines)
    assert max(map(len, lines)) <= 80
    assert "!" not in drawn(plans.front_table(rows[:1]))


def test_a_wide_front_adds_prediction_perplexity_and_divergence():
    text = drawn(plans.front_table([row("a")], width=140), width=140)
    assert all(word in text for word in ("Predicted", "20.000", "0.00100"))


def test_numbers_that_are_missing_or_not_finite_are_shown_as_such():
    text = drawn(
        plans.front_table(
            [row("a", kl=None, perplexity=None, measure="loss", perplexity_increase=float("inf"))],
            140,
        ),
        140,
    )
    assert "inf" in text
    assert "Loss" in text


def test_short_ids_tell_all_plans_apart():
    assert plans.short_ids(["abcdef01", "abcdef02", "ffffff01"]) == {
        "abcdef01": "abcdef01", "abcdef02": "abcdef02", "ffffff01": "ffffff01",
    }  # fmt: skip
    assert plans.short_ids(["abcdef012345"]) == {"abcdef012345": "abcdef"}


def test_layers_that_got_the_same_share_a_line_and_others_do_not():
    layers = [
        layer(f"layers.{block}.{role}", "bf16" if block == 3 else "int8-row")
        for block in range(40)
        for role in "qkvo"
    ]
    groups = plans.layer_groups(layers)
    assert [pattern for pattern, _ in groups][:2] == [
        "layers.{0-2, 4-39}.q",
        "layers.{0-2, 4-39}.k",
    ]
    assert len(groups) == 8
    assert sum(len(members) for _, members in groups) == 160


def test_a_group_shows_totals_route_and_reason():
    text = drawn(plans.layers_table(plan(layer("layers.0.q"), layer("layers.1.q"))))
    assert "layers.0-1.q" in text
    assert "prefill 1.20 ms" in text
    assert "decode 40.0 µs" in text
    assert "8.00 KiB" in text
    assert "m<=16 weight-only" in text
    assert "it is fastest" in text


def test_differing_reasons_are_counted():
    layers = [layer("layers.0.q", reason="1 us faster"), layer("layers.1.q", reason="2 us faster")]
    assert plans.reasons(layers) == "layers.0.q: 1 us faster (1 more reasons with --json)"


def test_coverage_lists_the_largest_and_counts_the_rest():
    skipped = tuple(
        Skipped(name=f"part{chr(97 + i)}", numel=1, share=0.01 * (i + 1), reason="conv")
        for i in range(20)
    )
    recording = Recording(
        sites=(), skipped=skipped, weights_share=0.5, flops_share={"prefill": 0.25},
        parameter_bytes=1
    )  # fmt: skip
    text = drawn(plans.coverage_table(recording))
    assert "8 more" in text
    assert text.index("partt") < text.index("parts")
    assert "25.00% in prefill" in plans.coverage_line(recording)


@dataclass(frozen=True)
class Status:
    format: str = "float8-row/plain"
    kernel: str = "scaled-mm"
    numerics: str = "a8"
    description: str = "float8"
    usable: bool = False
    reason: str = "needs a GPU [sm89 or newer]"
    by_default: bool = True


def test_candidates_show_why_not():
    text = drawn(plans.candidates_table([Status(), Status(usable=True)]))
    assert "needs a GPU [sm89 or newer]" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_candidates_show_which_must_be_asked_for():
    lines = [Status(usable=True), Status(usable=True, by_default=False), Status(by_default=False)]
    rows = [
        line.split()
        for line in drawn(plans.candidates_table(lines)).splitlines()
        if "scaled-mm" in line
    ]
    assert [row[2] for row in rows] == ["yes", "opt-in", "no"]


@pytest.mark.parametrize(("share", "said"), [(0.17, True), (0.49, True), (0.5, False)])
def test_that_most_of_a_model_is_left_as_it_is_is_said_with_the_largest_parts(share, said):
    skipped = tuple(
        Skipped(name=f"h.{block}.mlp.c_fc.weight", numel=1, share=0.2, reason="addmm")
        for block in range(2)
    )
    recording = Recording(
        sites=(), skipped=skipped, weights_share=share, flops_share={}, parameter_bytes=1
    )
    lines = plans.uncovered_lines(recording)
    assert bool(lines) == said
    if said:
        assert f"{100 * share:.2f}% of the weights" in lines[0]
        assert lines[1] == "  Left alone: h.0-1.mlp.c_fc.weight (40.00%, addmm)"
    assert plans.uncovered_lines(None) == []
