"""`autoquant search`: run a search, then print the front and the recommended plan."""

from __future__ import annotations

import shlex
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoquant.cli.options import (
    BatchOption,
    CandidatesOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    EngineOption,
    KvCacheSearch,
    MaxKlOption,
    MaxMemoryOption,
    Minimize,
    MinimizeOption,
    ModelFactoryOption,
    SampleInputsOption,
    TokenizerOption,
    TrustPickleOption,
    TrustRemoteCodeOption,
    WorkloadOption,
)
from autoquant.cli.output import JsonFlag, echo, interruptible, print_json, print_table
from autoquant.cli.recipe_option import (
    RecipeOption,
    SaveRecipeOption,
    check_save,
    command_line_wins,
    configuration,
    save_recipe,
)
from autoquant.cli.trust import check_suggested, options_again, trusting
from autoquant.cli.values import duration_s, fraction, nats, size_bytes
from autoquant.tuner.workers.asked import Workers

if TYPE_CHECKING:
    from autoquant.study.study import Study


_JUDGES = ("eval_text", "eval_data", "quality")


class SensitivityName(StrEnum):
    """How the loss of a change is found; see `autoquant.evaluators.sensitivity`."""

    ISOLATED = "isolated"
    FISHER = "fisher"
    PATH = "path"


def search(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Hugging Face folder or name, .safetensors, .pt, .pth or .pt2 file.",
            show_default=False,
        ),
    ],
    _recipe: RecipeOption = None,
    eval_text: Annotated[
        str | None,
        typer.Option(
            "--eval-text",
            metavar="FILE",
            help="Text that quality is measured on, like what the model will read."
            " The default is one that autoquant ships.",
            show_default=False,
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval-data",
            metavar="NAME[:CONFIG][:SPLIT][:COLUMN]",
            help="Instead of a text: a JSONL, JSON, CSV, Parquet or text file, a folder of them,"
            " or a dataset on the hub.",
            show_default=False,
        ),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:CALLABLE",
            help="Instead of a text: takes the module and calibration, selection or report;"
            " returns a loss per sample.",
            show_default=False,
        ),
    ] = None,
    sample_inputs: SampleInputsOption = None,
    device: DeviceOption = "auto",
    db: Annotated[
        str, typer.Option(metavar="FILE", help="Database; an existing one is continued.")
    ] = "plan.db",
    workload: WorkloadOption = None,
    batch: BatchOption = 1,
    dtype: DtypeOption = Dtype.AUTO,
    max_ppl_increase: Annotated[
        str,
        typer.Option(
            metavar="PERCENT",
            help="Limit of the increase of perplexity or of your own loss, or of output"
            " divergence, e.g. 1%.",
        ),
    ] = "1%",
    max_kl: MaxKlOption = None,
    max_memory: MaxMemoryOption = None,
    minimize: MinimizeOption = Minimize.TIME,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Layers that stay unquantized, e.g. lm_head; repeatable.",
            show_default=False,
        ),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB=GLOB",
            help="Layers that get such formats, e.g. '*.q_proj=int8-row*'; repeatable.",
            show_default=False,
        ),
    ] = None,
    engine: EngineOption = None,
    candidates: CandidatesOption = None,
    fuse: Annotated[
        bool | None,
        typer.Option(
            "--fuse/--no-fuse",
            help="Also try layers that read the same input as one (q, k, v; gate, up). Default: on"
            " a GPU.",
            show_default=False,
        ),
    ] = None,
    kv_cache: Annotated[
        KvCacheSearch,
        typer.Option(
            help="Also prove the best plan with keys and values in 8 bits, for long contexts and"
            " large batches; auto tries both formats."
        ),
    ] = KvCacheSearch.OFF,
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings",
            help="Also search embeddings, and heads tied to them: for less memory, not for speed.",
        ),
    ] = False,
    time_budget: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="What the search may take, e.g. 10m. Three plans are proven in any case.",
        ),
    ] = "10m",
    sensitivity: Annotated[
        SensitivityName | None,
        typer.Option(
            help="How losses are found: path and fisher need a text and predict all from a few"
            " gradients; isolated measures each change alone. Default: path with a text, else"
            " isolated.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn at random.")] = 0,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|ray",
            help="Processes that share the work, each with a GPU or cores of its own; ray, or"
            " ray://ADDRESS of a cluster.",
            show_default=False,
        ),
    ] = None,
    model_factory: ModelFactoryOption = None,
    tokenizer: TokenizerOption = None,
    trust_pickle: TrustPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    save_as: SaveRecipeOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Search MODEL for its fastest quantization within a quality budget, measured on this device.

    Ctrl-C keeps everything measured so far; the same command goes on from there.
    """
    eval_text, eval_data, quality = command_line_wins(context, *_JUDGES)
    _check_judge(context)
    if quality is not None and sensitivity not in (None, SensitivityName.ISOLATED):
        raise typer.BadParameter(
            "needs a text: with --quality only isolated works", param_hint="--sensitivity"
        )
    check_save(save_as)
    increase = fraction(max_ppl_increase, "--max-ppl-increase")
    divergence = None if max_kl is None else nats(max_kl, "--max-kl")
    memory = None if max_memory is None else size_bytes(max_memory, "--max-memory")
    budget_s = duration_s(time_budget, "--time-budget")
    if workers is not None:
        Workers.parse(workers)

    from autoquant.records import Workload
    from autoquant.report.progress import listening

    request = None if workload is None else Workload.parse(workload, batch)

    # Imports torch: only after everything that can be refused without it.
    from autoquant.tuner import driver

    def searched(**code: Any) -> Study:
        check_suggested(context, **code)
        context.params.update(code)  # what was confirmed is part of the command, too
        with interruptible(db), listening() as listener:
            return driver.search(
                model,
                eval_text=eval_text,
                eval_data=eval_data,
                db=db,
                device=device,
                dtype=dtype.value,
                workload=request,
                batch=batch,
                max_ppl_increase=increase,
                max_kl=divergence,
                max_memory_bytes=memory,
                minimize=minimize.value,
                keep=tuple(keep or ()),
                pin=tuple(pin or ()),
                engine=engine,
                candidates=tuple(candidates or ("*",)),
                fuse=fuse,
                embeddings=embeddings,
                time_budget_s=budget_s,
                sensitivity=sensitivity.value if sensitivity else None,
                seed=seed,
                workers=workers,
                kv_cache=kv_cache.value,
                tokenizer=tokenizer,
                listener=listener,
                **code,
            )

    study = trusting(
        searched,
        trust_pickle=trust_pickle,
        trust_remote_code=trust_remote_code,
        model_factory=model_factory,
        sample_inputs=sample_inputs,
        quality=quality,
    )
    study.store.put_reference(study.study_id, "command", {"options": configuration(context)})
    if save_as is not None:
        save_recipe(context, save_as)
    _report(study, db, as_json=as_json)


def _check_judge(context: typer.Context) -> None:
    given = [f"--{name.replace('_', '-')}" for name in _JUDGES if context.params[name] is not None]
    if len(given) > 1:
        raise typer.BadParameter(
            f"cannot be combined with {' and '.join(given[1:])}", param_hint=given[0]
        )


def _report(study: Study, db: str, *, as_json: bool) -> None:
    from autoquant.store.addresses import shown_address

    rows = study.rows()
    recommended = next((row for row in rows if row["recommended"]), None)
    if as_json:
        print_json(
            {
                "study_id": study.study_id,
                "recommended": recommended,
                "database": shown_address(db),
                "limits": study.limits.as_object(),
                "constraints": study.facts.constraints,
                "stage_seconds": study.stage_seconds(),
                "stage_memory_bytes": study.stage_memory(),
            }
        )
        return
    from autoquant.report.tables.plans import front_table, uncovered_lines
    from autoquant.report.words import (
        disturbed_proofs,
        engine_lines,
        exception_lines,
        off_predictions,
        recommendation,
        spent_words,
    )

    where = shlex.quote(shown_address(db))
    if rows:
        print_table(lambda width: front_table(rows, width))
        echo()
    echo(recommendation(rows, study.facts.limits, study.facts.workload))
    if not rows:
        return
    best = None if recommended is None else recommended["plan_id"]
    proofs = study.proofs()
    for line in [*uncovered_lines(study.facts.recording), *exception_lines(proofs.values())]:
        echo(line)
    for line in [*disturbed_proofs(proofs, best, where), *off_predictions(rows, where)]:
        echo(line)
    echo(spent_words(study.stage_seconds()))
    echo("\nNext:")
    echo(f"  autoquant pareto {where} --plot front.png")
    if recommended is not None:
        echo(f"  autoquant show {where}")
    chosen = "" if recommended is not None else " --plan ID"
    echo(f"  autoquant apply {where}{chosen}{options_again(study.facts.source)}")
    plan = None if best is None else study.plan(best)
    for line in engine_lines(study.constraints.engine, f"{where}{chosen}", plan):
        echo(line)
