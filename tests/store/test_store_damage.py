"""Damaged databases: one line names file, place and remedy, and the file stays as it is."""

import json
import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from builders.records import MODEL, STUDY
from builders.rich import DEVICE, delivery, fill, measurement, plan, proof, recording

from autoquant.errors import StoreError
from autoquant.store import open_store
from autoquant.store.columns import plain, to_json
from autoquant.store.connect import VERSION_TABLE
from autoquant.store.repair import repair

PLAN = "abcd0001"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A database with rows in its tables, closed."""
    path = tmp_path_factory.mktemp("whole") / "plan.db"
    store = open_store(path)
    fill(store)
    store.put_timings(DEVICE, "3", [measurement(), measurement(m=8)])
    store.put_losses(MODEL, "text", "path-1", {("head", "int8-row+a16"): 0.25})
    store.put_plan(plan())
    store.put_plan(plan("abcd0002"))
    store.put_proof(PLAN, proof())
    store.put_delivery(delivery())
    store.put_reference(STUDY, "refinement", {"plans": 1, "ended": "the time budget is spent"})
    store.put_calibration(STUDY, [[1, 2], [3, 4]])
    store.update_study(STUDY, recording=recording())
    store.put_options(STUDY, [plan().layers])
    store.close()
    return path


@pytest.fixture
def whole(template, path):
    """A database of its own for each test."""
    shutil.copyfile(template, path)
    return path


def change(path, statement, *values):
    """Run a statement past our own code, and leave no log behind."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute(statement, values)


def replace_in_json(path, table, column, keys, value):
    """Replace one value inside the JSON of each row."""
    with closing(sqlite3.connect(path)) as connection:
        (found,) = connection.execute(f"SELECT {column} FROM {table}").fetchone()
    whole = inner = json.loads(found)
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    change(path, f"UPDATE {table} SET {column} = ?", json.dumps(whole))


def read_everything(path):
    store = open_store(path, create=False)
    try:
        store.study(STUDY)
        store.timings(DEVICE, "3")
        store.losses(MODEL, "text", "path-1")
        store.plans(STUDY)
        store.proofs(STUDY)
        store.deliveries(STUDY)
        store.references(STUDY)
        store.options_and_about(STUDY)
    finally:
        store.close()


def refusal(path, folder_print):
    """What reading says of a damaged database, which it must leave as it is."""
    before = folder_print(path.parent)
    with pytest.raises(StoreError) as caught:
        read_everything(path)
    assert folder_print(path.parent) == before
    said = str(caught.value)
    assert str(path) in said and "\n" not in said and f"autoquant repair {path}" in said
    return said


def test_a_whole_database_is_read(whole, folder_print):
    before = folder_print(whole.parent)
    read_everything(whole)
    assert folder_print(whole.parent) == before


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("timing", "m", "x"),
        ("timing", "m", 0),
        ("timing", "n", -1),
        ("timing", "outcome", "fine"),
        ("timing", "samples_us", "[1.0, -2.0]"),
        ("timing", "samples_us", "[]"),
        ("timing", "samples_us", "[1e999]"),
        ("timing", "samples_us", "{"),
        ("timing", "bias", "maybe"),
        ("timing", "format", b"\xff\xfe"),
        ("loss", "loss", float("inf")),
        ("loss", "loss", "x"),
        ("study", "updated", "2026-13-45"),
        ("study", "created", 7),
        ("study", "workload", "[]"),
        ("study", "spent_s", -1.0),
        ("study", "recording", "[" * 100_000),
        ("study", "problem", '{"options": [[]]}'),
        ("study", "problem", '{"options": []}'),
        ("plan", "layers", "[]"),
        ("plan", "label", "long " * 1000),
        ("plan", "kind", "fastest"),
        ("plan", "layers", "null"),
        ("plan", "prediction", "{}"),
        ("proof", "proof", "7"),
        ("proof", "proof", None),
        ("delivery", "delivery", b"{}"),
        ("device", "fingerprint", '{"type": "cpu"}'),
        ("model", "source", "[1]"),
        ("reference", "value", '{"windows": 1, "plans": "x"}'),
    ],
)
def test_a_value_that_its_column_does_not_take_is_named(whole, folder_print, table, column, value):
    first = f"(SELECT min(rowid) FROM {table})"
    change(whole, f"UPDATE {table} SET {column} = ? WHERE rowid = {first}", value)
    said = refusal(whole, folder_print)
    assert f"{table}.{column}" in said or f"{table} " in said


@pytest.mark.parametrize(
    ("table", "column", "keys", "value"),
    [
        ("plan", "layers", (0, "shape", "n"), 0),
        ("plan", "layers", (0, "route", 0, "upper_m"), "x"),
        ("plan", "layers", (0, "latency_us", "prefill"), float("nan")),
        ("plan", "layers", (0, "latency_us", "elsewhere"), 1.0),
        ("plan", "layers", (0, "latency_us", "prefill"), 1e308),
        ("plan", "layers", (0, "memory_bytes"), 10**40),
        ("plan", "layers", (0, "parameters"), []),
        ("plan", "layers", (0, "route"), []),
        ("plan", "layers", (0, "joined"), ["head", "elsewhere"]),
        ("plan", "prediction", ("request_ms",), None),
        ("proof", "proof", ("request_ms",), 0.0),
        ("proof", "proof", ("request_ms",), 5e-324),
        ("proof", "proof", ("plan_id",), "another"),
        ("proof", "proof", ("increase",), [1, 2, 3]),
        ("delivery", "delivery", ("loop",), "run"),
        ("study", "limits", ("minimize",), "space"),
        ("study", "limits", ("max_ppl_increase",), "1%"),
        ("study", "identity", ("constraints",), {"keep": "*"}),
        ("study", "workload", ("phases", 0, "calls"), 0),
        ("study", "workload", ("batch",), True),
        ("study", "recording", ("sites", 0, "uses", 0, "m"), 0.5),
        ("study", "problem", ("options", 0, 0, "latency_us"), {"elsewhere": 1.0}),
        ("study", "problem", ("about",), {"dtype": "bfloat16"}),
        ("device", "fingerprint", ("versions",), ["torch"]),
    ],
)
def test_a_value_inside_json_is_held_to_its_field(whole, folder_print, table, column, keys, value):
    replace_in_json(whole, table, column, keys, value)
    said = refusal(whole, folder_print)
    assert table in said


@pytest.mark.parametrize("changes", [{}, {"format": "int4/plain"}])
def test_layers_that_are_there_twice_or_cannot_be_joined_are_named(whole, folder_print, changes):
    (layer,) = plan().layers
    names = ("head", "head") if not changes else ("head", "tail")
    layers = [
        replace(layer, name=names[0], joined=names),
        replace(layer, name=names[1], joined=names, **changes),
    ]
    change(whole, "UPDATE plan SET layers = ?", to_json(layers))
    assert "plan.layers of abcd0001" in refusal(whole, folder_print)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM model",
        "DELETE FROM device",
        "DELETE FROM study",
        "DELETE FROM plan WHERE id = 'abcd0001'",
        "UPDATE proof SET plan_id = 'nowhere'",
    ],
)
def test_a_row_that_others_refer_to_and_is_not_there_is_named(whole, folder_print, statement):
    change(whole, statement)
    assert "refers to a" in refusal(whole, folder_print)


@pytest.mark.parametrize("statement", ["DROP TABLE delivery", "ALTER TABLE plan DROP COLUMN label"])
def test_a_table_or_column_that_is_not_there_is_named(whole, folder_print, statement):
    change(whole, statement)
    assert "lacks" in refusal(whole, folder_print)


@pytest.mark.parametrize("place", range(1, 8))
def test_a_page_that_was_overwritten_is_found_before_anything_is_written(
    whole, folder_print, place
):
    content = bytearray(whole.read_bytes())
    start = len(content) * place // 8 // 4096 * 4096
    content[start : start + 4096] = b"\xff" * 4096
    whole.write_bytes(content)
    refusal(whole, folder_print)


def test_a_damaged_database_of_an_older_schema_is_not_migrated(whole, folder_print):
    change(whole, "DROP TABLE delivery")
    change(whole, f"UPDATE {VERSION_TABLE} SET version_num = '0003'")
    change(whole, "DELETE FROM model")
    assert "refers to a model" in refusal(whole, folder_print)


def test_a_wrong_revision_is_refused_in_one_line(whole):
    change(whole, f"UPDATE {VERSION_TABLE} SET version_num = '0001'")  # its tables are there
    with pytest.raises(StoreError) as caught:
        open_store(whole, create=False)
    assert "\n" not in str(caught.value)


def saved(path, out):
    """Repair, and return (saved, lost) of every table that has rows."""
    return {
        name: (rows.saved, rows.lost)
        for name, rows in repair(path, out).items()
        if rows.saved or rows.lost
    }


def rows_of(path):
    tables = ("device", "model", "study", "timing", "loss", "plan", "proof", "delivery")
    with closing(sqlite3.connect(path)) as connection:
        return {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
            for table in tables
        }


def test_repairing_a_whole_database_copies_every_row(whole, tmp_path, folder_print):
    before = folder_print(whole.parent)
    new = tmp_path / "new" / "new.db"
    new.parent.mkdir()
    counts = saved(whole, new)
    assert counts["timing"] == (2, 0) and not any(lost for _, lost in counts.values())
    assert [each.name for each in new.parent.iterdir()] == ["new.db"]
    assert rows_of(new) == rows_of(whole)
    whole_print = {
        name: value for name, value in folder_print(whole.parent).items() if name in before
    }
    assert whole_print == before


def test_a_bad_row_is_lost_alone_and_what_refers_to_it_with_it(whole, tmp_path):
    change(whole, "UPDATE timing SET m = 'x' WHERE id = 1")
    change(whole, "UPDATE plan SET kind = 'fastest' WHERE id = 'abcd0001'")
    new = tmp_path / "new.db"
    counts = saved(whole, new)
    assert counts["timing"] == counts["plan"] == (1, 1)
    assert counts["proof"] == counts["delivery"] == (0, 1)
    read_everything(new)


def test_a_field_that_an_option_does_not_have_is_left_out(whole, tmp_path):
    layer = plain(plan().layers[0]) | {"joinee": ["a"]}
    replace_in_json(whole, "study", "problem", ("options", 0, 0), layer)
    new = tmp_path / "new.db"
    assert saved(whole, new)["study"] == (1, 0)
    read_everything(new)


def test_a_bad_value_that_may_be_empty_is_left_out_of_its_row(whole, tmp_path):
    change(whole, "UPDATE study SET problem = '[]', recording = 'x'")
    new = tmp_path / "new.db"
    study = repair(whole, new)["study"]
    assert (study.saved, study.lost, study.emptied) == (1, 0, 2)
    store = open_store(new, create=False)
    assert store.study(STUDY).recording is None and store.options(STUDY) is None
    store.close()


def test_rows_on_both_sides_of_a_lost_page_are_saved(whole, tmp_path):
    store = open_store(whole, create=False)
    many = [measurement(m=m) for m in range(10, 300)]
    store.put_timings(DEVICE, "3", many)
    store.close()
    with closing(sqlite3.connect(whole)) as connection:
        pages = (
            [
                row[0]
                for row in connection.execute(
                    "SELECT pageno FROM dbstat WHERE name = 'timing' AND pagetype = 'leaf'"
                )
            ]
            if _has_dbstat(connection)
            else []
        )
    if not pages:
        pytest.skip("this SQLite does not say where its pages are")
    content = bytearray(whole.read_bytes())
    lost = pages[len(pages) // 2]
    content[(lost - 1) * 4096 : lost * 4096] = b"\xff" * 4096
    whole.write_bytes(content)
    rows = repair(whole, tmp_path / "new.db")["timing"]
    assert rows.unreadable and len(many) * 0.8 < rows.saved < len(many)
    read_everything(tmp_path / "new.db")


def _has_dbstat(connection):
    try:
        connection.execute("SELECT 1 FROM dbstat LIMIT 1")
    except sqlite3.Error:
        return False
    return True


@pytest.mark.parametrize("share", [0.99, 0.9, 0.8])
def test_what_is_left_of_a_file_that_was_cut_is_saved(whole, tmp_path, folder_print, share):
    content = whole.read_bytes()
    whole.write_bytes(content[: int(len(content) * share)])
    before = folder_print(whole.parent)
    rows = repair(whole, tmp_path / "new.db")
    assert rows["timing"].saved == 2 and rows["device"].whole
    assert folder_print(whole.parent).items() >= before.items()
    open_store(tmp_path / "new.db", create=False).close()


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (0, b"SQLite format 4\0"),
        (16, b"\x03\x33"),
        (18, b"\xff\xff"),
        (56, b"\xff"),
        (0, bytes(100)),
    ],
)
def test_a_file_whose_header_alone_is_damaged_is_saved_as_a_whole(
    whole, tmp_path, folder_print, place, wrong
):
    expected = rows_of(whole)
    content = whole.read_bytes()
    whole.write_bytes(content[:place] + wrong + content[place + len(wrong) :])
    before = folder_print(whole.parent)
    new = tmp_path / "new" / "new.db"
    new.parent.mkdir()
    assert all(rows.whole for rows in repair(whole, new).values())
    assert rows_of(new) == expected
    assert folder_print(whole.parent).items() >= before.items()
    assert [each.name for each in new.parent.iterdir()] == ["new.db"]


def test_what_was_lost_says_why(whole, tmp_path):
    change(whole, "UPDATE plan SET kind = 'fastest' WHERE id = 'abcd0001'")
    change(whole, "DROP TABLE reference")
    rows = repair(whole, tmp_path / "new.db")
    assert rows["plan"].reason.startswith("plan.kind")
    assert rows["proof"].reason == "its plan is not there"
    assert rows["reference"].missing and rows["timing"].whole


def test_repair_writes_over_nothing(whole, tmp_path, folder_print):
    before = folder_print(whole.parent)
    for out in (whole, tmp_path):
        with pytest.raises(StoreError, match="exists already"):
            repair(whole, out)
    assert folder_print(whole.parent) == before


def test_what_is_no_regular_file_is_refused_and_not_waited_for(path, tmp_path):
    os.mkfifo(path)
    for read in (lambda: repair(path, tmp_path / "new.db"), lambda: open_store(path)):
        with pytest.raises(StoreError, match="no regular file"):
            read()


@pytest.mark.parametrize("content", [b"", b"x" * 9000, b"SQLite format 3\0" + b"\xff" * 9000])
def test_a_file_that_cannot_be_read_at_all_leaves_nothing(path, tmp_path, content):
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        repair(path, tmp_path / "new.db")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert [each.name for each in Path(tmp_path).iterdir()] == [path.name]
