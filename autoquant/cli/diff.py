"""`autoquant diff`: show what differs between two plans of a study, and what it buys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from autoquant.cli.output import Database, JsonFlag, echo, opened_study, print_json, print_table
from autoquant.cli.plans import complete_plan

if TYPE_CHECKING:
    from autoquant.report.plan_diff import PlanPair
    from autoquant.study.study import Study


def diff(
    database: Database,
    plan_a: Annotated[
        str,
        typer.Argument(
            metavar="PLAN_A",
            help="Before (the beginning of its id will do).",
            show_default=False,
            autocompletion=complete_plan,
        ),
    ],
    plan_b: Annotated[
        str,
        typer.Argument(
            metavar="PLAN_B",
            help="After (the beginning of its id will do).",
            show_default=False,
            autocompletion=complete_plan,
        ),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Show which layers PLAN_B stores or computes differently from PLAN_A.

    Also show what that changes in time, quality and memory.
    """
    with opened_study(database, plan_id=plan_a) as study:
        pair = _pair(study, plan_a, plan_b)
        failures = study.store.failed_proofs(study.study_id)
    if as_json:
        from autoquant.report.plan_diff import difference_object

        print_json(difference_object(pair))
        return
    _print_text(pair)
    for plan_id in pair.unproven():
        reason = failures.get(plan_id)
        echo(
            f"Plan {plan_id} is not proven{f' ({reason})' if reason else ''}: nothing measured"
            " is compared."
        )


def _pair(study: Study, plan_a: str, plan_b: str) -> PlanPair:
    from autoquant.report.plan_diff import PlanPair
    from autoquant.study.compare import changes

    before, after = study.plan(plan_a), study.plan(plan_b)
    rows = {row["plan_id"]: row for row in study.rows()}
    return PlanPair(
        before=before,
        after=after,
        changes=changes(before, after, study.facts.workload),
        row_before=rows.get(before.plan_id),
        row_after=rows.get(after.plan_id),
    )


def _print_text(pair: PlanPair) -> None:
    from autoquant.report.plan_diff import changes_table, totals_table

    if pair.changes:
        echo(f"{len(pair.changes)} of {len(pair.before.layers)} layers change:\n")
        print_table(lambda _width: changes_table(pair.changes))
    else:
        echo("No layer changes.")
    echo()
    print_table(lambda _width: totals_table(pair))
