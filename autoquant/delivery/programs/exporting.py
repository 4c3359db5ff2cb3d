"""Write a plan as programs, run them in a process without autoquant, and compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from autoquant.candidates.formats.floats import original_format
from autoquant.delivery import checkpoint
from autoquant.delivery.applier import apply
from autoquant.delivery.programs.files import (
    write_beside,
    write_compiled,
    write_exported,
    write_library,
    write_manifest,
)
from autoquant.delivery.programs.operators import Packing, Substitute, kernel_counts
from autoquant.delivery.programs.plain import routed_weights
from autoquant.delivery.programs.ranges import Range
from autoquant.delivery.programs.reading import Agreement, Reading
from autoquant.delivery.programs.steps import check_step
from autoquant.delivery.programs.tracing import Subject, given_size, ranges_of, subject_of, trace
from autoquant.delivery.searched import load_searched
from autoquant.devices import backend
from autoquant.engines.programs import ProgramForm
from autoquant.errors import PlanError, first_line
from autoquant.events import (
    Listener,
    StageFinished,
    StageProgress,
    StageStarted,
    ignore,
    logged,
)
from autoquant.files import move_whole, scratch_folder
from autoquant.models import LoadedModel
from autoquant.models.quiet import quiet, some
from autoquant.models.trust import NO_TRUST, Trust
from autoquant.records import LayerChoice, Plan
from autoquant.store import StudyFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramReport:
    """A folder of programs that was written, run and compared.

    Attributes:
        programs: By program, how many layers each kernel computes, by `FORMAT/KERNEL`.
        unquantized: How many layers of the plan are left as they are.
        operators: The project's own operators that are called, which are in `libautoquant_cpu.so`.
        file_bytes: Of all files.
        plan_bytes: What the plan predicts of all parameters.
        notes: What is otherwise than in the plan, a line each.
        agreement: What the programs gave, beside the plan.
        workload: What `agreement.times_ms` was timed with, e.g. `prefill=512,decode=128`.
        request_ms: Time of a request: from these times, and as the search predicted it.
    """

    out: Path
    form: ProgramForm
    files: tuple[str, ...]
    programs: Mapping[str, Mapping[str, int]]
    unquantized: int
    operators: tuple[str, ...]
    file_bytes: int
    plan_bytes: int
    notes: tuple[str, ...]
    agreement: Agreement
    workload: str
    request_ms: tuple[float, float]


def export_programs(
    plan: Plan,
    model: str | Path,
    out: str | Path,
    *,
    form: ProgramForm,
    facts: StudyFacts,
    device: str | None = None,
    listener: Listener = ignore,
    trust: Trust = NO_TRUST,
) -> ProgramReport:
    """Write a plan as programs. Arguments are those of `export_to_disk` of another target.

    Raises:
        PlanError: No program can hold the model, or a layer of the plan.
        TrustError: The model needs code that the user did not name.
        ModelError: The model is not the one that was searched.
        CandidateError: The C++ compiler fails.
        CheckpointError: `out` cannot be written, or what was written computes something else.
    """
    listener = logged(listener)
    place = Path(out).absolute()
    checkpoint.check_new(place)
    loaded = load_searched(plan, model, facts, device, trust)
    _check(form, plan, loaded)
    subject = subject_of(loaded, facts.workload.batch)
    reading = Reading(loaded, subject, facts.workload)
    apply(plan, loaded.module, calibration=facts.calibration, listener=listener)
    module = loaded.module
    wanted, fixed_reason = ranges_of(module, subject, joins_one=not form.compiled)
    packing = Packing(form, torch.device(loaded.device).type)
    found, notes, exact = _packed(module, wanted, packing, subject)
    listener(StageStarted("programs", len(found)))
    with quiet():
        try:
            programs = _traced(module, subject, found, listener)
        except PlanError as error:
            if subject.steps or fixed_reason:
                raise
            fixed_reason = first_line(error)
            one = [given_size(module, subject)]
            found, notes, exact = _packed(module, one, packing, subject)
            programs = _traced(module, subject, found, listener)
    if fixed_reason:
        notes.append(f"the program takes the sample inputs' size only, since {fixed_reason}")
    names = list(programs)
    with checkpoint.writing(place), scratch_folder(place) as scratch, quiet():
        part = scratch / place.name
        part.mkdir()
        own = write_library(programs, part)
        if form.compiled:
            write_compiled(programs, loaded.device, part)
        else:
            write_exported(programs, part)
        write_beside(loaded, part)
        formats = {name: weight.format_id for name, weight in routed_weights(module).items()}
        write_manifest(form, plan, loaded, subject, found, formats, facts.workload.batch, own, part)
        listener(StageFinished("programs", ", ".join(names)))
        agreement = reading.agreement(part, scratch, found, exact=exact)
        files = sorted(path for path in part.rglob("*") if path.is_file())
        report = ProgramReport(
            out=place,
            form=form,
            files=tuple(str(path.relative_to(part)) for path in files),
            programs={
                name: kernel_counts(module, each.kernels)
                for name, each in zip(names, found, strict=True)
            },
            unquantized=len(plan.layers) - len(routed_weights(module)),
            operators=tuple(own),
            file_bytes=sum(path.stat().st_size for path in files),
            plan_bytes=plan.prediction.memory_bytes,
            notes=tuple(notes),
            agreement=agreement,
            workload=str(facts.workload),
            request_ms=(_request_ms(agreement, facts), plan.prediction.request_ms),
        )
        move_whole(part, place)
    return report


def _check(form: ProgramForm, plan: Plan, loaded: LoadedModel) -> None:
    """Refuse what no program is made of, before any work.

    Raises:
        PlanError: It says why, and what to do.
    """
    tables = [layer.name for layer in plan.layers if _is_quantized_table(layer)]
    if tables:
        raise PlanError(
            f"{form.name} holds embeddings unquantized, and this plan quantizes"
            f" {', '.join(tables)}: choose a plan that does not, or search without --embeddings"
        )
    if loaded.stream is not None:
        raise PlanError(
            f"{form.name} needs the model in memory, and it does not fit: `autoquant apply` writes"
            " this one layer by layer"
        )
    if loaded.kind == "encoder_decoder":
        raise PlanError(
            f"{form.name} holds one forward pass, and a model with an encoder and a decoder needs"
            " two and its caches: `autoquant apply` writes this one, and transformers runs it"
        )
    if form.compiled and (failure := backend(loaded.device).compile_failure()):
        raise PlanError(f"aoti needs PyTorch's compiler, and it does not work here: {failure}")
    if loaded.kind == "causal_lm":
        check_step(loaded.module)


def _is_quantized_table(layer: LayerChoice) -> bool:
    return layer.is_table and layer.format != original_format(layer.shape.dtype)


def _traced(
    module: nn.Module, subject: Subject, found: Sequence[Range], listener: Listener
) -> dict[str, ExportedProgram]:
    programs = {}
    for number, each in enumerate(found):
        name = each.name(subject.unit)
        listener(StageProgress("programs", number, name))
        programs[name] = trace(module, subject, each)
    return programs


def _packed(
    module: nn.Module, wanted: Sequence[Range], packing: Packing, subject: Subject
) -> tuple[list[Range], list[str], bool]:
    """Replace the kernels that no program can hold, say which, and whether all round alike.

    Raises:
        PlanError: A layer has no kernel that a program can hold. All such layers are named.
    """
    weights = routed_weights(module)
    found: list[Range] = []
    notes: list[str] = []
    exact = True
    none: dict[str, list[str]] = {}
    for each in wanted:
        kernels: dict[str, str] = {}
        replaced: dict[tuple[str, Substitute], list[str]] = {}
        for name, kernel in each.kernels.items():
            made = packing.kernel(weights[name], kernel, each.rows[name])
            if made is None:
                reason = packing.reason(weights[name], kernel, each.rows[name])
                none.setdefault(f"{weights[name].format_id}/{kernel}: {reason}", []).append(name)
            elif isinstance(made, Substitute):
                replaced.setdefault((weights[name].format_id, made), []).append(name)
                kernels[name] = made.kernel
                exact = exact and made.exact
            else:
                kernels[name] = made
        found.append(replace(each, kernels=kernels))
        notes += _notes(each.name(subject.unit), replaced)
    if none:
        lines = "; ".join(f"{some(names, 1)} ({reason})" for reason, names in none.items())
        raise PlanError(
            f"no program can hold {lines}, and no other kernel of the format can stand in: search"
            " without it (--candidates), or `autoquant apply` the plan"
        )
    return found, notes, exact


def _notes(program: str, replaced: Mapping[tuple[str, Substitute], Iterable[str]]) -> Iterable[str]:
    for (format_id, made), names in replaced.items():
        exactness = "" if made.exact else ", which does not round the activation"
        yield (
            f"in {program} {some(list(names), 1)} of {format_id} run {made.kernel}{exactness},"
            f" instead of {made.wanted}: {made.reason}"
        )


def _request_ms(agreement: Agreement, facts: StudyFacts) -> float:
    times = agreement.times_ms
    if "request" in times:
        return times["request"]
    calls = facts.workload.calls()
    return times["prompt"] * calls.get("prefill", 0) + times.get("token", 0.0) * calls.get(
        "decode", 0
    )
