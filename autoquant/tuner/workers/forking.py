"""Jobs in other processes, which return their memory and may crash."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeVar

from autoquant.errors import HungError, ProcessDiedError, WorkerLostError
from autoquant.processes import computed_s

if TYPE_CHECKING:
    from autoquant.tuner.workers.jobs import BenchSpec, Job

TOLD, DONE, RAISED, DIED = "told", "done", "raised", "died"
CHILD, WORKER = "autoquant.tuner.workers.child", "autoquant.tuner.workers.worker"
Result = TypeVar("Result")
_LONGEST_ENDING_S = 10
_LOOKS, _TIMES_AS_LONG = 8, 10
"""Looks at a job in each `silence_s`, and most of these that it gets while others hold it up."""
_WAITS, _COMPUTES = 0.02, 0.5
"""A silent job that computes for a share of the time between these is held up by other programs.

Above, it has the CPU it wants; below, it waits for something that does not come.
"""
_log = logging.getLogger(__name__)


_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What ends a process without any fault of its own."""


class ForkingRunner:
    """Runs jobs in children of a worker process, which has the model loaded.

    Each is fresh, but for jobs that keep their process for the next of their class. A process that
    cannot be forked, since it uses a GPU, runs all jobs itself.

    The worker is restarted if it dies. It runs in its own session, so Ctrl-C does not reach it, and
    it is killed when this process exits.

    Raises:
        AutoquantError: The worker cannot make the bench.
    """

    def __init__(self, spec: BenchSpec, environment: Mapping[str, str] | None = None) -> None:
        self._spec = spec
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._connection = self._start()

    def run(self, job: Job[Result], on_message: Callable[[Any], None]) -> Result:
        """Run a job as `Runner.run`.

        Raises:
            ProcessDiedError: A signal, or code that ended the process, stopped the job.
            WorkerLostError: The worker was ended from outside.
            HungError: It gave no message for `job.silence_s`, and was ended. It gets up to ten
                times as long while others leave it little of the machine.
        """
        if self._process is None:
            self._connection = self._start()
        try:
            send(self._connection, job)
            while True:
                self._wait(job.silence_s)
                kind, value = receive(self._connection)
                if kind != TOLD:
                    break
                on_message(value)
        except (EOFError, ConnectionError):
            raise self._death() from None
        except BaseException:
            self.close()  # the job's further messages have no reader
            raise
        if kind == RAISED:
            raise value
        if kind == DIED:
            raise ProcessDiedError(f"its process was ended by {value}")
        result: Result = value
        return result

    def _death(self, what: str = "its process was ended by") -> ProcessDiedError:
        """Return what to say of the worker's end, once it has ended."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LONGEST_ENDING_S)
        code = self._process.returncode
        self.close()
        if code is None or -code in _FROM_OUTSIDE:
            return WorkerLostError("the worker process was ended from outside")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return ProcessDiedError(f"{what} {how}")

    def _wait(self, silence_s: float | None) -> None:
        """Wait for a message, longer while other programs hold the job up.

        Raises:
            HungError: No message came in that time.
        """
        if self._connection.poll(silence_s) or silence_s is None:
            return
        assert self._process is not None
        look_s = silence_s / _LOOKS
        for _ in range(_LOOKS * (_TIMES_AS_LONG - 1)):
            before_s = computed_s(self._process.pid)
            if self._connection.poll(look_s):
                return
            share = (computed_s(self._process.pid) - before_s) / look_s
            if not _WAITS < share < _COMPUTES:
                break
        raise HungError(f"it did not end within {silence_s:.0f} s")

    def close(self) -> None:
        """End the worker, and its child with it."""
        if self._process is None:
            return
        end_process(self._process, self._connection)
        self._process = None

    def _start(self) -> Connection:
        self._process, self._connection = start_process(WORKER, self._environment)
        try:
            send(self._connection, sys.path)
            send(self._connection, self._spec)
            kind, value = receive(self._connection)
        except (EOFError, ConnectionError):
            raise self._death("the worker process could not start:") from None
        except BaseException:
            self.close()
            raise
        if kind == RAISED:
            self.close()
            raise value
        return self._connection


def start_process(
    module: str, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Run a module in its own session, with the number of the connection's other end.

    It imports from where this process does. With `-P`, the current folder is not searched first.

    Args:
        environment: Variables that differ from this process'.
    """
    imports_from = os.pathsep.join(filter(None, sys.path))
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", CHILD, str(os.getpid()), module, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **(environment or {}), "PYTHONPATH": imports_from},
            start_new_session=True,
        )
    _log.info("started worker process %d", process.pid)
    return process, Connection(ours.detach())


def end_process(process: subprocess.Popen[bytes], connection: Connection) -> None:
    """End a process of `start_process`, with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()


def send(connection: Connection, value: Any) -> None:
    """Send a value by plain pickle: tensors as bytes, without PyTorch's shared memory."""
    connection.send_bytes(pickle.dumps(value))


def receive(connection: Connection) -> Any:
    """Return what `send` sent.

    Both ends are ours: the socket has no name that another process could find.
    """
    return pickle.loads(connection.recv_bytes())
