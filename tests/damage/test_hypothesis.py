"""Files damaged in ways that Hypothesis draws: any outcome is a refusal in one line, or none.

What it found is kept as plain cases in `tests/store/test_store_damage.py` and in `test_files.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import autoquant
from autoquant.cli.main import app
from autoquant.errors import AutoquantError
from autoquant.models import load_model

from . import mutations

pytestmark = pytest.mark.slow

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


def some(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Draw the same examples in every run."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


def prints(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@some(100)
@given(seed=st.integers(0, 2**32), command=st.sampled_from(READS))
def test_a_command_reads_a_damaged_database_or_refuses_it(seed, command):
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        shutil.copyfile(GOLDEN / "finished.sqlite", "plan.db")
        how = mutations.damage(Path("plan.db"), Random(seed))
        before = prints(Path(folder))
        result = CliRunner().invoke(app, list(command))
        assert result.exit_code in (0, 2), (how, result.stderr, result.exception)
        if result.exit_code == 2:
            assert result.stderr.count("\n") == 1 and "unexpected" not in result.stderr, how
            assert prints(Path(folder)) == before, how


@some(40)
@given(seed=st.integers(0, 2**32), place=st.sampled_from(["checkpoint", "model"]))
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
