"""Kill searches at random moments, let them go on, and see whether anything was lost or repeated.

    python studies/reliability/kills.py [--kills 100] [--device cpu] [--mode MODE] [--seed 0]
        [--out FILE]

Each trial is a search of its own database. It is killed (SIGKILL) at a moment that is uniform over
the time of a whole search: the searching process alone, one of its workers, or all at once. Then
the same command goes on, is killed again up to three times, and comes to its end. Of each
trial it is checked that

- every fact that was saved before the kill is in the database at the end, once;
- all facts and the recommended plan are those of a search that was not killed;
- the same command once more measures nothing;
- no process is left five seconds after a kill;
- no file is left at the end that a search leaves that was not killed.

Prints a line a trial and a JSON object at the end. The exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

if __name__ == "__main__":  # before torch is imported
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import runs

LONGEST_S = 900.0
MOST_KILLS = 4
LONGEST_ORPHAN_S = 5.0
KEYS = {
    "timing": "n, k, m, format, kernel, working_set_bytes",
    "loss": "layer, numerics",
    "plan": "id",
    "proof": "plan_id",
    "delivery": "plan_id",
    "roofline": "device_key",
}
_UNIQUE = {"timing": "device_key, protocol, bias, dtype", "loss": "model_hash, quality_key, method"}
_CHANCE = {
    "timing": ("id", "created"),
    "loss": ("id", "created"),
    "plan": ("created", "study_id"),
    "proof": ("created",),
    "delivery": ("created",),
    "roofline": ("created",),
}
Facts = dict[str, list[tuple[object, ...]]]


@dataclass
class Outcome:
    """What was found out about a trial.

    Attributes:
        kills: What was killed, and after how many seconds.
        faults: What should not have happened.
    """

    kills: list[tuple[str, float]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    told: int = 0


@dataclass
class Reference:
    """A search that nobody killed.

    Attributes:
        seconds: How long a search takes: the shortest time so far.
        files: What it left beside its database.
    """

    seconds: float
    facts: Facts
    recommended: str | None
    files: set[str]


def rows(db: Path, table: str, columns: str = "*") -> list[tuple[object, ...]]:
    """Return rows as they are on the disk, and none of a database or table that is missing."""
    if not db.exists():
        return []
    with closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True, timeout=60)) as connection:
        try:
            return connection.execute(f"SELECT {columns} FROM {table}").fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return []
            raise


def facts(db: Path) -> Facts:
    """Return what a database holds of each table, without row numbers and times of saving."""
    found: Facts = {}
    with closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as connection:
        for table, chance in _CHANCE.items():
            names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            kept = ", ".join(name for name in names if name not in chance)
            told = connection.execute(f"SELECT {kept} FROM {table}").fetchall()
            found[table] = sorted((tuple(map(_without_seconds, row)) for row in told), key=repr)
    return found


def _without_seconds(cell: object) -> object:
    """Return a cell without what its proof took, which no two runs share."""
    if not isinstance(cell, str) or '"seconds"' not in cell:
        return cell
    return {name: value for name, value in json.loads(cell).items() if name != "seconds"}


def recommended(db: Path) -> str | None:
    """Return the plan that the study recommends, solved for again from its facts."""
    from autoquant.study.study import Study

    study = Study.open(db)
    try:
        best = study.recommended()
        kept = study.facts.recommended
        assert kept == (best.plan_id if best else None), "the kept recommendation is another"
        return kept
    finally:
        study.store.close()


def files(folder: Path) -> set[str]:
    """Return what lies below a folder, with what differs from run to run cut off."""
    return {
        "/".join(part[:24] for part in path.relative_to(folder).parts[:3])
        for path in folder.rglob("*")
        if path.name not in ("told", "output", "modules", "waits", "plan.db-wal", "plan.db-shm")
    }


def unkilled(run: runs.Run, db: Path) -> Reference:
    started = time.monotonic()
    code = runs.ended(runs.start(run), LONGEST_S)
    if code != 0:
        sys.exit(f"the search that nobody kills failed ({code}): {output(run)}")
    seconds = time.monotonic() - started
    return Reference(seconds, facts(db), recommended(db), files(run.folder))


def output(run: runs.Run) -> str:
    return (run.folder / "output").read_text(errors="replace")[-2000:]


def trial(run: runs.Run, db: Path, reference: Reference, draw: random.Random) -> Outcome:
    """Kill a search, let it go on, kill it again perhaps, let it end; check everything."""
    outcome = Outcome()
    for _ in range(MOST_KILLS):
        if _killed(run, reference, draw, outcome) is None:
            break
        check_told(run, db, outcome, "after a kill")
        _check_orphans(run, outcome)
    code = runs.ended(runs.start(run), LONGEST_S)
    if code != 0:
        outcome.faults.append(f"the same command ended with {code}: {output(run)}")
        return outcome
    check_told(run, db, outcome, "at the end")
    check_once(db, outcome)
    _check_same(run, db, reference, outcome)
    before = {table: rows(db, table) for table in KEYS}
    if (code := runs.ended(runs.start(run), LONGEST_S)) != 0:
        outcome.faults.append(f"the same command once more ended with {code}: {output(run)}")
    if before != {table: rows(db, table) for table in KEYS}:
        outcome.faults.append("the same command once more changed facts")
    _check_orphans(run, outcome)
    left = files(run.folder) - reference.files
    if left:
        outcome.faults.append(f"files were left: {sorted(left)[:5]}")
    return outcome


def _killed(
    run: runs.Run, reference: Reference, draw: random.Random, outcome: Outcome
) -> int | None:
    """Start the run and kill something of it; return how it ended, or None if it was earlier."""
    after_s = draw.uniform(0, reference.seconds)
    what = draw.choice(("search", "all") if run.in_process else ("search", "worker", "all"))
    process = runs.start(run)
    code = runs.ended(process, after_s)
    if code is not None:
        reference.seconds = min(reference.seconds, after_s)
        if code != 0:
            outcome.faults.append(f"ended by itself with {code}: {output(run)}")
        return None
    workers = [each for each in runs.alive(run.folder) if each != process]
    if what == "worker" and not workers:
        what = "search"
    victims = {"search": [process], "all": [process, *workers], "worker": workers}[what]
    if what == "worker":
        victims = [draw.choice(workers)]
    if not any([runs.kill(victim) for victim in victims]):
        return None
    code = runs.ended(process, LONGEST_S if what == "worker" else 20)
    if what != "worker" and code == 0:  # it had just ended: such a process takes signals, too
        return None
    outcome.kills.append((what, round(after_s, 2)))
    if what == "worker" and code not in (0, 2):
        outcome.faults.append(f"ended with {code} when a worker was killed: {output(run)}")
    elif what != "worker" and code != -9:
        outcome.faults.append(f"ended with {code} when it was killed: {output(run)}")
    return code


def check_told(run: runs.Run, db: Path, outcome: Outcome, when: str) -> None:
    if not run.told.exists():
        return
    told: dict[str, set[tuple[object, ...]]] = {}
    for line in run.told.read_text().splitlines():
        table, *key = json.loads(line)
        told.setdefault(table, set()).add(tuple(key))
    outcome.told = sum(map(len, told.values()))
    for table, keys in told.items():
        if lost := keys - set(rows(db, table, KEYS[table])):
            outcome.faults.append(f"{len(lost)} of {table} lost {when}: {sorted(lost)[:2]}")


def check_once(db: Path, outcome: Outcome) -> None:
    for table, key in KEYS.items():
        columns = ", ".join(filter(None, (key, _UNIQUE.get(table))))
        counts = Counter(rows(db, table, columns))
        if twice := [key for key, count in counts.items() if count > 1]:
            outcome.faults.append(f"{table} holds facts twice: {twice[:2]}")


def _check_same(run: runs.Run, db: Path, reference: Reference, outcome: Outcome) -> None:
    best = recommended(db)
    if run.refine:  # the sampler begins anew, and may find other plans
        return
    if best != reference.recommended:
        outcome.faults.append(f"recommends {best} instead of {reference.recommended}")
    now = facts(db)
    for table, wanted in reference.facts.items():
        if now[table] != wanted:
            outcome.faults.append(f"{table} differs from that of a search that was not killed")


def _check_orphans(run: runs.Run, outcome: Outcome) -> None:
    deadline = time.monotonic() + LONGEST_ORPHAN_S
    while left := runs.alive(run.folder):
        if time.monotonic() > deadline:
            outcome.faults.append(f"processes are left: {left}")
            for process in left:
                runs.kill(process)
            return
        time.sleep(0.05)


def modes(device: str) -> dict[str, dict[str, bool]]:
    """Return the kinds of searches; on a CPU most run in one process, where a trial is short."""
    if device != "cpu":  # a process that uses a GPU cannot be forked
        return {
            "one process": {"forked": False},
            "compiled": {"in_process": False, "compiled": True, "forked": False},
        }
    return {
        "one process": {},
        "refined": {"refine": True},
        "workers": {"in_process": False},
        "compiled": {"in_process": False, "compiled": True},
    }


_SHARE = {"one process": 0.65, "refined": 0.15, "workers": 0.15, "compiled": 0.05}


def trials(arguments: argparse.Namespace, place: Path) -> Iterator[tuple[str, Outcome, float]]:
    """Yield the mode, the outcome and the seconds of each trial, until there are enough kills."""
    model, text = runs.small_model(place)
    draw = random.Random(arguments.seed)
    kinds = modes(arguments.device)
    if arguments.mode:
        kinds = {arguments.mode: kinds[arguments.mode]}
    for mode, settings in kinds.items():
        wanted = round(arguments.kills * (_SHARE[mode] if len(kinds) > 1 else 1.0))
        reference = None
        number = done = 0
        while done < wanted:
            folder = place / f"{mode.replace(' ', '-')}-{number}"
            folder.mkdir()
            db = folder / "plan.db"
            run = runs.Run(
                arguments=runs.search_command(model, text, db, arguments.device),
                folder=folder,
                told=folder / "told",
                **settings,
            )
            number += 1
            started = time.monotonic()
            if reference is None:
                reference = unkilled(run, db)
                print(f"{mode}: {reference.seconds:.1f} s if not killed", flush=True)
                if run.forked:
                    runs.preload(run)
                continue
            if number == 2:  # now that all is imported, or read from the disk
                reference = unkilled(run, db)
                print(f"{mode}: {reference.seconds:.1f} s if not killed", flush=True)
                continue
            outcome = trial(run, db, reference, draw)
            done += len(outcome.kills)
            yield mode, outcome, time.monotonic() - started
            if not outcome.faults:
                shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--device", choices=sorted(runs.CANDIDATES), default="cpu")
    parser.add_argument("--mode", choices=("one process", "refined", "workers", "compiled"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the JSON object")
    arguments = parser.parse_args()
    import optuna
    import torch
    import transformers

    import autoquant.tuner.driver  # noqa: F401 - what is imported here need not be in each run

    place = Path(tempfile.mkdtemp(prefix="kills-"))
    counts: Counter[str] = Counter()
    whats: Counter[str] = Counter()
    faults: list[str] = []
    told = 0
    for mode, outcome, seconds in trials(arguments, place):
        counts[mode] += len(outcome.kills)
        whats.update(what for what, _ in outcome.kills)
        faults += outcome.faults
        told += outcome.told
        shown = ", ".join(f"{what} after {after_s} s" for what, after_s in outcome.kills)
        verdict = "; ".join(outcome.faults) or "nothing lost, nothing twice"
        print(f"{mode}: killed {shown or 'nothing'}: {verdict} ({seconds:.0f} s)", flush=True)
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "device": arguments.device,
        "kills": sum(counts.values()),
        "kills_by_search": dict(counts),
        "kills_by_victim": dict(whats),
        "facts_told": told,
        "faults": faults,
        "versions": {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "optuna": optuna.__version__,
        },
    }
    return runs.conclude(result, faults, arguments.out, place)


if __name__ == "__main__":
    sys.exit(main())
