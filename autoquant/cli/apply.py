"""`autoquant apply`: write a plan's quantized checkpoint, read it back and compare."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from autoquant.cli.options import (
    EvalDataOption,
    EvalTextOption,
    KvCacheChoice,
    KvCacheOption,
    ModelFactoryOption,
    QualityOption,
    SampleInputsOption,
    TrustPickleOption,
    TrustRemoteCodeOption,
)
from autoquant.cli.output import Database, echo, opened_study
from autoquant.cli.plans import (
    ModelOption,
    PlanOption,
    WithinOption,
    check_judges,
    folder_beside,
    increase_within,
    one_plan,
    source_path,
)
from autoquant.cli.trust import trusting
from autoquant.errors import option_words

if TYPE_CHECKING:
    from autoquant.delivery.on_disk import AppliedReport
    from autoquant.records import Plan
    from autoquant.tuner.retrained import RetrainedReport


def apply(
    database: Database,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the quantized model.",
            show_default="MODEL-PLANID beside the database",
        ),
    ] = None,
    retrained: Annotated[
        bool,
        typer.Option(
            "--retrained",
            help="The weights of --model are others than those that were searched: measure quality"
            " anew.",
        ),
    ] = False,
    eval_text: EvalTextOption = None,
    eval_data: EvalDataOption = None,
    quality: QualityOption = None,
    kv_cache: KvCacheOption = None,
    plan: PlanOption = None,
    max_ppl_increase: WithinOption = None,
    model: ModelOption = None,
    trust_pickle: TrustPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    model_factory: ModelFactoryOption = None,
    sample_inputs: SampleInputsOption = None,
) -> None:
    """Write the model that a plan quantizes into a new folder.

    It is read back and compared with the model in memory.
    """
    increase = increase_within(plan, max_ppl_increase)
    notes: list[str] = []
    check_judges(retrained, "--retrained", eval_text, eval_data, quality)
    from autoquant.report.progress import listening

    with opened_study(database, plan_id=plan) as study:
        chosen = one_plan(study, plan, increase)
        if kv_cache is not None:
            chosen, measured = _with_kv_cache(chosen, kv_cache)
            notes += measured
        source = model or source_path(study)
        target = out or folder_beside(database, source, chosen)

        def applied(**code: Any) -> AppliedReport | RetrainedReport:
            # Imports torch: only after everything that can be refused without it.
            from autoquant.models.trust import Trust

            with listening() as listener:
                options: dict[str, Any] = {"listener": listener, "trust": Trust(**code)}
                if retrained:
                    from autoquant.tuner.judge import Asked
                    from autoquant.tuner.retrained import apply_retrained

                    options["asked"] = Asked.of(eval_text, eval_data, quality)
                    return apply_retrained(study, chosen, source, target, **options)
                from autoquant.delivery.on_disk import apply_to_disk

                return apply_to_disk(chosen, source, target, facts=study.facts, **options)

        report = trusting(
            applied,
            trust_pickle=trust_pickle,
            trust_remote_code=trust_remote_code,
            model_factory=model_factory,
            sample_inputs=sample_inputs,
        )
    for note in notes:
        echo(note)
    if retrained:
        _print_retrained(chosen, cast("RetrainedReport", report))
    else:
        _print_report(chosen, cast("AppliedReport", report))


def _with_kv_cache(plan: Plan, asked: KvCacheChoice) -> tuple[Plan, list[str]]:
    """Return the plan with keys and values kept as asked, and notes on what is not measured."""
    from autoquant.records import KV_CACHES

    kind = next((each for each in KV_CACHES if each == asked.value), None)
    if kind == plan.kv_cache:
        return plan, []
    how = f"in {kind}" if kind else f"in {plan.dtype}"
    note = f"Note: the plan was proven with keys and values in {plan.kv_cache or plan.dtype}"
    measure = f"; `autoquant eval` and `bench --kv-cache {kind}` measure it" if kind else ""
    return replace(plan, kv_cache=kind), [f"{note}, and is applied with them {how}{measure}."]


def _print_retrained(plan: Plan, report: RetrainedReport) -> None:
    applied = report.applied
    if applied.model_hash == plan.model_hash:
        echo("Note: these are the weights that were searched.")
    else:
        echo(
            f"Applied to other weights (content {applied.model_hash}) than those that were searched"
            f" ({plan.model_hash}): speed is as proven, quality was measured anew."
        )
    for line in report.quality:
        echo(line)
    if report.beyond:
        echo(f"Note: {report.beyond}, the limit of the search.")
    _print_report(plan, applied)


_READ_BACK = {
    "logits": "Read back: its logits are bit for bit those of the quantized model in memory.",
    "weights": (
        "Read back: its weights are those of the quantized model in memory, whose logits differ"
        " from run to run, or by rounding."
    ),
    "layers": (
        "Read back: its tensors are bit for bit those that were made. The unquantized model does"
        " not fit, so layers were quantized one at a time, and the whole has not been run."
    ),
}


def _print_report(plan: Plan, report: AppliedReport) -> None:
    from autoquant.report import units

    formats = ", ".join(f"{count} x {name}" for name, count in report.formats.items())
    echo(f"Plan {plan.plan_id} ({plan.label}) applied to {report.layers} layers: {formats}")
    echo(
        f"Memory {units.size(report.memory_bytes)} instead of"
        f" {units.size(report.original_memory_bytes)}"
    )
    if plan.kv_cache is not None:
        echo(f"Keys and values in {plan.kv_cache}, when it generates")
    echo(f"Wrote {report.out}: {', '.join(report.files)}")
    echo(_READ_BACK[report.compared])
    where = (
        os.path.relpath(report.out) if report.out.is_relative_to(Path.cwd()) else str(report.out)
    )
    flags = "".join(f" {option_words(*each)}" for each in report.needs_code.items())
    keywords = "".join(f", {name}={value!r}" for name, value in report.needs_code.items())
    echo("\nNext:")
    if report.generates and not report.needs_module:
        echo(f"  autoquant generate {shlex.quote(where)} --prompt TEXT{flags}")
    if report.needs_module:
        echo(
            f"  autoquant.load({where!r}, module)    in Python, with a module of the same"
            " architecture"
        )
    else:
        echo(f"  autoquant.load({where!r}{keywords})    in Python")
