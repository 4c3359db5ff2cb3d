"""Search a model with different workers, kill some meanwhile, and compare what was found.

    python studies/fleet/fleet.py MODEL --workers 1 2 ray --out results.json [options of search]
    python studies/fleet/fleet.py MODEL --workers 2 --kill-every 5 --out killed.json

Each search gets a database of its own. The losses of layers and of uniform plans must be equal, and
the recommended plan is compared. `--kill-every` kills one of the search's worker processes at
random, again and again, until the plans are refined.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoquant.store import Store

WORKERS = ("autoquant.tuner.workers.worker", "ray::Actor")


def parents() -> dict[int, tuple[int, str]]:
    """Return (parent, command) of every process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(folder.name)] = parent, (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def workers_of(search: int) -> list[int]:
    """Return the worker processes below a search, and those that they forked."""
    all_of = parents()

    def is_below(process: int) -> bool:
        while process in all_of:
            if process == search:
                return True
            process = all_of[process][0]
        return False

    return [p for p, (_, text) in all_of.items() if any(w in text for w in WORKERS) and is_below(p)]


def kill_at_times(search: int, every_s: float, ended: threading.Event) -> int:
    """Kill a worker at random moments; return how many."""
    rng, killed = random.Random(0), 0
    while not ended.wait(rng.uniform(0, 2 * every_s)):
        found = workers_of(search)
        if found:
            victim = rng.choice(found)
            try:
                os.kill(victim, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass
    return killed


def busy_s() -> tuple[float, float]:
    """Return the seconds that all cores were busy and idle."""
    user, nice, system, idle, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system) / 100, idle / 100


def search(model: str, workers: str, options: list[str], every_s: float) -> dict[str, Any]:
    """Return the facts of a search, some of whose workers are killed."""
    folder = Path(tempfile.mkdtemp())
    db = folder / "plan.db"
    command = [sys.executable, "-m", "autoquant", "search", model, "--db", str(db)]
    command += ["--workers", workers, *options]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    before = busy_s()
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    ended, killed = threading.Event(), []
    killer = threading.Thread(
        target=lambda: killed.append(kill_at_times(process.pid, every_s, ended))
    )
    if every_s:
        killer.start()
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith("refine:"):
            ended.set()
    process.wait()
    ended.set()
    if every_s:
        killer.join()
    after = busy_s()
    facts = {
        "workers": workers,
        "exit_code": process.returncode,
        "seconds": time.monotonic() - started,
        "machine_busy": (after[0] - before[0]) / (sum(after) - sum(before)),
        "killed": sum(killed),
        "tried_again": sum("tried once more" in line for line in lines),
    }
    if process.returncode:
        return facts | {"output": lines[-5:]}
    from autoquant.store import open_store
    from autoquant.study.study import Study

    store = open_store(db)
    study = Study(store, next(iter(store.studies())))
    plans = {plan.plan_id: plan for plan in study.plans()}
    proofs = study.proofs()
    best = study.recommended() or study.candidate()
    losses = store.losses(study.facts.model_hash, *quality_of(store))
    return facts | {
        "stages": study.stage_seconds(),
        "proofs": len(proofs),
        "kinds": sorted(plans[i].kind for i in proofs),
        "failed": store.failed_proofs(study.study_id),
        "losses": {" ".join(key): loss for key, loss in sorted(losses.items())},
        "uniform": {
            plans[i].label: p.loss
            for i, p in proofs.items()
            if plans[i].kind in ("original", "uniform")
        },
        "best": None
        if best is None
        else {"plan": best.plan_id, "label": best.label, "formats": sorted(set(best.formats()))},
    }


def quality_of(store: Store) -> tuple[str, str]:
    """Return the quality and the method that losses were scored by."""
    from sqlalchemy import text

    with store.engine.connect() as connection:
        row = connection.execute(text("SELECT DISTINCT quality_key, method FROM loss")).one()
    return tuple(row)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--workers", nargs="+", default=["1", "2"])
    parser.add_argument("--kill-every", type=float, default=0.0)
    parser.add_argument("--out", default="")
    arguments, options = parser.parse_known_args()
    found = []
    for workers in arguments.workers:
        one = search(arguments.model, workers, options, arguments.kill_every)
        found.append(one)
        print(json.dumps({k: v for k, v in one.items() if k != "losses"}), flush=True)
    same = all(
        f.get("losses") == found[0].get("losses") and f.get("uniform") == found[0].get("uniform")
        for f in found
    )
    print(
        "the same losses:",
        same,
        "; the same plan:",
        len({json.dumps(f.get("best")) for f in found}) == 1,
    )
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
