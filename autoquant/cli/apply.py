"""`autoquant apply`: write a plan's quantized checkpoint, read it back and compare."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoquant.cli.options import (
    ModelFactoryOption,
    SampleInputsOption,
    TrustPickleOption,
    TrustRemoteCodeOption,
)
from autoquant.cli.output import Database, echo, opened_study
from autoquant.cli.plans import (
    ModelOption,
    PlanOption,
    WithinOption,
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
    from autoquant.report.progress import listening

    with opened_study(database, plan_id=plan) as study:
        chosen = one_plan(study, plan, increase)
        source = model or source_path(study)
        # Imports torch: only after everything that can be refused without it.
        from autoquant.delivery.on_disk import apply_to_disk
        from autoquant.models.trust import Trust

        target = out or folder_beside(database, source, chosen)

        def applied(**code: Any) -> AppliedReport:
            with listening() as listener:
                return apply_to_disk(
                    chosen,
                    source,
                    target,
                    facts=study.facts,
                    listener=listener,
                    trust=Trust(**code),
                )

        report = trusting(
            applied,
            trust_pickle=trust_pickle,
            trust_remote_code=trust_remote_code,
            model_factory=model_factory,
            sample_inputs=sample_inputs,
        )
    _print_report(chosen, report)


_READ_BACK = {
    "logits": "Read back: its logits are bit for bit those of the quantized model in memory.",
    "weights": (
        "Read back: its weights are those of the quantized model in memory, whose logits differ"
        " from run to run."
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
