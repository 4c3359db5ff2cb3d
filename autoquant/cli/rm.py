"""`autoquant rm`: a study with its plans and proofs goes; what was measured stays."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from autoquant.cli.output import Database, opened_store

if TYPE_CHECKING:
    from autoquant.tuner.remove import Removed


def rm(
    database: Database,
    study: Annotated[
        str,
        typer.Argument(metavar="STUDY_ID", help="Which study (the beginning of its id will do).", show_default=False),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a study with its plans and proofs. Timings and losses are kept: the same search does not measure them again."""
    from autoquant.report.words import study_line
    from autoquant.store.remove import find_study
    from autoquant.tuner.remove import remove

    with opened_store(database) as store:
        study_id = find_study(store, study)
        facts = store.study(study_id)
        words = f"study {study_id} ({study_line(facts.source, facts.device, facts.workload)})"
        if not yes and not _confirmed(f"Remove {words} with its {len(store.plans(study_id))} plans?"):
            typer.echo("Nothing was removed.")
            return
        removed = remove(store, study_id)
    typer.echo(f"Removed {words}: {_counted(removed)}.")
    typer.echo("Timings and losses are kept.")


def _confirmed(question: str) -> bool:
    """Ask on the terminal.

    Raises:
        AutoquantError: There is nobody to ask.
    """
    from autoquant.errors import AutoquantError

    if not sys.stdin.isatty():
        raise AutoquantError("nothing was removed: there is no terminal to ask for confirmation on; say --yes")
    return typer.confirm(question, err=True)


def _counted(removed: Removed) -> str:
    rows = removed.rows
    parts = [f"{rows.plans} plans", f"{rows.proofs} proofs", f"{rows.references} references of the unquantized model"]
    if removed.trials is not None:
        parts.append(f"Optuna's study of it with {removed.trials} trials")
    return ", ".join(parts)
