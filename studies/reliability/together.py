"""Work on one database from five processes at once, and see whether any of them fails or waits.

    python studies/reliability/together.py [--seconds 600] [--out FILE]

Two processes run the same searches at the same time, so that both save the same facts; one applies
plans; one merges a database that holds new timings each time; one searches and removes its study.
At the end it is checked that the database is sound, holds every fact that was saved and not
removed, and none twice.

Prints a JSON object: operations done, errors, the longest operation, and the longest wait for the
right to write. The exit code is 1 if there was an error.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import kills
import runs

Command = tuple[str, ...]
LONGEST_END_S = 300.0


@dataclass
class Worker:
    """One process after the other, each of which runs the next command.

    Attributes:
        folder: Where its processes write.
    """

    name: str
    folder: Path
    commands: Iterator[Command]
    told: str = "told"
    process: int | None = None
    command: Command = ()
    began_s: float = 0.0
    done: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    longest_s: Counter[str] = field(default_factory=Counter)

    def run(self) -> runs.Run:
        return runs.Run(
            arguments=self.command, folder=self.folder, told=self.folder / self.told, refine=True
        )

    def go_on(self, *, begin: bool) -> None:
        """Note the end of a process, and begin the next."""
        if self.process is not None:
            code = runs.ended(self.process)
            if code is None:
                return
            self._note(code)
        if begin:
            self.command = next(self.commands)
            self.began_s = time.monotonic()
            self.process = runs.start(self.run())

    def _note(self, code: int) -> None:
        what = self.command[0]
        self.process = None
        self.done[what] += 1
        self.longest_s[what] = max(self.longest_s[what], time.monotonic() - self.began_s)
        if code != 0:
            output = (self.folder / "output").read_text(errors="replace").strip()
            last = " / ".join(output.splitlines()[-3:])
            self.errors.append(f"{self.name}: {' '.join(self.command[:2])}: {code}: {last}")


def workers(place: Path, model: Path, text: Path, db: Path) -> list[Worker]:
    """Return the five workers."""
    other = place / "other.db"
    shutil.copy(db, other)
    (plan,) = kills.rows(db, "study", "recommended")[0]

    def searches() -> Iterator[Command]:
        for seed in range(1, 1_000_000):
            yield runs.search_command(model, text, db, more=("--seed", str(seed)))

    def applies() -> Iterator[Command]:
        out = place / "applied"
        while True:
            shutil.rmtree(out, ignore_errors=True)
            yield "apply", str(db), "--plan", str(plan), "--out", str(out)

    def merges() -> Iterator[Command]:
        for number in range(1_000_000):
            with closing(sqlite3.connect(other)) as connection, connection:
                connection.execute("UPDATE timing SET protocol = ?", (f"merged {number}",))
            yield "merge", str(db), str(other)

    def removals() -> Iterator[Command]:
        own = ("--keep", "lm_head")
        while True:
            yield runs.search_command(model, text, db, more=own)
            yield "rm", str(db), _study_with(db, "lm_head"), "--yes"

    def worker(name: str, commands: Callable[[], Iterator[Command]], told: str = "told") -> Worker:
        folder = place / name.replace(" ", "-")
        folder.mkdir()
        return Worker(name, folder, commands(), told)

    return [
        worker("search", searches),
        worker("same search", searches),
        worker("apply", applies),
        worker("merge", merges),
        worker("rm", removals, told="removed"),
    ]


def _study_with(db: Path, kept: str) -> str:
    studies = kills.rows(db, "study", "id, identity")
    return next(str(name) for name, identity in studies if kept in str(identity))


def check(db: Path, team: list[Worker]) -> list[str]:
    """Return what is wrong with the database."""
    outcome = kills.Outcome()
    for each in team:
        if each.told == "told":
            kills.check_told(each.run(), db, outcome, f"by {each.name}")
    kills.check_once(db, outcome)
    with closing(sqlite3.connect(db)) as connection:
        sound = connection.execute("PRAGMA integrity_check").fetchall()
        if sound != [("ok",)]:
            outcome.faults.append(f"integrity: {sound[:2]}")
        if broken := connection.execute("PRAGMA foreign_key_check").fetchall():
            outcome.faults.append(f"foreign keys: {broken[:2]}")
    return outcome.faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--out", type=Path, help="file for the JSON object")
    arguments = parser.parse_args()
    import autoquant.tuner.driver  # noqa: F401 - what is imported here need not be in each run

    place = Path(tempfile.mkdtemp(prefix="together-"))
    model, text = runs.small_model(place)
    db = place / "plan.db"
    first = runs.Run(
        arguments=runs.search_command(model, text, db), folder=place, told=place / "told"
    )
    kills.unkilled(first, db)
    runs.preload(first)
    team = workers(place, model, text, db)
    started = time.monotonic()
    while time.monotonic() < started + arguments.seconds:
        for each in team:
            each.go_on(begin=True)
        time.sleep(0.005)
    deadline = time.monotonic() + LONGEST_END_S
    while any(each.process is not None for each in team) and time.monotonic() < deadline:
        for each in team:
            each.go_on(begin=False)
        time.sleep(0.005)
    faults = [error for each in team for error in each.errors] + check(db, team)
    faults += [f"{each.name} does not end" for each in team if each.process is not None]
    waits = [float(line) for each in team for line in runs.waits(each.run())]
    operations: Counter[str] = sum((each.done for each in team), Counter())
    longest = {each.name: {k: round(v, 1) for k, v in each.longest_s.items()} for each in team}
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "seconds": arguments.seconds,
        "operations": dict(operations),
        "errors": faults,
        "longest_operation_s": longest,
        "transactions": len(waits),
        "longest_wait_s": round(max(waits, default=0.0), 3),
        "waits_above_100_ms": sum(wait > 0.1 for wait in waits),
        "versions": {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version},
    }
    return runs.conclude(result, faults, arguments.out, place)


if __name__ == "__main__":
    sys.exit(main())
