"""Apply a plan to a model: in memory, or from disk to disk with every step checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.flat import stored_bytes
from autoquant.candidates.formats.floats import original_format
from autoquant.candidates.joined import join
from autoquant.candidates.routed import RoutedWeight
from autoquant.candidates.routes import for_any_rows, route_words
from autoquant.errors import CandidateError, CheckpointError, ModelError, PlanError
from autoquant.events import (
    Listener,
    Notice,
    StageFinished,
    StageProgress,
    StageStarted,
    ignore,
    logged,
)
from autoquant.export import checkpoint
from autoquant.export.beside import check_beside
from autoquant.export.comparison import check_same
from autoquant.export.kernel_check import OnKernel, check_kernels, ignore_kernel
from autoquant.export.manifest import read_manifest
from autoquant.export.rounding_inputs import Calibration, Windows
from autoquant.files import is_writable, move_whole, scratch_folder
from autoquant.models import LoadedModel, ModelSource, load_request
from autoquant.models.code import named_code
from autoquant.models.copies import not_compiled
from autoquant.models.loaded import settle
from autoquant.models.trust import NO_TRUST, Trust, request_again
from autoquant.records import LayerChoice, Plan
from autoquant.runtime.prepare import prepare
from autoquant.store import StudyFacts

_RIGHT_MODEL = "give the model that was searched"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedReport:
    """A folder that `apply_to_disk` wrote and read back.

    Attributes:
        repeatable: The model gives the same logits each time, and they were compared. If its
            kernels add in a different order each time, the weights were compared instead.
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
    repeatable: bool
    needs_module: bool
    generates: bool
    needs_code: Mapping[str, str | bool]


class Quantized:
    """Quantized weights of one model, kept from one plan to the next.

    Weights that both plans store in the same format are quantized only once. It holds no more than
    the weights of one plan.
    """

    def __init__(self) -> None:
        self._stored: dict[tuple[str, str], torch.Tensor] = {}

    def forget_all_but(self, plan: Plan) -> None:
        """Free the weights that the plan does not use."""
        used = {(layer.parameters[0], layer.format) for layer in plan.layers if not layer.joined}
        self._stored = {key: stored for key, stored in self._stored.items() if key in used}

    def store(
        self, layer: LayerChoice, weight: torch.Tensor, made: Calibration | None
    ) -> torch.Tensor:
        """Return the layer's weight in its format, quantized now unless the last plan did.

        Args:
            made: The weights that were rounded for their layers' inputs.
        """
        key = (layer.parameters[0], layer.format)
        if key in self._stored:
            return self._stored[key]
        fmt = get_format(layer.format)
        rounded = made if fmt.needs_inputs else None
        stored = rounded.stored(layer.parameters[0], fmt) if rounded else fmt.store(weight)
        if not layer.joined:  # a joined weight is copied into memory shared with others
            self._stored[key] = stored
        return stored


def apply(
    plan: Plan,
    model: nn.Module,
    *,
    calibration: Windows | Calibration | None = None,
    listener: Listener = ignore,
    quantized: Quantized | None = None,
    on_kernel: OnKernel = ignore_kernel,
) -> nn.Module:
    """Quantize the weights of `model` as `autoquant.export.in_memory.apply` does, unchecked.

    Then each format, kernel and shape is checked once (see `autoquant.export.kernel_check`).

    Args:
        model: The model that was searched, loaded in the plan's dtype.
        calibration: The token ids of the search.
        quantized: Weights of the plan that was applied to the same model before.
        on_kernel: Takes what is checked next.

    Returns:
        The same module.

    Raises:
        PlanError: The plan needs a calibration.
        ModelError: The model lacks a layer of the plan, or has it with another shape or dtype. The
            model has not been changed.
        CandidateError: A weight could not be quantized as planned.
        KernelError: A kernel computes something else than its weight stores.
    """
    check_fits(plan, model)
    made = _prepared(plan, model, calibration)
    quantized = quantized or Quantized()
    quantized.forget_all_but(plan)
    listener(StageStarted("apply", len(plan.layers)))
    for done, layer in enumerate(plan.layers):
        listener(StageProgress("apply", done, layer.name))
        if layer.format != original_format(layer.shape.dtype):
            _replace(model, layer, quantized, made)
    for names in dict.fromkeys(layer.joined for layer in plan.layers if layer.joined):
        _join(model, [layer for layer in plan.layers if layer.name in names])
    prepare(model)
    check_kernels(model, on_kernel)
    listener(StageFinished("apply", f"{len(plan.layers)} layers: {_formats_text(plan)}"))
    for text in dict.fromkeys(filter(None, (_stand_ins(model, layer) for layer in plan.layers))):
        listener(Notice(text))
    return model


def apply_to_disk(
    plan: Plan,
    model: str | Path,
    out: str | Path,
    *,
    facts: StudyFacts,
    device: str | None = None,
    listener: Listener = ignore,
    trust: Trust = NO_TRUST,
) -> AppliedReport:
    """Apply `plan` to the model that was searched, save it as a new folder and check the folder.

    The folder is read back, and must compute the same as the model in memory, bit for bit.

    Args:
        model: Path or name of the model.
        out: The folder to make. It must not exist yet, or be empty.
        facts: Facts of the plan's study: how the model was loaded, and on which device.
        trust: The code that the user named. What the study names is never run by itself.

    Raises:
        TrustError: The model needs code that the user did not name.
        ModelError: The model is not the one that was searched (its content has another hash).
        CheckpointError: `out` cannot be written, or its model computes something else.
    """
    listener = logged(listener)
    target = Path(out).absolute()
    _check_target(target, plan)
    loaded = load_searched(plan, model, facts, device, trust)
    original_bytes = module_bytes(loaded.module)
    apply(plan, loaded.module, calibration=facts.calibration, listener=listener)
    with checkpoint.writing(target), scratch_folder(target) as scratch:
        part = scratch / target.name
        part.mkdir()
        files = checkpoint.write(loaded, plan, part)
        skeleton = _skeleton(loaded, model, plan, facts, trust)
        place = device or facts.device.type
        again = checkpoint.read(part, skeleton, place, trust=trust)
        repeatable = check_same(loaded, again, target)
        check_beside(loaded, again, part)
        move_whole(part, target)
    what = "logits are" if repeatable else "its logits differ from run to run; weights are"
    listener(Notice(f"read {target.name} back: {what} bit for bit those of the model in memory"))
    return AppliedReport(
        out=target,
        files=tuple(files),
        layers=len(plan.layers),
        formats=plan.formats(),
        memory_bytes=module_bytes(loaded.module),
        original_memory_bytes=original_bytes,
        repeatable=repeatable,
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
) -> nn.Module:
    """Load a model from a folder that `autoquant apply` wrote, ready to run.

    Args:
        model: A module of the same architecture, whose weights are replaced. Needed only if a live
            module was searched.
        device: The device to run on: `cpu`, `cuda`, `cuda:1` or `auto`. None is the kind of device
            that the plan was searched on, whose kernels the model needs.
        model_factory: `package.module:callable` that makes the module, if the model was searched
            with one. The folder names it, but only you can have it imported.
        trust_remote_code: Run the code in the folder that its `config.json` names.

    Raises:
        TrustError: The folder needs one of these two. The message says which.
        CheckpointError: The folder holds no such model, is damaged, or was packed for another CPU.
        DeviceError: The device is not available here.
        KernelError: A kernel computes something else here than its weight stores.
    """
    manifest = read_manifest(Path(folder))
    trust = Trust(model_factory=model_factory, trust_remote_code=trust_remote_code)
    place = device or manifest.get("device", "cpu")
    module = prepare(settle(checkpoint.read(Path(folder), model, place, trust=trust)))
    check_kernels(module)
    from autoquant.export.in_memory import remember

    return remember(module, manifest)


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters as stored, counting each tensor once."""
    unique = {id(parameter): parameter for parameter in module.parameters()}
    return sum(stored_bytes(parameter.data) for parameter in unique.values())


def check_fits(plan: Plan, model: nn.Module) -> None:
    """Refuse a module that lacks a layer of the plan, or has it otherwise."""
    for layer in plan.layers:
        for name in layer.parameters:
            _check_parameter(model, name, layer)


def _check_parameter(model: nn.Module, name: str, layer: LayerChoice) -> None:
    """Refuse a parameter that is not the one the plan was made for."""
    other_model = "the plan is for another model"
    try:
        parameter = model.get_parameter(name)
    except AttributeError:
        missing = f"this one has no parameter {name}"
        raise ModelError(f"{other_model}: {missing}; {_RIGHT_MODEL}") from None
    shape, wanted = tuple(parameter.shape), (layer.shape.n, layer.shape.k)
    if shape != wanted:
        raise ModelError(f"{other_model}: {name} is {shape} here, not {wanted}; {_RIGHT_MODEL}")
    kind = str(parameter.dtype).removeprefix("torch.")
    if isinstance(parameter.data, RoutedWeight):
        kind = "already quantized"
    if kind != layer.shape.dtype:
        planned = f"the plan was made for {layer.shape.dtype}"
        raise ModelError(f"{name} is {kind}; {planned}: load the model that way")


def _prepared(
    plan: Plan, model: nn.Module, calibration: Windows | Calibration | None
) -> Calibration | None:
    """Make the plan's weights that need a calibration, and return it, or None if none does."""
    formats = {layer.parameters[0]: get_format(layer.format) for layer in plan.layers}
    wanted = {name: fmt for name, fmt in formats.items() if fmt.needs_inputs}
    if not wanted:
        return None
    if calibration is None:
        names = ", ".join(sorted({fmt.values for fmt in wanted.values()}))
        raise PlanError(
            f"plan {plan.plan_id} has weights rounded for their layers' inputs ({names}): "
            "give the text they were rounded for with calibration=study.calibration"
        )
    made = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
    failed = made.prepare(model, {name: [fmt] for name, fmt in wanted.items()})
    for (name, format_id), reason in failed.items():
        raise CandidateError(f"{name} cannot be {format_id}: {reason}")
    return made


def _replace(
    model: nn.Module, layer: LayerChoice, quantized: Quantized, made: Calibration | None
) -> None:
    fmt = get_format(layer.format)
    parameter = model.get_parameter(layer.parameters[0])
    route = for_any_rows(layer.route, fmt, layer.shape, parameter.device.type)
    stored = quantized.store(layer, parameter.data, made)
    _put(model, layer, RoutedWeight.wrap(stored, fmt.id, route, parameter.dtype))
    placed = model.get_parameter(layer.parameters[0]).data
    if not isinstance(placed, RoutedWeight) or type(placed.stored) is not fmt.tensor_type:
        raise ModelError(
            f"{layer.name} did not become {fmt.id}: its module puts another weight in place"
        )


def _stand_ins(model: nn.Module, layer: LayerChoice) -> str:
    """Return a note if the applied route differs from the plan's, else "".

    It does if a kernel supports only some numbers of rows.
    """
    weight = model.get_parameter(layer.parameters[0]).data
    if not isinstance(weight, RoutedWeight) or weight.steps() == layer.route:
        return ""
    names = " and ".join(dict.fromkeys(step.kernel for step in layer.route))
    used = f"so what is used is {route_words(weight.steps())}"
    return f"{layer.format}: {names} cannot compute every number of rows, {used}"


def _join(model: nn.Module, layers: Sequence[LayerChoice]) -> None:
    """Store the layers' weights adjacently, so that they can be multiplied as one."""
    weights = [model.get_parameter(layer.parameters[0]).data for layer in layers]
    for layer, weight in zip(layers, join(weights), strict=True):
        _put(model, layer, weight)


def _put(model: nn.Module, layer: LayerChoice, weight: torch.Tensor) -> None:
    """Make a tensor the layer's weight, under each of its names."""
    replacement = nn.Parameter(weight, requires_grad=False)
    for name in layer.parameters:
        owner, _, leaf = name.rpartition(".")
        not_compiled(model.get_submodule(owner))._parameters[leaf] = replacement


def _formats_text(plan: Plan) -> str:
    return ", ".join(f"{count} {name}" for name, count in plan.formats().items())


def _check_target(target: Path, plan: Plan) -> None:
    if checkpoint.plan_in(target) == plan.plan_id:
        raise CheckpointError(
            f"{target} exists already and holds this plan; load it, or choose another --out"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; choose another --out")
    if not target.parent.is_dir():
        raise CheckpointError(f"the folder {target.parent} does not exist; make it first")
    if not is_writable(target.parent) or (target.exists() and not is_writable(target)):
        raise CheckpointError(f"cannot write into {target.parent}; choose another --out")


def load_searched(
    plan: Plan,
    model: str | Path,
    facts: StudyFacts,
    device: str | None,
    trust: Trust = NO_TRUST,
) -> LoadedModel:
    """Load the model that a plan was made for, the way the search loaded it.

    Args:
        trust: The code that the user named. What the study names is never run by itself.

    Raises:
        TrustError: The model needs code that the user did not name.
        ModelError: `model` is another model.
        PlanError: A live module was searched, and no `model` is given.
    """
    source = ModelSource(**facts.source)
    if source.kind == "live" and not model:
        raise PlanError(
            "a live module was searched: apply its plan with autoquant.apply(plan, module) from"
            " Python"
        )
    place = device or facts.device.type
    loaded = load_request(request_again(source, trust, dtype=plan.dtype, device=place, model=model))
    if loaded.content_hash != plan.model_hash:
        raise ModelError(
            f"{model} is not the model that was searched (content {loaded.content_hash}, plan for"
            f" {plan.model_hash}): give the right one with --model, or search this one"
        )
    return loaded


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
