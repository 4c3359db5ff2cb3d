"""The drivers of `studies/reliability` find nothing lost, nothing twice and nothing left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.processes]


def run(driver, *arguments, out):
    """What a driver found out, once it has come to its end without a fault."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), *filter(None, sys.path))),
    }
    command = [sys.executable, f"studies/reliability/{driver}.py", *arguments, "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("mode", ["one process", "workers"])
def test_killed_searches_lose_nothing_and_recommend_the_same(tmp_path, mode):
    found = run("kills", "--kills", "4", "--mode", mode, out=tmp_path / "out.json")
    assert found["faults"] == [] and found["kills"] >= 4 and found["facts_told"] > 0


def test_five_processes_on_one_database_fail_in_nothing(tmp_path):
    found = run("together", "--seconds", "30", out=tmp_path / "out.json")
    assert found["errors"] == [] and set(found["operations"]) >= {"search", "apply", "merge"}
