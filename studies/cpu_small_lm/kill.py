"""Kill a search at random moments, run it to the end, and see whether anything was measured twice
or came out differently.

    python kill.py MODEL --text FILE --db plan.db [--kills 10] [--longest 40]
        [--seed 0] -- MORE SEARCH OPTIONS

Each run is killed (SIGKILL) after a random time; the last one is let run to its end. Then it is run
once more, which must change nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

TABLES = ("timing", "loss", "plan", "proof")


def counts(database: Path) -> dict[str, int]:
    """Rows by table; nothing where the database does not exist yet."""
    if not database.exists():
        return dict.fromkeys(TABLES, 0)
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        names = {
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        return {
            t: connection.execute(f"SELECT count(*) FROM {t}").fetchone()[0] if t in names else 0
            for t in TABLES
        }


def timing_rows(database: Path) -> dict[tuple[object, ...], tuple[object, ...]]:
    """Every timing by what it is of, with its identity (row, when).

    A timing made again would show another one.
    """
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        rows = connection.execute(
            "SELECT device_key, protocol, n, k, m, format, kernel, id, created FROM timing"
        ).fetchall()
    return {row[:7]: row[7:] for row in rows}


def front(database: Path) -> list[str]:
    """Ids of the plans on the front."""
    command = [sys.executable, "-m", "autoquant", "pareto", str(database), "--json"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return sorted(row["plan_id"] for row in rows if row["on_front"])


def main() -> None:
    """Print one line per kill and a JSON object at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--db", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--longest", type=float, default=40.0, help="seconds until a kill at most")
    parser.add_argument("--seed", type=int, default=0)
    own, more = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, more = own[:at], own[at + 1 :]
    arguments = parser.parse_args(own)
    command = [
        sys.executable,
        "-m",
        "autoquant",
        "search",
        arguments.model,
        "--eval-text",
        arguments.text,
    ]
    command += ["--db", str(arguments.db), *more]
    moments = random.Random(arguments.seed)
    seen: dict[tuple[object, ...], tuple[object, ...]] = {}
    repeated = 0
    for number in range(1, arguments.kills + 1):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after_s = moments.uniform(3, arguments.longest)
        try:
            process.wait(after_s)
            how = "had ended by itself"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            how = f"killed after {after_s:.1f} s"
        rows = timing_rows(arguments.db) if counts(arguments.db)["timing"] else {}
        repeated += sum(1 for key, value in seen.items() if rows.get(key) != value)
        seen = rows
        print(f"run {number} {how}: {counts(arguments.db)}", flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = front(arguments.db), counts(arguments.db), timing_rows(arguments.db)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    second = front(arguments.db), counts(arguments.db), timing_rows(arguments.db)
    repeated += sum(1 for key, value in seen.items() if first[2].get(key) != value)
    result = {
        "kills": arguments.kills,
        "timings_changed": repeated,
        "rows": first[1],
        "front": first[0],
    }
    print(json.dumps({**result, "a_further_run_changes_nothing": first == second}))


if __name__ == "__main__":
    main()
