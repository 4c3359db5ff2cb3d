"""`autoquant bench`: time plans in the whole model, in turn with the unquantized model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoquant.cli.options import (
    Embedding,
    KvCacheKind,
    ModelFactoryOption,
    SampleInputsOption,
    TrustPickleOption,
    TrustRemoteCodeOption,
)
from autoquant.cli.output import (
    Database,
    JsonFlag,
    echo,
    opened_study,
    print_json,
    print_table,
)
from autoquant.cli.plans import ModelOption, PlansOption, chosen_plans, source_path
from autoquant.cli.trust import trusting
from autoquant.files import write_file

if TYPE_CHECKING:
    from autoquant.records import Plan, Workload
    from autoquant.report.tables.bench import LoopLine
    from autoquant.store import StudyFacts
    from autoquant.study.study import Study
    from autoquant.tuner.bench import BenchRow


_KINDS = ("uniform", "heuristic", "bits", "front", "refined")


class TimedLoop(StrEnum):
    """What is timed."""

    PHASES = "phases"
    GENERATE = "generate"


def bench(
    database: Database,
    plan: PlansOption = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Also all proven plans of a kind, e.g. uniform.",
            show_default=False,
        ),
    ] = None,
    loop: Annotated[
        TimedLoop,
        typer.Option(help="phases: compiled prefill and decode steps; generate: what a user runs."),
    ] = TimedLoop.PHASES,
    kv_cache: Annotated[
        list[KvCacheKind] | None,
        typer.Option(
            help="Also the unquantized model and the plans with keys and values in 8 bits;"
            " repeatable.",
            show_default=False,
        ),
    ] = None,
    attribute: Annotated[
        bool,
        typer.Option(
            "--attribute", help="Also say where the time of a step goes: layers, glue, gaps."
        ),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.JSON",
            help="Write these steps for chrome://tracing or Perfetto.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Export the plans, and time them in this engine itself: llama.cpp or vllm.",
            show_default=False,
        ),
    ] = None,
    engine_path: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="With --engine: where its program is (llama-bench, vllm), or the environment that"
            " has it.",
            show_default="on the PATH",
        ),
    ] = None,
    embedding: Annotated[
        Embedding | None,
        typer.Option(
            help="With --engine: what becomes of embeddings, as in `autoquant export`.",
            show_default="plan",
        ),
    ] = None,
    model: ModelOption = None,
    trust_pickle: TrustPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    model_factory: ModelFactoryOption = None,
    sample_inputs: SampleInputsOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Time plans in the whole model, in turn with the unquantized model.

    The times are compared with the predicted ones. With --loop generate: time the model's own
    generate() instead, or one call of a module that is no language model. With --engine: time an
    inference engine's own program.
    """
    _check_options(compare, loop, trace, engine, kv_cache, attribute=attribute)
    _check_engine_options(engine, engine_path, embedding)
    from autoquant.report.progress import listening

    with opened_study(database, plan_id=plan[0] if plan else None) as study:
        plans = chosen_plans(study, plan or [], compare)
        if kv_cache:
            plans += _with_kv_caches(study, plans, kv_cache)
        source = model or source_path(study)
        code = {
            "trust_pickle": trust_pickle,
            "trust_remote_code": trust_remote_code,
            "model_factory": model_factory,
            "sample_inputs": sample_inputs,
        }
        if engine is not None:
            path = engine_path
            return _bench_engine(study, plans, source, engine, path, embedding, code, as_json)
        if loop is TimedLoop.GENERATE:
            return _bench_loop(plans, source, study.facts, code, as_json=as_json)
        # Imports torch: only after everything that can be refused without it.
        from autoquant.models.trust import Trust
        from autoquant.tuner.bench import bench as measure

        def measured(**code: Any) -> list[BenchRow]:
            with listening() as listener:
                return measure(
                    plans,
                    source,
                    study.facts,
                    listener,
                    attribution=attribute or trace is not None,
                    trust=Trust(**code),
                )

        rows = trusting(measured, **code)
        workload = study.facts.workload
    by_id = {each.plan_id: each for each in plans}
    if trace is not None and rows[0].steps:
        _write_trace(trace, rows)
    if as_json:
        _print_json(rows, by_id, workload, attribute)
    else:
        _print_text(rows, by_id, workload, attribute)


def _check_options(
    compare: str | None,
    loop: TimedLoop,
    trace: Path | None,
    engine: str | None,
    kv_cache: Sequence[KvCacheKind] | None,
    *,
    attribute: bool,
) -> None:
    if compare is not None and compare not in _KINDS:
        raise typer.BadParameter(
            f"{compare!r} is none of {', '.join(_KINDS)}", param_hint="--compare"
        )
    if trace is not None and not trace.absolute().parent.is_dir():
        raise typer.BadParameter(
            f"there is no folder {trace.absolute().parent}", param_hint="--trace"
        )
    if loop is TimedLoop.GENERATE and (attribute or trace is not None):
        raise typer.BadParameter(
            "--attribute and --trace are of phases: leave it out", param_hint="--loop"
        )
    if engine is not None and kv_cache:
        raise typer.BadParameter("is of autoquant's own runs", param_hint="--kv-cache")
    if engine is not None and (attribute or trace is not None or loop is TimedLoop.GENERATE):
        raise typer.BadParameter(
            "--loop, --attribute and --trace are of autoquant's own runs: leave them out",
            param_hint="--engine",
        )


def _with_kv_caches(
    study: Study, plans: Sequence[Plan], kinds: Sequence[KvCacheKind]
) -> list[Plan]:
    """Return the unquantized model and the plans with each of these caches."""
    from autoquant.solver.planning import with_kv_cache

    originals = [plan for plan in study.plans() if plan.kind == "original"]
    return [
        with_kv_cache(each, kind.value)
        for kind in dict.fromkeys(kinds)
        for each in (*originals, *plans)
        if each.kv_cache != kind.value
    ]


def _check_engine_options(
    engine: str | None, engine_path: Path | None, embedding: str | None
) -> None:
    given = {"--engine-path": engine_path, "--embedding": embedding}
    if engine is None and (unused := [name for name, value in given.items() if value is not None]):
        raise typer.BadParameter("needs --engine", param_hint=" and ".join(unused))
    if engine_path is not None and not engine_path.is_dir():
        raise typer.BadParameter(f"there is no folder {engine_path}", param_hint="--engine-path")


def _bench_engine(
    study: Study,
    plans: Sequence[Plan],
    source: str,
    engine: str,
    engine_path: Path | None,
    embedding: str | None,
    code: Mapping[str, Any],
    as_json: bool,
) -> None:
    from autoquant.errors import PlanError
    from autoquant.models.trust import Trust
    from autoquant.report.progress import listening
    from autoquant.tuner.engine_bench import EngineRow, bench_engine, timed_engine

    facts = study.facts
    program = timed_engine(engine, facts.workload, engine_path)
    original = next((plan for plan in study.plans() if plan.kind == "original"), None)
    if original is None:
        raise PlanError("this study has no plan of the unquantized model to compare with")

    def measured(**code: Any) -> list[EngineRow]:
        with listening() as listener:
            return bench_engine(
                plans,
                original,
                source,
                facts,
                program,
                listener,
                embedding=embedding,
                trust=Trust(**code),
            )

    _show_loops(trusting(measured, **code), facts.workload, as_json=as_json)


def _bench_loop(
    plans: Sequence[Plan],
    source: str,
    facts: StudyFacts,
    code: Mapping[str, Any],
    *,
    as_json: bool,
) -> None:
    from autoquant.models.trust import Trust
    from autoquant.report.progress import listening
    from autoquant.tuner.bench import LoopRow, bench_loop

    def measured(**code: Any) -> list[LoopRow]:
        with listening() as listener:
            return bench_loop(plans, source, facts, listener, trust=Trust(**code))

    _show_loops(trusting(measured, **code), facts.workload, as_json=as_json)


def _show_loops(rows: Sequence[LoopLine], workload: Workload, *, as_json: bool) -> None:
    from autoquant.report.tables.bench import loop_objects, loop_table

    if as_json:
        print_json(loop_objects(rows, workload))
        return
    print_table(lambda width: loop_table(rows, workload, width))
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        echo(f"note: {note}")


def _write_trace(path: Path, rows: Sequence[BenchRow]) -> None:
    from autoquant.report.attribution import trace_object
    from autoquant.report.json_output import dumps

    write_file(path, dumps(trace_object({_called(row): row.steps for row in rows})).encode())
    echo(f"wrote {path}", err=True)


def _called(row: BenchRow) -> str:
    return row.label if row.plan_id is None else f"{row.label} ({row.plan_id})"


def _print_json(
    rows: Sequence[BenchRow], plans: Mapping[str, Plan], workload: Workload, attribute: bool
) -> None:
    from autoquant.report.attribution import attribution_object
    from autoquant.report.tables.bench import bench_objects

    objects = bench_objects(rows, workload)
    for row, shown in zip(rows, objects, strict=True):
        if attribute and row.steps and row.plan_id is not None:
            shown["attribution"] = attribution_object(row, rows[0], plans[row.plan_id], workload)
    print_json(objects)


def _print_text(
    rows: Sequence[BenchRow], plans: Mapping[str, Plan], workload: Workload, attribute: bool
) -> None:
    from autoquant.report.attribution import attribution_report
    from autoquant.report.tables.bench import bench_notes, bench_table

    print_table(lambda width: bench_table(rows, workload, width))
    for row in rows:
        if attribute and row.steps and row.plan_id is not None:
            echo()
            print_table(partial(attribution_report, row, rows[0], plans[row.plan_id], workload))
    for note in bench_notes(rows, plans, workload):
        echo(note)
