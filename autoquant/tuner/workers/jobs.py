"""The heavy work of a search as jobs: what they need is said in records, so that a process of their own can do them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch

from autoquant.candidates import Format, get_format
from autoquant.devices.device import release_memory, trim_memory
from autoquant.evaluators.outputs import AnyQuality, OutputQuality, VariedInputs
from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.sensitivity import SENSITIVITIES, Change, Sensitivity
from autoquant.evaluators.text import TextParts
from autoquant.events import Event, Notice, StageProgress
from autoquant.export.rounding_inputs import Calibration
from autoquant.models import LoadedModel, SameModel
from autoquant.profiler.measure import profile
from autoquant.records import Device, Measurement, Plan, Proof, Roofline, Site, TimingSubject, Workload
from autoquant.store import Store
from autoquant.tuner.prove import Prover

Tell = Callable[[Any], None]
"""Takes what a job learns while it runs: events, and facts to be kept at once."""

Result_co = TypeVar("Result_co", covariant=True)


@dataclass(slots=True, kw_only=True)
class Bench:
    """What every job works on: the model, and how it is run and judged.

    Attributes:
        load: Gives the model; called once, when it is first needed.
        own_process: Nothing but jobs runs in this process.
        calibration: Weights rounded for their layers' inputs; None where no format needs those.
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
        """The model, in memory from now on."""
        if self._loaded is None:
            self._loaded = self.load()
        return self._loaded

    @property
    def prover(self) -> Prover:
        """One for all proofs of a process: it has compiled the unquantized model."""
        if self._prover is None:
            self._prover = Prover(
                loaded=self.loaded,
                workload=self.workload,
                quality=self.quality,
                device=self.device,
                execution=self.execution,
                calibration=self.calibration,
            )
        return self._prover

    def forget_compiled(self) -> None:
        """Free what the compiler keeps of finished work, where nobody else has compiled anything."""
        if self.own_process:
            torch.compiler.reset()
            release_memory()


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSpec:
    """How another process makes the same bench.

    Attributes:
        formats: Ids that the process has to know.
        threads: How many threads a job computes with.
    """

    model: SameModel
    judged_on: TextParts | VariedInputs
    workload: Workload
    device: str
    execution: str
    formats: tuple[str, ...]
    threads: int

    def make(self) -> Bench:
        """The bench, whose model is loaded when a job needs it.

        Raises:
            CandidateError: A format is not known here.
        """
        for format_id in self.formats:
            get_format(format_id)
        return Bench(
            load=self.model.load,
            quality=self._quality(),
            workload=self.workload,
            device=self.device,
            execution=self.execution,
            own_process=True,
        )

    def _quality(self) -> TextQuality | OutputQuality:
        if isinstance(self.judged_on, VariedInputs):
            return OutputQuality(self.judged_on)
        return TextQuality(self.judged_on, self.device, keep_reference=True)


class Job(Protocol[Result_co]):
    """One piece of work. It tells what it learns as it learns it; its result is told last.

    Attributes:
        needs_model: The model should be in memory before it starts.
    """

    needs_model: ClassVar[bool]

    def run(self, bench: Bench, tell: Tell) -> Result_co: ...


@dataclass(frozen=True, slots=True)
class Timed:
    """Told by `ProfileJob`: timings to keep, made against one another."""

    measurements: tuple[Measurement, ...]


@dataclass(frozen=True, slots=True)
class Limited:
    """Told by `ProfileJob`: the device's roofline, where it had to be measured."""

    roofline: Roofline


@dataclass(frozen=True, slots=True)
class Scored:
    """Told by `ScoreJob`: losses by (site name, numerics), with a word for what they are of."""

    subject: str
    losses: Mapping[tuple[str, str], float]


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Finds out whether the model can be loaded again. Raises `ModelError` where not."""

    needs_model: ClassVar[bool] = False

    def run(self, bench: Bench, tell: Tell) -> None:
        bench.loaded  # noqa: B018 - loads it


@dataclass(frozen=True, slots=True)
class ProfileJob:
    """Times the subjects that are not known yet; tells `Timed`, `Limited` and events."""

    needs_model: ClassVar[bool] = False
    subjects: Sequence[TimingSubject]
    hardware: Device
    known: Mapping[TimingSubject, Measurement]
    roofline: Roofline | None = None

    def run(self, bench: Bench, tell: Tell) -> dict[TimingSubject, Measurement]:
        formats = {(subject.format, subject.kernel): get_format(subject.format) for subject in self.subjects}
        return profile(
            self.subjects,
            [(fmt, fmt.kernel(kernel)) for (_, kernel), fmt in formats.items()],
            device=self.hardware,
            device_name=bench.device,
            store=cast(Store, _Relay(self.known, self.roofline, tell, bench)),
            listener=partial(_tell_trimmed, tell),
        )


def _tell_trimmed(tell: Tell, event: Event) -> None:
    """Between candidates, off the clock, what their quantization freed goes back to the system."""
    if isinstance(event, StageProgress):
        trim_memory()
    tell(event)


class _Relay:
    """Stands for the store where there is none: what is known came with the job, what is new is told."""

    def __init__(
        self, known: Mapping[TimingSubject, Measurement], roofline: Roofline | None, tell: Tell, bench: Bench
    ) -> None:
        self._known, self._roofline, self._tell, self._bench = known, roofline, tell, bench

    def roofline(self, _device: Device) -> Roofline | None:
        return self._roofline

    def put_roofline(self, _device: Device, roofline: Roofline) -> None:
        self._tell(Limited(roofline))

    def timings(self, _device: Device, _protocol: str) -> dict[TimingSubject, Measurement]:
        return dict(self._known)

    def put_timings(self, _device: Device, _protocol: str, measurements: Iterable[Measurement]) -> None:
        self._tell(Timed(tuple(measurements)))
        self._bench.forget_compiled()


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Losses of changes, each (site, numerics, format id, activation), by one sensitivity; tells `Scored`."""

    needs_model: ClassVar[bool] = True

    changes: Sequence[tuple[Site, str, str, str]]
    sensitivity: str

    @classmethod
    def of(cls, method: Sensitivity, changes: Sequence[Change]) -> ScoreJob:
        return cls(
            [(change.site, change.numerics, change.format.id, change.activation) for change in changes], method.id
        )

    def run(self, bench: Bench, tell: Tell) -> None:
        changes = [
            Change(site, numerics, get_format(format_id), activation)
            for site, numerics, format_id, activation in self.changes
        ]
        if any(change.format.needs_inputs for change in changes):
            changes = _with_inputs(changes, bench, tell)
        score = SENSITIVITIES[self.sensitivity].score
        score(bench.loaded.module, changes, bench.quality, lambda subject, losses: tell(Scored(subject, dict(losses))))


def _with_inputs(changes: Sequence[Change], bench: Bench, tell: Tell) -> list[Change]:
    """The changes, with the weights of those that need inputs; those that cannot be made are told and left out."""
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
    return [
        replace(change, stored=partial(calibration.stored, change.site.parameters[0], change.format))
        if change.format.needs_inputs
        else change
        for change in changes
        if (change.site.parameters[0], change.format.id) not in reasons
    ]


@dataclass(frozen=True, slots=True)
class ProveJob:
    """Proves a plan.

    Attributes:
        selection: The unquantized model's losses on the selection part, from an earlier proof; empty before the first.
    """

    needs_model: ClassVar[bool] = True

    plan: Plan
    selection: tuple[float, ...]

    def run(self, bench: Bench, tell: Tell) -> tuple[Proof, tuple[float, ...]]:
        bench.prover.selection = bench.prover.selection or self.selection
        return bench.prover.prove(self.plan), bench.prover.selection
