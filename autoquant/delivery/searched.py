"""The model that was searched, loaded again for one of its plans."""

from __future__ import annotations

from pathlib import Path

from autoquant.errors import ModelError, PlanError
from autoquant.models import LoadedModel, ModelSource, load_request
from autoquant.models.trust import NO_TRUST, Trust, request_again
from autoquant.records import Plan
from autoquant.store import StudyFacts


def load_searched(
    plan: Plan,
    model: str | Path,
    facts: StudyFacts,
    device: str | None,
    trust: Trust = NO_TRUST,
    *,
    retrained: bool = False,
) -> LoadedModel:
    """Load the model that a plan was made for, the way the search loaded it.

    Args:
        trust: The code that the user named. What the study names is never run by itself.
        retrained: Its weights may be others than those that were searched.

    Raises:
        TrustError: The model needs code that the user did not name.
        ModelError: `model` is another model.
        PlanError: A live module was searched, and no `model` is given.
    """
    source = ModelSource(**facts.source)
    if source.kind == "live" and not model:
        raise PlanError(
            "a live module was searched: apply its plan with autoquant.apply(plan, module) from"
            " Python"
        )
    place = device or facts.device.type
    loaded = load_request(request_again(source, trust, dtype=plan.dtype, device=place, model=model))
    if loaded.content_hash != plan.model_hash and not retrained:
        raise ModelError(
            f"{model} is not the model that was searched (content {loaded.content_hash}, plan for"
            f" {plan.model_hash}): give the right one with --model, search this one, or, if it is"
            " the same model trained on, apply the plan with `autoquant apply --retrained`"
        )
    return loaded
