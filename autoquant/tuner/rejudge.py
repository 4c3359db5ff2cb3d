"""Measure the quality of a plan once more, on the texts of its search."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from autoquant.candidates import select
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.applier import applied
from autoquant.delivery.searched import load_searched
from autoquant.errors import PlanError, TextError
from autoquant.evaluators.outputs import AnyQuality
from autoquant.evaluators.quality import TextQuality
from autoquant.events import Listener, StageFinished, StageProgress, StageStarted, ignore
from autoquant.intervals import mean_interval, paired_increase
from autoquant.models import LoadedModel
from autoquant.models.copies import shallow_copy
from autoquant.models.trust import Trust
from autoquant.records import Interval, Plan, Proof
from autoquant.runtime.generate.kv_codes import kv_cache_of, rounding_in_passes
from autoquant.solver.limits import Limits
from autoquant.store import StudyFacts
from autoquant.study.study import Study
from autoquant.tuner.judge import Asked, make_judge
from autoquant.tuner.prove import worst_numerics


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The quality of one model against the unquantized one.

    Attributes:
        loss: Mean loss on the report part: nats a token, or what the user's function returns.
        increase: Over the unquantized model on the report part.
        selection: The same on the selection part, which limits are checked on.
        kl: Mean divergence on the selection part, or None.
    """

    loss: float
    increase: Interval
    selection: Interval
    kl: Interval | None

    def used(self, limits: Limits) -> float | None:
        """Return the part of the tightest limit of quality that it uses; None without a limit."""
        parts = []
        if limits.max_ppl_increase:
            parts.append(self.selection.high / limits.max_ppl_increase)
        if limits.max_kl and self.kl is not None:
            parts.append(self.kl.high / limits.max_kl)
        return max(parts, default=None)

    def beyond(self, limits: Limits) -> str:
        """Say by how much it is beyond the limits of quality, or return an empty text."""
        most, found = limits.max_ppl_increase, self.selection.high
        if most is not None and not found <= most:
            value, high = 100 * self.selection.value, 100 * found
            return f"{value:+.2f} % (95 %: up to {high:+.2f} %) is beyond {100 * most:g} %"
        if limits.max_kl is not None and (self.kl is None or not self.kl.high <= limits.max_kl):
            kl = math.nan if self.kl is None else self.kl.high
            return f"a KL of {kl:.3g} is beyond {limits.max_kl:g}"
        return ""


def study_quality(
    loaded: LoadedModel, facts: StudyFacts, asked: Asked, words: str = ""
) -> AnyQuality:
    """Return the measure that a search used, made again and compared by its key.

    Args:
        words: What the search says of it.

    Raises:
        TextError: The text or the function is another one.
    """
    known = set(facts.identity["candidates"])
    candidates = [each for each in select(["*"]) if each.id in known]
    judge = make_judge(asked, loaded, candidates, int(facts.identity["seed"]), ignore)
    if judge.quality.key != facts.identity["quality"]:
        raise TextError(
            f"the search judged by another measure ({words or facts.identity['quality']}) than"
            f" {judge.words}: give the same one with --eval-text, --eval-data or --quality"
        )
    return judge.quality


class Rejudge:
    """Judges what is made of a plan again (see `autoquant.delivery.judging`).

    Args:
        made: The plan that is judged.
        plan: The plan of the search that is shown beside it, or None.
        limits: What the result has to keep to, or None if it is only measured.
        advice: What to do where it does not.
        make_quality: Returns the measure for a loaded model.

    Attributes:
        original, of_plan, result: What was found, once it was.
    """

    def __init__(
        self,
        made: Plan,
        plan: Plan | None,
        facts: StudyFacts,
        make_quality: Callable[[LoadedModel], AnyQuality],
        *,
        limits: Limits | None = None,
        advice: str = "",
        listener: Listener = ignore,
    ) -> None:
        self._made, self._plan, self._limits = made, plan, limits
        self._facts, self._make = facts, make_quality
        self._advice, self._listener = advice, listener
        self._study_limits = limits or Limits.of(facts.limits)
        self.of_plan: Judged | None = None
        self.result: Judged | None = None
        self.original_loss = math.nan
        self.logarithmic = True

    @property
    def words(self) -> tuple[str, ...]:
        """What was found, a line each; empty before."""
        if self.result is None:
            return ()
        rows = {"the plan": self.of_plan, "what was written": self.result}
        found = {name: judged for name, judged in rows.items() if judged is not None}
        what = "Perplexity" if self.logarithmic else "Loss"
        shown = math.exp if self.logarithmic else float
        report = ", ".join(
            f"{name} {shown(judged.loss):.4g} ({100 * judged.increase.value:+.2f} %)"
            for name, judged in found.items()
        )
        selection = ", ".join(
            f"{name} {100 * judged.selection.value:+.2f} %"
            f" (95 %: up to {100 * judged.selection.high:+.2f} %)"
            for name, judged in found.items()
        )
        return (
            f"{what} on text that no choice was made by: unquantized"
            f" {shown(self.original_loss):.4g}, {report}",
            f"On the part that limits are checked on: {selection}; {self._limit_words()}",
        )

    def _limit_words(self) -> str:
        limit = self._study_limits.max_ppl_increase
        return "there is no limit" if limit is None else f"the limit is {100 * limit:g} %"

    def before(self, loaded: LoadedModel) -> None:
        """Keep the unquantized model, and judge the plan of the search.

        Raises:
            PlanError: The model does not fit, so that nothing can be judged.
            TextError: The search judged by another measure.
        """
        if loaded.stream is not None:
            raise PlanError(
                "the unquantized model does not fit here, so quality cannot be measured again:"
                " search with --for instead"
            )
        quality = self._make(loaded)
        # All comparisons have one reference, whose logits need not be made again.
        self._quality = quality.keeping() if isinstance(quality, TextQuality) else quality
        self.logarithmic = self._quality.logarithmic
        self._original = shallow_copy(loaded.module)
        self._listener(StageStarted("quality", 1 if self._plan is None else 2))
        if self._plan is not None:
            self._listener(StageProgress("quality", 0, self._plan.label))
            module = applied(self._plan, self._original, self._facts.calibration)
            with worst_numerics(module, self._plan):
                self.of_plan = self._judged(module)

    def after(self, module: nn.Module) -> None:
        """Judge the result.

        Raises:
            PlanError: It is beyond the limits.
        """
        done = 0 if self._plan is None else 1
        self._listener(StageProgress("quality", done, "what was written"))
        with self._worst(module):
            self.result = self._judged(module)
        self._listener(StageFinished("quality", "measured on the texts of the search"))
        if self._limits is not None and (beyond := self.result.beyond(self._limits)):
            raise PlanError(f"{beyond}, the limit on the selection part: {self._advice}")

    def _worst(self, module: nn.Module) -> AbstractContextManager[None]:
        """Let a module with routes compute with the numerics that losses stand for."""
        if any(isinstance(each.data, RoutedWeight) for each in module.parameters()):
            return worst_numerics(module, self._made)
        return nullcontext()

    def _judged(self, module: nn.Module) -> Judged:
        found, self.original_loss = judge_module(self._quality, module, self._original)
        return found


def judge_module(
    quality: AnyQuality, module: nn.Module, original: nn.Module
) -> tuple[Judged, float]:
    """Return the quality of a module, and the unquantized one's mean loss on the report part."""
    with torch.no_grad(), rounding_in_passes(module, kv_cache_of(module)):
        selection = quality.compare(module, original, "selection")
        report = quality.compare(module, original, "report")
    logarithmic = quality.logarithmic
    unseen = len(report.losses)
    judged = Judged(
        loss=sum(report.losses) / len(report.losses),
        increase=paired_increase(report.losses, report.reference, logarithmic=logarithmic),
        selection=paired_increase(
            selection.losses, selection.reference, logarithmic=logarithmic, unseen=unseen
        ),
        kl=mean_interval(selection.sample_kl, unseen) if selection.sample_kl else None,
    )
    return judged, sum(report.reference) / len(report.reference)


class PlanJudge:
    """Measures the quality of plans, each once. What the search proved is not measured again."""

    def __init__(self, study: Study, model: str, asked: Asked, trust: Trust) -> None:
        self._study, self._model, self._asked, self._trust = study, model, asked, trust
        self._proofs = study.proofs()
        self._known: dict[str, Judged] = {}
        self._measure: Callable[[Plan], Judged] | None = None

    def judged(self, plan: Plan) -> Judged:
        """Return the quality of a plan.

        Raises:
            PlanError: The model does not fit.
            TextError: The search judged by another measure.
        """
        if plan.plan_id not in self._known:
            proof = self._proofs.get(plan.plan_id)
            self._known[plan.plan_id] = _proven(proof) if proof else self._measured(plan)
        return self._known[plan.plan_id]

    def _measured(self, plan: Plan) -> Judged:
        if self._measure is None:
            self._measure = self._ready(plan)
        return self._measure(plan)

    def _ready(self, plan: Plan) -> Callable[[Plan], Judged]:
        facts = self._study.facts
        loaded = load_searched(plan, self._model, facts, None, self._trust)
        if loaded.stream is not None:
            raise PlanError("the unquantized model does not fit here, so no plan can be judged")
        words = self._study.store.references(self._study.study_id).get("judge", {}).get("words", "")
        quality = study_quality(loaded, facts, self._asked, words)
        kept = quality.keeping() if isinstance(quality, TextQuality) else quality

        def measure(plan: Plan) -> Judged:
            module = applied(plan, loaded.module, facts.calibration)
            with worst_numerics(module, plan):
                return judge_module(kept, module, loaded.module)[0]

        return measure


def _proven(proof: Proof) -> Judged:
    return Judged(
        loss=proof.loss,
        increase=proof.increase,
        selection=proof.selection_increase,
        kl=proof.selection_kl,
    )
