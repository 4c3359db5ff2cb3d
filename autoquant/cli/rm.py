"""`autoquant rm`: remove a study with its plans; timings and losses stay."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from autoquant.cli.output import Database, confirmed, echo, opened_store

if TYPE_CHECKING:
    from autoquant.study.remove import Removed


def rm(
    database: Database,
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY_ID",
            help="Which study (the beginning of its id will do).",
            show_default=False,
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a study with its plans, their proofs and their task scores.

    Timings, losses and task scores of the unquantized model are kept: the same search does not
    measure them again.
    """
    from autoquant.report.words import study_line
    from autoquant.store.remove import find_study
    from autoquant.study.remove import remove

    with opened_store(database) as store:
        study_id = find_study(store, study)
        facts = store.study(study_id)
        words = f"study {study_id} ({study_line(facts.source, facts.device, facts.workload)})"
        if not yes and not _agreed(f"Remove {words} with its {len(store.plans(study_id))} plans?"):
            echo("Nothing was removed.")
            return
        removed = remove(store, study_id)
    echo(f"Removed {words}: {_counted(removed)}.")
    echo("Timings, losses and task scores of the unquantized model are kept.")


def _agreed(question: str) -> bool:
    """Ask the person at the terminal.

    Raises:
        AutoquantError: Standard input is no terminal.
    """
    from autoquant.errors import AutoquantError

    if not sys.stdin.isatty():
        raise AutoquantError(
            "nothing was removed: there is no terminal to ask for confirmation on; say --yes"
        )
    return confirmed(question)


def _counted(removed: Removed) -> str:
    rows = removed.rows
    parts = [f"{rows.plans} plans", f"{rows.proofs} proofs"]
    if rows.deliveries:
        parts.append(f"{rows.deliveries} timings as a user runs them")
    if rows.references:
        parts.append("the command that it came from")
    if rows.task_scores:
        parts.append(f"{rows.task_scores} task scores of its plans")
    if removed.trials is not None:
        parts.append(f"Optuna's study of it with {removed.trials} trials")
    return ", ".join(parts)
