"""The choice of a search's runner."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial

import torch

from autoquant.candidates.registry import is_registered_here
from autoquant.devices import backend
from autoquant.devices.base import Place
from autoquant.errors import AutoquantError, WorkersError
from autoquant.evaluators.quality import FunctionQuality, TextQuality
from autoquant.events import Listener, Notice
from autoquant.models import SameModel
from autoquant.tuner.workers.asked import Workers
from autoquant.tuner.workers.crew import Crew
from autoquant.tuner.workers.forking import ForkingRunner
from autoquant.tuner.workers.in_process import InProcessRunner, Runner
from autoquant.tuner.workers.jobs import Bench, BenchSpec, LoadJob

IN_PROCESS_VARIABLE = "AUTOQUANT_IN_PROCESS"


def start_runner(
    bench: Bench, formats: Sequence[str], listener: Listener, workers: Workers | None = None
) -> Runner:
    """Return a `ForkingRunner` if another process can have the same model, formats and quality.

    Otherwise return an `InProcessRunner`, and give a notice why.

    Args:
        workers: Those that the user asked for, or None for the one that suits.

    Raises:
        WorkersError: They cannot be had.
    """
    if workers is not None:
        return _several(bench, formats, workers)
    reason = ""
    if not backend(bench.device).forks:
        reason = f"a process that uses {bench.device} cannot be forked"
    reason = reason or _needs_this_process(bench, formats)
    if not reason:
        try:
            return _loading(ForkingRunner(_spec_of(bench, formats)))
        except AutoquantError as error:
            reason = str(error)
    listener(
        Notice(
            f"everything runs in one process, which a crashing kernel would end: {reason}; if it"
            " does, the same command goes on"
        )
    )
    return InProcessRunner(bench)


def _several(bench: Bench, formats: Sequence[str], workers: Workers) -> Runner:
    """Return the workers that the user asked for as one runner.

    Raises:
        WorkersError: They cannot be had.
    """
    if reason := _needs_this_process(bench, formats):
        raise WorkersError(f"--workers needs processes of their own: {reason}")
    if bench.loaded.stream is not None:
        raise WorkersError(
            "--workers does not go with a model that is larger than the device: search it without"
        )
    spec = _spec_of(bench, formats)
    if workers.count is None:
        from autoquant.tuner.workers.ray_runner import ray_crew

        return ray_crew(spec, backend(bench.device).fingerprint(), workers.address)
    crew = Crew()
    for place in places_for(workers.count, bench.device):
        crew.join(partial(_at, spec, place))
    crew.wait_for_all()
    return crew


def _at(spec: BenchSpec, place: Place) -> Runner:
    return _loading(ForkingRunner(spec.at(place), place.environment))


def places_for(asked: int, device: str) -> list[Place]:
    """Return a place for each of so many workers.

    Raises:
        WorkersError: There are fewer.
    """
    places = backend(device).places()
    if asked <= len(places):
        return places[:asked]
    if not backend(device).forks:
        raise WorkersError(f"--workers {asked}: devices like {device} on this host: {len(places)}")
    threads = torch.get_num_threads()
    raise WorkersError(
        f"--workers {asked}: each computes with {threads} threads, and this host has cores for"
        f" {len(places)}: set OMP_NUM_THREADS to the threads that one should have"
    )


def _spec_of(bench: Bench, formats: Sequence[str]) -> BenchSpec:
    quality = bench.quality
    assert not isinstance(quality, FunctionQuality)  # `_needs_this_process` saw to it
    return BenchSpec(
        model=SameModel.of(bench.loaded),
        judged_on=quality.parts if isinstance(quality, TextQuality) else quality,
        workload=bench.workload,
        device=bench.device,
        execution=bench.execution,
        formats=tuple(formats),
        threads=torch.get_num_threads(),
    )


def _loading(runner: Runner) -> Runner:
    """Have the runner load the model, and return it; close it if it cannot."""
    try:
        runner.run(LoadJob(), lambda _message: None)
    except AutoquantError:
        runner.close()
        raise
    return runner


def _needs_this_process(bench: Bench, formats: Sequence[str]) -> str:
    """Return why no other process can do the work, or an empty string."""
    if os.environ.get(IN_PROCESS_VARIABLE):
        return f"{IN_PROCESS_VARIABLE} is set"
    if sys.platform != "linux":
        return f"a process cannot safely be forked on {sys.platform}"
    if bench.loaded.source.kind == "live":
        return "the model is a live module"
    if isinstance(bench.quality, FunctionQuality):
        return "the quality function is the caller's own"
    own = [format_id for format_id in formats if is_registered_here(format_id)]
    return f"{', '.join(own)} is registered in this process only" if own else ""
