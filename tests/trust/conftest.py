"""Payloads that leave a marker if they run, and a study of a module that needs its owner's code."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from end_to_end import quick
from end_to_end.tiny import save_llama
from typer.testing import CliRunner

from autoquant.cli.main import app

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

def inputs():
    return (torch.linspace(-1, 1, 128).reshape(4, 32),)
"""


class Payload:
    """Makes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture(autouse=True)
def short():
    """Searches and benches in this process are short."""
    with quick.short():
        yield


@pytest.fixture
def marker(tmp_path):
    """Where a payload leaves its mark. It must not exist at the end of a test that gives no leave."""
    return tmp_path / "the payload ran"


@pytest.fixture
def evil(tmp_path, marker, monkeypatch):
    """A module `evil` in the current folder: importing it, or calling what is in it, leaves the mark."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(
        f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\ndef run(*_):\n    return ()\n"
    )
    yield "evil:run"
    sys.modules.pop("evil", None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder as `save_pretrained` writes it."""
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def folder(llama, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def change(path, **fields):
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def run(*arguments, stdin=""):
    return CliRunner().invoke(app, [*map(str, arguments)], input=stdin)


def refused(*arguments):
    """Run a command that must be refused in one line, and return the line."""
    result = run(*arguments)
    assert (result.exit_code, result.stderr.count("error: ")) == (2, 1), result.output
    return next(line for line in result.stderr.splitlines() if line.startswith("error: "))


def done(*arguments, stdin=""):
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


@dataclass(frozen=True)
class Owned:
    """A searched module whose class, inputs and pickle are its owner's code.

    Attributes:
        place: The folder with the module `owners_net`, the pickle, its weights alone, and the study.
    """

    place: Path

    @property
    def db(self):
        return self.place / "plan.db"

    def said(self, **fields):
        """Have the database say something else of the model's source."""
        with sqlite3.connect(self.db) as connection:
            (text,) = connection.execute("SELECT source FROM model").fetchone()
            source = json.loads(text) | fields
            connection.execute("UPDATE model SET source = ?", [json.dumps(source)])
        connection.close()

    def source(self):
        with sqlite3.connect(self.db) as connection:
            (text,) = connection.execute("SELECT source FROM model").fetchone()
        connection.close()
        return json.loads(text)


@pytest.fixture(scope="session")
def searched(tmp_path_factory):
    """The study, made once by a person who names all code in the command."""
    place = tmp_path_factory.mktemp("owned")
    (place / "owners_net.py").write_text(NET)
    sys.path.insert(0, str(place))
    try:
        import owners_net

        torch.manual_seed(0)
        net = owners_net.Net()
        torch.save(net, place / "net.pt")
        torch.save(net.state_dict(), place / "weights.pt")
        with quick.short(), pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            quick.driver.search(
                "net.pt",
                trust_pickle=True,
                sample_inputs="owners_net:inputs",
                db="plan.db",
                device="cpu",
                candidates=["int8-row/plain/int8pack-mm"],
                max_ppl_increase=10.0,
                minimize="memory",
                time_budget_s=0.1,
            )
    finally:
        sys.path.remove(str(place))
        sys.modules.pop("owners_net", None)
    return place


@pytest.fixture
def owned(searched, tmp_path, monkeypatch):
    """A copy of the study and of its files, in the current folder."""
    place = Path(shutil.copytree(searched, tmp_path / "owned"))
    monkeypatch.chdir(place)
    study = Owned(place)
    study.said(path=str(place / "net.pt"))
    yield study
    sys.modules.pop("owners_net", None)
