"""`autoquant search`: measure, solve, prove; ends with the front and the recommended plan."""

from __future__ import annotations

import shlex
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from autoquant.cli.output import JsonFlag, print_json, print_table
from autoquant.cli.recipe_option import (
    RecipeOption,
    SaveRecipeOption,
    check_save,
    command_line_wins,
    configuration,
    save_recipe,
)
from autoquant.cli.values import duration_s, fraction, nats, size_bytes

if TYPE_CHECKING:
    from autoquant.study.study import Study


_JUDGES = ("eval_text", "eval_data", "quality")


class Dtype(StrEnum):
    """The precision that counts as unquantized."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FAST16 = "fast16"


class Sensitivity(StrEnum):
    """How what a change costs is found out; described in `autoquant.evaluators.sensitivity`."""

    ISOLATED = "isolated"
    FISHER = "fisher"
    PATH = "path"


class Minimize(StrEnum):
    """What the recommended plan has least of."""

    TIME = "time"
    MEMORY = "memory"


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
            help="Text that quality is measured on, like what the model will read. By default one that autoquant ships.",
            show_default=False,
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval-data",
            metavar="NAME[:CONFIG][:SPLIT][:COLUMN]",
            help="Instead of a text: a JSONL, JSON, CSV, Parquet or text file, a folder of them, or a dataset on the hub.",
            show_default=False,
        ),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:CALLABLE",
            help="Instead of a text: takes the module and calibration, selection or report; returns a loss per sample.",
            show_default=False,
        ),
    ] = None,
    sample_inputs: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:CALLABLE",
            help="Returns the inputs (tuple or dict) of a module that is no language model. Without --quality, variations of"
            " them show how far its outputs diverge.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (cuda, then mps, then cpu) or a device.")] = "auto",
    db: Annotated[str, typer.Option(metavar="FILE", help="Database; an existing one is continued.")] = "plan.db",
    workload: Annotated[
        str | None,
        typer.Option(help="One request, e.g. prefill=512,decode=128 (the default).", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the unquantized model.")] = Dtype.AUTO,
    max_ppl_increase: Annotated[
        str,
        typer.Option(
            metavar="PERCENT",
            help="Limit of the increase of perplexity or your own loss, or of output divergence, e.g. 1%.",
        ),
    ] = "1%",
    max_kl: Annotated[
        str | None,
        typer.Option(
            metavar="NATS", help="Limit of the mean KL to the unquantized model, e.g. 0.02.", show_default=False
        ),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Limit of the weights' memory, e.g. 2GiB.", show_default=False)
    ] = None,
    minimize: Annotated[
        Minimize, typer.Option(help="What the recommended plan has least of, within the limits.")
    ] = Minimize.TIME,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="Layers that stay unquantized, e.g. lm_head; repeatable.", show_default=False
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
    fusable: Annotated[
        str | None,
        typer.Option(
            metavar="vllm", help="One format for what this engine fuses (q, k, v; gate, up).", show_default=False
        ),
    ] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Candidates to consider, repeatable. Default: all but the opt-in ones.",
            show_default=False,
        ),
    ] = None,
    fuse: Annotated[
        bool,
        typer.Option("--fuse/--no-fuse", help="Also try layers that read the same input as one (q, k, v; gate, up)."),
    ] = False,
    time_budget: Annotated[
        str, typer.Option(metavar="TIME", help="Refine until then, e.g. 10m; the steps before take what they take.")
    ] = "10m",
    sensitivity: Annotated[
        Sensitivity | None,
        typer.Option(
            help="What tells a layer's loss: path and fisher, which need a text, predict all from a few gradients; isolated"
            " measures each change alone. By default path; without a text isolated.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn at random.")] = 0,
    model_factory: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:CALLABLE", help="Builds the module of a state dict.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Tokenizer, where the model has none of its own.", show_default=False),
    ] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Load a pickled model: runs the code that is in it.")
    ] = False,
    save_as: SaveRecipeOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Search MODEL for its fastest quantization within a quality budget, measured on this device.

    Ctrl-C keeps everything measured so far; the same command goes on from there.
    """
    eval_text, eval_data, quality = command_line_wins(context, *_JUDGES)
    _check_judge(context)
    if quality is not None and sensitivity not in (None, Sensitivity.ISOLATED):
        raise typer.BadParameter("needs a text: with --quality only isolated works", param_hint="--sensitivity")
    check_save(save_as)
    increase = fraction(max_ppl_increase, "--max-ppl-increase")
    divergence = None if max_kl is None else nats(max_kl, "--max-kl")
    memory = None if max_memory is None else size_bytes(max_memory, "--max-memory")
    budget_s = duration_s(time_budget, "--time-budget")

    from autoquant.records import Workload
    from autoquant.report.progress import listening

    request = None if workload is None else Workload.parse(workload, batch)

    from autoquant.tuner import driver  # imports torch: after everything that can be refused without it

    try:
        with listening() as listener:
            study = driver.search(
                model,
                eval_text=eval_text,
                eval_data=eval_data,
                quality=quality,
                sample_inputs=sample_inputs,
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
                fusable=fusable,
                candidates=tuple(candidates or ("*",)),
                fuse=fuse,
                time_budget_s=budget_s,
                sensitivity=sensitivity.value if sensitivity else None,
                seed=seed,
                model_factory=model_factory,
                tokenizer=tokenizer,
                trust_pickle=trust_pickle,
                listener=listener,
            )
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted: everything measured so far is kept in {db}; the same command goes on from there", err=True
        )
        raise typer.Exit(130) from None
    study.store.put_reference(study.study_id, "command", {"options": configuration(context)})
    if save_as is not None:
        save_recipe(context, save_as)
    _report(study, db, as_json=as_json)


def _check_judge(context: typer.Context) -> None:
    given = [f"--{name.replace('_', '-')}" for name in _JUDGES if context.params[name] is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"cannot be combined with {' and '.join(given[1:])}", param_hint=given[0])


def _report(study: Study, db: str, *, as_json: bool) -> None:
    rows = study.rows()
    recommended = next((row for row in rows if row["recommended"]), None)
    if as_json:
        print_json(
            {
                "study_id": study.study_id,
                "recommended": recommended,
                "database": db,
                "limits": study.limits.as_object(),
                "constraints": study.constraints.as_object(),
            }
        )
        return
    from autoquant.report.tables.plans import front_table
    from autoquant.report.words import disturbed_proofs, off_predictions, recommendation

    where = shlex.quote(db)
    if rows:
        print_table(lambda width: front_table(rows, width))
        typer.echo()
    typer.echo(recommendation(rows, study.facts.limits, study.facts.workload))
    if not rows:
        return
    best = None if recommended is None else recommended["plan_id"]
    for line in [*disturbed_proofs(study.proofs(), best, where), *off_predictions(rows, where)]:
        typer.echo(line)
    typer.echo("\nNext:")
    typer.echo(f"  autoquant pareto {where} --plot front.png")
    if recommended is not None:
        typer.echo(f"  autoquant show {where}")
    typer.echo(f"  autoquant apply {where} {'' if recommended is not None else '--plan ID'}".rstrip())
