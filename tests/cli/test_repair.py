"""What `autoquant repair` says."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autoquant.cli.main import app

GOLDEN = Path(__file__).parents[1] / "golden" / "finished.sqlite"


@pytest.fixture
def repaired(tmp_path, monkeypatch):
    """Repair a database after statements, and return the lines that are printed."""

    def repaired(*statements):
        monkeypatch.chdir(tmp_path)
        shutil.copyfile(GOLDEN, "plan.db")
        with closing(sqlite3.connect("plan.db", isolation_level=None)) as connection:
            for statement in statements:
                connection.execute(statement)
        result = CliRunner().invoke(app, ["repair", "plan.db", "--out", "new.db"])
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    return repaired


def test_of_a_whole_database_nothing_is_lost(repaired):
    *tables, last = repaired()
    assert all(line.endswith(" 0 lost") for line in tables)
    assert last == "Wrote new.db."


def test_what_is_lost_is_said_with_why_and_how_to_get_it_again(repaired):
    lines = repaired("UPDATE study SET workload = '{'", "DROP TABLE delivery")
    said = {line.split()[0]: line for line in lines}
    assert "0 saved       1 lost  (study.workload: invalid JSON" in said["study"]
    assert "lost  (the first: its study is not there)" in said["plan"]
    assert said["delivery"].endswith("0 saved       0 lost  (no such table was found)")
    assert lines[-1] == "The same search with --db new.db measures again only what is lost."
