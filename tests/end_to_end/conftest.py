"""A tiny language model that was searched once from the command line, and what tests ask of databases and folders."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from autoquant.cli.main import app
from autoquant.tuner.ledger import ProofLedger

from . import quick
from .tiny import save_llama, save_text

FACTS = ("timing", "loss", "plan", "proof")
WORKLOAD = "prefill=8,decode=4"


@pytest.fixture(autouse=True)
def short():
    """Searches in this process are short."""
    with quick.short():
        yield


def typed(*arguments, cwd=None, settings=(*quick.SHORTER, *quick.FEWER_PLANS)):
    """Run the `autoquant` command in this process, with short timings, also where a module's fixtures need it."""
    with quick.short(settings), contextlib.chdir(cwd or "."):
        return CliRunner().invoke(app, list(map(str, arguments)))


def command(*arguments, cwd=None):
    """Run the `autoquant` command in a process of its own."""
    return python("-m", "autoquant", *arguments, cwd=cwd)


def python(*arguments, cwd=None):
    """Run Python in a process of its own, without compiling and with one thread."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "AUTOQUANT_EAGER": "1",
        "AUTOQUANT_IN_PROCESS": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


def rows(db, tables=FACTS):
    """Every row of the tables, without opening the database for writing."""
    connection = sqlite3.connect(f"file:{db}?mode=ro", uri=True)
    try:
        return {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
            for table in tables
        }
    finally:
        connection.close()


def copy_database(source, target):
    """Copy a database that is open elsewhere, perhaps; returns the copy."""
    with (
        contextlib.closing(sqlite3.connect(source)) as before,
        contextlib.closing(sqlite3.connect(target)) as after,
    ):
        before.backup(after)
    return target


def folder_print(folder):
    """Every file below a folder with a hash of its bytes."""
    return {
        str(entry.relative_to(folder)): hashlib.sha256(entry.read_bytes()).hexdigest()
        if entry.is_file()
        else ""
        for entry in sorted(Path(folder).rglob("*"))
    }


@pytest.fixture
def run():
    """The command in this process."""

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@dataclass(frozen=True)
class Searched:
    """A finished search: its files, and what the command said."""

    model: Path
    text: Path
    db: Path
    result: Result

    def search(self, *options, cwd=None):
        """The same command again, with further options."""
        base = (
            "--eval-text",
            self.text,
            "--db",
            self.db,
            "--device",
            "cpu",
            "--workload",
            WORKLOAD,
        )
        globs = ("--candidates", "int8*", "--candidates", "int4*", "--candidates", "float16*")
        return ("search", self.model, *base, *globs, *options)


def until_one_is_refined(ledger, proofs=1):
    """There is time until one plan of Optuna's was proven, however fast this machine is."""
    return all(plan.kind != "refined" for plan in ledger.plans.values())


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """(model folder, text file)."""
    place = tmp_path_factory.mktemp("files")
    return save_llama(place / "model"), save_text(place / "text.txt")


@pytest.fixture(scope="session")
def searched(files, tmp_path_factory):
    model, text = files
    db = tmp_path_factory.mktemp("searched") / "plan.db"
    unfinished = Searched(model, text, db, None)
    settings = (*quick.SHORTER, (ProofLedger, "has_time", until_one_is_refined))
    result = typed(*unfinished.search("--time-budget", "4s", "--json"), settings=settings)
    assert result.exit_code == 0, result.stderr
    return Searched(model, text, db, result)


@pytest.fixture(scope="session")
def study(searched):
    from autoquant.study.study import Study

    return Study.open(searched.db)
