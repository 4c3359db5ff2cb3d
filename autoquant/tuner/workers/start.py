"""The choice of a search's runner."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

from autoquant.candidates.registry import is_registered_here
from autoquant.devices import backend
from autoquant.errors import AutoquantError
from autoquant.evaluators.quality import FunctionQuality, TextQuality
from autoquant.events import Listener, Notice
from autoquant.models import SameModel
from autoquant.tuner.workers.forking import ForkingRunner
from autoquant.tuner.workers.in_process import InProcessRunner, Runner
from autoquant.tuner.workers.jobs import Bench, BenchSpec, LoadJob

IN_PROCESS_VARIABLE = "AUTOQUANT_IN_PROCESS"


def start_runner(bench: Bench, formats: Sequence[str], listener: Listener) -> Runner:
    """Return a `ForkingRunner` if another process can have the same model, formats and quality.

    Otherwise return an `InProcessRunner`, and give a notice why.
    """
    reason = _needs_this_process(bench, formats)
    if not reason:
        try:
            return _forking(bench, formats)
        except AutoquantError as error:
            reason = str(error)
    listener(
        Notice(
            f"everything runs in one process, which a crashing kernel would end: {reason}; if it"
            " does, the same command goes on"
        )
    )
    return InProcessRunner(bench)


def _forking(bench: Bench, formats: Sequence[str]) -> Runner:
    """Return a `ForkingRunner`, or raise `AutoquantError` if it cannot make the bench."""
    quality = bench.quality
    assert not isinstance(quality, FunctionQuality)  # `_needs_this_process` saw to it
    runner = ForkingRunner(
        BenchSpec(
            model=SameModel.of(bench.loaded),
            judged_on=quality.parts if isinstance(quality, TextQuality) else quality,
            workload=bench.workload,
            device=bench.device,
            execution=bench.execution,
            formats=tuple(formats),
            threads=torch.get_num_threads(),
        )
    )
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
    if not backend(bench.device).forks:
        return f"a process that uses {bench.device} cannot be forked"
    if bench.loaded.source.kind == "live":
        return "the model is a live module"
    if isinstance(bench.quality, FunctionQuality):
        return "the quality function is the caller's own"
    own = [format_id for format_id in formats if is_registered_here(format_id)]
    return f"{', '.join(own)} is registered in this process only" if own else ""
