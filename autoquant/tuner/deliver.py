"""Deliver: save the best plan, load it in a new process, and run it as its user will."""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from autoquant.candidates.registry import is_registered_here
from autoquant.delivery import applier, checkpoint, on_disk
from autoquant.devices import backend
from autoquant.devices.effort import TimingEffort, timing_effort
from autoquant.devices.memory import release_memory
from autoquant.errors import ProcessDiedError, first_line
from autoquant.events import Listener, Notice, StageFinished, StageProgress, StageStarted
from autoquant.files import raise_if_full, scratch_folder
from autoquant.models import LoadedModel, SameModel
from autoquant.models.copies import shallow_copy
from autoquant.models.stand_in import to_time
from autoquant.models.streaming import stream_of
from autoquant.records import Delivery, Plan, Where
from autoquant.runtime.caches import clear_caches
from autoquant.runtime.request import MAX_RELATIVE_ERROR
from autoquant.runtime.user_loop import Answer, Usage, first_difference, time_user_loops, warm_up
from autoquant.stopwatch import Stopwatch, seconds_words
from autoquant.study.delivered import is_disturbed
from autoquant.study.study import Study
from autoquant.tuner.workers.delivery_process import DeliveryProcess
from autoquant.tuner.workers.start import IN_PROCESS_VARIABLE

TRIES = 3
_ROOM_IN_MODELS = 3
"""Another process needs memory for the unquantized model, the plan, and all else."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverySpec:
    """All that a process needs to load a plan and the unquantized model, check and time them.

    Attributes:
        folder: Where the plan was saved.
        expected: The plan's answer in the memory of the search.
        threads: The number of threads to compute with.
        effort: The effort of the timings.
    """

    plan_id: str
    folder: Path
    model: SameModel
    usage: Usage
    expected: Answer
    threads: int
    effort: TimingEffort = field(default_factory=timing_effort)


def deliver_best(study: Study, deliver: Callable[[Plan], Delivery], listener: Listener) -> None:
    """Deliver the plan that would be recommended; if it is refused, the next best, a few times.

    A delivery that the store knows is not repeated, unless other programs used the machine then and
    the plan was refused.
    """
    known = study.deliveries()
    study.store.forget_deliveries(
        plan_id for plan_id in study.refused() if is_disturbed(known[plan_id])
    )
    tries = 0
    while tries < TRIES and (plan := _next(study)) is not None:
        if tries == 0:
            listener(StageStarted("deliver", 0))
        listener(
            StageProgress(
                "deliver", tries, f"{plan.label}: saved, loaded again, and timed as you will run it"
            )
        )
        delivery = deliver(plan)
        _log.info("delivered %s: %s", plan.label, seconds_words(delivery.seconds))
        study.store.put_delivery(delivery)
        tries += 1
        if reason := study.refused().get(plan.plan_id):
            listener(Notice(f"plan {plan.plan_id} ({plan.label}) is not recommended: {reason}"))
    if tries:
        listener(StageFinished("deliver", _summary(study, tries)))


def _next(study: Study) -> Plan | None:
    """Return the best plan; None if it was delivered already or is the unquantized model."""
    plan = study.candidate()
    if plan is None or plan.kind == "original" or plan.plan_id in study.deliveries():
        return None
    return plan


def _summary(study: Study, tries: int) -> str:
    best = study.recommended()
    delivery = study.deliveries().get(best.plan_id) if best else None
    plans, them = ("plan", "it") if tries == 1 else ("plans", "them")
    tried = f"{tries} {plans} run as you will run {them}"
    if best is None or delivery is None or delivery.ratio is None:
        return f"{tried}; none is better there than the unquantized model"
    speed = 1 / delivery.ratio.value
    return f"{tried}; {best.label}: {speed:.2f} times the speed of the unquantized model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliverer:
    """Delivers plans of one model.

    Attributes:
        calibration: Token ids of the search, for weights that are rounded for their layers' inputs.
    """

    loaded: LoadedModel
    usage: Usage
    listener: Listener
    calibration: Sequence[Sequence[int]] | None = None
    process: DeliveryProcess = field(default_factory=DeliveryProcess)

    def make_ready(self) -> None:
        """Start the process that will load plans, while there is other work to wait for."""
        if not self._no_process():
            self.process.start(self.usage.device)

    def close(self) -> None:
        """End that process, if it still waits."""
        self.process.close()

    def __call__(self, plan: Plan) -> Delivery:
        """Deliver `plan`. If anything fails, the delivery has the reason and no times."""
        watch = Stopwatch()
        live = self.loaded.source.kind == "live"
        reason = self._needs_this_process(plan)
        if reason:
            self.listener(
                Notice(f"plan {plan.label} is not loaded again in a new process: {reason}")
            )
        where: Where = "same process" if reason else "new process"
        if live:
            where = "in memory"
        try:
            with watch.part("apply"):
                quantized = applier.applied(plan, self.loaded.module, self.calibration)
            if live:
                return check_and_time(
                    plan.plan_id, quantized, shallow_copy(self.loaded.module), self.usage
                )
            with scratch_folder(Path(tempfile.gettempdir()) / "autoquant-delivery") as folder:
                with watch.part("save"):
                    checkpoint.write(replace(self.loaded, module=quantized), plan, folder)
                    spec = self._spec(plan, folder, self.usage.answer_of(quantized))
                del quantized
                if where == "new process":
                    delivery = self._in_new_process(spec)
                else:
                    original = self.loaded
                    if original.stream is None:
                        original = replace(original, module=shallow_copy(original.module))
                    delivery = load_and_deliver(spec, lambda: original)
                return replace(delivery, seconds={**watch.seconds, **delivery.seconds})
        except Exception as error:  # noqa: BLE001 - any error is a fact about the plan
            raise_if_full(error)
            reason = first_line(error, with_type=True)
            return Delivery(plan_id=plan.plan_id, loop=self.usage.loop, where=where, reason=reason)

    def _no_process(self) -> str:
        """Say why no other process can load any plan; empty if one can."""
        if os.environ.get(IN_PROCESS_VARIABLE):
            return f"{IN_PROCESS_VARIABLE} is set"
        return "the model is a live module" if self.loaded.source.kind == "live" else ""

    def _needs_this_process(self, plan: Plan) -> str:
        """Say why no other process can load the plan; empty if one can."""
        if reason := self._no_process():
            return reason
        own = sorted(filter(is_registered_here, plan.formats()))
        if own:
            return f"{', '.join(own)} is registered in this process only"
        try:
            pickle.dumps(self.usage)
        except Exception as error:  # noqa: BLE001 - inputs of the caller's own may raise anything
            return f"its sample inputs cannot be sent there ({first_line(error)})"
        return ""

    def _spec(self, plan: Plan, folder: Path, expected: Answer) -> DeliverySpec:
        return DeliverySpec(
            plan_id=plan.plan_id,
            folder=folder,
            model=SameModel.of(self.loaded),
            usage=self.usage,
            expected=expected,
            threads=torch.get_num_threads(),
        )

    def _in_new_process(self, spec: DeliverySpec) -> Delivery:
        """Run `load_and_deliver` in a new process, and in a second one if the first dies.

        A plan that ends its process does so again. A kill from outside does not come twice.
        """
        try:
            return self._in_one_process(spec)
        except ProcessDiedError as death:
            self.listener(Notice(f"tried once more: {death}"))
            return self._in_one_process(spec)

    def _in_one_process(self, spec: DeliverySpec) -> Delivery:
        watch = Stopwatch()
        with _moved_off_gpu(self.loaded.module, self.usage.device), watch.part("process"):
            delivery: Delivery = self.process.run(spec)
        # What is left over is the start of the process, if that was not done ahead.
        start_s = max(0.0, watch.seconds["process"] - sum(delivery.seconds.values()))
        return replace(delivery, seconds={"start": start_s, **delivery.seconds})


@contextmanager
def _moved_off_gpu(module: nn.Module, device: str) -> Iterator[None]:
    """Keep the model on the CPU meanwhile, if a GPU has no room for another process beside it."""
    place = backend(device)
    if place.free_bytes() is None:
        yield
        return
    stream = stream_of(module)
    clear_caches()
    if stream is not None:
        stream.let_go()
        stream.forget_uploads()
    release_memory()
    place.trim_memory()
    moved = stream is None and (place.free_bytes() or 0) < _ROOM_IN_MODELS * applier.module_bytes(
        module
    )
    if moved:
        module.to("cpu")
        place.trim_memory()
    try:
        yield
    finally:
        if moved:
            module.to(device)


def load_and_deliver(
    spec: DeliverySpec, load_original: Callable[[], LoadedModel], where: Where = "same process"
) -> Delivery:
    """Load the saved plan, compare its answer with the expected one, and time it."""
    watch = Stopwatch()
    with watch.part("load"):
        original = load_original()
    with watch.part("read"):
        skeleton = None if original.describes_itself else shallow_copy(original.module)
        quantized = on_disk.load(
            spec.folder,
            skeleton,
            device=spec.usage.device,
            model_factory=original.source.model_factory,
            trust_remote_code=original.source.trust_remote_code,
        )
        error = spec.usage.answer_of(quantized).error(spec.expected)
    if not error <= MAX_RELATIVE_ERROR:  # NaN counts as wrong
        reason = (
            f"loaded again it computes something else: its output is off by {error:.2g} (relative)"
        )
        return Delivery(
            plan_id=spec.plan_id,
            loop=spec.usage.loop,
            where=where,
            logits_error=error,
            reason=reason,
            seconds=watch.seconds,
        )
    timed, stand_in = to_time(original.module) if original.stream else (original.module, "")
    delivery = check_and_time(spec.plan_id, quantized, timed, spec.usage, spec.expected)
    if stand_in:
        delivery = replace(delivery, notes=(stand_in, *delivery.notes))
    note = f"loaded again, its output differs by {error:.2g} (relative) from what it was in memory"
    return replace(
        delivery,
        where=where,
        logits_error=error,
        notes=((note,) if error else ()) + delivery.notes,
        seconds={**watch.seconds, **delivery.seconds},
    )


def check_and_time(
    plan_id: str,
    quantized: nn.Module,
    original: nn.Module,
    usage: Usage,
    expected: Answer | None = None,
) -> Delivery:
    """Time a plan in turn with the unquantized model, as a user runs them.

    Not timed if it gives another answer when replayed than without preparation.
    """
    watch = Stopwatch()
    expected = expected or usage.answer_of(quantized)
    with watch.part("ready"):
        loops = [usage.loop_of(original), usage.loop_of(quantized)]
        warm_up(loops, usage.device)
    with watch.part("check"):  # by the steps that are warm: others would be compiled for it
        made = usage.answer_of(quantized, replayed=True)
        reason = first_difference(usage, quantized, made, expected)
    delivery = Delivery(
        plan_id=plan_id, loop=usage.loop, where="in memory", reason=reason, seconds=watch.seconds
    )
    if reason:
        return delivery
    with watch.part("time"):
        (of_original, of_plan), note = time_user_loops(loops, usage.device)
    return replace(
        delivery,
        times=of_plan.times,
        original_times=of_original.times,
        ratio=of_plan.ratio,
        notes=(note,) if note else (),
    )
