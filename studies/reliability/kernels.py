"""Search a tiny model with kernels that lie, and print what became of each.

    python studies/reliability/kernels.py FOLDER [LIE ...]

FOLDER is made: the plug-in, the model and the database lie there. Without names all lies are tried
in one search. The search is a real one: on the CPU, compiled, with processes of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import lying_kernels

if TYPE_CHECKING:
    from autoquant.study.study import Study

SHORT = {"highest_other_load": 9.0, "candidate_limit_s": 60.0, "most_memory": 0.05}


def main(folder: Path, lies: list[str]) -> None:
    """Make the files, then search in a process that has the plug-in installed."""
    lying_kernels.entry_points(folder / "plug-in")
    save_model(folder / "model.pt2")
    path = os.pathsep.join([str(folder / "plug-in"), *filter(None, sys.path)])
    command = [sys.executable, __file__, "--searching", str(folder), *lies]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)


def save_model(path: Path) -> None:
    """Export three linears of one shape, whose inputs are larger than those of a timing."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.GELU())]
    model = nn.Sequential(*layers[:-1]).to(torch.bfloat16)
    x = 5 * torch.randn(8, 64, dtype=torch.bfloat16)
    torch.export.save(torch.export.export(model, (x,)), path)


def search(folder: Path, lies: list[str]) -> None:
    import autoquant
    from autoquant.candidates import known_formats
    from autoquant.devices.effort import TimingEffort, use_timing_effort
    from autoquant.events import Notice

    use_timing_effort(TimingEffort(**SHORT))
    plug_in = [fmt.id for fmt in lying_kernels.formats()]
    assert set(plug_in) <= set(known_formats())
    candidates = [f"{name}/plain" for name in lies] or plug_in
    started = time.monotonic()
    study = autoquant.search(
        str(folder / "model.pt2"),
        db=str(folder / "plan.db"),
        device="cpu",
        candidates=candidates,
        time_budget_s=120,
        listener=lambda event: print(event.text, flush=True) if isinstance(event, Notice) else None,
    )
    print(f"\nended after {time.monotonic() - started:.0f} s\n")
    print_outcomes(study, candidates)


def print_outcomes(study: Study, candidates: list[str]) -> None:
    """Print a table: each format, the outcome of its timings, and the first reason."""
    from autoquant.profiler.timing import PROTOCOL

    timings = study.store.timings(study.facts.device, PROTOCOL)
    best = study.recommended()
    used = set() if best is None else set(best.formats())
    print("| kernel | outcome | reason | recommended |\n| --- | --- | --- | --- |")
    for name in candidates:
        found = [each for subject, each in timings.items() if subject.format == name]
        outcomes = ", ".join(sorted({each.outcome for each in found}))
        reason = next((each.reason for each in found if each.outcome != "ok"), "")
        print(f"| {name.partition('/')[0]} | {outcomes} | {reason} | {name in used} |")


if __name__ == "__main__":
    if sys.argv[1] == "--searching":
        search(Path(sys.argv[2]), sys.argv[3:])
    else:
        main(Path(sys.argv[1]).resolve(), sys.argv[2:])
