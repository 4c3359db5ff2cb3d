"""What one block of a replayed decode step is made of, from a trace of `autoquant bench --trace` or
of the attribution study.

    python studies/users_loop/block.py TRACE.json.gz

Prints, for each decode step in the trace, the kernels of its repeated block in order: microseconds
and the gap before (medians over the blocks), and their sums over the step.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
from pathlib import Path

FEWEST_BLOCKS = 4

Kernel = tuple[str, float, float]
"""Name, microseconds, and the gap before it."""


def kernels_of(path: Path) -> dict[str, list[Kernel]]:
    """The kernels of each step, by the step's name."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {
        event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"
    }
    steps: dict[str, list[Kernel]] = {}
    for pid, name in names.items():
        of_step = [
            event
            for event in events
            if event["ph"] == "X" and (event["pid"], event["tid"]) == (pid, 1)
        ]
        end, found = 0.0, []
        for event in sorted(of_step, key=lambda event: event["ts"]):
            found.append((event["name"], event["dur"], max(0.0, event["ts"] - end)))
            end = event["ts"] + event["dur"]
        steps[name] = found
    return steps


def repeated(names: list[str]) -> tuple[int, int, int]:
    """Where the longest repetition starts, how long what is repeated is, and how often it comes."""
    best = (0, 1, 0)
    for period in range(4, len(names) // FEWEST_BLOCKS):
        run = 0
        for place in range(len(names) - period):
            run = run + 1 if names[place] == names[place + period] else 0
            if run // period >= FEWEST_BLOCKS - 1 and run > best[1] * best[2]:
                best = (place - run + 1, period, run // period + 1)
        if best[2]:
            return best
    return best


def main() -> None:
    for step, kernels in kernels_of(Path(sys.argv[1])).items():
        start, period, count = repeated([name for name, _, _ in kernels])
        if "decode" not in step or not count:
            continue
        print(f"\n{step}: {len(kernels)} kernels, {count} blocks of {period}")
        sums = [0.0, 0.0]
        for place in range(period):
            same = kernels[start + place : start + period * count : period]
            taken, gap = (statistics.median(kernel[column] for kernel in same) for column in (1, 2))
            sums[0], sums[1] = sums[0] + taken, sums[1] + gap
            print(f"{taken:8.2f} {gap:6.2f}  {same[0][0][:100]}")
        print(
            f"{sums[0]:8.2f} {sums[1]:6.2f}  a block; {sum(sums) * count / 1000:.2f} ms of "
            f"{count} blocks"
        )


if __name__ == "__main__":
    main()
