"""A small finished search, made up, in a database."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from builders.searched import fill
from typer.testing import CliRunner

import autoquant.tuner
from autoquant.events import Notice, StageFinished, StageProgress, StageStarted
from autoquant.records import Delivery
from autoquant.store import open_store
from autoquant.study.study import Study


@pytest.fixture
def deliver(database):
    """Keep deliveries in the database."""

    def keep(*deliveries: Delivery) -> None:
        store = open_store(database)
        for each in deliveries:
            store.put_delivery(each)
        store.close()

    return keep


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database that each test gets a copy of: a copy takes a hundredth of the time."""
    path = tmp_path_factory.mktemp("filled") / "plan.db"
    store = open_store(path)
    fill(store, {"max_ppl_increase": 0.01, "max_memory_bytes": None})
    store.close()
    return path


@pytest.fixture
def database(filled: Path, tmp_path: Path) -> Path:
    """A finished search with a limit of 1 %: `MIXED` is the recommended plan."""
    return Path(shutil.copy(filled, tmp_path / "plan.db"))


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


@pytest.fixture
def driver(monkeypatch, database):
    """A stand-in for `autoquant.tuner.driver`, whose `calls` are the keyword arguments it got."""
    module = ModuleType("autoquant.tuner.driver")
    module.calls = []
    module.error = None

    def search(model, **options):
        module.calls.append({"model": model, **options})
        listener = options["listener"]
        listener(StageStarted("timing", 2))
        listener(StageProgress("timing", 1, "int8-row at m=1"))
        listener(Notice("a layer was left alone"))
        listener(StageFinished("timing", "2 timings"))
        if module.error is not None:
            raise module.error
        return Study.open(database)

    module.search = search
    monkeypatch.setitem(sys.modules, "autoquant.tuner.driver", module)
    monkeypatch.setattr(autoquant.tuner, "driver", module, raising=False)
    return module
