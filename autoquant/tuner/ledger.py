"""The ledger of a search: what was planned, proven and failed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

from autoquant.devices.memory import release_memory
from autoquant.engines import engine as find_engine
from autoquant.errors import HungError, KernelError, ProcessDiedError, first_line
from autoquant.evaluators.quality import ReferenceLosses
from autoquant.events import Listener, Notice, StageProgress
from autoquant.files import raise_if_full
from autoquant.records import Plan, PlanKind, Proof
from autoquant.solver.planning import ProvenPlans
from autoquant.solver.space import SearchSpace
from autoquant.stopwatch import seconds_words
from autoquant.store import Store
from autoquant.study.study import Study
from autoquant.tuner.budget import Budget
from autoquant.tuner.expected import Expected
from autoquant.tuner.workers.again import run_again
from autoquant.tuner.workers.crew import Begun, begin, count, drop
from autoquant.tuner.workers.in_process import Runner
from autoquant.tuner.workers.jobs import Checking, ProveJob

_FIRST_LIMIT_S = 3600.0
_LEAST_LIMIT_S = 600.0
_TIMES_AS_LONG = 10
"""A proof may take so many times as long as the unquantized model's, and at least `_LEAST_LIMIT_S`.

It is `_FIRST_LIMIT_S` where that was proven in an earlier run.
"""
_Begun = tuple[list[Checking], Begun[tuple[Proof, ReferenceLosses]], Callable[[Any], None]]
"""A proof that was begun: the kernel that is checked, the job, and what takes its messages."""
_log = logging.getLogger(__name__)


class ProofLedger:
    """Proves plans, and remembers how that ended. Starts from what the store holds.

    Everything is kept in the store at once.

    Args:
        reference: The unquantized model's losses, as far as they are known.
        expected: What a proof and the delivery are expected to take.

    Attributes:
        plans: By id.
        proofs: By plan id.
        failures: Why a plan could not be proven, by plan id.
        left_out: Labels of the plans for which there was no time.
        room_bytes: What plans may take to fit the device; None for any size.
        reserved_s: Seconds of the time budget for what is measured after the proofs.
    """

    def __init__(
        self,
        store: Store,
        study_id: str,
        runner: Runner,
        budget: Budget,
        listener: Listener,
        reference: ReferenceLosses,
        expected: Expected,
    ) -> None:
        self.store, self.study_id, self.budget, self.listener = store, study_id, budget, listener
        self._runner = runner
        self._reference = reference
        self._expected = expected
        self._limit_s = _FIRST_LIMIT_S
        self._original_s = 0.0  # of proofs made now, as the others
        self._further_s: list[float] = []
        self._begun: dict[str, _Begun] = {}
        self.left_out: list[str] = []
        self.room_bytes: int | None = None
        self.reserved_s = 0.0
        self.plans: dict[str, Plan] = {plan.plan_id: plan for plan in store.plans(study_id)}
        self.proofs: dict[str, Proof] = store.proofs(study_id)
        self.failures: dict[str, str] = store.failed_proofs(study_id)
        engine = self.study.constraints.engine
        self._counts_files = engine is not None and bool(find_engine(engine).target.stores)

    @property
    def study(self) -> Study:
        """The study as its user sees it now."""
        return Study(self.store, self.study_id)

    def proven(self) -> ProvenPlans:
        """Return the proven plans that plans are solved from.

        What keeps keys and values in 8 bits does not show what its layers take and lose.
        """
        return {
            plan_id: (self.plans[plan_id], proof)
            for plan_id, proof in self.proofs.items()
            if plan_id in self.plans and self.plans[plan_id].kv_cache is None
        }

    def put_plan(self, plan: Plan) -> None:
        """Keep a plan, or what is new about it."""
        self.store.put_plan(plan)
        self.plans[plan.plan_id] = plan

    def put_space(self, space: SearchSpace) -> None:
        """Keep what further plans are solved from."""
        self.store.put_options(self.study_id, space.options, space.about())

    @property
    def proof_s(self) -> float:
        """The seconds that a further proof is expected to take.

        It is the root mean square of those so far, which is above their mean the more they differ.
        The unquantized model's, which comes first, has less to do.
        """
        if self._further_s:
            return math.sqrt(fmean(each**2 for each in self._further_s))
        return max(self._expected.proof_s, self._original_s)

    def least_s(self, proofs: int) -> float:
        """Return the seconds that so many proofs, and the delivery, are expected to take."""
        rounds = math.ceil(proofs / count(self._runner))
        return rounds * self.proof_s + self._expected.deliver_s

    def has_time(self, proofs: int = 1) -> bool:
        """Check whether so many further proofs, and the delivery, fit into the time budget."""
        return self.budget.left_s() >= self.least_s(proofs) + self.reserved_s

    def has_ended(self, plan: Plan) -> bool:
        """Check whether a plan was proven, or could not be."""
        return plan.plan_id in self.proofs or plan.plan_id in self.failures

    def prove_if_time(self, plan: Plan, *, before: int = 0) -> bool:
        """Prove a plan if there is time for it, or leave it out; return whether there was.

        Args:
            before: So many other plans are worth more, and need their time first.
        """
        if self.has_ended(plan) or self.is_ahead(plan) or self.has_time(1 + before):
            self.prove(plan)
            return True
        self.left_out.append(plan.label)
        return False

    def prove(self, plan: Plan) -> Proof | None:
        """Prove a plan unless it is known how that ends.

        Returns:
            The proof, or None if the plan could not be proven.

        Raises:
            KernelError: A kernel of the plan is wrong, or ended the process when it was checked.
        """
        if self.has_ended(plan):
            return self.proofs.get(plan.plan_id)
        self.listener(StageProgress("prove", len(self.proofs), plan.label))
        self.put_plan(plan)
        if plan.kind == "original":
            self._warm_up(plan)
        try:
            made, self._reference = self._run(plan)
            if self._counts_files:
                # What the plan takes here says nothing of what it takes there.
                made = replace(made, memory_bytes=plan.prediction.memory_bytes)
        except Exception as error:
            raise_if_full(error)
            proof = self._put_failure(plan, first_line(error, with_type=True))
            if isinstance(error, KernelError):
                raise
        else:
            proof = self.store.put_proof(plan.plan_id, made)
        if proof is None:
            return None
        self.proofs[plan.plan_id] = proof
        _log.info(
            "proved %s: %.4g ms a request, increase %+.3g, up to %+.3g where limits apply; %s",
            plan.label,
            proof.request_ms,
            proof.increase.value,
            proof.selection_increase.high,
            seconds_words(proof.seconds),
        )
        self.budget.note()
        release_memory()
        return proof

    def ahead(self, *plans: Plan, before: int = 0) -> None:
        """Begin proofs that are asked for next, if there is time, for workers that have none.

        How they ended counts once `prove` asks for it, so that what is decided until then is the
        same for any number of workers.

        Args:
            before: See `prove_if_time`.
        """
        if count(self._runner) == 1:
            return
        for plan in plans:
            if self.has_ended(plan) or plan.plan_id in self._begun:
                continue
            if not self.has_time(len(self._begun) + 1 + before):
                break
            self._begun[plan.plan_id] = self._begin(plan)

    def is_ahead(self, plan: Plan) -> bool:
        """Check whether the proof of a plan was begun."""
        return plan.plan_id in self._begun

    def drop_ahead(self) -> None:
        """Forget the proofs that were begun, and that nobody asks for any more."""
        for _, begun, _ in self._begun.values():
            drop(self._runner, begun)
        self._begun.clear()

    def _warm_up(self, original: Plan) -> None:
        """Have the other workers prove the unquantized model, too: plans are timed beside it."""
        job = ProveJob(original, self._reference, self.study.limits)
        for _ in range(count(self._runner) - 1):
            begin(self._runner, job, lambda _message: None)

    def _begin(self, plan: Plan, *, first: bool = False) -> _Begun:
        """Begin a proof, and note the kernel that is checked."""
        at_work = [Checking()]

        def on_message(message: Any) -> None:
            if isinstance(message, Checking):
                at_work[0] = message
            else:
                self.listener(message)

        limit_s = None if plan.kind == "original" else self._limit_s
        job = ProveJob(plan, self._reference, self.study.limits, limit_s)
        return at_work, begin(self._runner, job, on_message, first=first), on_message

    def _run(self, plan: Plan) -> tuple[Proof, ReferenceLosses]:
        """Run and time a proof.

        If its process dies while a kernel is checked, that kernel is blamed.
        """
        original = plan.kind == "original"
        started_s = self.budget.now_s()
        ahead = self._begun.pop(plan.plan_id) if self.is_ahead(plan) else None
        at_work, begun, on_message = ahead or self._begin(plan, first=True)
        try:
            result = run_again(self._runner, begun.job, on_message, self.listener, begun)
        except ProcessDiedError as death:
            blamed = at_work[0] if at_work[0].kernel else self._only_suspect(plan, death)
            if blamed is None:
                raise
            raise KernelError(
                f"kernel {blamed.format}/{blamed.kernel} in {blamed.layer}: {death}",
                format_id=blamed.format,
                kernel=blamed.kernel,
                reason=f"in {blamed.layer}: {death}",
            ) from death
        finally:
            several = count(self._runner) > 1
            took_s = begun.seconds if several else self.budget.now_s() - started_s
            if original:
                self._original_s = took_s
            else:
                self._further_s.append(took_s)
        if original:
            self._limit_s = max(_LEAST_LIMIT_S, _TIMES_AS_LONG * took_s)
        return result

    def _only_suspect(self, plan: Plan, death: ProcessDiedError) -> Checking | None:
        """Return the kernel of a plan that hung if all its others are in proven plans, or None.

        Every further plan with it would hang as long.
        """
        if not isinstance(death, HungError):
            return None
        proven = {kernel for each, _ in self.proven().values() for kernel in _kernels(each)}
        suspects = _kernels(plan).keys() - proven
        if len(suspects) != 1:
            return None
        format_id, kernel = suspects.pop()
        return Checking(_kernels(plan)[format_id, kernel], format_id, kernel)

    def distrust(self, lie: KernelError) -> None:
        """Count every plan with a kernel as failed, also those that were proven before."""
        for plan_id, plan in self.plans.items():
            if plan_id in self.proofs and (lie.format, lie.kernel) in _kernels(plan):
                del self.proofs[plan_id]
                reason = f"its kernel {lie.format}/{lie.kernel} is wrong"
                self._put_failure(plan, reason, replaces=True)

    def prove_baseline(self, kind: PlanKind, plan: Plan, *, before: int = 0) -> None:
        """Prove a baseline as `prove_if_time`, unless it is the same as a plan of another kind."""
        same = self.plans.get(plan.plan_id)
        if same is not None and same.kind != kind:
            self.leave_out(kind, f"the same as plan {same.plan_id} ({same.label})")
        elif not self.prove_if_time(plan, before=before):
            self.leave_out(kind, "the time budget is spent")

    def leave_out(self, kind: PlanKind, reason: str) -> None:
        """Keep why there is no baseline of this kind."""
        self.store.put_reference(self.study_id, f"no {kind} plan", {"reason": reason})
        self.listener(Notice(f"no {kind} plan: {reason}"))

    def _put_failure(self, plan: Plan, reason: str, *, replaces: bool = False) -> Proof | None:
        """Keep why a plan could not be proven here; return another process' proof, or None.

        Args:
            replaces: Another process' proof counts for nothing.
        """
        if proof := self.store.put_proof(plan.plan_id, None, reason, replaces=replaces):
            return proof
        self.failures[plan.plan_id] = reason
        text = f"plan {plan.label} could not be proven: {reason}; the search goes on without it"
        self.listener(Notice(text))
        return None


def _kernels(plan: Plan) -> dict[tuple[str, str], str]:
    """Return the last layer that each kernel of a plan computes, by format and kernel."""
    return {
        (layer.format, step.kernel): layer.name for layer in plan.layers for step in layer.route
    }
