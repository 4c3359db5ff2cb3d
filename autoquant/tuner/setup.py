"""The setup of a search: settled before its first stage, and the same for all stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from autoquant.candidates import Format
from autoquant.devices import backend
from autoquant.evaluators.quality import ReferenceLosses
from autoquant.events import Listener, Notice
from autoquant.profiler.crossovers import Measure
from autoquant.runtime.user_loop import Usage
from autoquant.store import Store
from autoquant.tuner.deliver import Deliverer
from autoquant.tuner.profiling import measure_all
from autoquant.tuner.request import SettledRequest
from autoquant.tuner.workers.in_process import Runner
from autoquant.tuner.workers.jobs import Bench
from autoquant.tuner.workers.start import start_runner


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSetup:
    """All that the stages of one search share.

    Attributes:
        settled: What is searched, and how.
        fuse: Also try to compute linears that read the same input as one: if that is wanted, and
            can be done here.
        reference: The unquantized model's losses, as far as they are known.
    """

    settled: SettledRequest
    store: Store
    fuse: bool
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
        return cls(
            settled=settled,
            store=store,
            fuse=settled.fuse,
            listener=listener,
            reference=reference,
        )

    @property
    def device(self) -> str:
        """The torch device."""
        return self.settled.loaded.device

    @property
    def formats(self) -> list[Format]:
        """The formats of the candidates, each once."""
        return list({each.format.id: each.format for each in self.settled.candidates}.values())

    @property
    def usage(self) -> Usage:
        """The way the user will run the model."""
        return Usage.of(self.settled.loaded, self.settled.workload)

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
        settled = self.settled
        eager = settled.hardware.versions.get("compiler") == "none"
        bench = Bench(
            load=lambda: settled.loaded,
            quality=settled.quality,
            workload=settled.workload,
            device=self.device,
            execution="eager" if eager else "compiled",
        )
        workers = settled.request.workers
        return start_runner(bench, [fmt.id for fmt in self.formats], self.listener, workers)

    def measurer(self, runner: Runner) -> Measure:
        """Return what times linears, or takes their timings from the store."""
        return partial(
            measure_all,
            runner=runner,
            hardware=self.settled.hardware,
            store=self.store,
            listener=self.listener,
            together=backend(self.device).prepares,
        )

    def deliverer(self) -> Deliverer:
        """Return what runs a plan as the user will."""
        return Deliverer(loaded=self.settled.loaded, usage=self.usage, listener=self.listener)

    def tell(self, *notices: str) -> None:
        """Report notices."""
        for notice in notices:
            self.listener(Notice(notice))
