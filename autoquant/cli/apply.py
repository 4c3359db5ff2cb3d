"""`autoquant apply`: write a plan's quantized checkpoint, read it back and compare."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
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
from autoquant.cli.plans import ModelOption, PlanOption, source_path
from autoquant.cli.trust import trusting
from autoquant.cli.values import fraction
from autoquant.errors import option_words

if TYPE_CHECKING:
    from autoquant.export.on_disk import AppliedReport
    from autoquant.records import Plan
    from autoquant.study.study import Study

_FILE_SUFFIXES = (".pt", ".pth", ".pt2", ".bin", ".ckpt", ".safetensors")


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
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT",
            help="Take the fastest plan within this increase.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    trust_pickle: TrustPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    model_factory: ModelFactoryOption = None,
    sample_inputs: SampleInputsOption = None,
) -> None:
    """Write the model that a plan quantizes into a new folder.

    It is read back and compared with the model in memory.
    """
    if plan is not None and max_ppl_increase is not None:
        raise typer.BadParameter("cannot be combined with --max-ppl-increase", param_hint="--plan")
    increase = (
        None if max_ppl_increase is None else fraction(max_ppl_increase, "--max-ppl-increase")
    )
    from autoquant.report.progress import listening

    with opened_study(database, plan_id=plan) as study:
        chosen = _chosen(study, plan, increase)
        source = model or source_path(study)
        # Imports torch: only after everything that can be refused without it.
        from autoquant.export.on_disk import apply_to_disk
        from autoquant.models.trust import Trust

        target = out or _folder_beside(database, source, chosen)

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


def _chosen(study: Study, plan_id: str | None, increase: float | None) -> Plan:
    if plan_id is not None:
        return study.plan(plan_id)
    if increase is not None:
        return study.best_within(replace(study.limits, max_ppl_increase=increase, minimize="time"))
    return study.best_of_search()


def _folder_beside(database: str, source: str, plan: Plan) -> Path:
    """Return the folder that is named after the model and the plan, beside the database.

    Raises:
        PlanError: The plan's id, which the database gives, would lead to another folder.
    """
    from autoquant.errors import PlanError
    from autoquant.store.connect import folder_of

    if not plan.plan_id.isalnum():
        raise PlanError(f"the plan's id {plan.plan_id!r} is no name for a folder: give --out DIR")
    return folder_of(database) / f"{_model_name(source)}-{plan.plan_id}"


def _model_name(path: str) -> str:
    """Name a model after its folder, its file or its name on the hub."""
    place = Path(os.path.abspath(path))
    return (place.stem if place.suffix in _FILE_SUFFIXES else place.name) or "model"


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
