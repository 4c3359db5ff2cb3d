"""How long it takes to trace and compile a model's phases, with and without following alike parts.

    python studies/search_cost/tracing.py MODEL PLAN.db [--rounds 3]

Makes the phases of the unquantized model and of the recommended plan, and runs each once. All is
compiled once before, so what is left is tracing, and looking compiled code up. Then in turn: every
part traced, and alike parts followed. Prints the seconds of each, and how many parts were traced.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from autoquant.delivery.applier import applied
from autoquant.models import LoadedModel, load_model
from autoquant.runtime import parts
from autoquant.runtime.phases import make_phases
from autoquant.study.study import Study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("db")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    study = Study.open(options.db)
    best = study.recommended()
    assert best is not None, "the search recommends a plan"
    plan = study.store.plan(best.plan_id)
    loaded = load_model(options.model, device="cpu")
    for label, module in (
        ("unquantized", loaded.module),
        (plan.label, applied(plan, loaded.module, None)),
    ):
        seconds, traced = compared(replace(loaded, module=module), study, options.rounds)
        words = ", ".join(
            f"{name} {statistics.median(each):.2f} s, {traced[name]} parts traced"
            for name, each in seconds.items()
        )
        print(f"{label}: {words}", flush=True)


def compared(
    loaded: LoadedModel, study: Study, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return the seconds and the numbers of traced parts of both ways, taken in turn."""
    never: Callable[..., None] = lambda *_arguments: None  # noqa: E731 - stands in for `followed`
    ways = {"every part traced": never, "alike parts followed": parts.followed}
    ready(loaded, study)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    traced: dict[str, int] = {}
    for _ in range(rounds):
        for name, follow in ways.items():
            counted = Counted(parts.make_fx)
            with patch.object(parts, "followed", follow), patch.object(parts, "make_fx", counted):
                seconds[name].append(ready(loaded, study))
            traced[name] = counted.calls
    return seconds, traced


class Counted:
    """Calls a function, and counts how often."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.calls, self._function = 0, function

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self._function(*arguments)


def ready(loaded: LoadedModel, study: Study) -> float:
    """Return the seconds until each phase was run once."""
    started = time.perf_counter()
    workload = study.facts.workload
    phases = make_phases(loaded, workload, compiled=True)
    for phase in workload.phases:
        phases.reset(phase.name)
        phases.run(phase.name)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
