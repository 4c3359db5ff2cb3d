"""The setup of a search: settled before its first stage, and the same for all stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from autoquant.candidates import Candidate, Format
from autoquant.devices import backend
from autoquant.evaluators.outputs import AnyQuality
from autoquant.evaluators.quality import ReferenceLosses
from autoquant.evaluators.sensitivity import Sensitivity
from autoquant.events import Listener, Notice
from autoquant.models import LoadedModel
from autoquant.profiler.crossovers import Measure
from autoquant.records import Device, Workload
from autoquant.runtime.user_loop import Usage
from autoquant.solver.constraints import Constraints
from autoquant.solver.limits import Limits
from autoquant.store import Store
from autoquant.tuner.profiling import measure_all
from autoquant.tuner.request import SettledRequest
from autoquant.tuner.workers.in_process import Runner
from autoquant.tuner.workers.jobs import Bench
from autoquant.tuner.workers.start import start_runner


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSetup:
    """All that the stages of one search share.

    Attributes:
        hardware: The fingerprint of the device.
        candidates: Those of the search, the unquantized ones among them.
        fuse: Also try to compute linears that read the same input as one.
        reference: The unquantized model's losses, as far as they are known.
    """

    store: Store
    study_id: str
    loaded: LoadedModel
    quality: AnyQuality
    workload: Workload
    hardware: Device
    candidates: list[Candidate]
    fuse: bool
    sensitivity: Sensitivity
    constraints: Constraints
    limits: Limits
    seed: int
    listener: Listener
    reference: ReferenceLosses

    @classmethod
    def of(
        cls,
        settled: SettledRequest,
        store: Store,
        listener: Listener,
        reference: ReferenceLosses,
    ) -> SearchSetup:
        """Return the setup of a request."""
        request = settled.request
        return cls(
            store=store,
            study_id=settled.study_id,
            loaded=settled.loaded,
            quality=settled.quality,
            workload=settled.workload,
            hardware=settled.hardware,
            candidates=settled.candidates,
            fuse=request.fuse,
            sensitivity=settled.method,
            constraints=request.constraints,
            limits=settled.limits,
            seed=request.seed,
            listener=listener,
            reference=reference,
        )

    @property
    def device(self) -> str:
        """The torch device."""
        return self.loaded.device

    @property
    def formats(self) -> list[Format]:
        """The formats of the candidates, each once."""
        return list({each.format.id: each.format for each in self.candidates}.values())

    @property
    def usage(self) -> Usage:
        """The way the user will run the model."""
        return Usage.of(self.loaded, self.workload)

    def for_this_machine(self) -> SearchSetup:
        """Return the setup without what needs torch.compile, if that does not work here."""
        reason = backend(self.device).compile_failure()
        if reason is None:
            return self
        self.tell(f"running eagerly, since torch.compile does not work here: {reason}")
        if self.fuse:
            self.tell("layers are not computed as one, since torch.compile does that")
        return replace(self, fuse=False)

    def start_runner(self) -> Runner:
        """Start what runs the jobs: processes of their own where that is possible."""
        eager = self.hardware.versions.get("compiler") == "none"
        bench = Bench(
            load=lambda: self.loaded,
            quality=self.quality,
            workload=self.workload,
            device=self.device,
            execution="eager" if eager else "compiled",
        )
        return start_runner(bench, [fmt.id for fmt in self.formats], self.listener)

    def measurer(self, runner: Runner) -> Measure:
        """Return what times linears, or takes their timings from the store."""
        return partial(
            measure_all,
            runner=runner,
            hardware=self.hardware,
            store=self.store,
            listener=self.listener,
        )

    def tell(self, *notices: str) -> None:
        """Report notices."""
        for notice in notices:
            self.listener(Notice(notice))
