"""One quantized model in `generate`, by several versions of the project in turn.

    python studies/users_loop/trees.py FOLDER TREE [TREE ...] [--turns 5]

A TREE is a checkout of the project. Each turn loads the folder in a new process by each tree, and
makes 128 tokens behind a prompt of 512. A line is a turn of a tree: milliseconds to the first token
and for each further one, and the seconds of the request. All trees have to give the same tokens.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

TIMED = """
import statistics, sys, time
import torch
import autoquant

model = autoquant.load(sys.argv[1])
ids = torch.randint(100, 40000, (1, 512), generator=torch.Generator().manual_seed(0))

def seconds(tokens):
    start = time.perf_counter()
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
    )
    return time.perf_counter() - start, made

seconds(8)
first = statistics.median(seconds(1)[0] for _ in range(4))
times = [seconds(128) for _ in range(4)]
request = statistics.median(time for time, _ in times)
print(first * 1e3, (request - first) / 127 * 1e3, request, hash(tuple(times[0][1][0].tolist())))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("trees", nargs="+")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    tokens = set()
    for turn in range(options.turns):
        for tree in options.trees:
            first_ms, step_ms, request_s, made = timed(options.folder, tree)
            tokens.add(made)
            print(
                f"{turn} {tree}: {first_ms:.0f} ms, {step_ms:.2f} ms, {request_s:.2f} s", flush=True
            )
    print("the same tokens" if len(tokens) == 1 else "not the same tokens")


def timed(folder: str, tree: str) -> tuple[float, float, float, str]:
    done = subprocess.run(
        [sys.executable, "-c", TIMED, folder],
        env={**os.environ, "PYTHONPATH": tree},
        check=True,
        capture_output=True,
        text=True,
    )
    first, step, request, made = done.stdout.split()[-4:]
    return float(first), float(step), float(request), made


if __name__ == "__main__":
    main()
