"""Damage real files in thousands of seeded ways, run the commands that read them, and count.

Every call runs in a forked process, with limits of time and memory. It has to end with exit code 0
or 2. With 2 it has to say one line, change no file and leave none behind.

    python studies/reliability/damage.py --count 10000 --out damage.jsonl
    python studies/reliability/damage.py --only 4711        # one call again, with its output
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

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

LONGEST_S = 60
MORE_MEMORY_BYTES = 2 * 2**30
CHANGED_BY = ("solve", "rm", "merge", "apply", "report", "repair")  # if they succeed


@dataclass(frozen=True)
class Outcome:
    """What came of one call."""

    number: int
    file: str
    command: str
    damage: str
    code: int | None  # None: killed after `LONGEST_S`
    wall_s: float
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
    _warm(whole)
    gc.collect()
    gc.freeze()  # or each forked process would look at all of it again
    known = [case for case in files.cases(whole) if arguments.kind in case.file]
    numbers = range(arguments.start, arguments.start + arguments.count)
    started = time.monotonic()
    outcomes = []
    with open(arguments.out or os.devnull, "w", encoding="utf-8") as out:
        for number in numbers if arguments.only is None else [arguments.only]:
            if time.monotonic() - started > arguments.seconds:
                break
            outcome = _call(whole, known, number)
            outcomes.append(outcome)
            line = json.dumps(asdict(outcome))
            out.write(f"{line}\n")
            out.flush()
            if outcome.faults or arguments.only is not None:
                print(line, flush=True)
    _summarize(outcomes, time.monotonic() - started)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--only", type=int)
    parser.add_argument("--kind", default="", help="only files whose name holds this")
    parser.add_argument("--out")
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
    from autoquant.export import applier  # noqa: F401
    from autoquant.report import html  # noqa: F401
    from autoquant.store import open_store  # noqa: F401
    from autoquant.study import study  # noqa: F401

    logs.hide_warnings()


def _warm(whole: Path) -> None:
    """Run commands once on whole files, so that forked processes find everything prepared."""
    from typer.testing import CliRunner

    from autoquant.cli.main import app

    with (
        tempfile.TemporaryDirectory() as temporary,
        contextlib.chdir(temporary),
        quick.short(),
    ):
        shutil.copytree(whole, "files")
        os.chdir("files")
        for case in files.cases(Path()):
            if case.file in ("plan.db", "saved/autoquant.json", "model/config.json", "recipe.toml"):
                CliRunner().invoke(app, list(case.command))


def _call(whole: Path, known: list[files.Case], number: int) -> Outcome:
    draw = Random(number)
    case = files.pick(known, draw)
    with tempfile.TemporaryDirectory(prefix="damage-") as temporary:
        folder = Path(temporary) / "files"
        shutil.copytree(whole, folder)
        how = mutations.damage(folder / case.file, draw)
        before = _prints(folder)
        started = time.monotonic()
        code, more, said = _forked(folder, case.command, Path(temporary))
        wall_s = time.monotonic() - started
        faults = list(_faults(code, said, more))
        after = _prints(folder)
        may_change = code == 0 and case.command[0] in CHANGED_BY
        if before != after and not may_change:
            changed = sorted(name for name in before | after if before.get(name) != after.get(name))
            faults.append(f"files changed: {', '.join(changed)}")
    return Outcome(
        number, case.file, " ".join(case.command), how, code, round(wall_s, 2), more,
        tuple(faults), said[-600:],
    )  # fmt: skip


def _prints(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _faults(code: int | None, said: str, more_memory_bytes: int) -> Iterator[str]:
    if code is None:
        yield f"not done after {LONGEST_S} s"
    elif code not in (0, 2):
        yield f"exit code {code}"
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == 2 and (len(errors) != 1 or len(errors[0]) > 2000):
        yield f"{len(errors)} lines of errors"
    if "Traceback" in said:
        yield "a traceback"
    if more_memory_bytes > MORE_MEMORY_BYTES:
        yield f"{more_memory_bytes / 2**20:.0f} MiB more memory"


def _forked(folder: Path, command: tuple[str, ...], place: Path) -> tuple[int | None, int, str]:
    """Return the exit code (negative: a signal), added memory and stderr of a command."""
    child = os.fork()
    if child == 0:
        _become(folder, command, place)
    end = time.monotonic() + LONGEST_S
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.wait4(child, 0)
            return None, 0, (place / "stderr").read_text(errors="replace")
        time.sleep(0.01)
    own_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    more = max(usage.ru_maxrss * 1024 - own_bytes, 0)
    said = (place / "stderr").read_text(errors="replace")
    return os.waitstatus_to_exitcode(status), more, said


def _become(folder: Path, command: tuple[str, ...], place: Path) -> None:
    """Run a command in this forked process, and end it."""
    code = 1
    try:
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), number)
        os.chdir(folder)
        os.environ["AUTOQUANT_RECIPES"] = str(folder)
        with quick.short():
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


def _summarize(outcomes: list[Outcome], wall_s: float) -> None:
    codes = Counter(str(outcome.code) for outcome in outcomes)
    bad = [outcome for outcome in outcomes if outcome.faults]
    slowest = max(outcomes, key=lambda outcome: outcome.wall_s)
    largest = max(outcomes, key=lambda outcome: outcome.more_memory_bytes)
    print(
        f"{len(outcomes)} calls in {wall_s:.0f} s; exit codes {dict(codes)}; {len(bad)} with faults"
    )
    print(f"slowest: {slowest.wall_s} s, number {slowest.number} ({slowest.command})")
    print(f"most memory: {largest.more_memory_bytes / 2**20:.0f} MiB, number {largest.number}")
    for kind, count in Counter(outcome.file for outcome in outcomes).most_common():
        own = [outcome for outcome in outcomes if outcome.file == kind]
        print(f"  {kind}: {count} calls, {sum(outcome.code == 2 for outcome in own)} refused, "
              f"{sum(bool(outcome.faults) for outcome in own)} with faults")  # fmt: skip


if __name__ == "__main__":
    main()
