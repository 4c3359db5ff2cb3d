"""Export a plan, and prove its quality again where layers had to be rounded anew."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoquant.delivery.exporting import ExportReport, export_to_disk
from autoquant.delivery.programs.exporting import ProgramReport, export_programs
from autoquant.delivery.requantizing import Requantized, requantized
from autoquant.delivery.targets import writer
from autoquant.engines import ENGINES, PROGRAMS, Activations
from autoquant.errors import PlanError
from autoquant.evaluators.quality import QualityFunction
from autoquant.events import Listener, Notice, ignore
from autoquant.models.request import SampleInputs
from autoquant.models.trust import NO_TRUST, Trust
from autoquant.records import Plan
from autoquant.solver.limits import Limits
from autoquant.study.study import Study
from autoquant.tuner.judge import Asked
from autoquant.tuner.rejudge import Judged, Rejudge, study_quality


@dataclass(frozen=True, slots=True, kw_only=True)
class RequantizedReport:
    """An export for which layers were rounded anew.

    Attributes:
        plan: The plan that was exported.
        changes: How many layers were changed, by (values of the plan, values here, why).
        quality: What was measured, a line each; empty if no layer was changed.
        of_plan, result: The quality of the plan of the search, and of what was written.
    """

    export: ExportReport
    plan: Plan
    changes: Mapping[tuple[str, str, str], int]
    quality: tuple[str, ...] = ()
    of_plan: Judged | None = None
    result: Judged | None = None


AnyReport = ExportReport | RequantizedReport | ProgramReport
"""What one of the ways to export gives."""


def export_requantized(  # noqa: PLR0913 - the keywords of a public function
    study: Study,
    plan: Plan,
    model: str | Path,
    out: str | Path,
    *,
    to: str,
    asked: Asked | None = None,
    limits: Limits | None = None,
    base: str | Path | None = None,
    embedding: str | None = None,
    activations: Activations = "rounded",
    device: str | None = None,
    listener: Listener = ignore,
    trust: Trust = NO_TRUST,
) -> RequantizedReport:
    """Export a plan with the nearest values that the target holds, and prove its quality again.

    The layers that the target cannot hold exactly are rounded anew from the unquantized weights.
    What the target's reader makes of the files is judged on the texts of the search, or the changed
    plan in memory if it is not read. If it is beyond the limits, nothing is written.

    Args:
        asked: What judged the search, if not the text that autoquant ships.
        limits: Those to keep to. None is those of the search.

    Raises what `export_to_disk` raises, and:
        PlanError: What was made is beyond the limits.
        TextError: The search judged by another measure.
    """
    facts = study.facts
    place = device or facts.device.type
    changed = requantized(plan, writer(to).target, place.partition(":")[0], activations)
    judge = None
    if changed.changes:
        judge = _judge(study, plan, changed, to, asked, limits, listener)
    report = export_to_disk(
        changed.plan,
        model,
        out,
        to=to,
        facts=facts,
        base=base,
        embedding=embedding,
        device=device,
        listener=listener,
        trust=trust,
        activations=activations,
        judge=judge,
    )
    if judge is None:
        return RequantizedReport(export=report, plan=plan, changes={})
    return RequantizedReport(
        export=report,
        plan=changed.plan,
        changes=changed.changes,
        quality=judge.words,
        of_plan=judge.of_plan,
        result=judge.result,
    )


def _judge(
    study: Study,
    plan: Plan,
    changed: Requantized,
    to: str,
    asked: Asked | None,
    limits: Limits | None,
    listener: Listener,
) -> Rejudge:
    facts = study.facts
    words = study.store.references(study.study_id).get("judge", {}).get("words", "")
    readers = [each.name for each in ENGINES.values() if each.target.name == to]
    search = f"search or solve with --for {readers[0]}, or " if readers else ""
    advice = (
        f"nothing was written; {search}accept more with --plan {plan.plan_id} --max-ppl-increase"
    )
    asked = asked or Asked.of(None, None, None)
    return Rejudge(
        changed.plan,
        plan,
        facts,
        lambda loaded: study_quality(loaded, facts, asked, words),
        limits=limits or study.limits,
        advice=advice,
        listener=listener,
    )


def write_export(  # noqa: PLR0913 - what a command may say
    study: Study,
    plan: Plan,
    model: str | Path,
    out: str | Path,
    *,
    to: str,
    requantize: bool,
    asked: Asked,
    limits: Limits,
    base: str | Path | None,
    embedding: str | None,
    activations: Activations,
    device: str | None = None,
    listener: Listener,
    trust: Trust,
) -> AnyReport:
    """Export as `export` says, with its arguments taken apart."""
    how: dict[str, Any] = {"device": device, "listener": listener, "trust": trust}
    if to in PROGRAMS:
        _check_programs(to, base, embedding, activations, requantize=requantize)
    if plan.kv_cache is not None:
        listener(Notice(f"keys and values in {plan.kv_cache} stay here: set it in what runs {to}"))
    if to in PROGRAMS:
        return export_programs(plan, model, out, form=PROGRAMS[to], facts=study.facts, **how)
    how |= {"to": to, "base": base, "embedding": embedding, "activations": activations}
    if requantize:
        return export_requantized(study, plan, model, out, asked=asked, limits=limits, **how)
    return export_to_disk(plan, model, out, facts=study.facts, **how)


def _check_programs(
    to: str,
    base: str | Path | None,
    embedding: str | None,
    activations: Activations,
    *,
    requantize: bool,
) -> None:
    """Refuse options that programs have no use for, all at once."""
    wrong = {
        "--base": base is not None,
        "--embedding": embedding is not None,
        "--activations": activations != "rounded",
        "--requantize": requantize,
    }
    if names := " and ".join(name for name, given in wrong.items() if given):
        raise PlanError(f"{to} holds every plan with its own kernels: leave out {names}")


def export(  # noqa: PLR0913 - the keywords of a public function
    study: Study,
    out: str | Path,
    *,
    to: str,
    plan: Plan | None = None,
    model: str | Path | None = None,
    base: str | Path | None = None,
    embedding: str | None = None,
    activations: Activations = "rounded",
    requantize: bool = False,
    max_ppl_increase: float | None = None,
    eval_text: str | os.PathLike[str] | None = None,
    eval_data: str | None = None,
    quality: QualityFunction | str | None = None,
    device: str | None = None,
    listener: Listener = ignore,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
    model_factory: str | None = None,
    sample_inputs: SampleInputs = None,
) -> AnyReport:
    """Write the model that a plan quantizes as a new folder that another tool reads.

    The folder is read back and compared as `autoquant.delivery.exporting.export_to_disk` says.
    Programs are run and compared (see `autoquant.delivery.programs`).

    Args:
        study: What `search` returned, or `Study.open` opened.
        out: The folder to make. It must not exist yet, or be empty.
        to: What the engine reads, e.g. `compressed-tensors`; or `aoti` or `pt2`, for programs that
            run with PyTorch alone.
        plan: None is the recommended plan.
        model: Where the model is, if not where it was.
        base: A GGUF of the unquantized model for `gguf`, which is made of the model's folder if
            this is None. No other target takes it.
        embedding: For `gguf`: `int8` rounds the embedding, too, and `head` writes the quantized
            head for both, if they are tied. None and `plan` keep it.
        activations: What is taken of a layer where some kernels of its route round the activation
            and others do not: `rounded`, or `a16`.
        requantize: Round layers anew that the target cannot hold exactly, and prove the quality
            again. Then the report is a `RequantizedReport`.
        max_ppl_increase: The limit of that. None is the search's.
        eval_text, eval_data, quality: What judged the search, for that; as `search` takes it.
        device: Where the plan is applied. None is the kind of device of the search.
        trust_pickle, trust_remote_code, model_factory, sample_inputs: The code that the model
            needs, as `search` takes it.

    Raises what `export_to_disk`, `export_requantized` and `export_programs` raise.
    """
    trust = Trust(
        trust_pickle=trust_pickle,
        trust_remote_code=trust_remote_code,
        model_factory=model_factory,
        sample_inputs=sample_inputs,
    )
    limits = study.limits
    if max_ppl_increase is not None:
        limits = replace(limits, max_ppl_increase=max_ppl_increase)
    return write_export(
        study,
        plan or study.best_of_search(),
        model or study.facts.source.get("path") or "",
        out,
        to=to,
        requantize=requantize,
        asked=Asked.of(eval_text, eval_data, quality),
        limits=limits,
        base=base,
        embedding=embedding,
        activations=activations,
        device=device,
        listener=listener,
        trust=trust,
    )
