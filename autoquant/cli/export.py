"""`autoquant export`: write a plan for an inference engine, read it back and compare."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from autoquant.cli.options import (
    EvalDataOption,
    EvalTextOption,
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
    limits_within,
    one_plan,
    source_path,
)
from autoquant.cli.trust import trusting
from autoquant.engines import ENGINES, TARGETS, target

if TYPE_CHECKING:
    from autoquant.delivery.exporting import ExportReport
    from autoquant.delivery.likeness import Likeness
    from autoquant.records import Plan
    from autoquant.tuner.exporting import RequantizedReport


class MixedActivations(StrEnum):
    """What is taken where kernels of a route round the activation and others do not."""

    ROUNDED = "rounded"
    A16 = "a16"


def _with_engines(name: str) -> str:
    readers = ", ".join(each.name for each in ENGINES.values() if each.reading(TARGETS[name]))
    return name if readers == name else f"{name} ({readers})"


def export(
    database: Database,
    to: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help=f"What the engine reads: {', '.join(map(_with_engines, TARGETS))}.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the exported model.",
            show_default="MODEL-PLANID-TARGET beside the database",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="GGUF of the unquantized model, for --to gguf.",
            show_default=False,
        ),
    ] = None,
    activations: Annotated[
        MixedActivations,
        typer.Option(
            help="Of layers of which some kernels round the activation and others do not.",
        ),
    ] = MixedActivations.ROUNDED,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="Round anew what the target cannot hold exactly, and measure quality again.",
        ),
    ] = False,
    eval_text: EvalTextOption = None,
    eval_data: EvalDataOption = None,
    quality: QualityOption = None,
    plan: PlanOption = None,
    max_ppl_increase: WithinOption = None,
    model: ModelOption = None,
    trust_pickle: TrustPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    model_factory: ModelFactoryOption = None,
    sample_inputs: SampleInputsOption = None,
) -> None:
    """Write the model that a plan quantizes for an inference engine, into a new folder.

    The numbers are the plan's. A plan that the target cannot hold exactly is refused, unless
    --requantize is given. The folder is read back by the target's own reader, if it is installed,
    and compared with the plan in memory. The kernels, and so the speed, are the engine's.
    """
    # What is rounded anew may be named, and have another limit than its search.
    increase = increase_within(None if requantize else plan, max_ppl_increase)
    target(to)
    check_judges(requantize, "--requantize", eval_text, eval_data, quality)
    from autoquant.report.progress import listening

    with opened_study(database, plan_id=plan) as study:
        chosen = one_plan(study, plan, increase)
        source = model or source_path(study)
        place = out or folder_beside(database, source, chosen, f"-{to}")

        def exported(**code: Any) -> ExportReport | RequantizedReport:
            # Imports torch: only after everything that can be refused without it.
            from autoquant.models.trust import Trust

            options: dict[str, Any] = {"to": to, "base": base, "activations": activations.value}
            with listening() as listener:
                options |= {"listener": listener, "trust": Trust(**code)}
                if requantize:
                    from autoquant.tuner.exporting import export_requantized
                    from autoquant.tuner.judge import Asked

                    options |= {
                        "asked": Asked.of(eval_text, eval_data, quality),
                        "limits": limits_within(study, increase),
                    }
                    return export_requantized(study, chosen, source, place, **options)
                from autoquant.delivery.exporting import export_to_disk

                return export_to_disk(chosen, source, place, facts=study.facts, **options)

        report = trusting(
            exported,
            trust_pickle=trust_pickle,
            trust_remote_code=trust_remote_code,
            model_factory=model_factory,
            sample_inputs=sample_inputs,
        )
    _print(chosen, report)


def _print(plan: Plan, report: ExportReport | RequantizedReport) -> None:
    changes = getattr(report, "changes", None)
    if changes is None:
        _print_report(plan, cast("Any", report))
        return
    made = cast("RequantizedReport", report)
    _print_report(made.plan, made.export)
    if not made.changes:
        echo("No layer was rounded anew: the target holds the plan exactly.")
    for (before, after, why), count in made.changes.items():
        layers = "1 layer" if count == 1 else f"{count} layers"
        echo(f"Rounded anew from the unquantized weights: {layers} from {before} to {after}: {why}")
    for line in made.quality:
        echo(line)


def _print_report(plan: Plan, report: ExportReport) -> None:
    from autoquant.report import units

    schemes = ", ".join(f"{count} x {name}" for name, count in report.schemes.items())
    echo(f"Plan {plan.plan_id} ({plan.label}) as {report.target.name}: {schemes or 'no layer'}")
    if report.unquantized:
        echo(f"{report.unquantized} layers are left unquantized")
    where = os.path.relpath(report.out) if report.out.is_relative_to(Path.cwd()) else report.out
    echo(f"Wrote {where}: {', '.join(report.files)}")
    echo(
        f"Files {units.size(report.file_bytes)}, parameters in the plan"
        f" {units.size(report.plan_bytes)}"
    )
    echo(report.written)
    if report.likeness is None:
        echo(f"Not read back by {report.reader}: {report.unread}")
    else:
        echo(f"Read back by {report.reader}: {_likeness_text(report.likeness)}")
    for note in report.notes:
        echo(f"Note: {note}")
    echo(report.closing)


def _likeness_text(found: Likeness) -> str:
    from autoquant.report import units

    loss, plan_loss, apart = (
        units.digits(each, 2) for each in (found.loss, found.plan_loss, found.apart)
    )
    beside = f"of the plan with its own kernels {plan_loss}."
    if not found.weights:
        measure, unit = ("KL", " nats a token") if found.in_nats else ("Divergence of outputs", "")
        return (
            f"it runs, and shows no weights. {measure} to these numbers multiplied in the model's"
            f" dtype {apart}{unit}, to the unquantized model {loss}; {beside}"
        )
    weights = f"all {found.weights} quantized weights have the plan's numbers"
    if found.moved:
        weights = (
            f"{found.moved} of {found.weights} quantized weights differ by up to"
            f" {units.digits(100 * found.farthest, 2)} % of a row's largest, since the reader"
            " rounds their scales"
        )
    same = "bit for bit those of these numbers multiplied in the model's dtype"
    rounded = "not bit for bit the plan's, since activations or sums are rounded otherwise"
    return (
        f"{weights}. Logits are {same if found.same_logits else rounded}: KL to the unquantized"
        f" model {loss} nats a token, {beside}"
    )
