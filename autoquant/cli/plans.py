"""Choose the plans and the model that a command is about."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoquant.cli.values import fraction

if TYPE_CHECKING:
    from autoquant.records import Plan
    from autoquant.solver.limits import Limits
    from autoquant.study.study import Study

_FILE_SUFFIXES = (".pt", ".pth", ".pt2", ".bin", ".ckpt", ".safetensors")
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
WithinOption = Annotated[
    str | None,
    typer.Option(
        metavar="PERCENT",
        help="Take the fastest plan within this increase.",
        show_default=False,
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


def increase_within(plan_id: str | None, max_ppl_increase: str | None) -> float | None:
    """Return the increase that a plan is to be chosen by, as a fraction, or None.

    Raises:
        BadParameter: It cannot be read, or a plan is named, too.
    """
    if max_ppl_increase is None:
        return None
    if plan_id is not None:
        raise typer.BadParameter("cannot be combined with --max-ppl-increase", param_hint="--plan")
    return fraction(max_ppl_increase, "--max-ppl-increase")


def one_plan(study: Study, plan_id: str | None, increase: float | None) -> Plan:
    """Return the plan named, the fastest within an increase, or the recommended one.

    Raises:
        PlanError: There is none.
    """
    if plan_id is not None:
        return study.plan(plan_id)
    if increase is not None:
        return study.best_within(replace(study.limits, max_ppl_increase=increase, minimize="time"))
    return study.best_of_search()


def limits_within(study: Study, increase: float | None) -> Limits:
    """Return the limits of a search, with another increase if one is given."""
    if increase is None:
        return study.limits
    return replace(study.limits, max_ppl_increase=increase)


def check_judges(measures: bool, option: str, *judges: str | None) -> None:
    """Refuse what names a measure of quality where none is measured.

    Args:
        option: What has it measured.

    Raises:
        BadParameter: It is named without that option.
    """
    if any(judges) and not measures:
        raise typer.BadParameter(
            f"quality is measured with {option} only: add it, or leave this out",
            param_hint="--eval-text, --eval-data, --quality",
        )


def folder_beside(database: str, source: str, plan: Plan, suffix: str = "") -> Path:
    """Return the folder that is named after the model and the plan, beside the database.

    Raises:
        PlanError: The plan's id, which the database gives, would lead to another folder.
    """
    from autoquant.errors import PlanError
    from autoquant.store.connect import folder_of

    if not plan.plan_id.isalnum():
        raise PlanError(f"the plan's id {plan.plan_id!r} is no name for a folder: give --out DIR")
    return folder_of(database) / f"{_model_name(source)}-{plan.plan_id}{suffix}"


def _model_name(path: str) -> str:
    """Name a model after its folder, its file or its name on the hub."""
    place = Path(os.path.abspath(path))
    return (place.stem if place.suffix in _FILE_SUFFIXES else place.name) or "model"


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
