"""The stages of a search, each of which starts from what the store holds already and keeps what it learns as it learns it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from autoquant.candidates import Format, Kernel
from autoquant.candidates.formats.floats import original_format
from autoquant.devices import backend
from autoquant.devices.memory import release_memory
from autoquant.errors import CandidateError, first_line
from autoquant.evaluators.outputs import AnyQuality
from autoquant.evaluators.sensitivity import Sensitivity
from autoquant.events import Listener, Notice, StageFinished, StageProgress, StageStarted
from autoquant.models import LoadedModel
from autoquant.profiler.crossovers import Timings, settled
from autoquant.profiler.measure import cells_of, subjects_of, working_set_bytes
from autoquant.profiler.prepare import workers_kept
from autoquant.profiler.record import mean_element_bytes, record_model
from autoquant.records import (
    Device,
    LayerChoice,
    Measurement,
    Plan,
    PlanKind,
    Proof,
    Recording,
    Site,
    TimingSubject,
    Workload,
)
from autoquant.runtime.user_loop import Usage
from autoquant.solver.additivity import ADDITION, LossMap
from autoquant.solver.aim import aimed
from autoquant.solver.baselines import bits_plan, structural_plan
from autoquant.solver.constraints import UNBOUND, Bound, Constraints, bind
from autoquant.solver.limits import Limits
from autoquant.solver.planning import (
    PlanContext,
    about_options,
    check_memory,
    front_plans,
    original_plan,
    uniform_plans,
)
from autoquant.solver.refine import growth_of, point_of, proposals
from autoquant.store import Store
from autoquant.study.study import Study
from autoquant.tuner.calibrate import fit, predicted
from autoquant.tuner.choices import constrained_choices, format_facts, scored
from autoquant.tuner.deliver import Deliverer, deliver_best
from autoquant.tuner.fusion import Fusion, complete, fusion_subjects, make_fusion
from autoquant.tuner.notices import constraint_notices, dropped_notices, fusion_notices
from autoquant.tuner.profiling import measure_all
from autoquant.tuner.scoring import score
from autoquant.tuner.workers.in_process import Runner
from autoquant.tuner.workers.jobs import Bench, ProveJob
from autoquant.tuner.workers.start import start_runner

FRONT_PLANS = 3
LEAST_PLANS = 10
_SHORTEST_PROOF_S = 5.0
_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Stages:
    """One run of a search."""

    store: Store
    study_id: str
    loaded: LoadedModel
    quality: AnyQuality
    workload: Workload
    device: str
    hardware: Device
    candidates: list[tuple[Format, Kernel]]
    fuse: bool
    sensitivity: Sensitivity
    constraints: Constraints
    limits: Limits
    time_budget_s: float
    seed: int
    listener: Listener
    started: float
    spent_before_s: float
    plans: dict[str, Plan] = field(default_factory=dict)
    proofs: dict[str, Proof] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    selection: tuple[float, ...] = ()
    runner: Runner = field(init=False)
    fusion: Fusion | None = None
    loss_map: LossMap = ADDITION
    bound: Bound = UNBOUND

    def go(self) -> None:
        facts = self.store.study(self.study_id)
        if facts.complete and facts.spent_s >= self.time_budget_s:
            self.listener(
                Notice(
                    f"study {self.study_id} is complete: the best of its plans within the limits, nothing measured;"
                    f" {facts.spent_s:.0f} s were spent on it, and a larger --time-budget aims at these limits"
                )
            )
            return self._deliver()
        if reason := backend(self.device).compile_failure():
            self.listener(Notice(f"running eagerly, since torch.compile does not work here: {reason}"))
            if self.fuse:
                self.listener(Notice("layers are not computed as one, since torch.compile does that"))
                self.fuse = False
        recording = facts.recording or self._record()
        self._bind(recording.sites)
        self.runner = self._runner()
        try:
            working_set = self._working_set(recording)
            timings = self._profile(recording.sites, working_set)
            options, originals = self._options(recording, timings, working_set)
            self._prove_all(options, originals, recording)
            self._settle_routes(timings, working_set)
        finally:
            self.runner.close()
        self._spend(complete=True)
        return self._deliver()

    def _runner(self) -> Runner:
        """Jobs run in processes of their own where those can have the same model, formats and quality."""
        bench = Bench(
            load=lambda: self.loaded,
            quality=self.quality,
            workload=self.workload,
            device=self.device,
            execution="eager" if self.hardware.versions.get("compiler") == "none" else "compiled",
        )
        formats = list({fmt.id: None for fmt, _ in self.candidates})
        return start_runner(bench, formats, self.listener)

    # -- stages ----------------------------------------------------------------------------------------------------

    def _record(self) -> Recording:
        recording = record_model(self.loaded, self.workload, self.listener)
        self.store.update_study(self.study_id, recording=recording)
        return recording

    def _bind(self, sites: Sequence[Site]) -> None:
        """Find the layers that constraints are about, and tell what that comes to."""
        ids = [(fmt.id, kernel.id) for fmt, kernel in self.candidates]
        self.bound = bind(self.constraints, sites, ids, original_format(self.loaded.dtype))
        self._tell(constraint_notices(self.constraints, self.bound, sites))

    def _tell(self, notices: Iterable[str]) -> None:
        for notice in notices:
            self.listener(Notice(notice))

    def _working_set(self, recording: Recording) -> int:
        element_bytes = mean_element_bytes(self.loaded.module, recording)
        return working_set_bytes([site.shape for site in recording.sites], self.hardware, element_bytes)

    def _time(self, subjects: Sequence[TimingSubject]) -> dict[TimingSubject, Measurement]:
        """Timings of the subjects, from the store or measured now."""
        return measure_all(
            subjects, runner=self.runner, hardware=self.hardware, store=self.store, listener=self.listener
        )

    def _profile(self, sites: Sequence[Site], working_set: int) -> dict[TimingSubject, Measurement]:
        """Timings of every candidate at the workload's m, of siblings as one too where that is asked for."""
        subjects = subjects_of(cells_of(sites), self.candidates, working_set)
        if self.fuse:
            subjects = list(dict.fromkeys([*subjects, *fusion_subjects(sites, self.candidates, working_set)]))
        timings = self._time(subjects)
        if self.fuse:
            self.fusion = make_fusion(sites, self.candidates, timings, self.workload, working_set)
            self._tell(fusion_notices(self.fusion))
        self._spend()
        return timings

    def _options(
        self, recording: Recording, timings: Timings, working_set: int
    ) -> tuple[list[list[LayerChoice]], list[LayerChoice]]:
        """Scored choices per site, and the unquantized choice per site."""
        sites = recording.sites
        formats = list({fmt.id: fmt for fmt, _ in self.candidates}.values())
        facts = format_facts(formats, list(dict.fromkeys(site.shape for site in sites)), self.device)
        choices = [
            constrained_choices(
                site,
                self.candidates,
                timings,
                facts,
                self.workload,
                working_set,
                constraints=self.constraints,
                bound=self.bound,
            )
            for site in sites
        ]
        self._tell(dropped_notices(choices))
        if self.fusion:
            offered = self.fusion.offered(choices, facts)
            choices = [replace(each, choices=tuple(filter(self._admits, each.choices))) for each in offered]
        scores = score(
            choices,
            method=self.sensitivity,
            model_hash=self.loaded.content_hash,
            quality_key=f"{self.quality.key}-{self.loaded.dtype}",
            device_type=self.hardware.type,
            runner=self.runner,
            store=self.store,
            listener=self.listener,
        )
        self.loss_map = scores.loss_map
        self._spend()
        filled = [scored(choice, scores.losses) for choice in choices]
        options = self.bound.narrowed(complete([choice.choices for choice in filled]))
        return complete(options), [choice.original for choice in filled]

    def _admits(self, choice: LayerChoice) -> bool:
        """Whether constraints let a layer have this choice."""
        original = original_format(choice.shape.dtype)
        return all(self.constraints.admits(choice.name, (choice.format, s.kernel), original) for s in choice.route)

    def _prove_all(self, options: list[list[LayerChoice]], originals: list[LayerChoice], recording: Recording) -> None:
        self.plans = {plan.plan_id: plan for plan in self.store.plans(self.study_id)}
        self.proofs = self.store.proofs(self.study_id)
        self.failed = self.store.failed_proofs(self.study_id)
        context = PlanContext(
            study_id=self.study_id,
            model_hash=self.loaded.content_hash,
            dtype=self.loaded.dtype,
            workload=self.workload,
            other_bytes=recording.parameter_bytes - sum(choice.memory_bytes for choice in originals),
            fusion=self.fusion.with_scores(options) if self.fusion else None,
            loss_map=self.loss_map,
            bound=self.bound,
        )
        check_memory(options, context, self.limits.max_memory_bytes)
        original = original_plan(originals, context)
        self.listener(StageStarted("prove", 1 + FRONT_PLANS))
        self._prove(original)
        if original.plan_id not in self.proofs:
            raise CandidateError(f"the unquantized model cannot be run: {self.failed[original.plan_id]}")
        sites = recording.sites
        calibration = fit([original], self.proofs, sites)
        self.plans[original.plan_id] = predicted(original, calibration, sites, context)
        self.store.put_plan(self.plans[original.plan_id])
        uniform = uniform_plans(options, originals, context)
        self.listener(StageStarted("prove", 1 + len(uniform) + FRONT_PLANS))
        for plan in uniform:
            self._prove(predicted(plan, calibration, sites, context))
        calibration = fit([original, *uniform], self.proofs, sites)
        measured, fusing = options, context
        context = replace(calibration.within(context), fusion=None)  # from here on the solver chooses what is one
        options = [
            [calibration.choice(choice, site) for choice in layer] for layer, site in zip(options, sites, strict=True)
        ]
        self.store.put_options(self.study_id, options, about_options(context, logarithmic=self.quality.logarithmic))
        known = {plan.plan_id for plan in (original, *uniform)}
        allowed = self.limits.expected_loss(self.plans, self.proofs, logarithmic=self.quality.logarithmic)
        heuristic = structural_plan(measured, fusing, limits=self.limits, max_loss=allowed)
        self._prove_baseline("heuristic", heuristic and predicted(heuristic, calibration, sites, context))
        known |= {heuristic.plan_id} if heuristic else set()
        self._prove_front(options, context, known, allowed)
        self.listener(StageFinished("prove", f"{len(self.proofs)} plans proven, {len(self.failed)} failed"))
        self._refine(options, context, allowed)
        self._prove_bits(options, context)  # of another recommended plan, where refinement found one

    def _prove_front(
        self, options: list[list[LayerChoice]], context: PlanContext, known: set[str], allowed: float | None
    ) -> None:
        """Prove the best plan within the limits, others until one is at the limit of quality, and some all over the front."""
        count = max(FRONT_PLANS, LEAST_PLANS - len(known) - 1)  # one is left for the allocation by bits
        plans = front_plans(
            options,
            context,
            count=count + 1 + len(known),
            max_loss=allowed,
            max_memory_bytes=self.limits.max_memory_bytes,
            minimize=self.limits.minimize,
        )
        new = [plan for plan in plans if plan.plan_id not in known]
        for plan in new[:1]:
            self._prove(plan)
        for plan, tell in aimed(options, context, limits=self.limits, guess=allowed, known=self._known()):
            if self._left_s() <= 0:
                self.listener(Notice("not aimed at the limit any further: the time budget is spent"))
                break
            tell(self._prove(plan))
            count -= 1
        for plan in new[1:count]:
            self._prove(plan)
        self._prove_bits(options, context)
        for plan in new[max(count, 1) :][: max(0, LEAST_PLANS - len(self.proofs))]:  # where bits alone gave nothing new
            self._prove(plan)

    def _prove_bits(self, options: list[list[LayerChoice]], context: PlanContext) -> None:
        """Set beside the recommended plan what bits alone would choose in its place."""
        recommended = Study(self.store, self.study_id).candidate()
        if recommended is None:
            self._prove_baseline("bits", None, "no plan is within the limits, whose bits it could have")
        elif recommended.kind != "bits":
            self._prove_baseline("bits", bits_plan(options, context, recommended))

    def _prove_baseline(self, kind: PlanKind, plan: Plan | None, reason: str = "no formats to choose between") -> None:
        """Prove a plan without layer-wise latency, or keep why there is none."""
        same = self.plans.get(plan.plan_id) if plan else None
        if same is not None and same.kind != kind:
            reason = f"the same as plan {same.plan_id} ({same.label})"
        elif plan is not None:
            self._prove(plan)
            return
        self.store.put_reference(self.study_id, f"no {kind} plan", {"reason": reason})
        self.listener(Notice(f"no {kind} plan: {reason}"))

    def _prove(self, plan: Plan) -> Proof | None:
        """Prove `plan` unless the store knows how that ends."""
        if plan.plan_id in self.proofs or plan.plan_id in self.failed:
            return self.proofs.get(plan.plan_id)
        self.listener(StageProgress("prove", len(self.proofs), plan.label))
        self.store.put_plan(plan)
        self.plans[plan.plan_id] = plan
        try:
            proof, self.selection = self.runner.run(ProveJob(plan, self.selection), self.listener)
        except Exception as error:  # noqa: BLE001 - a plan that cannot run is a fact about it, kept with its reason
            reason = first_line(error, with_type=True)
            self.failed[plan.plan_id] = reason
            self.store.put_proof(plan.plan_id, None, reason)
            self.listener(Notice(f"plan {plan.label} could not be proven: {reason}; the search goes on without it"))
            return None
        self.store.put_proof(plan.plan_id, proof)
        _log.info("proved %s: %.4g ms a request, increase %+.3g", plan.label, proof.request_ms, proof.increase.value)
        self.proofs[plan.plan_id] = proof
        self._spend()
        return proof

    def _known(self) -> dict[str, tuple[Plan, Proof]]:
        """The proven plans, by id."""
        return {
            plan_id: (self.plans[plan_id], proof) for plan_id, proof in self.proofs.items() if plan_id in self.plans
        }

    def _refine(self, options: list[list[LayerChoice]], context: PlanContext, allowed: float | None) -> None:
        """Spend what is left of the time on plans that Optuna proposes, as long as they make the front grow."""
        known = self._known()
        self.listener(StageStarted("refine", 0))
        growth = growth_of(known, self.limits.minimize, self.limits.max_ppl_increase)
        slowest_s, count, why = 0.0, 0, "no new plan proposed"
        for plan, tell in proposals(
            options,
            context,
            storage_url=self.store.engine.url.render_as_string(hide_password=False),
            seed=self.seed,
            known=known,
            max_memory_bytes=self.limits.max_memory_bytes,
            minimize=self.limits.minimize,
            allowed=allowed,
        ):
            if self._left_s() < max(slowest_s, _SHORTEST_PROOF_S):
                tell(None)
                why = "the time budget is spent"
                break
            began = time.monotonic()
            self.listener(StageProgress("refine", count, f"{plan.label}, {self._left_s():.0f} s left"))
            proof = self._prove(plan)
            tell(proof)
            growth.add(point_of(proof, self.limits.minimize))
            slowest_s = max(slowest_s, time.monotonic() - began)
            count += 1
            if growth.ended:
                why = f"the front's hypervolume grew by {growth.last_growth:.2%} over the last {growth.patience}"
                break
        self.store.put_reference(self.study_id, "refinement", {"plans": count, "ended": why})
        self.listener(StageFinished("refine", f"{count} further plans proven; ended: {why}"))

    def _settle_routes(self, timings: Timings, working_set: int) -> None:
        """On GPUs, where a format has many kernels: measure at which m they change in the plans of the front.

        At the m of the workload the routes stay as they are, and so does what was proven of the plans.
        """
        if not backend(self.device).settles_routes:
            return
        front = {row["plan_id"] for row in Study(self.store, self.study_id).rows() if row["on_front"]}
        plans = [plan for plan_id, plan in self.plans.items() if plan_id in front]
        with workers_kept():  # each halving would wait for new ones otherwise
            plans = settled(plans, timings, working_set, self._time)
        for plan in plans:
            self.store.put_plan(plan)
        self._spend()

    def _deliver(self) -> None:
        """Recommend the best plan that is faster as its user will run it."""
        study = Study(self.store, self.study_id)
        usage = Usage.of(self.loaded, self.workload)
        deliver_best(
            study,
            Deliverer(loaded=self.loaded, usage=usage, calibration=study.calibration, listener=self.listener),
            self.listener,
        )
        best = study.recommended()
        self.store.update_study(self.study_id, recommended=best.plan_id if best else None)

    # -- accounts --------------------------------------------------------------------------------------------------

    def _elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def _left_s(self) -> float:
        return self.time_budget_s - self.spent_before_s - self._elapsed_s()

    def _spend(self, *, complete: bool = False) -> None:
        spent = self.spent_before_s + self._elapsed_s()
        if complete:
            self.store.update_study(self.study_id, complete=True, spent_s=max(spent, self.time_budget_s))
        else:
            self.store.update_study(self.study_id, spent_s=spent)
        release_memory()
