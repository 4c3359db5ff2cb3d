"""Models on disk: a plan applied from folder to folder, and the result loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from autoquant.delivery import checkpoint
from autoquant.delivery.applier import apply, module_bytes
from autoquant.delivery.beside import check_beside
from autoquant.delivery.comparison import check_same
from autoquant.delivery.judging import Judge
from autoquant.delivery.kernel_check import check_kernels
from autoquant.delivery.layers import write_layers
from autoquant.delivery.manifest import read_manifest
from autoquant.delivery.searched import load_searched
from autoquant.errors import CheckpointError
from autoquant.events import (
    Listener,
    Notice,
    ignore,
    logged,
)
from autoquant.files import move_whole, scratch_folder
from autoquant.models import LoadedModel, ModelSource
from autoquant.models.code import named_code
from autoquant.models.copies import unwrapped
from autoquant.models.loaded import settle
from autoquant.models.trust import NO_TRUST, Trust
from autoquant.records import Plan
from autoquant.runtime.prepare import prepare
from autoquant.store import StudyFacts

Compared = Literal["logits", "weights", "layers"]
_SAME: Mapping[Compared, str] = {
    "logits": "logits are bit for bit those of the model in memory",
    "weights": (
        "its logits differ from run to run, or by rounding; weights are bit for bit those of the"
        " model in memory"
    ),
    "layers": "all tensors are bit for bit those that were made, layer by layer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedReport:
    """A folder that `apply_to_disk` wrote and read back.

    Attributes:
        compared: What was compared with the model in memory: `logits`; `weights` if its kernels
            add in a different order each time; `layers`, tensor by tensor, if the unquantized model
            has no room and layers were quantized one at a time.
        model_hash: Content hash of the model that the plan was applied to.
        needs_module: Loading the folder takes a module of the same architecture, because the
            folder does not describe it.
        needs_code: The code that loading the folder takes, as keywords of `load`.
        generates: The folder holds a language model and its tokenizer.
    """

    out: Path
    files: tuple[str, ...]
    layers: int
    formats: Mapping[str, int]
    memory_bytes: int
    original_memory_bytes: int
    compared: Compared
    model_hash: str
    needs_module: bool
    generates: bool
    needs_code: Mapping[str, str | bool]


def apply_to_disk(  # noqa: PLR0913 - the keywords of a delivery
    plan: Plan,
    model: str | Path,
    out: str | Path,
    *,
    facts: StudyFacts,
    device: str | None = None,
    listener: Listener = ignore,
    trust: Trust = NO_TRUST,
    retrained: bool = False,
    judge: Judge | None = None,
) -> AppliedReport:
    """Apply `plan` to the model that was searched, save it as a new folder and check the folder.

    The folder is read back, and must compute the same as the model in memory, bit for bit.

    Args:
        model: Path or name of the model.
        out: The folder to make. It must not exist yet, or be empty.
        facts: Facts of the plan's study: how the model was loaded, and on which device.
        trust: The code that the user named. What the study names is never run by itself.
        retrained: The weights may be others than those that were searched, such as those of the
            same model trained on. Names, shapes and dtype have to be the same.
        judge: Judges the quantized model before it is moved into place.

    Raises:
        TrustError: The model needs code that the user did not name.
        ModelError: The model is not the one that was searched (its content has another hash), or
            has other layers.
        CheckpointError: `out` cannot be written, or its model computes something else.
    """
    listener = logged(listener)
    target = Path(out).absolute()
    _check_target(target, plan)
    loaded = load_searched(plan, model, facts, device, trust, retrained=retrained)
    plan = replace(plan, model_hash=loaded.content_hash)
    if judge is not None:
        judge.before(loaded)
    original_bytes = module_bytes(loaded.module)
    with checkpoint.writing(target), scratch_folder(target) as scratch:
        part = scratch / target.name
        part.mkdir()
        compared: Compared = "layers"
        if loaded.stream is not None:
            memory_bytes = write_layers(
                plan, loaded, part, calibration=facts.calibration, listener=listener
            )
            check_beside(loaded, loaded.module, part)
        else:
            apply(plan, loaded.module, calibration=facts.calibration, listener=listener)
            memory_bytes = module_bytes(loaded.module)
            checkpoint.write(loaded, plan, part)
            skeleton = _skeleton(loaded, model, plan, facts, trust)
            place = device or facts.device.type
            again = settle(checkpoint.read(part, skeleton, place, trust=trust))
            compared = "logits" if check_same(loaded, again, target) else "weights"
            check_beside(loaded, again, part)
        if judge is not None:
            judge.after(loaded.module)
        files = sorted(path.name for path in part.iterdir())
        move_whole(part, target)
    listener(Notice(f"read {target.name} back: {_SAME[compared]}"))
    return AppliedReport(
        out=target,
        files=tuple(files),
        layers=len(plan.layers),
        formats=plan.formats(),
        memory_bytes=memory_bytes,
        original_memory_bytes=original_bytes,
        compared=compared,
        model_hash=loaded.content_hash,
        needs_module=not loaded.describes_itself,
        needs_code=_needed_code(loaded.source, target),
        generates=loaded.kind == "causal_lm" and loaded.tokenizer is not None,
    )


def load(
    folder: str | Path,
    model: nn.Module | None = None,
    *,
    device: str | None = None,
    model_factory: str | None = None,
    trust_remote_code: bool = False,
    kv_cache: str | None = None,
) -> nn.Module:
    """Load a model from a folder that `autoquant apply` wrote, ready to run.

    Args:
        model: A module of the same architecture, whose weights are replaced, also inside of
            `torch.compile` and data parallelism. Needed only if a live module was searched.
        device: The device to run on: `cpu`, `cuda`, `cuda:1` or `auto`. None is the kind of device
            that the plan was searched on, whose kernels the model needs.
        model_factory: `package.module:callable` that makes the module, if the model was searched
            with one. The folder names it, but only you can have it imported.
        trust_remote_code: Run the code in the folder that its `config.json` names.
        kv_cache: How `generate` keeps keys and values, as `autoquant.prepare` takes it. None is
            what the folder's plan says.

    Raises:
        ModelError: The model keeps no keys and values, or something else as well.
        TrustError: The folder needs one of these two. The message says which.
        CheckpointError: The folder holds no such model, is damaged, or was packed for another CPU.
        DeviceError: The device is not available here.
        KernelError: A kernel computes something else here than its weight stores.
    """
    manifest = read_manifest(Path(folder))
    trust = Trust(model_factory=model_factory, trust_remote_code=trust_remote_code)
    place = device or manifest.get("device", "cpu")
    inner = None if model is None else unwrapped(model)
    module = settle(checkpoint.read(Path(folder), inner, place, trust=trust))
    prepare(module, kv_cache=kv_cache or manifest.get("kv_cache"))
    check_kernels(module)
    from autoquant.delivery.in_memory import remember

    remember(module, manifest)
    return module if model is None else model


def _check_target(target: Path, plan: Plan) -> None:
    if checkpoint.plan_in(target) == plan.plan_id:
        raise CheckpointError(
            f"{target} exists already and holds this plan; load it, or choose another --out"
        )
    checkpoint.check_new(target)


def _skeleton(
    loaded: LoadedModel, model: str | Path, plan: Plan, facts: StudyFacts, trust: Trust
) -> nn.Module | None:
    """Load a second module for a checkpoint that cannot make one, else return None.

    Exported programs and pickled modules need it.
    """
    if loaded.describes_itself:
        return None
    return load_searched(plan, model, facts, None, trust).module


def _needed_code(source: ModelSource, folder: Path) -> dict[str, str | bool]:
    """Return the code that loading the checkpoint in `folder` takes, as keywords of `load`."""
    if source.kind == "state_dict" and source.model_factory:
        return {"model_factory": source.model_factory}
    if source.trust_remote_code and named_code(folder):
        return {"trust_remote_code": True}
    return {}
