"""The parts of the report's page by themselves."""

import contextlib
import json
import sqlite3

import pytest
from builders import reported
from builders.records import MODEL, STUDY
from builders.reported import ATTENTION, FAST, FRONT, FUSED, INT8, MLP, ORIGINAL, PLAIN, UNIFORM

from autoquant.report.html.about import about
from autoquant.report.html.command import search_command
from autoquant.report.html.kernels import kernel_map
from autoquant.report.html.layer_grid import OUTSIDE, layer_grid
from autoquant.report.html.plans import format_objects
from autoquant.report.html.points import front_points
from autoquant.report.html.verdict import verdict
from autoquant.store import open_store
from autoquant.study.study import Study


def study(tmp_path, **options):
    store = open_store(tmp_path / "plan.db")
    reported.fill(store, **options)
    return Study(store)


def said(tmp_path, **options):
    """Headline and sentences as one text."""
    opened = study(tmp_path, **options)
    found = verdict(front_points(opened), opened.facts)
    return " ".join([found.headline, *found.sentences])


@pytest.mark.parametrize(
    ("names", "rows", "columns"),
    [
        (
            ["model.layers.0.attn.q", "model.layers.10.attn.q", "head"],
            ("attn.q", "head"),
            ("0", "10", OUTSIDE),
        ),
        (["enc.0.q", "dec.0.q"], ("enc.*.q", "dec.*.q"), ("0",)),
        (["layers.0.experts.0.up", "layers.0.experts.1.up"], ("experts.*.up",), ("0",)),
        (["0", "2"], ("layer",), ("0", "2")),
        (["net.0", "net.2"], ("net",), ("0", "2")),
        (["fc1", "fc2"], ("fc1", "fc2"), (OUTSIDE,)),
    ],
)
def test_layers_stand_by_type_and_block(names, rows, columns):
    grid = layer_grid(names)
    assert (grid.rows, grid.columns) == (rows, columns)
    assert set(grid.places) == set(names)
    assert all(row < len(rows) and column < len(columns) for row, column in grid.places.values())


def test_blocks_are_in_the_order_of_their_numbers():
    grid = layer_grid([f"layers.{block}.q" for block in (10, 9, 0)])
    assert [grid.places[f"layers.{block}.q"] for block in (0, 9, 10)] == [(0, 0), (0, 1), (0, 2)]


def test_every_format_has_a_short_text_of_its_own():
    names = [
        "bfloat16/plain",
        "int8-row/plain",
        "int4-g64/packed",
        "int4-g128/packed",
        "float8-row/plain",
        "odd",
    ]
    formats = format_objects(names, {"bfloat16/plain"})
    assert [each["code"] for each in formats] == ["b16", "i8", "i4a", "i4b", "f8", "od"]
    assert [each["colour"] for each in formats] == [0, 1, 2, 3, 4, 5]


def test_kernels_are_those_of_the_studys_protocol_and_working_set(tmp_path):
    kernels = kernel_map(study(tmp_path))
    assert list(kernels.shapes) == [ATTENTION, MLP, FUSED]
    latencies = {
        (row["format"], row["kernel"]): row["latency_us"]
        for row in kernels.shapes[ATTENTION]
        if row["m"] == 1
    }
    assert latencies == {
        (PLAIN, "matmul"): 40.1, (INT8, "weight-only"): 10.5, (INT8, "integer"): 20.1,
        ("float8-row/plain", "scaled-mm"): None,
    }  # fmt: skip
    assert kernels.names[ATTENTION][-1] == "lm_head" and kernels.roofline is not None


def test_without_timings_there_is_no_kernel(tmp_path):
    assert kernel_map(study(tmp_path, timed=False)).shapes == {}


@pytest.mark.parametrize(("fuse", "written"), [(True, "--fuse"), (False, "--no-fuse")])
def test_the_command_that_the_study_came_from_is_given_back(fuse, written, tmp_path):
    opened = study(tmp_path)
    options = {
        "model": "my model",
        "eval-text": "/a text",
        "fuse": fuse,
        "json": False,
        "candidates": ["int8*", "int4*"],
    }
    opened.store.put_reference(STUDY, "command", {"options": options})
    assert search_command(opened).text.split(" \\\n    ") == [
        "autoquant search 'my model'", "--eval-text '/a text'", written,
        "--candidates 'int8*' --candidates 'int4*'",
    ]  # fmt: skip


def test_a_password_is_not_shown(tmp_path):
    opened = study(tmp_path)
    options = {"model": "m", "db": "postgresql://me:secret@host/plans"}
    opened.store.put_reference(STUDY, "command", {"options": options})
    assert "postgresql://me:***@host/plans" in search_command(opened).text


def test_an_older_study_tells_what_is_known_of_its_command(tmp_path):
    command = search_command(study(tmp_path))
    assert "autoquant search '/somewhere/<b>tiny' \\\n    --eval-text FILE" in command.text
    assert (
        "--workload prefill=64,decode=16" in command.text
        and "--max-ppl-increase 0.01" in command.text
    )
    assert "--candidates int8-row/plain/weight-only" in command.text and "--seed 7" in command.text
    assert "does not hold the command itself" in command.note


def test_the_command_of_a_study_for_an_engine_names_it(tmp_path):
    opened = study(tmp_path)
    constraints = {"keep": ["lm_head"], "engine": "vllm"}
    with contextlib.closing(sqlite3.connect(tmp_path / "plan.db")) as connection, connection:
        (kept,) = connection.execute("SELECT identity FROM study").fetchone()
        identity = json.dumps(json.loads(kept) | {"constraints": constraints})
        connection.execute("UPDATE study SET identity = ?", [identity])
    assert "--keep lm_head \\\n    --for vllm" in search_command(opened).text
    facts = dict(about(opened))
    assert facts["Constraints"] == "--keep lm_head --for vllm"
    assert "autoquant export plan.db --to compressed-tensors" in facts["Engine"]


def test_a_live_module_has_no_command(tmp_path):
    opened = study(tmp_path)
    opened.store.put_model(MODEL, {"kind": "live", "path": ""})
    assert search_command(opened).text == ""


def test_the_recommended_plan_is_named_with_what_it_buys(tmp_path):
    opened = study(tmp_path)
    found = verdict(front_points(opened), opened.facts)
    assert found.headline == "Use plan cccccc (front 1): 2.02 times faster."
    assert found.sentences[0].startswith("Not timed yet as you will run it")
    assert "perplexity +0.50% (95 % interval +0.40..+0.60%)" in found.sentences[1]
    assert [(tile.value, tile.detail) for tile in found.tiles] == [
        ("2.02x", "50.0 ms a request instead of 101 ms"),
        ("+0.50%", "95 % interval +0.40..+0.60%"),
        ("40%", "410 KiB instead of 1.00 MiB"),
    ]


def test_what_the_user_gets_is_the_headline_and_the_first_tile(tmp_path):
    opened = study(tmp_path)
    opened.store.put_delivery(reported.make_delivery(FRONT, 0.5))
    found = verdict(front_points(opened), opened.facts)
    assert found.headline == "Use plan cccccc (front 1): 2.00 times faster."
    assert found.sentences[0].startswith(
        "As you will run it (generate, prompt 64 + 16): 200 ms -> 100 ms a request"
    )
    assert (found.tiles[0].name, found.tiles[0].value) == ("As you will run it", "2.00x")
    assert found.tiles[1].name == "In the search" and found.tiles[1].value == "2.02x"


def test_a_plan_that_does_not_win_there_is_named_with_the_reason(tmp_path):
    opened = study(tmp_path)
    opened.store.put_delivery(reported.make_delivery(FRONT, 1.5))
    found = verdict(front_points(opened), opened.facts)
    assert found.headline == "Leave the model unquantized."
    assert (
        f"Not recommended: plan {FRONT} (front 1): it works, but takes 1.50 times as long"
        in found.sentences[0]
    )


def test_where_nothing_faster_is_within_the_limits_the_model_is_left_as_it_is(tmp_path):
    text = said(tmp_path, limits={"max_ppl_increase": 0.001, "max_memory_bytes": None})
    assert text.startswith("Leave the model unquantized. No faster plan is within the limits")
    assert (
        "The fastest of all, plan eeeeee (front 3), is 2.35 times faster with perplexity +900.0%"
        in text
    )


def test_where_nothing_is_faster_at_all_it_says_so(tmp_path):
    text = said(tmp_path, plans=(ORIGINAL,))
    assert (
        text.startswith("Leave the model unquantized.")
        and "No proven plan is faster at all." in text
    )


def test_where_no_plan_is_within_the_limits_none_is_recommended(tmp_path):
    text = said(tmp_path, limits={"max_ppl_increase": 0.01, "max_memory_bytes": 1000})
    assert text.startswith("No plan can be recommended.") and "memory at most 1000 B" in text


def test_a_uniform_plan_that_wins_is_called_uniform(tmp_path):
    assert "choosing layer by layer brought nothing more" in said(
        tmp_path, plans=(ORIGINAL, UNIFORM)
    )


def test_a_search_that_is_not_at_its_end_is_told(tmp_path):
    assert "is not finished" in said(tmp_path, plans=(ORIGINAL, UNIFORM, FAST), complete=False)
