"""Files damaged in ways that Hypothesis draws: any outcome is a refusal in one line, or none.

What it found is kept as plain cases in `tests/store/test_store_damage.py` and in `test_files.py`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import autoquant
from autoquant.cli.main import app
from autoquant.errors import AutoquantError
from autoquant.models import load_model
from autoquant.store.connect import open_existing

from . import mutations

pytestmark = pytest.mark.slow

BOX_S = 300
"""The time box of each test. On an idle machine all of its examples take less than a minute."""

GOLDEN = Path(__file__).parents[1] / "golden"
READS = (
    ("show", "plan.db"),
    ("show", "plan.db", "--why"),
    ("pareto", "plan.db", "--json"),
    ("report", "plan.db", "--out", "report.html"),
    ("studies", "plan.db"),
    ("diff", "plan.db", "e2a46f6b", "6deed148"),
    ("solve", "plan.db", "--max-ppl-increase", "5%"),
    ("export-timings", "plan.db"),
    ("repair", "plan.db", "--out", "new.db"),
)


Test = Callable[..., None]


def some(examples: int, **drawn: st.SearchStrategy[Any]) -> Callable[[Test], Test]:
    """Draw the same examples in every run. After `BOX_S` no further one is tried."""
    same = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    return lambda test: same(given(**drawn)(_boxed(test)))


def _boxed(test: Test) -> Test:
    began: list[float] = []
    failed: list[bool] = []

    @functools.wraps(test)
    def boxed(**drawn: Any) -> None:
        began.append(time.monotonic())
        if began[-1] - began[0] > BOX_S and not failed:
            return
        try:
            test(**drawn)
        except BaseException:
            failed.append(True)  # Hypothesis looks for the simplest example that fails
            raise

    return boxed


def prints(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@functools.cache
def database() -> bytes:
    """A finished search in today's schema: an older one is migrated before its rows are read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copy(GOLDEN / "finished.sqlite", folder))
        open_existing(path).close()
        return path.read_bytes()


@some(100, seed=st.integers(0, 2**32), command=st.sampled_from(READS))
def test_a_command_reads_a_damaged_database_or_refuses_it(seed, command):
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("plan.db").write_bytes(database())
        how = mutations.damage(Path("plan.db"), Random(seed))
        before = prints(Path(folder))
        result = CliRunner().invoke(app, list(command))
        assert result.exit_code in (0, 2), (how, result.stderr, result.exception)
        if result.exit_code == 2:
            assert result.stderr.count("\n") == 1 and "unexpected" not in result.stderr, how
            assert prints(Path(folder)) == before, how


@some(40, seed=st.integers(0, 2**32), place=st.sampled_from(["checkpoint", "model"]))
def test_a_damaged_folder_is_loaded_or_refused(seed, place):
    draw = Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(GOLDEN / place, Path(temporary) / place)
        path = draw.choice(sorted(folder.iterdir()))
        how = f"{path.name}: {mutations.damage(path, draw)}"
        before = prints(folder)
        try:
            autoquant.load(folder) if place == "checkpoint" else load_model(folder)
        except AutoquantError as error:
            assert "\n" not in str(error), how
        except BaseException as error:
            raise AssertionError(how) from error
        assert prints(folder) == before, how
