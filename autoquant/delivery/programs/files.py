"""The files of a folder of programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from autoquant.delivery.beside import copy_beside
from autoquant.delivery.programs.library import LIBRARY, library_of
from autoquant.delivery.programs.operators import OWN, operators
from autoquant.delivery.programs.ranges import Range
from autoquant.delivery.programs.steps import cache_shapes
from autoquant.delivery.programs.tracing import Subject, tensors_of
from autoquant.devices import backend
from autoquant.devices.cpu import instructions
from autoquant.engines.programs import ProgramForm
from autoquant.models import LoadedModel
from autoquant.records import Plan

MANIFEST = "program.json"
_COMPILED, _WEIGHTS, _RUNNER = "model.pt2", "weights.pt", "run.py"


def write_compiled(programs: Mapping[str, ExportedProgram], device: str, folder: Path) -> None:
    """Compile programs into one package, and save the weights that all of them share beside it."""
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    options = {
        **backend(device).compiler_settings,
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,  # else each program has all weights
        "cpp.dynamic_threads": True,  # as many as the process has that runs it
    }
    made: dict[str, Any] = {}
    for name, program in programs.items():
        made[name] = aot_compile(program.module(), *program.example_inputs, options=options)
    package_aoti(str(folder / _COMPILED), made)
    torch.save(tensors_of(programs), folder / _WEIGHTS)


def write_exported(programs: Mapping[str, ExportedProgram], folder: Path) -> None:
    """Save each program in a file of its own, with its weights."""
    for name, program in programs.items():
        torch.export.save(program, folder / f"{name}.pt2")


def write_library(programs: Mapping[str, ExportedProgram], folder: Path) -> list[str]:
    """Write the project's own operators that programs call, and return their names.

    Raises:
        CandidateError: The compiler fails.
    """
    called = {name for program in programs.values() for name in operators(program)}
    own = sorted(name for name in called if name.startswith(f"{OWN}::"))
    if own:
        (folder / LIBRARY).write_bytes(library_of(own))
    return own


def write_beside(loaded: LoadedModel, folder: Path) -> None:
    """Write configuration and tokenizer, and what runs the programs."""
    copy_beside(loaded, folder)
    if loaded.tokenizer is not None and hasattr(loaded.tokenizer, "save_pretrained"):
        loaded.tokenizer.save_pretrained(folder)
    (folder / _RUNNER).write_text(files(__package__).joinpath(_RUNNER).read_text())


def write_manifest(  # noqa: PLR0913 - the facts of a manifest
    form: ProgramForm,
    plan: Plan,
    loaded: LoadedModel,
    subject: Subject,
    ranges: Sequence[Range],
    formats: Mapping[str, str],
    batch: int,
    own: Sequence[str],
    folder: Path,
) -> None:
    """Write `program.json`, which says what each program is for and what it needs.

    Args:
        formats: Ids of formats, by the name of the weight.
        batch: Sequences that a language model takes at a time.
        own: Names of the project's operators that are called.
    """
    device = torch.device(loaded.device).type
    on_cpu = device == "cpu" and (form.compiled or bool(own))
    about = {
        "target": form.name,
        "plan_id": plan.plan_id,
        "dtype": plan.dtype,
        "device": device,
        "instructions": instructions().split() if on_cpu else [],
        "torch": torch.__version__.partition("+")[0],
        "unit": subject.unit,
        "dimension": subject.dimension,
        "names": [] if subject.steps else list(subject.inputs(0)[1]),
        "batch": batch if subject.steps else None,
        "cache": cache_shapes(loaded.module) if subject.steps else [],
        "ends": _ends(loaded) if subject.steps else [],
        "library": LIBRARY if own else None,
        "operators": list(own),
        "programs": [
            {
                "name": each.name(subject.unit),
                "least": each.least,
                "most": each.most,
                "kernels": {
                    name: f"{formats[name]}/{kernel}" for name, kernel in each.kernels.items()
                },
            }
            for each in ranges
        ],
    }
    (folder / MANIFEST).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _ends(loaded: LoadedModel) -> list[int]:
    """Return the ids that end a text."""
    settings: Any = getattr(loaded.module, "generation_config", None)
    found = getattr(settings, "eos_token_id", None)
    return [] if found is None else list(found) if isinstance(found, list) else [found]
