"""Choose the plans and the model that a command is about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from autoquant.records import Plan
    from autoquant.study.study import Study

_WHICH = "Which plan (the beginning of its id will do)"


def complete_plan(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Complete a plan id in the shell: return ids of the last study, each with its label."""
    from autoquant.errors import AutoquantError
    from autoquant.store.connect import open_read_only

    # An option that has no value yet keeps click from telling the arguments apart.
    given = [context.params.get("database"), *context.args]
    database = next((word for word in given if word), "plan.db")
    try:
        store = open_read_only(database)
        plans = store.plans(store.study().study_id)
    except AutoquantError:
        return []
    return [(plan.plan_id, plan.label) for plan in plans if plan.plan_id.startswith(incomplete)]


StudyOption = Annotated[
    str | None,
    typer.Option(metavar="ID", help="Which study; the last one if left out.", show_default=False),
]
PlanOption = Annotated[
    str | None,
    typer.Option(
        metavar="ID", help=f"{_WHICH}.", show_default="recommended", autocompletion=complete_plan
    ),
]
PlansOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID",
        help=f"{_WHICH}; repeatable.",
        show_default="recommended",
        autocompletion=complete_plan,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="Where the model is, if not where it was.", show_default=False
    ),
]


def chosen_plans(study: Study, ids: list[str], kind: str | None = None) -> list[Plan]:
    """Return the plans named, else the recommended one, and then those of the kind.

    The unquantized model takes part anyway, so it is never among them.

    Raises:
        PlanError: They are of several studies, or only the unquantized model is left.
    """
    from autoquant.errors import PlanError

    named = [study.plan(plan_id) for plan_id in ids] or [study.best_of_search()]
    if others := {each.study_id for each in named} - {study.study_id}:
        raise PlanError(
            f"the plans are of different studies ({study.study_id} and {others.pop()}): give"
            " those of one"
        )
    proven = study.proofs()
    named += [each for each in study.plans() if each.kind == kind and each.plan_id in proven]
    chosen = {each.plan_id: each for each in named if each.kind != "original"}
    if not chosen:
        raise PlanError(
            "the unquantized model takes part anyway: say with --plan which plan to set beside it"
        )
    return list(chosen.values())


def source_path(study: Study) -> str:
    """Return where the searched model was.

    Raises:
        ModelError: It was a live module.
    """
    from autoquant.errors import ModelError

    path = study.facts.source.get("path")
    if not path:
        raise ModelError(
            "this study searched a live module, which has no path: say where the model is with"
            " --model PATH"
        )
    return str(path)
