import csv
import io
import json
import sqlite3
from pathlib import Path

import pytest
from builders import searched
from builders.searched import MIXED, ORIGINAL, SMALL, STUDY, UNIFORM, delivery

from autoquant.cli.main import app
from autoquant.store import open_store
from autoquant.study.columns import COLUMNS

FIELDS = {
    "plan_id", "label", "predicted_request_ms", "measured_request_ms", "perplexity", "perplexity_increase",
    "perplexity_increase_low", "perplexity_increase_high", "kl", "memory_bytes", "on_front", "recommended",
}  # fmt: skip


def test_json_lists_every_proven_plan_with_its_measurements(runner, database):
    result = runner.invoke(app, ["pareto", str(database), "--json"])
    rows = json.loads(result.stdout)
    assert result.exit_code == 0
    assert [row["plan_id"] for row in rows] == [SMALL, MIXED, UNIFORM, ORIGINAL]
    assert all(set(row) >= FIELDS for row in rows)
    assert [row["plan_id"] for row in rows if row["recommended"]] == [MIXED]
    assert rows[1]["measured_request_ms"] == pytest.approx(125.0)
    assert rows[1]["perplexity_increase_high"] == pytest.approx(0.005)
    assert rows[2]["on_front"] is True, "the uniform plan is the smallest of its quality"


def test_csv_has_the_same_rows(runner, database):
    result = runner.invoke(app, ["pareto", str(database), "--csv"])
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert len(rows) == 4
    assert rows[1]["plan_id"] == MIXED
    assert float(rows[1]["kl"]) == pytest.approx(0.002)


def test_text_fits_80_columns_and_says_what_is_recommended(runner, database):
    result = runner.invoke(app, ["pareto", str(database), "--study", STUDY])
    table = result.stdout.splitlines()
    assert result.exit_code == 0
    assert any(line.startswith(">*") and "front 1" in line and "1.60x" in line for line in table)
    assert "1.60 times faster" in result.stdout
    assert "20.0 MiB instead of 32.0 MiB" in result.stdout
    assert "eeee00000005 could not be proven: the kernel failed" in result.stdout
    assert max(map(len, table[:12])) <= 80


def test_what_the_user_gets_stands_in_every_form(runner, database, deliver):
    deliver(delivery(MIXED, 0.5))
    text = runner.invoke(app, ["pareto", str(database)]).stdout
    assert (
        "As you will run it (generate, prompt 512 + 128): 400 ms -> 200 ms a request, 2.00 times faster"
        in text
    )
    assert "first token 100 ms -> 50.0 ms, 2.00 ms -> 1.00 ms a further token" in text
    assert text.index("As you will run it") < text.index("in the search: 1.60 times faster")
    by_json = {
        row["plan_id"]: row
        for row in json.loads(runner.invoke(app, ["pareto", str(database), "--json"]).stdout)
    }
    assert (
        by_json[MIXED]["as_run_speedup"] == 2.0 and by_json[MIXED]["as_run_where"] == "new process"
    )
    assert by_json[SMALL]["as_run_request_ms"] is None
    by_csv = csv.DictReader(
        io.StringIO(runner.invoke(app, ["pareto", str(database), "--csv"]).stdout)
    )
    assert {row["plan_id"]: row["as_run_step_ms"] for row in by_csv}[MIXED] == "1.0"


def test_a_plan_that_cannot_be_used_is_not_recommended_and_why_is_shown(runner, database, deliver):
    deliver(delivery(MIXED, reason="RuntimeError: it cannot be moved"), delivery(UNIFORM, 0.9))
    text = runner.invoke(app, ["pareto", str(database)]).stdout
    assert f"Recommended: plan {UNIFORM}" in text
    assert f"Not recommended: plan {MIXED} (front 1): RuntimeError: it cannot be moved" in text
    assert any(line.startswith("x*") and "front 1" in line for line in text.splitlines())
    assert "x not recommended for how it runs for its user, see below" in text
    assert max(map(len, text.splitlines()[:13])) <= 80


def test_where_no_plan_wins_the_unquantized_model_is_recommended(runner, database, deliver):
    deliver(delivery(MIXED, 1.1), delivery(UNIFORM, 1.2))
    text = runner.invoke(app, ["pareto", str(database)]).stdout
    assert (
        "Recommended: the unquantized model. No plan that is faster in the search is faster as you will run it."
        in text
    )
    assert text.count("Not recommended: plan") == 2


@pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_plot_draws_the_kind_that_the_suffix_names(runner, database, tmp_path, suffix, begin):
    target = tmp_path / f"front{suffix}"
    result = runner.invoke(app, ["pareto", str(database), "--json", "--plot", str(target)])
    assert result.exit_code == 0
    assert target.read_bytes().startswith(begin)
    json.loads(result.stdout)


def test_plot_of_an_unknown_kind_is_a_usage_error_and_leaves_no_file(runner, database, tmp_path):
    result = runner.invoke(app, ["pareto", str(database), "--plot", str(tmp_path / "front.gif")])
    assert result.exit_code == 2
    assert "must end in one of .png, .svg" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "front.gif").exists()


def test_plot_of_a_page_names_the_command_that_writes_one(runner, database, tmp_path):
    result = runner.invoke(app, ["pareto", str(database), "--plot", str(tmp_path / "front.html")])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "`autoquant report" in result.stderr
    assert not (tmp_path / "front.html").exists()


def test_plot_into_a_missing_folder_is_one_line(runner, database, tmp_path):
    result = runner.invoke(
        app, ["pareto", str(database), "--plot", str(tmp_path / "no" / "front.png")]
    )
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "cannot write" in result.stderr


def test_json_and_csv_together_are_refused(runner, database):
    result = runner.invoke(app, ["pareto", str(database), "--json", "--csv"])
    assert (result.exit_code, result.stdout) == (2, "")


def test_an_unknown_study_is_one_line(runner, database):
    result = runner.invoke(app, ["pareto", str(database), "--study", "nope"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no study 'nope'")


def test_a_missing_database_stays_missing(runner, tmp_path):
    result = runner.invoke(app, ["pareto", str(tmp_path / "plan.db")])
    assert result.exit_code == 2
    assert "no database at" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_reading_leaves_no_file_beside_the_database(runner, database):
    runner.invoke(app, ["pareto", str(database)])
    assert [path.name for path in database.parent.iterdir()] == ["plan.db"]


def test_a_database_without_a_study_says_what_to_do(runner, tmp_path):
    open_store(tmp_path / "plan.db").close()
    result = runner.invoke(app, ["pareto", str(tmp_path / "plan.db"), "--json"])
    assert result.exit_code == 2
    assert "run `autoquant search` first" in result.stderr


def test_chart_is_drawn_below_the_table(runner, database):
    plain = runner.invoke(app, ["pareto", str(database)]).stdout
    charted = runner.invoke(app, ["pareto", str(database), "--chart"]).stdout
    assert "Time of one request" not in plain
    assert (
        charted.index("1.60x")
        < charted.index("Time of one request [ms]")
        < charted.index("Recommended:")
    )
    assert "★ recommended   ■ unquantized   ● searched, on the front" in charted


def test_chart_of_a_study_without_proofs_says_what_to_do(runner, tmp_path):
    store = open_store(tmp_path / "plan.db")
    searched.fill(store, {})
    store.close()
    with sqlite3.connect(tmp_path / "plan.db") as connection:
        connection.execute("DELETE FROM proof")
    result = runner.invoke(app, ["pareto", str(tmp_path / "plan.db"), "--chart"])
    assert result.exit_code == 0 and "No plan has been proven yet" in result.stdout


@pytest.mark.parametrize("other", ["--json", "--csv"])
def test_chart_beside_what_programs_read_is_refused(runner, database, other):
    result = runner.invoke(app, ["pareto", str(database), "--chart", other])
    assert (result.exit_code, result.stdout) == (2, "")


def test_csv_has_the_documented_columns_in_their_order(runner, database):
    result = runner.invoke(app, ["pareto", str(database), "--csv"])
    page = (Path(__file__).parents[2] / "docs/guides/reading-a-front.md").read_text()
    first_cells = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert result.stdout.splitlines()[0].split(",") == list(COLUMNS)
    assert [cell for cell in first_cells if cell in COLUMNS] == list(COLUMNS)


def test_a_narrow_terminal_cuts_no_id_and_no_number(runner, database):
    narrow = runner.invoke(app, ["pareto", str(database)], env={"COLUMNS": "40"}).stdout
    assert narrow == runner.invoke(app, ["pareto", str(database)], env={"COLUMNS": "80"}).stdout
    assert MIXED[:8] in narrow and "1.60x" in narrow
