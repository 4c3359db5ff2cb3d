"""The heavy work of a search as jobs: plain records, which another process can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from autoquant.candidates import Format, candidate_of, get_format
from autoquant.delivery.rounding_inputs import Calibration
from autoquant.devices import backend
from autoquant.devices.base import Place
from autoquant.devices.effort import TimingEffort, timing_effort, use_timing_effort
from autoquant.devices.memory import (
    leave_out_of_collections,
    release_memory,
    trim_memory,
)
from autoquant.evaluators.outputs import AnyQuality, DivergenceQuality
from autoquant.evaluators.quality import ReferenceLosses, TextQuality
from autoquant.evaluators.sensitivity import SENSITIVITIES, Change, Sensitivity
from autoquant.evaluators.text import TextParts
from autoquant.events import Event, Notice, StageProgress
from autoquant.models import LoadedModel, SameModel
from autoquant.profiler.hopeless import Hopeless
from autoquant.profiler.measure import TimingDevice, measure
from autoquant.profiler.roofline import undisturbed_roofline
from autoquant.records import (
    Device,
    Measurement,
    Plan,
    Proof,
    Roofline,
    Site,
    TimingSubject,
    Workload,
)
from autoquant.runtime.caches import clear_caches
from autoquant.solver.limits import Limits
from autoquant.tuner.prove import Prover

Tell = Callable[[Any], None]
"""Takes the messages of a running job: events, and facts to be saved at once."""

Result_co = TypeVar("Result_co", covariant=True)


@dataclass(slots=True, kw_only=True)
class Bench:
    """The model that every job works on, and how it is run and judged.

    Attributes:
        load: Returns the model; called once, when it is first needed.
        own_process: Only jobs run in this process.
        calibration: Weights rounded for their layers' inputs, or None if no format needs those.
    """

    load: Callable[[], LoadedModel]
    quality: AnyQuality
    workload: Workload
    device: str
    execution: str
    own_process: bool = False
    calibration: Calibration | None = field(default=None, init=False)
    _loaded: LoadedModel | None = field(default=None, init=False)
    _prover: Prover | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.quality, TextQuality) and self.quality.parts.inputs is not None:
            self.calibration = Calibration(self.quality.parts.inputs)

    @property
    def loaded(self) -> LoadedModel:
        """The model, which stays in memory from now on."""
        if self._loaded is None:
            self._loaded = self.load()
        return self._loaded

    @property
    def prover(self) -> Prover:
        """The prover, one for all proofs of a process: it has compiled the unquantized model."""
        if self._prover is None:
            quality = self.quality
            self._prover = Prover(
                loaded=self.loaded,
                workload=self.workload,
                quality=quality.keeping() if isinstance(quality, TextQuality) else quality,
                device=self.device,
                execution=self.execution,
                calibration=self.calibration,
            )
        return self._prover

    def forget_compiled(self) -> None:
        """Free what the compiler keeps of finished work, if only jobs have compiled anything."""
        if self.own_process:
            clear_caches()
            release_memory()


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSpec:
    """All that another process needs to make the same bench.

    Attributes:
        formats: Ids that the process has to know.
        threads: The number of threads that a job computes with.
        effort: The effort of a job's timings.
        cores: The cores that the process and its jobs may use; empty for all.
    """

    model: SameModel
    judged_on: TextParts | DivergenceQuality
    workload: Workload
    device: str
    execution: str
    formats: tuple[str, ...]
    threads: int
    effort: TimingEffort = field(default_factory=timing_effort)
    cores: tuple[int, ...] = ()

    def at(self, place: Place) -> BenchSpec:
        """Return what a process at a place needs."""
        request = replace(self.model.request, device=place.device)
        model = replace(self.model, request=request)
        return replace(self, model=model, device=place.device, cores=place.cores)

    def make(self) -> Bench:
        """Return the bench, whose model is loaded when a job needs it.

        Raises:
            CandidateError: A format is not known here.
        """
        use_timing_effort(self.effort)
        for format_id in self.formats:
            get_format(format_id)
        return Bench(
            load=self.model.load,
            quality=self._quality(),
            workload=self.workload,
            device=self.device,
            execution=self.execution,
            # A process that serves all jobs itself keeps what it has compiled, as a search's does.
            own_process=backend(self.device).forks,
        )

    def _quality(self) -> TextQuality | DivergenceQuality:
        if isinstance(self.judged_on, DivergenceQuality):
            return self.judged_on
        return TextQuality(self.judged_on, self.device)


class Job(Protocol[Result_co]):
    """One piece of work. It sends facts through `tell` once they are known.

    Attributes:
        needs_model: The model should be in memory before it starts.
        keeps_process: What it leaves in its process is of use to the next job of its class.
        silence_s: A runner that can ends the job after so long without a message. None: never.
    """

    needs_model: ClassVar[bool]
    keeps_process: ClassVar[bool]

    @property
    def silence_s(self) -> float | None: ...

    def run(self, bench: Bench, tell: Tell) -> Result_co: ...


@dataclass(frozen=True, slots=True)
class Timed:
    """Sent by `ProfileJob`: timings to save, of candidates that were compared."""

    measurements: tuple[Measurement, ...]


@dataclass(frozen=True, slots=True)
class AtWork:
    """Sent by `ProfileJob`: the candidate that runs alone now, or None for several."""

    subject: TimingSubject | None


@dataclass(frozen=True, slots=True)
class Checking:
    """Sent by `ProveJob`: the kernel that is checked now; empty once all were."""

    layer: str = ""
    format: str = ""
    kernel: str = ""


@dataclass(frozen=True, slots=True)
class Limited:
    """Sent by `ProfileJob`: the device's roofline, if it was measured."""

    roofline: Roofline


@dataclass(frozen=True, slots=True)
class Scored:
    """Sent by `ScoreJob`: losses by (site name, numerics), with a word for what they are of."""

    subject: str
    losses: Mapping[tuple[str, str], float]


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Loads the model again, or raises `ModelError`."""

    needs_model: ClassVar[bool] = False
    keeps_process: ClassVar[bool] = False
    silence_s: float | None = None

    def run(self, bench: Bench, tell: Tell) -> None:
        bench.loaded  # noqa: B018 - loads it


@dataclass(frozen=True, slots=True)
class ProfileJob:
    """Times the subjects; sends `AtWork`, `Timed`, `Limited` and events.

    Attributes:
        roofline: The device's, or None to measure it if it is needed.
        known: Timings of the device, which rule candidates out.
    """

    needs_model: ClassVar[bool] = False
    keeps_process: ClassVar[bool] = False
    subjects: Sequence[TimingSubject]
    hardware: Device
    roofline: Roofline | None = None
    known: Sequence[Measurement] = ()

    @property
    def silence_s(self) -> float | None:
        """Most seconds for one candidate, or for all of a shape and m in turn."""
        return timing_effort().candidate_limit_s

    def run(self, bench: Bench, tell: Tell) -> None:
        candidates = {subject.candidate: candidate_of(subject) for subject in self.subjects}

        def on_measured(measurements: Sequence[Measurement]) -> None:
            tell(Timed(tuple(measurements)))
            bench.forget_compiled()

        measure(
            self.subjects,
            list(candidates.values()),
            TimingDevice(
                device=bench.device,
                hardware=self.hardware,
                roofline=partial(self._limits, bench.device, tell),
            ),
            on_measured=on_measured,
            listener=partial(_tell_trimmed, tell),
            on_candidate=lambda subject: tell(AtWork(subject)),
            hopeless=Hopeless(self.known),
        )

    def _limits(self, device: str, tell: Tell) -> Roofline:
        return self.roofline or undisturbed_roofline(
            device,
            cache_bytes=self.hardware.cache_bytes,
            on_measured=lambda roofline: tell(Limited(roofline)),
            listener=tell,
        )


def _tell_trimmed(tell: Tell, event: Event) -> None:
    """Pass an event on.

    Between candidates, off the clock, return what their quantization freed to the system.
    """
    if isinstance(event, StageProgress):
        trim_memory()
    tell(event)


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Scores changes, each (site, numerics, format id, activation), by one sensitivity.

    Sends `Scored`.
    """

    needs_model: ClassVar[bool] = True
    keeps_process: ClassVar[bool] = False

    changes: Sequence[tuple[Site, str, str, str]]
    sensitivity: str
    silence_s: float | None = None

    @classmethod
    def of(cls, method: Sensitivity, changes: Sequence[Change]) -> ScoreJob:
        return cls(
            [
                (change.site, change.numerics, change.format.id, change.activation)
                for change in changes
            ],
            method.id,
        )

    def run(self, bench: Bench, tell: Tell) -> None:
        changes = [
            Change(site, numerics, get_format(format_id), activation)
            for site, numerics, format_id, activation in self.changes
        ]
        if any(change.format.needs_inputs for change in changes):
            changes = _with_inputs(changes, bench, tell)
        score = SENSITIVITIES[self.sensitivity].score
        score(
            bench.loaded.module,
            changes,
            bench.quality,
            lambda subject, losses: tell(Scored(subject, dict(losses))),
        )


def _with_inputs(changes: Sequence[Change], bench: Bench, tell: Tell) -> list[Change]:
    """Return the changes, with the weights of those that need inputs.

    Those that cannot be made are left out with a notice.
    """
    calibration = bench.calibration
    assert calibration is not None  # the search lets in no format that needs inputs without a text
    wanted: dict[str, dict[str, Format]] = {}
    for change in changes:
        if change.format.needs_inputs:
            wanted.setdefault(change.site.parameters[0], {})[change.format.id] = change.format
    tell(Notice("rounding weights for their layers' inputs"))
    reasons = calibration.prepare(
        bench.loaded.module, {name: list(formats.values()) for name, formats in wanted.items()}
    )
    for (name, format_id), reason in reasons.items():
        tell(Notice(f"{format_id} not considered for {name}: {reason}"))
    for name, idle in calibration.idle.items():
        numbers = ", ".join(map(str, idle))
        text = f"no row of the calibration text reaches experts {numbers} of {name}"
        tell(Notice(f"{text}: they are rounded to nearest"))
    made = []
    for change in changes:
        name = change.site.parameters[0]
        if (name, change.format.id) in reasons:
            continue
        if change.format.needs_inputs:
            change = _made(change, partial(calibration.stored, name, change.format))
        made.append(change)
    return made


def _made(change: Change, stored: Callable[[], torch.Tensor]) -> Change:
    """Return a change with the weight made for it, and what that keeps for its activation."""
    keeps = change.format.input_kept
    return replace(change, stored=stored, input_kept=keeps(stored()) if keeps else None)


@dataclass(frozen=True, slots=True)
class ProveJob:
    """Proves a plan. Sends `Checking`.

    Attributes:
        reference: The unquantized model's losses, as far as they are known.
        limits: Those of the search, see `Prover.prove`.
    """

    needs_model: ClassVar[bool] = True
    keeps_process: ClassVar[bool] = True  # its prover has compiled the unquantized model

    plan: Plan
    reference: ReferenceLosses
    limits: Limits | None = None
    silence_s: float | None = None

    def run(self, bench: Bench, tell: Tell) -> tuple[Proof, ReferenceLosses]:
        leave_out_of_collections()  # the compiler, which the last proof imported
        bench.prover.reference = bench.prover.reference or self.reference
        told: list[Checking] = []

        def on_kernel(layer: str, format_id: str, kernel: str) -> None:
            checking = Checking(layer, format_id, kernel)
            if told[-1:] != [checking]:
                told[:] = [checking]
                tell(checking)

        proof = bench.prover.prove(self.plan, on_kernel, lambda: tell(Checking()), self.limits)
        return proof, bench.prover.reference
