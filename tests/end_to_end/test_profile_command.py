"""`autoquant profile` with real kernels: shapes and a model, every kind of output, and a database that a search shares."""

from __future__ import annotations

import csv
import io
import json

import pytest

from autoquant.profiler.latencies import COLUMNS

from .conftest import WORKLOAD, copy_database, typed

pytestmark = pytest.mark.slow  # kernels are compiled

CANDIDATES = ("int8-row/plain/int8pack-mm", "int8-row/plain/int-mm", "float32*")


class Profile:
    """The command in a folder, which has a file of shapes."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "shapes.txt").write_text("64x32 up\n32x64+bias down\n")

    def __call__(self, *arguments):
        globs = [part for glob in CANDIDATES for part in ("--candidates", glob)]
        given = [
            "profile",
            "--db",
            self.folder / "timings.db",
            "--device",
            "cpu",
            *globs,
            *arguments,
        ]
        result = typed(*given)
        assert result.exit_code == 0, result.stderr
        return result

    def shapes(self, *arguments):
        return self("--shapes", self.folder / "shapes.txt", "--rows", "1,4", *arguments)


@pytest.fixture
def profile(tmp_path):
    return Profile(tmp_path)


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """The same where the shapes have been timed."""
    profile = Profile(tmp_path_factory.mktemp("timed"))
    profile.shapes()
    return profile


def test_a_file_of_shapes_gives_a_table_and_accounts(profile):
    first = profile.shapes()
    assert (
        "64 x 32, bfloat16: up" in first.stdout and "32 x 64 + bias, bfloat16: down" in first.stdout
    )
    assert "bfloat16/plain/matmul" in first.stdout and "m=4" in first.stdout and "*" in first.stdout
    assert "unsupported: float32/plain/matmul: float32 is wider" in first.stdout
    assert "16 timings (4 candidates at 4 shapes and m): 12 measured" in " ".join(
        first.stdout.split()
    )
    assert "0 were in the store, 16 are new" in " ".join(first.stdout.split())
    assert max(map(len, first.stdout.splitlines())) <= 80
    assert "roofline: memory" in first.stderr and "profile: 16 timings" in first.stderr
    again = profile.shapes()
    assert "16 were in the store, 0 are new" in " ".join(again.stdout.split())
    assert "roofline" not in again.stderr


def test_csv_and_json_hold_the_same_rows_and_are_alone_on_stdout(timed):
    as_csv = list(csv.DictReader(io.StringIO(timed.shapes("--csv").stdout)))
    as_json = json.loads(timed.shapes("--json").stdout)
    assert len(as_csv) == len(as_json) == 16
    assert tuple(as_csv[0]) == tuple(as_json[0]) == COLUMNS
    for text, value in zip(as_csv, as_json, strict=True):
        assert text == {name: "" if value[name] is None else str(value[name]) for name in COLUMNS}
    timed = [row for row in as_json if row["outcome"] == "ok"]
    assert len(timed) == 12
    assert all(
        row["latency_us"] > 0 and row["floor_us"] > 0 and row["relative_error"] < 0.02
        for row in timed
    )
    assert {row["latency_us"] for row in as_json if row["outcome"] == "unsupported"} == {None}


@pytest.mark.parametrize(
    ("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".html", b"<!doctype html>")]
)  # fmt: skip
def test_the_picture_is_of_the_kind_that_the_suffix_names(timed, tmp_path, suffix, begin):
    target = tmp_path / f"latency{suffix}"
    result = timed.shapes("--json", "--plot", target)
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
    copy = copy_database(searched.db, tmp_path / "plan.db")
    result = profile(searched.model, "--workload", WORKLOAD, "--db", copy)
    said = " ".join(result.stdout.split())
    assert (
        ", 0 were in the store" not in said and " 0 are new" not in said
    )  # float32 was not part of that search
    rows = json.loads(
        profile(searched.model, "--workload", WORKLOAD, "--db", copy, "--json").stdout
    )
    unsupported = sum(row["outcome"] == "unsupported" for row in rows)
    assert f"{len(rows) - unsupported} were in the store" in said
