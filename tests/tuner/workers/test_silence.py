"""Silent jobs: one that hangs is ended, one that others hold up is not."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from autoquant.errors import HungError
from autoquant.processes import computed_s
from autoquant.tuner.workers import forking
from autoquant.tuner.workers.forking import ForkingRunner

LIMIT_S = 80.0


class Silence:
    """A connection on a clock of its own, over which nothing comes before `answer_s`."""

    def __init__(self, answer_s=float("inf")):
        self.answer_s, self.now_s = answer_s, 0.0

    def poll(self, seconds):
        self.now_s = self.answer_s if seconds is None else self.now_s + seconds
        return self.now_s >= self.answer_s


@pytest.fixture
def wait(monkeypatch):
    def wait_on(connection, share, limit_s=LIMIT_S):
        runner = object.__new__(ForkingRunner)
        runner._process, runner._connection = SimpleNamespace(pid=1), connection
        monkeypatch.setattr(forking, "computed_s", lambda _process: share * connection.now_s)
        runner._wait(limit_s)

    return wait_on


@pytest.mark.parametrize("share", [0.0, 0.01, 0.9, 2.0])
def test_a_job_that_waits_or_has_its_cpu_is_ended_soon_after_the_limit(wait, share):
    connection = Silence()
    with pytest.raises(HungError, match="did not end within 80 s"):
        wait(connection, share)
    assert connection.now_s == 90


def test_a_job_that_others_hold_up_gets_ten_times_as_long(wait):
    wait(Silence(answer_s=700), share=0.1)
    connection = Silence()
    with pytest.raises(HungError):
        wait(connection, share=0.1)
    assert connection.now_s == 800


def test_an_answer_within_the_limit_and_one_without_a_limit_are_taken(wait):
    wait(Silence(answer_s=80), share=0.0)
    wait(Silence(answer_s=1e6), share=0.0, limit_s=None)


@pytest.mark.skipif(sys.platform != "linux", reason="nothing tells it elsewhere")
def test_what_a_process_and_its_children_compute_is_counted():
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    start = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        assert 0.3 <= computed_s(process.pid) + 0.02 < 10
        process.stdin.write(b"\n")
