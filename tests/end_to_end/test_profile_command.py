"""`autoquant profile` with real kernels: shapes and a model, every kind of output, and a database that a search shares."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from autoquant.cli.main import app
from autoquant.devices.effort import timing_effort, timing_effort_of
from autoquant.profiler.latencies import COLUMNS

from .conftest import WORKLOAD

CANDIDATES = ("int8-row/plain/int8pack-mm", "int8-row/plain/int-mm", "float32*")


@pytest.fixture(autouse=True)
def small_roofline():
    with timing_effort_of(replace(timing_effort(), largest_copy_bytes=1 << 20, largest_product=64)):
        yield


@pytest.fixture
def profile(tmp_path):
    """Run the command in its folder, which has a file of shapes; returns what it says."""
    (tmp_path / "shapes.txt").write_text("64x32 up\n32x64+bias down\n")

    def run(*arguments):
        globs = [part for glob in CANDIDATES for part in ("--candidates", glob)]
        given = ["profile", "--db", str(tmp_path / "timings.db"), "--device", "cpu", *globs, *map(str, arguments)]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.stderr
        return result

    def shapes(*arguments):
        return run("--shapes", tmp_path / "shapes.txt", "--rows", "1,4", *arguments)

    run.shapes = shapes
    return run


def test_a_file_of_shapes_gives_a_table_and_accounts(profile):
    first = profile.shapes()
    assert "64 x 32, bfloat16: up" in first.stdout and "32 x 64 + bias, bfloat16: down" in first.stdout
    assert "bfloat16/plain/matmul" in first.stdout and "m=4" in first.stdout and "*" in first.stdout
    assert "unsupported: float32/plain/matmul: float32 is wider" in first.stdout
    assert "16 timings (4 candidates at 4 shapes and m): 12 measured" in " ".join(first.stdout.split())
    assert "0 were in the store, 16 are new" in " ".join(first.stdout.split())
    assert max(map(len, first.stdout.splitlines())) <= 80
    assert "roofline: memory" in first.stderr and "profile: 16 timings" in first.stderr
    again = profile.shapes()
    assert "16 were in the store, 0 are new" in " ".join(again.stdout.split())
    assert "roofline" not in again.stderr


def test_csv_and_json_hold_the_same_rows_and_are_alone_on_stdout(profile):
    as_csv = list(csv.DictReader(io.StringIO(profile.shapes("--csv").stdout)))
    as_json = json.loads(profile.shapes("--json").stdout)
    assert len(as_csv) == len(as_json) == 16
    assert tuple(as_csv[0]) == tuple(as_json[0]) == COLUMNS
    for text, value in zip(as_csv, as_json, strict=True):
        assert text == {name: "" if value[name] is None else str(value[name]) for name in COLUMNS}
    timed = [row for row in as_json if row["outcome"] == "ok"]
    assert len(timed) == 12
    assert all(row["latency_us"] > 0 and row["floor_us"] > 0 and row["relative_error"] < 0.02 for row in timed)
    assert {row["latency_us"] for row in as_json if row["outcome"] == "unsupported"} == {None}


@pytest.mark.parametrize(
    ("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".html", b"<!doctype html>")]
)  # fmt: skip
def test_the_picture_is_of_the_kind_that_the_suffix_names(profile, tmp_path, suffix, begin):
    target = tmp_path / f"latency{suffix}"
    result = profile.shapes("--json", "--plot", target)
    assert target.read_bytes().startswith(begin)
    assert f"wrote {target}" in result.stderr
    json.loads(result.stdout)


def test_the_rows_of_a_model_are_those_of_its_workload(profile, files):
    rows = json.loads(profile(files[0], "--workload", WORKLOAD, "--json").stdout)
    cells = {(row["n"], row["k"], row["m"]) for row in rows}
    assert {m for _, _, m in cells} == {1, 8}
    assert (128, 64, 8) in cells and (64, 128, 1) in cells
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_rows_override_those_of_a_models_workload(profile, files):
    rows = json.loads(profile(files[0], "--workload", WORKLOAD, "--rows", "3", "--json").stdout)
    assert {row["m"] for row in rows} == {3}


def test_what_a_search_timed_is_not_timed_again(searched, tmp_path, profile):
    copy = tmp_path / "plan.db"
    copy.write_bytes(searched.db.read_bytes())
    result = profile(searched.model, "--workload", WORKLOAD, "--db", copy)
    said = " ".join(result.stdout.split())
    assert ", 0 were in the store" not in said and " 0 are new" not in said  # float32 was not part of that search
    rows = json.loads(profile(searched.model, "--workload", WORKLOAD, "--db", copy, "--json").stdout)
    unsupported = sum(row["outcome"] == "unsupported" for row in rows)
    assert f"{len(rows) - unsupported} were in the store" in said
