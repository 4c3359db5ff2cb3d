"""Prove plans: apply them, and measure quality and request time against the unquantized model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.kernels.caches import kernels_kept, untuned
from autoquant.candidates.routed import RoutedWeight
from autoquant.candidates.routes import for_any_rows
from autoquant.delivery.applier import Quantized, applied, module_bytes
from autoquant.delivery.kernel_check import KernelsInModel, OnKernel, ignore_kernel
from autoquant.delivery.rounding_inputs import Calibration
from autoquant.devices import Division, backend
from autoquant.devices.memory import release_memory
from autoquant.errors import CandidateError
from autoquant.evaluators.quality import (
    Comparison,
    Enough,
    Quality,
    ReferenceLosses,
    TextQuality,
)
from autoquant.evaluators.text import Part
from autoquant.intervals import mean_interval, paired_increase
from autoquant.models import LoadedModel
from autoquant.models.fitting import gib
from autoquant.models.stand_in import to_time
from autoquant.models.streaming import Stream
from autoquant.records import (
    PARTLY,
    RIGHT,
    LayerChoice,
    Numerics,
    Plan,
    Proof,
    RouteStep,
    Workload,
    route_kernel,
)
from autoquant.runtime.generate.kv_codes import bytes_of_keys_and_values, rounding_in_passes
from autoquant.runtime.phases import Phases, make_phases
from autoquant.runtime.request import RequestTimes, make_warm, time_requests
from autoquant.solver.beyond import surely_beyond
from autoquant.solver.limits import Limits
from autoquant.stopwatch import Stopwatch
from autoquant.tuner.baseline import check_finite


@dataclass(slots=True)
class Prover:
    """Proves plans of one model, which is loaded and compiled once.

    Args:
        execution: `compiled`, or `eager` if the device cannot compile.
        reference: The unquantized model's losses. The first proof measures those that are missing.
        calibration: Weights rounded for their layers' inputs, if plans have any.
    """

    loaded: LoadedModel
    workload: Workload
    quality: Quality
    device: str
    execution: str
    reference: ReferenceLosses = field(default_factory=dict)
    calibration: Calibration | None = None
    _original: tuple[Phases, str] | None = None
    _compiled_quality: TextQuality | None = None
    _compiled_reference: ReferenceLosses = field(default_factory=dict)
    _quantized: Quantized = field(default_factory=Quantized)

    def prove(
        self,
        plan: Plan,
        on_kernel: OnKernel = ignore_kernel,
        on_checked: Callable[[], None] = lambda: None,
        limits: Limits | None = None,
    ) -> Proof:
        """Apply `plan` to a copy that shares all unquantized weights, and measure it.

        Args:
            limits: Of a plan that is surely beyond them, quality is measured on some windows only.
            on_kernel: Takes the kernel that is checked next.
            on_checked: Called when all were checked.

        Raises:
            KernelError: A kernel computes something else than its weight stores.
            ModelError: The unquantized model's loss is not finite.
        """
        watch = Stopwatch()
        with watch.part("apply"):
            module = self._applied(plan, on_kernel)
        with watch.part("check"):
            if module is not self.loaded.module:
                self._check_kernels(module, on_kernel)
        on_checked()
        release_memory()
        with watch.part("compile"):
            phases, note = self._phases(module, plan)
        with watch.part("quality"):
            report, selection = self._compare(module, plan, phases, limits)
        if plan.kind == "original":
            check_finite(self.loaded, report.losses + selection.losses)
        release_memory()
        with watch.part("time"):
            times, notes = self._time(phases, note)
        calls = self.workload.calls()
        request_ms, original_ms = times.request_ms(calls)
        logarithmic = self.quality.logarithmic
        unseen = len(report.losses) + report.unseen
        mean = sum(report.losses) / len(report.losses)
        notes += [_partly(report, selection), _right_words(report)]
        perplexity = selection_kl = None
        if logarithmic:
            perplexity = torch.tensor(mean, dtype=torch.float64).exp().item()
        if selection.sample_kl:
            selection_kl = mean_interval(selection.sample_kl, unseen)
        return Proof(
            plan_id=plan.plan_id,
            request_ms=request_ms,
            phase_ms=times.plan_ms,
            original_request_ms=original_ms,
            original_phase_ms=times.original_ms,
            perplexity=perplexity,
            loss=mean,
            increase=paired_increase(report.losses, report.reference, logarithmic=logarithmic),
            selection_increase=paired_increase(
                selection.losses, selection.reference, logarithmic=logarithmic, unseen=unseen
            ),
            kl=report.kl,
            memory_bytes=module_bytes(module),
            kv_bytes=bytes_of_keys_and_values(module, self.workload),
            execution=self.execution,
            notes=tuple(dict.fromkeys(filter(None, notes))),
            selection_kl=selection_kl,
            selection_losses=selection.losses,
            time_ratio=times.ratio(calls),
            seconds=watch.seconds,
        )

    def _applied(self, plan: Plan, on_kernel: OnKernel) -> nn.Module:
        """Return the plan's model; a streamed one itself for the unquantized model.

        Raises:
            CandidateError: It has no room on the device.
        """
        original = self.loaded.module
        if self.loaded.stream is not None:
            if plan.kind == "original":
                return original
            self._original_phases()  # a stand-in, whose memory no longer counts as free
            self._check_room(plan, self.loaded.stream)
        return applied(
            plan, original, self.calibration, quantized=self._quantized, on_kernel=on_kernel
        )

    def _check_room(self, plan: Plan, stream: Stream) -> None:
        needed, most = plan.prediction.memory_bytes, stream.most_plan_bytes
        if most is not None and needed > most:
            raise CandidateError(
                f"its weights take {gib(needed)}, and {self.device} has room for {gib(most)} beside"
                " what it is timed with"
            )

    def _check_kernels(self, module: nn.Module, on_kernel: OnKernel) -> None:
        """Check every quantized linear on what the phases of the workload give it."""
        with KernelsInModel(module, on_kernel):
            phases = make_phases(replace(self.loaded, module=module), self.workload)
            for phase in self.workload.phases:
                phases.reset(phase.name)
                phases.run_eager(phase.name)

    def _compare(
        self, module: nn.Module, plan: Plan, phases: Phases, limits: Limits | None
    ) -> tuple[Comparison, Comparison]:
        """Return the losses on the report and on the selection part."""
        # A streamed model's logits on all windows come from one pass.
        enough = self._beyond(limits) if limits and self.loaded.stream is None else None
        original = self.loaded.module
        compared_module = original if plan.kind == "original" else module
        # Windows may have other m than the workload, whose speed does not matter: tune nothing.
        with worst_numerics(module, plan), untuned():
            if compared := self._compared_compiled(module, plan, phases, enough):
                return compared
            with rounding_in_passes(compared_module, plan.kv_cache):
                compared = _compare(self.quality, compared_module, original, self.reference, enough)
        self.reference = _losses_of_reference(compared, self.reference)
        return compared

    def _beyond(self, limits: Limits) -> Enough:
        return lambda so_far: surely_beyond(
            limits,
            so_far.losses,
            so_far.reference,
            so_far.sample_kl,
            logarithmic=self.quality.logarithmic,
            unseen=so_far.unseen,
        )

    def _compared_compiled(
        self, module: nn.Module, plan: Plan, phases: Phases, enough: Enough | None
    ) -> tuple[Comparison, Comparison] | None:
        """Compare by compiled prompts, which are quicker; None if windows are no such prompts.

        The unquantized model is compiled too, since compiled code rounds less often. What it loses
        so is known apart from what it loses when it runs eagerly. Its own proof makes the logits
        that those of plans are compared with.

        Args:
            module: The plan's model with its worst numerics everywhere.
            phases: Those of the plan.
        """
        if not isinstance(self.quality, TextQuality):
            return None
        if self.loaded.stream is not None:  # what is compiled has weights of its own
            return None
        original = self._original_phases()[0].compiled_prompt()
        prompt = original if plan.kind == "original" else phases.compiled_prompt()
        if prompt is None or original is None or prompt.tokens != self.quality.window_tokens():
            return None
        if not prompts_lose_most(plan, prompt.tokens):
            prompt = self._made_phases(module).compiled_prompt()
        assert prompt is not None  # the plan's phases had one
        if self._compiled_quality is None:
            # Compiling the comparison takes longer than it saves where whole models run fast.
            slow = not backend(self.device).judges_long
            self._compiled_quality = self.quality.keeping(compiled=slow)
        known = self._compiled_reference
        compared = _compare(self._compiled_quality, prompt, original, known, enough)
        self._compiled_reference = _losses_of_reference(compared, known)
        return compared

    def _time(self, phases: Phases, note: str) -> tuple[RequestTimes, list[str]]:
        """Time the plan and the unquantized model in turn; return notes on how they ran, too."""
        original, original_note = self._original_phases()
        times = time_requests(phases, original, self.device)
        return times, [times.note, note, original_note]

    def _phases(self, module: nn.Module, plan: Plan) -> tuple[Phases, str]:
        """Return the phases of a plan, ready to be timed, and a note on how they were compiled."""
        original = self._original_phases()
        return original if plan.kind == "original" else self._warm_phases(module)

    def _original_phases(self) -> tuple[Phases, str]:
        if self._original is None:
            module = self.loaded.module
            stand_in = ""
            if self.loaded.stream is not None:
                module, stand_in = to_time(module)
            phases, note = self._warm_phases(module)
            self._original = phases, "; ".join(filter(None, (stand_in, note)))
        return self._original

    def _warm_phases(self, module: nn.Module) -> tuple[Phases, str]:
        """Return the phases, ready to be timed, and a note on how they were compiled."""
        make = partial(self._made_phases, module)
        with kernels_kept(self.device):
            return make_warm(make, backend(self.device).divisions)

    def _made_phases(self, module: nn.Module, *, division: Division = "parts") -> Phases:
        loaded = replace(self.loaded, module=module)
        compiled = self.execution == "compiled"
        return make_phases(loaded, self.workload, compiled=compiled, division=division)


def _compare(
    quality: Quality,
    module: nn.Module,
    original: nn.Module,
    reference: ReferenceLosses,
    enough: Enough | None,
) -> tuple[Comparison, Comparison]:
    """Return the losses on the report and on the selection part, which is compared first.

    Where some samples of that are enough, so are some of the report part.
    """
    known = reference.get("selection", ())
    selection = quality.compare(module, original, "selection", known, enough)
    some = (lambda _so_far: True) if selection.unseen else None
    report = quality.compare(module, original, "report", reference.get("report", ()), some)
    return report, selection


def _losses_of_reference(
    compared: tuple[Comparison, Comparison], known: ReferenceLosses
) -> ReferenceLosses:
    parts: tuple[Part, Part] = ("report", "selection")
    whole = {part: each for part, each in zip(parts, compared, strict=True) if not each.unseen}
    return {**known, **{part: each.reference for part, each in whole.items()}}


def _partly(report: Comparison, selection: Comparison) -> str:
    """Return a note of quality that was measured on some samples, or an empty text."""
    if not selection.unseen:
        return ""
    seen = len(selection.losses), len(report.losses)
    samples = sum(seen) + selection.unseen + report.unseen
    return f"{PARTLY} {sum(seen)} of {samples} windows, surely beyond the limit"


def _right_words(report: Comparison) -> str:
    """Return a note of how many labels of the report part are right, or an empty text."""
    if report.right is None:
        return ""
    right, before, labels = report.right
    return f"{RIGHT} {right / labels:.1%} of {labels} labels, {before / labels:.1%} unquantized"


def prompts_lose_most(plan: Plan, tokens: int) -> bool:
    """Check that prompts of so many tokens compute with the numerics that the losses stand for."""
    for layer in plan.layers:
        if layer.is_table:
            continue
        activation = Numerics.parse(layer.numerics).activation
        kernel = get_format(layer.format).kernel(route_kernel(layer.route, tokens))
        if kernel.numerics != activation:
            return False
    return True


@contextmanager
def worst_numerics(module: nn.Module, plan: Plan) -> Iterator[None]:
    """Let every layer compute at every m with the numerics that its loss stands for.

    A route may round activations in prefill and not in decode, or the other way round. Quality is
    measured on whole windows, which run the prefill side only. So the worse side runs everywhere.
    """
    routes: list[tuple[RoutedWeight, Any]] = []
    try:
        for layer in plan.layers:
            weight = module.get_parameter(layer.parameters[0])
            if isinstance(weight, RoutedWeight) and not layer.is_table:
                routes.append((weight, weight.route))
                fmt = get_format(layer.format)
                worst = for_any_rows((_everywhere(layer),), fmt, layer.shape, weight.device.type)
                weight.route = tuple((step.upper_m, step.kernel) for step in worst)
        yield
    finally:
        for weight, route in routes:
            weight.route = route


def _everywhere(layer: LayerChoice) -> RouteStep:
    """Return a step for any m with the kernel of the worst numerics in the layer's route.

    Of several kernels it is the last, which is for most rows.
    """
    fmt = get_format(layer.format)
    activation = Numerics.parse(layer.numerics).activation
    worst = [step for step in layer.route if fmt.kernel(step.kernel).numerics == activation]
    return replace(worst[-1], upper_m=None)
