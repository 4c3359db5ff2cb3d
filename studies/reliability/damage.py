"""Damage real files in thousands of seeded ways, run the commands that read them, and count.

Every call runs in a forked process, with limits of time and memory. It has to end with exit code 0
or 2, start no program and open no connection. With 2 it has to say one line, change no file and
leave none behind; with 0 it may change only what the command is for.

    python studies/reliability/damage.py --count 10000 --out damage.jsonl --summary damage.json
    python studies/reliability/damage.py --only 4711        # one call again, with its output
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import io
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
os.environ |= {
    "AUTOQUANT_EAGER": "1",
    "AUTOQUANT_IN_PROCESS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

from damage import files, mutations  # noqa: E402 - after the path
from end_to_end import quick  # noqa: E402

LONGEST_S = 60  # of a core's time: a busy machine is no fault
LONGEST_WAIT_S = 600  # for a call that hangs, too
MORE_MEMORY_BYTES = 2 * 2**30
CHANGED_BY = {
    "solve": "plan.db",
    "rm": "plan.db",
    "merge": "plan.db",
    "apply": "new/",
    "report": "report.html",
    "repair": "repaired.db",
}  # with what their names begin, if the commands succeed
KINDS = {
    "of row": "a cell of a database",
    "bits flipped": "bits flipped",
    "cut to": "cut",
    "overwritten": "bytes overwritten",
    "inserted": "bytes inserted",
    "odd JSON": "JSON",
    "dropped": "a table dropped",
    "removed": "a row removed",
    "nothing (": "nothing (SQLite refused the change)",
    "header": "safetensors header",
    "entry": "entry of an archive",
    "TOML": "TOML",
}  # words of the mutations for a table
LEFT_ALONE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


@dataclass(frozen=True)
class Outcome:
    """What came of one call."""

    number: int
    file: str
    command: str
    damage: str
    code: int | None  # None: killed after `LONGEST_WAIT_S`
    wall_s: float
    cpu_s: float
    more_memory_bytes: int
    faults: tuple[str, ...]
    said: str


def main() -> None:
    arguments = _parsed()
    whole = Path(tempfile.gettempdir()) / f"autoquant-damage-{os.getuid()}"
    if not (whole / "done").exists():
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        files.make_files(whole)
        gc.collect()
        (whole / "done").touch()
    _import_everything()
    known = [case for case in files.cases(whole) if arguments.kind in case.file]
    numbers = range(arguments.start, arguments.start + arguments.count)
    if arguments.only is not None:
        numbers = range(arguments.only, arguments.only + 1)
    started = time.monotonic()
    outcomes = []
    with quick.short(), open(arguments.out or os.devnull, "w", encoding="utf-8") as out:
        _warm(whole, known)
        gc.collect()
        gc.freeze()  # or each forked process would look at all of it again
        for outcome in _outcomes(whole, known, numbers, arguments.jobs, arguments.seconds):
            outcomes.append(outcome)
            line = json.dumps(asdict(outcome))
            out.write(f"{line}\n")
            out.flush()
            if outcome.faults or arguments.only is not None:
                print(line, flush=True)
    summary = _summary(outcomes, time.monotonic() - started, arguments.jobs)
    print(json.dumps(summary, indent=1))
    if arguments.summary:
        Path(arguments.summary).write_text(json.dumps(summary, indent=1) + "\n")


def _outcomes(
    whole: Path, known: list[files.Case], numbers: range, jobs: int, seconds: float
) -> Iterator[Outcome]:
    """Yield what comes of each call, as it comes."""
    context = get_context("fork")
    queue: Any = context.SimpleQueue()
    end = time.monotonic() + seconds
    arguments = [(whole, known, numbers[job::jobs], end, queue) for job in range(jobs)]
    processes = [context.Process(target=_make_calls, args=each) for each in arguments]
    for process in processes:
        process.start()
    working = jobs
    while working:
        outcome = queue.get()
        if outcome is None:
            working -= 1
        else:
            yield outcome
    for process in processes:
        process.join()


def _make_calls(
    whole: Path, known: list[files.Case], numbers: range, end: float, queue: Any
) -> None:
    try:
        for number in numbers:
            if time.monotonic() > end:
                break
            queue.put(_call(whole, known, number))
    finally:
        queue.put(None)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--only", type=int)
    parser.add_argument("--kind", default="", help="only files whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="so many calls at once")
    parser.add_argument("--out", help="a line of JSON for each call")
    parser.add_argument("--summary", help="JSON: calls by kind of file and of damage")
    return parser.parse_args()


def _import_everything() -> None:
    """Import what commands import, so that each forked process has it."""
    import datasets  # noqa: F401
    import optuna  # noqa: F401
    import pandas  # noqa: F401
    import torchao  # noqa: F401
    import transformers  # noqa: F401

    from autoquant import (
        logs,
        prompting,  # noqa: F401
    )
    from autoquant.delivery import applier  # noqa: F401
    from autoquant.report import html  # noqa: F401
    from autoquant.store import open_store  # noqa: F401
    from autoquant.study import study  # noqa: F401

    logs.hide_warnings()


def _warm(whole: Path, known: list[files.Case]) -> None:
    """Run each command once on whole files, so that forked processes find everything prepared."""
    commands = {case.command[0]: case.command for case in known}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "files"
        for command in commands.values():
            shutil.copytree(whole, folder)
            with (
                contextlib.chdir(folder),
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
                contextlib.suppress(SystemExit),
            ):
                files.run(command)
            shutil.rmtree(folder)


def _call(whole: Path, known: list[files.Case], number: int) -> Outcome:
    draw = Random(number)
    case = files.pick(known, draw)
    with tempfile.TemporaryDirectory(prefix="damage-") as temporary:
        folder = Path(temporary) / "files"
        shutil.copytree(whole, folder)
        how = mutations.damage(folder / case.file, draw)
        before = _prints(folder)
        started = time.monotonic()
        code, cpu_s, more, said = _forked(folder, case.command, Path(temporary))
        wall_s = time.monotonic() - started
        faults = list(_faults(code, said, more))
        after = _prints(folder)
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        if code == 0:
            may = CHANGED_BY.get(case.command[0], "/")  # no name begins so
            changed = {name for name in changed if not name.startswith(may)}
        if changed:
            faults.append(f"files changed: {', '.join(sorted(changed))}")
    return Outcome(
        number, case.file, " ".join(case.command), how, code, round(wall_s, 2), round(cpu_s, 2),
        more, tuple(faults), said[-600:],
    )  # fmt: skip


def _prints(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _faults(code: int | None, said: str, more_memory_bytes: int) -> Iterator[str]:
    if code is None:
        yield f"not done after {LONGEST_WAIT_S} s"
    elif code == -signal.SIGXCPU:
        yield f"not done after {LONGEST_S} s of a core"
    elif code not in (0, 2):
        yield f"exit code {code}"
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == 2 and (len(errors) != 1 or len(errors[0]) > 2000):
        yield f"{len(errors)} lines of errors"
    if "Traceback" in said:
        yield "a traceback"
    if "started: " in said:
        yield "a program or a connection"
    if more_memory_bytes > MORE_MEMORY_BYTES:
        yield f"{more_memory_bytes / 2**20:.0f} MiB more memory"


def _forked(
    folder: Path, command: tuple[str, ...], place: Path
) -> tuple[int | None, float, int, str]:
    """Return the exit code (negative: a signal), CPU seconds, memory in bytes, and stderr.

    The memory is the peak of what was resident, less what was so when the process began.
    """
    child = os.fork()
    if child == 0:
        _become(folder, command, place)
    handle = os.pidfd_open(child)
    in_time, _, _ = select.select([handle], [], [], LONGEST_WAIT_S)
    os.close(handle)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    more = usage.ru_maxrss * 1024 - int((place / "resident").read_text())
    said = (place / "stderr").read_text(errors="replace")
    code = os.waitstatus_to_exitcode(status) if in_time else None
    return code, usage.ru_utime + usage.ru_stime, more, said


def _become(folder: Path, command: tuple[str, ...], place: Path) -> None:
    """Run a command in this forked process, and end it."""
    code = 1
    try:
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), number)
        os.chdir(folder)
        os.environ["AUTOQUANT_RECIPES"] = str(folder)
        (place / "resident").write_text(str(_measure_from_here()))
        resource.setrlimit(resource.RLIMIT_CPU, (LONGEST_S, LONGEST_S + 1))
        sys.addaudithook(_tell_of_programs)
        files.run(command)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - the fault that is looked for
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()  # as at the end of any process: it closes what is open
        os._exit(code)


def _measure_from_here() -> int:
    """Have Linux measure the peak of this process from now on, and return its resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _tell_of_programs(event: str, arguments: tuple[Any, ...]) -> None:
    if event in LEFT_ALONE:
        os.write(2, f"started: {event} {arguments}\n".encode())


def _summary(outcomes: list[Outcome], wall_s: float, jobs: int) -> dict[str, Any]:
    """Return what came of all calls, and of those of each kind of file and of damage."""
    return {
        "wall_s": round(wall_s),
        "jobs": jobs,
        "load": os.getloadavg()[2],
        "all": _row(outcomes),
        "by file": _rows(outcomes, lambda outcome: outcome.file),
        "by damage": _rows(outcomes, _kind_of_damage),
        "by command": _rows(outcomes, lambda outcome: outcome.command.split()[0]),
        "faults": {outcome.number: outcome.faults for outcome in outcomes if outcome.faults},
    }


def _rows(outcomes: list[Outcome], kind: Callable[[Outcome], str]) -> dict[str, dict[str, Any]]:
    kinds = sorted({kind(outcome) for outcome in outcomes})
    return {name: _row([each for each in outcomes if kind(each) == name]) for name in kinds}


def _row(outcomes: list[Outcome]) -> dict[str, Any]:
    codes = Counter(outcome.code for outcome in outcomes)
    slowest = max(outcomes, key=lambda outcome: outcome.wall_s)
    largest = max(outcomes, key=lambda outcome: outcome.more_memory_bytes)
    return {
        "calls": len(outcomes),
        "exit 0": codes[0],
        "exit 2": codes[2],
        "other": len(outcomes) - codes[0] - codes[2],
        "with faults": sum(bool(outcome.faults) for outcome in outcomes),
        "CPU s a call": round(sum(outcome.cpu_s for outcome in outcomes) / len(outcomes), 2),
        "most CPU s": max(outcome.cpu_s for outcome in outcomes),
        "slowest s": slowest.wall_s,
        "slowest": slowest.number,
        "most MiB": round(largest.more_memory_bytes / 2**20),
        "largest": largest.number,
    }


def _kind_of_damage(outcome: Outcome) -> str:
    for words, kind in KINDS.items():
        if words in outcome.damage:
            return kind
    return "other"


if __name__ == "__main__":
    main()
