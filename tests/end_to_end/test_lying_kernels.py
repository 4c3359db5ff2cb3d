"""A whole search, compiled and with processes of its own, among kernels that lie in every way.

The plug-in and the search are those of `studies/reliability`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoquant.profiler.timing import PROTOCOL
from autoquant.study.study import Study

STUDY = Path(__file__).parent.parent.parent / "studies/reliability/kernels.py"
LIES = (
    "scaled", "zeros", "one-nan", "one-column", "few-rows", "compiled-only", "eager-only", "noisy",
    "second", "rarely", "late", "real-weights", "remembered", "hangs", "hangs-later", "crashes",
    "crashes-in-model", "exits", "takes-memory",
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="jobs run in this process elsewhere"),
]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search among liars only, as it is found in its database."""
    folder = tmp_path_factory.mktemp("liars")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "AUTOQUANT_EAGER": "",
        "AUTOQUANT_IN_PROCESS": "",
    }
    command = [sys.executable, str(STUDY), str(folder / "made"), *LIES]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    study = Study.open(folder / "made/plan.db")
    yield study, result.stdout
    study.store.close()


def test_no_liar_stops_the_search_or_is_recommended(searched):
    study, told = searched
    assert "ended after" in told
    best = study.recommended()
    assert best is None or set(best.formats()) == {"bfloat16/plain"}
    proofs = study.proofs()
    proven = {name for plan in study.plans() for name in plan.formats() if plan.plan_id in proofs}
    assert proven == {"bfloat16/plain"}


@pytest.mark.parametrize("lie", LIES)
def test_each_liar_is_in_the_report_with_its_reason(searched, lie):
    study, told = searched
    timings = study.store.timings(study.facts.device, PROTOCOL)
    found = [each for subject, each in timings.items() if subject.format == f"{lie}/plain"]
    assert found and {each.outcome for each in found} <= {"incorrect", "failed"}
    assert all(each.reason for each in found)
    assert f"{lie}/plain/int8pack is " in told
