import csv
import io
import json
from dataclasses import replace

import pytest
from builders.searched import DEVICE

from autoquant.cli.main import app
from autoquant.records import LinearShape, Measurement, TimingSubject
from autoquant.store import open_store

SHAPE = LinearShape(n=256, k=128, bias=True, dtype="bf16")
OTHER = replace(DEVICE, name="Other GPU", type="cuda", versions={"torch": "2.14", "triton": "3.9"})
COLUMNS = [
    "device", "device_key", "versions", "protocol", "n", "k", "bias", "dtype", "m", "format", "kernel",
    "working_set_bytes", "outcome", "latency_us", "spread_us", "relative_error", "reason",
]  # fmt: skip


def subject(m, kernel="torch"):
    return TimingSubject(
        shape=SHAPE, m=m, format="bf16/plain", kernel=kernel, working_set_bytes=2**20
    )


@pytest.fixture
def timed(database):
    """The finished search with timings of two devices, one of them a failure."""
    store = open_store(database)
    store.put_device(OTHER)
    fine = Measurement(
        subject=subject(1), outcome="ok", samples_us=(4.0, 1.0, 2.0, 8.0), relative_error=0.25
    )
    failed = Measurement(
        subject=subject(16, "int-mm"), outcome="failed", reason='it broke, "badly"'
    )
    store.put_timings(DEVICE, "7", [fine, failed])
    store.put_timings(OTHER, "8", [replace(fine, samples_us=(0.5,))])
    store.close()
    return database


def exported(runner, database, *arguments):
    result = runner.invoke(app, ["export-timings", str(database), *arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_csv_is_the_default_and_has_every_timing_with_its_device(runner, timed):
    text = exported(runner, timed)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text == exported(runner, timed, "--csv")
    assert list(rows[0]) == COLUMNS
    assert [row["device"] for row in rows] == ["Test CPU", "Test CPU", "Other GPU"]
    assert rows[0] | {"device_key": ""} == {
        "device": "Test CPU", "device_key": "", "versions": "torch 2.13", "protocol": "7", "n": "256", "k": "128",
        "bias": "True", "dtype": "bf16", "m": "1", "format": "bf16/plain", "kernel": "torch",
        "working_set_bytes": "1048576", "outcome": "ok", "latency_us": "3.0", "spread_us": "6.0",
        "relative_error": "0.25", "reason": "",
    }  # fmt: skip
    assert (rows[1]["outcome"], rows[1]["latency_us"], rows[1]["spread_us"]) == ("failed", "", "")
    assert rows[1]["reason"] == 'it broke, "badly"'
    assert rows[2]["versions"] == "torch 2.14; triton 3.9"


def test_json_has_the_same_rows_with_null_where_there_is_no_number(runner, timed):
    rows = json.loads(exported(runner, timed, "--json"))
    assert [list(row) for row in rows] == [COLUMNS] * 3
    assert (rows[0]["latency_us"], rows[0]["spread_us"], rows[0]["bias"]) == (3.0, 6.0, True)
    assert (rows[1]["latency_us"], rows[1]["spread_us"], rows[1]["relative_error"]) == (
        None,
        None,
        None,
    )
    assert rows[2]["versions"] == {"torch": "2.14", "triton": "3.9"}
    assert rows[2]["device_key"] == OTHER.key


def test_a_part_of_a_name_picks_devices(runner, timed):
    rows = json.loads(exported(runner, timed, "--json", "--device", "other g"))
    assert [(row["device"], row["latency_us"]) for row in rows] == [("Other GPU", 0.5)]


def test_a_name_that_no_device_has_is_one_line_with_those_there_are(runner, timed):
    result = runner.invoke(app, ["export-timings", str(timed), "--device", "H100"])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "devices: Other GPU, Test CPU" in result.stderr


def test_a_file_gets_what_stdout_would(runner, timed, tmp_path):
    wanted = exported(runner, timed)
    result = runner.invoke(
        app, ["export-timings", str(timed), "--out", str(tmp_path / "timings.csv")]
    )
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tmp_path / "timings.csv").read_text() == wanted


def test_a_file_in_a_missing_folder_is_one_line(runner, timed, tmp_path):
    result = runner.invoke(
        app, ["export-timings", str(timed), "--out", str(tmp_path / "no" / "timings.csv")]
    )
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "cannot write" in result.stderr


def test_the_database_is_not_written_over(runner, timed):
    before = timed.read_bytes()
    result = runner.invoke(app, ["export-timings", str(timed), "--out", str(timed)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "is the database itself" in result.stderr
    assert timed.read_bytes() == before


def test_csv_and_json_together_are_refused(runner, timed):
    result = runner.invoke(app, ["export-timings", str(timed), "--json", "--csv"])
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_database_without_timings_gives_only_the_heading(runner, database):
    assert exported(runner, database) == ",".join(COLUMNS) + "\n"
    assert json.loads(exported(runner, database, "--json")) == []
