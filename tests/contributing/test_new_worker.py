"""A new kind of worker: a `Runner` in a file of its own, and the rule in `start.py` that chooses
it.

The one here sends jobs through a connection to a thread, as another would to another machine: what
crosses the connection is plain pickle. It is run through what every runner has to do.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from multiprocessing import Pipe

import pytest
from tuner.workers.made_up_jobs import Count, Fail

from autoquant.tuner.workers.forking import DONE, RAISED, TOLD, receive, send
from autoquant.tuner.workers.in_process import InProcessRunner
from autoquant.tuner.workers.worker import portable


class RemoteRunner:
    """Runs each job where the other end of a connection is."""

    def __init__(self, bench):
        self._connection, theirs = Pipe()
        self._thread = threading.Thread(target=serve, args=(bench, theirs))
        self._thread.start()

    def run(self, job, on_message):
        send(self._connection, job)
        while True:
            kind, value = receive(self._connection)
            if kind == DONE:
                return value
            if kind == RAISED:
                raise value
            on_message(value)

    def close(self):
        self._connection.close()
        self._thread.join(timeout=10)


def serve(bench, connection):
    """Do jobs until the connection closes."""
    with suppress(EOFError), connection:
        while True:
            job = receive(connection)
            try:
                result = job.run(bench, lambda message: send(connection, (TOLD, message)))
            except Exception as error:  # noqa: BLE001 - raised on the other side
                send(connection, (RAISED, portable(error)))
            else:
                send(connection, (DONE, result))


@pytest.fixture(params=[InProcessRunner, RemoteRunner])
def runner(request):
    made = request.param(bench=None)
    yield made
    made.close()


def test_a_job_tells_what_it_learns_in_order_and_its_result_comes_last(runner):
    told = []
    process, _threads = runner.run(Count(3), told.append)
    assert told == [0, 1, 2] and process == os.getpid()


def test_what_a_job_raises_is_raised_and_the_next_job_runs(runner):
    with pytest.raises(ValueError, match="no luck"):
        runner.run(Fail("no luck"), lambda _message: None)
    told = []
    runner.run(Count(1), told.append)
    assert told == [0]


def test_a_closed_worker_has_ended():
    runner = RemoteRunner(bench=None)
    runner.close()
    assert not runner._thread.is_alive()
