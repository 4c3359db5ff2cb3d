"""The other side of `ForkingRunner`: a process that forks a child for each job.

Run by `child.py` with the number of a socket. This process never
computes: a process whose OpenMP threads have run cannot be forked. A child ends with its job, which
returns all its memory. A child that a signal ends is an answer like any other, and so is one that
takes nearly all memory, which is ended. When the searching process ends, so do this one and its
child.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch

from autoquant.devices.effort import timing_effort
from autoquant.devices.memory import available_bytes, own_bytes
from autoquant.processes import die_with
from autoquant.tuner.workers.forking import DIED, DONE, RAISED, TOLD, receive, send
from autoquant.tuner.workers.jobs import Bench, BenchSpec, Job

_ANSWERED = 87
"""The exit code of a child that sent its result. A kernel's own code may end it with any other."""
_LOOK_S = 0.1


def main() -> None:
    """Make the bench, then serve jobs until the socket closes."""
    torch.set_num_threads(1)
    connection = Connection(int(sys.argv[1]))
    sys.path[:] = receive(connection)
    spec: BenchSpec = receive(connection)
    try:
        bench = spec.make()
        warm_compiler()
        gc.freeze()  # modules stay, so the garbage collection of children need not visit them
    except Exception as error:  # noqa: BLE001 - the other side decides what to do without this process
        send(connection, (RAISED, portable(error)))
        return
    send(connection, (DONE, None))
    with suppress(EOFError, ConnectionError):
        while True:
            _serve(receive(connection), bench, spec.threads, connection)


def _serve(job: Job[Any], bench: Bench, threads: int, connection: Connection) -> None:
    """Fork, pass the child's messages on, and report how it ended if it did not finish."""
    if job.needs_model:
        try:
            bench.loaded  # noqa: B018 - loaded here, children share it
        except Exception as error:  # noqa: BLE001 - raised again on the other side
            return send(connection, (RAISED, portable(error)))
    ours, theirs = Pipe(duplex=False)
    me = os.getpid()
    child = os.fork()
    if child == 0:
        ours.close()
        connection.close()
        die_with(me)
        be_ended_first()
        torch.set_num_threads(threads)
        _work(job, bench, theirs)
        os._exit(_ANSWERED)
    theirs.close()
    why_ended = _pass_on(ours, connection, child)
    ours.close()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != _ANSWERED:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        send(connection, (DIED, why_ended or how))
    return None


def _pass_on(ours: Connection, connection: Connection, child: int) -> str:
    """Pass the child's messages on until it ends. End it if it takes nearly all memory.

    Return why it was ended, or an empty string.
    """
    available = available_bytes()
    most = (
        None
        if available is None
        else own_bytes(child) + int(timing_effort().most_memory * available)
    )
    with suppress(EOFError, OSError):  # the child has ended, in the middle of a message perhaps
        while True:
            while not ours.poll(_LOOK_S):
                if most is not None and own_bytes(child) > most:
                    os.kill(child, signal.SIGKILL)
                    return f"this program, since it took {most / 2**30:.1f} GiB of memory"
            connection.send_bytes(ours.recv_bytes())
    return ""


def be_ended_first() -> None:
    """Have the system, when it runs out of memory, end this process before any other."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _work(job: Job[Any], bench: Bench, answers: Connection) -> None:
    try:
        result = job.run(bench, lambda message: send(answers, (TOLD, message)))
        send(answers, (DONE, result))
    except BaseException as error:  # noqa: BLE001 - raised again on the other side
        send(answers, (RAISED, portable(error)))


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
