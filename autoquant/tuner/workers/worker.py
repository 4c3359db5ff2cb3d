"""The other side of `ForkingRunner`: a process that forks a child for each job.

Run by `child.py` with the number of a socket. This process never computes: a process whose OpenMP
threads have run cannot be forked. One for a GPU could not be forked anyway, and does the jobs
itself. A child ends with its job, which returns all its memory, or with
the last of several jobs of a class that keeps its process. A child that a signal ends is an answer
like any other, and so is one that takes nearly all memory, which is ended. When the searching
process ends, so do this one and its child.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch

from autoquant.devices import backend
from autoquant.devices.effort import timing_effort
from autoquant.devices.memory import available_bytes, own_bytes
from autoquant.processes import die_with
from autoquant.tuner.workers.forking import DIED, DONE, RAISED, TOLD, receive, send
from autoquant.tuner.workers.jobs import Bench, BenchSpec, Job

_TELLS, _STAYS, _ENDS = b"t", b"s", b"e"
"""The first byte of a child's message: one of several, or the last of a job.

After the last one it waits for its next job, or ends. However it ends then, the job is done.
"""
_LOOK_S = 0.1


def main() -> None:
    """Make the bench, then serve jobs until the socket closes."""
    torch.set_num_threads(1)
    connection = Connection(int(sys.argv[1]))
    sys.path[:] = receive(connection)
    spec: BenchSpec = receive(connection)
    if spec.cores:
        os.sched_setaffinity(0, spec.cores)
    try:
        bench = spec.make()
        warm_compiler()
        gc.freeze()  # modules stay, so the garbage collection of children need not visit them
    except Exception as error:  # noqa: BLE001 - the other side decides what to do without this process
        send(connection, (RAISED, portable(error)))
        return
    send(connection, (DONE, None))
    with suppress(EOFError, ConnectionError):
        if backend(spec.device).forks:
            children = _Children(bench, spec.threads, connection)
            while True:
                children.serve(receive(connection))
        torch.set_num_threads(spec.threads)
        while True:
            _serve(receive(connection), bench, connection)


def _serve(job: Job[Any], bench: Bench, connection: Connection) -> None:
    """Do a job in this process."""
    try:
        result = job.run(bench, lambda message: send(connection, (TOLD, message)))
    except Exception as error:  # noqa: BLE001 - raised again on the other side
        return send(connection, (RAISED, portable(error)))
    return send(connection, (DONE, result))


@dataclass(frozen=True, slots=True)
class _Child:
    """A process that does jobs of one class, and the end of its pipe that is ours."""

    process: int
    pipe: Connection
    does: type[Job[Any]]

    def end(self) -> int:
        """Have it end once its job is done; return its exit code, or a signal as a negative."""
        self.pipe.close()
        _, status = os.waitpid(self.process, 0)
        return os.waitstatus_to_exitcode(status)


class _Children:
    """Does jobs, each in a child."""

    def __init__(self, bench: Bench, threads: int, connection: Connection) -> None:
        self._bench, self._threads, self._connection = bench, threads, connection
        self._kept: _Child | None = None

    def serve(self, job: Job[Any]) -> None:
        """Pass a child's messages on, and report how it ended if it did not finish."""
        if job.needs_model:
            try:
                self._bench.loaded  # noqa: B018 - loaded here, children share it
            except Exception as error:  # noqa: BLE001 - raised again on the other side
                return send(self._connection, (RAISED, portable(error)))
        child = self._child_for(job)
        with suppress(ConnectionError):  # it has ended meanwhile, as is found below
            send(child.pipe, job)
        last, why_ended = _pass_on(child, self._connection)
        if last == _STAYS:
            self._kept = child
            return None
        code = child.end()
        if not last:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            send(self._connection, (DIED, why_ended or how))
        return None

    def _child_for(self, job: Job[Any]) -> _Child:
        kept, self._kept = self._kept, None
        if kept is not None:
            if kept.does is type(job):
                return kept
            kept.end()
        ours, theirs = Pipe()
        me = os.getpid()
        process = os.fork()
        if process == 0:
            ours.close()
            self._connection.close()
            die_with(me)
            be_ended_first()
            torch.set_num_threads(self._threads)
            _work(self._bench, theirs)
            os._exit(0)
        theirs.close()
        return _Child(process, ours, type(job))


def _pass_on(child: _Child, connection: Connection) -> tuple[bytes, str]:
    """Pass the child's messages on, up to the last of a job; return that one's first byte.

    The child may end before, or is ended if it takes nearly all memory: return nothing, and why it
    was ended, or an empty string.
    """
    available = available_bytes()
    most = (
        None
        if available is None
        else own_bytes(child.process) + int(timing_effort().most_memory * available)
    )
    with suppress(EOFError, OSError):  # the child has ended, in the middle of a message perhaps
        while True:
            while not child.pipe.poll(_LOOK_S):
                if most is not None and own_bytes(child.process) > most:
                    os.kill(child.process, signal.SIGKILL)
                    return b"", f"this program, since it took {most / 2**30:.1f} GiB of memory"
            message = child.pipe.recv_bytes()
            connection.send_bytes(message[1:])
            if message[:1] != _TELLS:
                return message[:1], ""
    return b"", ""


def be_ended_first() -> None:
    """Have the system, when it runs out of memory, end this process before any other."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _work(bench: Bench, pipe: Connection) -> None:
    """Do jobs until one ends its process or the pipe closes."""
    with suppress(EOFError):
        while True:
            job: Job[Any] = receive(pipe)
            try:
                result = job.run(bench, lambda message: _say(pipe, _TELLS, (TOLD, message)))
                _say(pipe, _STAYS if job.keeps_process else _ENDS, (DONE, result))
            except BaseException as error:  # noqa: BLE001 - raised again on the other side
                return _say(pipe, _ENDS, (RAISED, portable(error)))
            if not job.keeps_process:
                return None


def _say(pipe: Connection, kind: bytes, value: Any) -> None:
    pipe.send_bytes(kind + pickle.dumps(value))


def portable(error: BaseException) -> BaseException:
    """Return the error with its traceback as a note, or a like one that can be sent."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - exceptions may hold anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def warm_compiler() -> None:
    """Import the compiler and find out once what the CPU can do, so that no child has to."""
    from torch._inductor import compile_fx, cpu_vec_isa  # noqa: F401

    cpu_vec_isa.pick_vec_isa()


if __name__ == "__main__":
    main()
