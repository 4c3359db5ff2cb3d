"""Time a saved, quantized model against the unquantized one.

Both are compiled the same way and run in turn, one request after another.

python demo/compare.py QUANTIZED_FOLDER [--model ORIGINAL_FOLDER]
    [--workload prefill=128,decode=128]
"""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import autoquant
from autoquant.devices import backend
from autoquant.models import load_model
from autoquant.records import Workload
from autoquant.runtime.phases import make_phases
from autoquant.runtime.request import make_warm, time_requests


def main() -> None:
    """Load both, warm both up, and print milliseconds and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--workload", default="prefill=128,decode=128")
    parser.add_argument("--eager", action="store_true", help="do not compile either")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    workload = Workload.parse(arguments.workload)
    original = load_model(arguments.model)
    quantized = replace(original, module=autoquant.load(arguments.quantized))
    phases = []
    for loaded in (quantized, original):
        make = partial(make_phases, loaded, workload, compiled=not arguments.eager)
        ready, note = make_warm(make, backend("cpu").divisions)
        phases.append(ready)
        if note:
            print(f"note: {note}")
    times = time_requests(phases[0], phases[1], "cpu")
    print(f"{'':10}{'original':>12}{'quantized':>12}{'speedup':>10}")
    for phase in workload.phases:
        before, after = times.original_ms[phase.name], times.plan_ms[phase.name]
        print(f"{phase.name:10}{before:>9.2f} ms{after:>9.2f} ms{before / after:>9.2f}x")
    after, before = times.request_ms(workload.calls())
    print(f"{'request':10}{before:>9.1f} ms{after:>9.1f} ms{before / after:>9.2f}x")
    if times.note:
        print(f"note: {times.note}")


if __name__ == "__main__":
    main()
