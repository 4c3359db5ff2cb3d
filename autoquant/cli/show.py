"""`autoquant show`: show one plan layer by layer, with why."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoquant.cli.output import Database, JsonFlag, echo, opened_study, print_json, print_table
from autoquant.cli.plans import PlanOption

if TYPE_CHECKING:
    from autoquant.records import Plan, Proof
    from autoquant.study.study import Study


def show(
    database: Database,
    plan: PlanOption = None,
    why: Annotated[
        bool,
        typer.Option(
            "--why", help="Also what the next better and the next cheaper choices would change."
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show one plan layer by layer: format, kernels, predicted time, loss and memory, and why."""
    with opened_study(database, plan_id=plan) as study:
        chosen = study.best_of_search() if plan is None else study.plan(plan)
        rows = study.rows()
        row = next((row for row in rows if row["plan_id"] == chosen.plan_id), None)
        proof = study.proofs().get(chosen.plan_id)
        if as_json:
            from autoquant.report.json_output import plan_object

            found = plan_object(
                chosen, row, proof, study.facts.recording, study.alternatives(chosen)
            )
            print_json(found | {"constraints": study.facts.constraints})
        else:
            from autoquant.store.addresses import shown_address

            where = shlex.quote(shown_address(database))
            _print_text(study, chosen, rows, proof, why=why, database=where)


def _print_text(
    study: Study,
    plan: Plan,
    rows: list[dict[str, Any]],
    proof: Proof | None,
    *,
    why: bool,
    database: str,
) -> None:
    from autoquant.report.tables.plans import coverage_line, coverage_table, layers_table
    from autoquant.report.words import (
        as_run_lines,
        constraints_words,
        engine_lines,
        off_predictions,
        plan_lines,
        refused_lines,
        study_line,
        ties_lines,
    )

    facts = study.facts
    row = next((row for row in rows if row["plan_id"] == plan.plan_id), None)
    failure = study.store.failed_proofs(study.study_id).get(plan.plan_id)
    echo(study_line(facts.source, facts.device, facts.workload))
    if constrained := constraints_words(facts.constraints):
        echo(f"Constraints: {constrained}")
    head, *lines = plan_lines(plan, row, proof, failure)
    as_run = [*as_run_lines(row, facts.workload), *refused_lines([row])] if row else []
    for line in [head, *as_run, *lines, *off_predictions([row] if row else [], database)]:
        echo(line)
    for line in ties_lines(rows, row) if row else []:
        echo(line)
    for line in engine_lines(study.constraints.engine, f"{database} --plan {plan.plan_id}", plan):
        echo(line)
    echo()
    print_table(lambda width: layers_table(plan, width))
    if why:
        _print_why(study, plan)
    recording = facts.recording
    if recording is None:
        return
    echo(f"\n{coverage_line(recording)}")
    if recording.skipped:
        echo()
        print_table(lambda _width: coverage_table(recording))


def _print_why(study: Study, plan: Plan) -> None:
    from autoquant.report.tables.why import NOTHING_KEPT, TOGETHER, together, why_table

    echo()
    found = study.alternatives(plan)
    if found is None:
        echo(NOTHING_KEPT)
        return
    print_table(lambda _width: why_table(plan, found))
    if together(plan, found):
        echo(TOGETHER)
