"""Time plans in an inference engine itself, in turn with the unquantized model.

llama.cpp is timed by its own `llama-bench`: it comes with each release and package of llama.cpp,
tells its version and each time as JSON, and needs nothing of Python. Its bindings would be one more
build of llama.cpp than the user serves with.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from autoquant.delivery.exporting import export_to_disk
from autoquant.engines import engine as find_engine
from autoquant.errors import ConstraintError, ProcessDiedError, WorkloadError
from autoquant.events import (
    Listener,
    Notice,
    StageFinished,
    StageProgress,
    StageStarted,
    ignore,
    logged,
)
from autoquant.models.trust import NO_TRUST, Trust
from autoquant.records import ORIGINAL_LABEL, Interval, Plan, RunTimes, Workload
from autoquant.runtime.request import RequestTimes, paired
from autoquant.store import StudyFacts

ROUNDS = 5
_REQUEST, _FIRST = "request", "first token"
_TOOL = "llama-bench"
_LIMIT_S = 3600
Times = dict[str, float]
"""Milliseconds of a request and of its first token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRow:
    """One model in a run of `bench_engine`.

    Attributes:
        plan_id: None for the unquantized model.
        loop: The engine with its version.
        ratio: Request time over the unquantized model's, with its interval; None for that one.
        memory_bytes: Of the file that the engine reads.
        notes: How it was timed.
    """

    plan_id: str | None
    label: str
    loop: str
    times: RunTimes
    ratio: Interval | None
    memory_bytes: int
    notes: tuple[str, ...]


def check_engine(name: str, workload: Workload) -> None:
    """Refuse what cannot be timed, before any work.

    Raises:
        ConstraintError: The engine is not known, is not timed here, or is not installed.
        WorkloadError: It has no way to time the workload.
    """
    if find_engine(name).name != "llama.cpp":
        raise ConstraintError(
            f"only llama.cpp is timed here: export the plan for {name}, and time it there"
        )
    if shutil.which(_TOOL) is None:
        raise ConstraintError(
            f"timing in llama.cpp needs its program {_TOOL} on the PATH: install llama.cpp (its"
            " releases, conda-forge and Homebrew have it), or build it and add build/bin to the"
            " PATH"
        )
    if workload.batch > 1:
        raise WorkloadError(
            f"{_TOOL} times one sequence, and this study's workload has a batch of"
            f" {workload.batch}: search with --batch 1 to time plans in llama.cpp"
        )
    if not {phase.name for phase in workload.phases} & {"prefill", "decode"}:
        raise WorkloadError("llama.cpp runs language models, and this study's has no prompt")


def bench_engine(
    plans: Sequence[Plan],
    original: Plan,
    model: str,
    facts: StudyFacts,
    engine: str,
    listener: Listener = ignore,
    *,
    embedding: str | None = None,
    trust: Trust = NO_TRUST,
) -> list[EngineRow]:
    """Export plans and the unquantized model, and time the engine with each in turn.

    Files are written into a temporary folder, and removed at the end. A round starts the engine
    once for each model.

    Args:
        original: The study's plan that quantizes nothing.
        engine: Name of the engine.
        embedding: What becomes of embeddings of plans, see `export_to_disk`.

    Raises:
        ConstraintError, WorkloadError: `check_engine` refuses it.
        PlanError: The engine's files cannot hold a plan or the model.
        ProcessDiedError: The engine failed.
    """
    check_engine(engine, facts.workload)
    listener = logged(listener)
    every = [original, *plans]
    with tempfile.TemporaryDirectory(prefix="autoquant-bench-") as scratch:
        files = []
        listener(StageStarted("export", len(every)))
        for done, plan in enumerate(every):
            listener(StageProgress("export", done, plan.label))
            report = export_to_disk(
                plan,
                model,
                Path(scratch) / plan.plan_id,
                to=find_engine(engine).target.name,
                facts=facts,
                embedding=None if plan is original else embedding,
                trust=trust,
            )
            files.append(report.out / "model.gguf")
        listener(StageFinished("export", f"{len(files)} models"))
        sizes = [path.stat().st_size for path in files]
        runs = [partial(_llama_bench, path, facts) for path in files]
        found, version = _in_turn(runs, [plan.label for plan in every], listener)
    pairs = [paired(taken, found[0], "") for taken in found]
    return [
        EngineRow(
            plan_id=None if plan is original else plan.plan_id,
            label=ORIGINAL_LABEL if plan is original else plan.label,
            loop=f"{engine} {version}",
            times=_run_times(pair, facts.workload),
            ratio=None if plan is original else pair.ratio({_REQUEST: 1, _FIRST: 0}),
            memory_bytes=size,
            notes=(),
        )
        for plan, pair, size in zip(every, pairs, sizes, strict=True)
    ]


def _in_turn(
    runs: Sequence[Callable[[], tuple[Times, str]]], labels: Sequence[str], listener: Listener
) -> tuple[list[list[Times]], str]:
    """Return the times of each model in each round, and the engine's version."""
    found: list[list[Times]] = [[] for _ in runs]
    version = ""
    listener(StageStarted("run", ROUNDS * len(runs)))
    for number in range(ROUNDS):
        for place, (run, label) in enumerate(zip(runs, labels, strict=True)):
            listener(StageProgress("run", number * len(runs) + place, label))
            times, version = run()
            found[place].append(times)
    listener(StageFinished("run", f"{len(runs)} models, {ROUNDS} rounds"))
    spread = max(taken[_REQUEST] for taken in found[0]) / min(taken[_REQUEST] for taken in found[0])
    if spread > 1.2:
        listener(
            Notice(
                f"the unquantized model's requests differ by {spread:.1f} times between rounds:"
                " other programs are at work, close them for times to trust"
            )
        )
    return found, version


def _run_times(pair: RequestTimes, workload: Workload) -> RunTimes:
    request_ms, first_ms = pair.plan_ms[_REQUEST], pair.plan_ms[_FIRST]
    further = workload.new_tokens - 1
    step_ms = max(request_ms - first_ms, 0.0) / further if further else None
    return RunTimes(request_ms=request_ms, first_token_ms=first_ms, step_ms=step_ms)


def _llama_bench(path: Path, facts: StudyFacts) -> tuple[Times, str]:
    """Run `llama-bench` once on a prompt alone, and on a prompt with its new tokens.

    A prompt gives the first new token, so as many steps follow as there are new tokens but one.
    """
    prompt, further = facts.workload.prompt_tokens, facts.workload.new_tokens - 1
    command = [_TOOL, "-m", str(path), "-p", str(prompt), "-n", "0", "-r", "1", "-o", "json"]
    if further:
        command += ["-pg", f"{prompt},{further}"]
    if facts.device.type == "cpu" and facts.device.threads:
        command += ["-t", str(facts.device.threads), "-ngl", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    try:
        runs: list[Mapping[str, Any]] = json.loads(done.stdout)
        times = {int(run["n_gen"]): float(run["avg_ns"]) / 1e6 for run in runs}
        version = f"{runs[0]['build_commit']} (build {runs[0]['build_number']})"
        return {_REQUEST: times[further], _FIRST: times[0]}, version
    except (ValueError, LookupError, TypeError) as error:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ProcessDiedError(
            f"{_TOOL} gave no times (exit code {done.returncode}), and said: {said}"
        ) from error
