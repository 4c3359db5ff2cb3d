"""`autoquant solve`: solve a finished search for other limits, without its model."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoquant.cli.options import (
    Embedding,
    EngineOption,
    EvalDataOption,
    EvalTextOption,
    MaxKlOption,
    MaxMemoryOption,
    Minimize,
    MinimizeOption,
    QualityOption,
)
from autoquant.cli.output import Database, JsonFlag, echo, opened_study, print_json, print_table
from autoquant.cli.plans import ModelOption, StudyOption
from autoquant.cli.solve_in_engine import EngineRequest, solve_and_show
from autoquant.cli.values import fraction, nats, size_bytes
from autoquant.engines import engine as find_engine

if TYPE_CHECKING:
    from autoquant.records import Plan
    from autoquant.study.solve_again import Solved


def solve(
    database: Database,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT",
            help="Limit of the increase (or divergence) of quality.",
            show_default=False,
        ),
    ] = None,
    max_kl: MaxKlOption = None,
    max_memory: MaxMemoryOption = None,
    minimize: MinimizeOption = Minimize.TIME,
    engine: EngineOption = None,
    embedding: Annotated[
        Embedding | None,
        typer.Option(
            help="For --for llama.cpp, what the export will do. head: a quantized head that is tied"
            " to the embedding stands for both, and memory is counted so.",
            show_default="plan: both are kept",
        ),
    ] = None,
    in_engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="NAME",
            help="Solve for the speed of this engine, llama.cpp: time it with each type of weights,"
            " once, and prove the plan in it. Implies --for.",
            show_default=False,
        ),
    ] = None,
    engine_path: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="With --engine: where its program is (llama-bench).",
            show_default="on the PATH",
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option("--again", help="With --engine: time types again that were timed before."),
    ] = False,
    study: StudyOption = None,
    model: ModelOption = None,
    eval_text: EvalTextOption = None,
    eval_data: EvalDataOption = None,
    quality: QualityOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Solve a finished search for other limits, at once.

    Nothing is measured: the plan is predicted, not proven. It is kept, and `autoquant apply --plan`
    takes it. A limit that is not given is not set. Without any, the limits are those of the search.
    With --engine, the plan is for that engine's speed: it is measured there, and its quality here.
    """
    request = EngineRequest(
        in_engine, engine_path, again, model, eval_text, eval_data, quality, embedding
    )
    request.check(engine)
    engine = in_engine or engine
    increase = (
        None if max_ppl_increase is None else fraction(max_ppl_increase, "--max-ppl-increase")
    )
    divergence = None if max_kl is None else nats(max_kl, "--max-kl")
    memory = None if max_memory is None else size_bytes(max_memory, "--max-memory")
    from autoquant.solver.limits import Limits
    from autoquant.study.solve_again import AROUND, solve_again

    with opened_study(database, study_id=study) as opened:
        given = Limits(
            max_ppl_increase=increase,
            max_kl=divergence,
            max_memory_bytes=memory,
            measure=opened.limits.measure,
        )
        any_given = (increase, divergence, memory) != (None, None, None)
        limits = replace(given if any_given else opened.limits, minimize=minimize.value)
        check_embedding(embedding, engine or opened.constraints.engine)
        one_head = embedding is Embedding.HEAD
        if in_engine is not None:
            return solve_and_show(opened, limits, request, database, as_json=as_json)
        solved = solve_again(opened, limits, AROUND, engine, one_head=one_head)
    for note in solved.notes:
        echo(note, err=True)
    if as_json:
        print_json(_object(solved, limits.as_object()))
    else:
        from autoquant.store.addresses import shown_address

        _print_text(solved, shlex.quote(shown_address(database)), embedding)


def check_embedding(embedding: Embedding | None, engine: str | None) -> None:
    """Refuse a kind of embedding that no export of the plan would take, or that is not counted.

    Raises:
        ConstraintError: It says what is taken.
    """
    from autoquant.errors import ConstraintError

    if embedding is None:
        return
    if engine is None or find_engine(engine).target.name != "gguf":
        raise ConstraintError("--embedding is for plans of a gguf: give --for llama.cpp, too")
    if embedding is Embedding.INT8:
        raise ConstraintError(
            "--embedding int8 is for `autoquant export`: a plan does not count it; solve with head"
            " or plan"
        )


def _object(solved: Solved, limits: dict[str, Any]) -> dict[str, Any]:
    def predicted(plan: Plan) -> dict[str, Any]:
        return {"plan_id": plan.plan_id, "formats": plan.formats(), **asdict(plan.prediction)}

    plan = {
        **predicted(solved.plan),
        "label": solved.plan.label,
        "kind": solved.plan.kind,
        "proven": solved.proven,
    }
    return {
        "limits": limits,
        "engine": solved.engine,
        "notes": solved.notes,
        "plan": plan,
        "around": [predicted(other) for other in solved.around],
    }


def _print_text(solved: Solved, where: str, embedding: Embedding | None) -> None:
    from autoquant.report.tables.predicted import predicted_table
    from autoquant.report.words import engine_lines, plan_lines

    print_table(lambda _width: predicted_table(solved.around, solved.plan))
    plan = solved.plan
    echo()
    for line in plan_lines(plan, None)[:2]:
        echo(line)
    if solved.proven:
        echo(f"It was proven: autoquant show {where} --plan {plan.plan_id}")
    else:
        echo("It is a prediction: `autoquant search` with these limits proves it.")
    echo(f"  autoquant apply {where} --plan {plan.plan_id}")
    exported = f"{where} --plan {plan.plan_id}"
    if embedding is Embedding.HEAD:
        exported += " --embedding head"
    for line in engine_lines(solved.engine, exported, plan):
        echo(line)
