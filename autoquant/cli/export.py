"""`autoquant export`: write a plan for an inference engine, read it back and compare."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from autoquant.cli.options import (
    Embedding,
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
from autoquant.engines import ENGINES, PROGRAMS, TARGETS, target

if TYPE_CHECKING:
    from autoquant.delivery.exporting import ExportReport
    from autoquant.delivery.likeness import Likeness
    from autoquant.delivery.programs.exporting import ProgramReport
    from autoquant.delivery.programs.reading import Agreement
    from autoquant.records import Plan
    from autoquant.tuner.exporting import AnyReport, RequantizedReport


class MixedActivations(StrEnum):
    """What is taken where kernels of a route round the activation and others do not."""

    ROUNDED = "rounded"
    A16 = "a16"


def _with_engines(name: str) -> str:
    if name in PROGRAMS:
        return f"{name} ({PROGRAMS[name].reader})"
    readers = ", ".join(each.name for each in ENGINES.values() if each.reading(TARGETS[name]))
    return name if readers == name else f"{name} ({readers})"


def export(
    database: Database,
    to: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help=f"What the engine reads: {', '.join(map(_with_engines, [*TARGETS, *PROGRAMS]))}.",
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
            show_default="made of the model's folder",
        ),
    ] = None,
    embedding: Annotated[
        Embedding | None,
        typer.Option(
            help="For --to gguf. int8: round the embedding, and a head tied to it; head: write the"
            " quantized head for both, if they are tied.",
            show_default="plan: as the plan has it",
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
    and compared with the plan in memory. The kernels, and so the speed, are the engine's; aoti and
    pt2 keep the plan's.
    """
    # What is rounded anew may be named, and have another limit than its search.
    increase = increase_within(None if requantize else plan, max_ppl_increase)
    if to not in PROGRAMS:
        target(to)
    check_judges(requantize, "--requantize", eval_text, eval_data, quality)
    from autoquant.report.progress import listening

    with opened_study(database, plan_id=plan) as study:
        chosen = one_plan(study, plan, increase)
        source = model or source_path(study)
        place = out or folder_beside(database, source, chosen, f"-{to}")

        def exported(**code: Any) -> AnyReport:
            # Imports torch: only after everything that can be refused without it.
            from autoquant.models.trust import Trust
            from autoquant.tuner.exporting import write_export
            from autoquant.tuner.judge import Asked

            with listening() as listener:
                return write_export(
                    study,
                    chosen,
                    source,
                    place,
                    to=to,
                    requantize=requantize,
                    asked=Asked.of(eval_text, eval_data, quality),
                    limits=limits_within(study, increase),
                    base=base,
                    embedding=embedding,
                    activations=cast("Any", activations.value),
                    listener=listener,
                    trust=Trust(**code),
                )

        report = trusting(
            exported,
            trust_pickle=trust_pickle,
            trust_remote_code=trust_remote_code,
            model_factory=model_factory,
            sample_inputs=sample_inputs,
        )
    _print(chosen, report)


def _print(plan: Plan, report: AnyReport) -> None:
    if hasattr(report, "programs"):
        _print_programs(plan, cast("ProgramReport", report))
        return
    if not hasattr(report, "changes"):
        _print_report(plan, report)
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


def _print_programs(plan: Plan, report: ProgramReport) -> None:
    from autoquant.report import units

    echo(f"Plan {plan.plan_id} ({plan.label}) as {report.form.name}:")
    for name, kernels in report.programs.items():
        echo(f"  {name}: {', '.join(f'{count} x {kernel}' for kernel, count in kernels.items())}")
    if report.unquantized:
        echo(f"{report.unquantized} layers are left unquantized")
    if report.operators:
        echo(f"libautoquant_cpu.so has the operators {', '.join(report.operators)}")
    _print_files(report)
    agreement = report.agreement
    echo(f"Run in a process without autoquant: {_agreement_text(agreement)}")
    for note in report.notes:
        echo(f"Note: {note}")
    request, predicted = (units.digits(each) for each in report.request_ms)
    parts = ", ".join(f"{name} {units.digits(ms)} ms" for name, ms in agreement.times_ms.items())
    echo(
        f"Speed: a request ({report.workload}) takes {request} ms ({parts}); the search predicted"
        f" {predicted} ms"
    )


def _print_files(report: ExportReport | ProgramReport) -> None:
    from autoquant.report import units

    where = os.path.relpath(report.out) if report.out.is_relative_to(Path.cwd()) else report.out
    echo(f"Wrote {where}: {', '.join(report.files)}")
    echo(
        f"Files {units.size(report.file_bytes)}, parameters in the plan"
        f" {units.size(report.plan_bytes)}"
    )


def _agreement_text(found: Agreement) -> str:
    from autoquant.report import units

    error, loss, plan_loss = (
        units.digits(each, 2) for each in (found.error, found.loss, found.plan_loss)
    )
    same = "outputs are bit for bit the plan's"
    if not found.same:
        same = (
            f"outputs differ from the plan's by {error} (relative), since compiled code rounds at"
            " other places"
        )
    if found.same_tokens is None:
        return f"{same}. From the unquantized model they differ by {loss}, the plan by {plan_loss}."
    return (
        f"{same}; the likeliest token is the same at {found.same_tokens} of {found.places} places."
        f" KL to the unquantized model {loss} nats a token, of the plan {plan_loss}."
    )


def _print_report(plan: Plan, report: ExportReport) -> None:
    schemes = ", ".join(f"{count} x {name}" for name, count in report.schemes.items())
    echo(f"Plan {plan.plan_id} ({plan.label}) as {report.target.name}: {schemes or 'no layer'}")
    if report.unquantized:
        echo(f"{report.unquantized} layers are left unquantized")
    _print_files(report)
    if report.schemes:
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
    if not found.weights:
        weights = "all weights are the model's"
    if found.moved:
        weights = (
            f"{found.moved} of {found.weights} quantized weights differ by up to"
            f" {units.digits(100 * found.farthest, 2)} % of a row's largest, since the reader"
            " rounds their scales"
        )
    same = "bit for bit those of these numbers multiplied in the model's dtype"
    rounded = "not bit for bit the plan's, since activations or sums are rounded otherwise"
    if found.rounded:
        rounded = "those of these numbers with a rounded embedding, which is not the plan's"
    return (
        f"{weights}. Logits are {same if found.same_logits else rounded}: KL to the unquantized"
        f" model {loss} nats a token, {beside}"
    )
