"""A plan put into a model: in memory, layer by layer, or from disk to disk with every step checked."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.flat import same_bits, stored_bytes
from autoquant.candidates.formats.floats import original_format
from autoquant.candidates.joined import join
from autoquant.candidates.routed import RoutedWeight
from autoquant.candidates.routes import for_any_rows, route_words
from autoquant.errors import CandidateError, CheckpointError, ModelError, PlanError
from autoquant.events import Listener, Notice, StageFinished, StageProgress, StageStarted, ignore, logged
from autoquant.export import checkpoint
from autoquant.export.rounding_inputs import Calibration, Windows
from autoquant.models import LoadedModel, ModelSource, load_request
from autoquant.models.loaded import is_causal_lm, settle
from autoquant.models.outputs import output_tensor
from autoquant.records import LayerChoice, Plan
from autoquant.runtime.prepare import prepare
from autoquant.store import StudyFacts

_CHECK_TOKENS = 48
_RIGHT_MODEL = "give the model that was searched"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedReport:
    """What `apply_to_disk` wrote, and what it found when it read it back.

    Attributes:
        repeatable: The model gives the same logits each time. Where kernels add up in another order each time, what was compared
            is the weights.
        needs_module: Loading the folder takes a module of the same architecture, which it does not describe.
        generates: It is a language model with its tokenizer.
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


class Quantized:
    """Weights of one model as the last plan stored them: what the next plan leaves as it is need not be quantized again.

    It holds nothing beyond the weights of one plan.
    """

    def __init__(self) -> None:
        self._stored: dict[tuple[str, str], torch.Tensor] = {}

    def forget_all_but(self, plan: Plan) -> None:
        """Free what the plan does not use."""
        used = {(layer.parameters[0], layer.format) for layer in plan.layers if not layer.joined}
        self._stored = {key: stored for key, stored in self._stored.items() if key in used}

    def store(self, layer: LayerChoice, weight: torch.Tensor, made: Calibration | None) -> torch.Tensor:
        """The layer's weight in its format, from the last plan or quantized now, or made for its inputs before."""
        key = (layer.parameters[0], layer.format)
        if key not in self._stored:
            fmt = get_format(layer.format)
            stored = made.stored(layer.parameters[0], fmt) if made and fmt.needs_inputs else fmt.store(weight)
            if layer.joined:  # copied into memory shared with others
                return stored
            self._stored[key] = stored
        return self._stored[key]


def apply(
    plan: Plan,
    model: nn.Module,
    *,
    calibration: Windows | Calibration | None = None,
    listener: Listener = ignore,
    quantized: Quantized | None = None,
) -> nn.Module:
    """Replace the weights of `model`, in place and one at a time, by what `plan` says.

    Args:
        model: The model that was searched, loaded in the plan's dtype.
        calibration: The token ids of the search, `study.calibration`, for a plan with weights that are rounded for their layers'
            inputs: from them the same bits are made again (on the same device, with as many threads).
        quantized: Weights of the plan that was applied to the same model before.

    Returns:
        The same module.

    Raises:
        PlanError: The plan needs a calibration.
        ModelError: A layer of the plan is not in the model, or has another shape or dtype. Nothing has been changed then.
        CandidateError: A weight could not be quantized as planned.
    """
    _check_fits(plan, model)
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
) -> AppliedReport:
    """Load the model that was searched, apply `plan`, save it as a new folder, read that back and compare.

    Args:
        model: Where the model lies now.
        out: The folder to make; it must not exist yet, or be empty.
        facts: The plan's study: how the model was loaded, on which device.

    Raises:
        ModelError: The model is not the one that was searched (its content has another hash).
        CheckpointError: `out` cannot be written, or what was written does not compute the same, bit for bit.
    """
    listener = logged(listener)
    target = Path(out).absolute()
    _check_target(target, plan)
    loaded = load_searched(plan, model, facts, device)
    original_bytes = module_bytes(loaded.module)
    apply(plan, loaded.module, calibration=facts.calibration, listener=listener)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        files = checkpoint.write(loaded, plan, scratch)
        again = checkpoint.read(scratch, _skeleton(loaded, model, plan, facts), device=device or facts.device.type)
        repeatable = _check_same(loaded, again, target)
        scratch.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
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
        generates=loaded.kind == "causal_lm" and loaded.tokenizer is not None,
    )


def load(folder: str | Path, model: nn.Module | None = None, *, device: str | None = None) -> nn.Module:
    """The ready model of a folder that `autoquant apply` wrote.

    Args:
        model: Needed only where a live module was searched: a module of the same architecture, whose weights are replaced.
        device: Where it will run: `cpu`, `cuda`, `cuda:1`, `auto`. None for the kind of device that the plan was searched on,
            whose kernels it needs.

    Raises:
        CheckpointError: The folder is no such model, is damaged, or was packed for another CPU.
        DeviceError: There is no such device here.
    """
    manifest = checkpoint.read_manifest(Path(folder))
    module = settle(checkpoint.read(Path(folder), model, device or manifest.get("device", "cpu")))
    if not is_causal_lm(module):
        return prepare(module)
    from autoquant.export.integrations.saving import settle_loaded  # imports transformers

    return settle_loaded(module, manifest)


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters as stored, each tensor counted once."""
    unique = {id(parameter): parameter for parameter in module.parameters()}
    return sum(stored_bytes(parameter.data) for parameter in unique.values())


def _check_fits(plan: Plan, model: nn.Module) -> None:
    for layer in plan.layers:
        for name in layer.parameters:
            try:
                parameter = model.get_parameter(name)
            except AttributeError:
                raise ModelError(
                    f"the plan is for another model: this one has no parameter {name}; {_RIGHT_MODEL}"
                ) from None
            wanted = (layer.shape.n, layer.shape.k)
            if tuple(parameter.shape) != wanted:
                raise ModelError(
                    f"the plan is for another model: {name} is {tuple(parameter.shape)} here, not {wanted}; {_RIGHT_MODEL}"
                )
            dtype = str(parameter.dtype).removeprefix("torch.")
            if isinstance(parameter.data, RoutedWeight) or dtype != layer.shape.dtype:
                kind = "already quantized" if isinstance(parameter.data, RoutedWeight) else dtype
                raise ModelError(
                    f"{name} is {kind}; the plan was made for {layer.shape.dtype}: load the model that way"
                )


def _prepared(plan: Plan, model: nn.Module, calibration: Windows | Calibration | None) -> Calibration | None:
    """The calibration with every weight of the plan that needs it; None where none does."""
    wanted = {layer.parameters[0]: [get_format(layer.format)] for layer in plan.layers}
    wanted = {name: [fmt] for name, (fmt,) in wanted.items() if fmt.needs_inputs}
    if not wanted:
        return None
    if calibration is None:
        names = ", ".join(sorted({fmt.values for (fmt,) in wanted.values()}))
        raise PlanError(
            f"plan {plan.plan_id} has weights rounded for their layers' inputs ({names}): give the text they were rounded for"
            " with calibration=study.calibration"
        )
    made = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
    for (name, format_id), reason in made.prepare(model, wanted).items():
        raise CandidateError(f"{name} cannot be {format_id}: {reason}")
    return made


def _replace(model: nn.Module, layer: LayerChoice, quantized: Quantized, made: Calibration | None) -> None:
    fmt = get_format(layer.format)
    parameter = model.get_parameter(layer.parameters[0])
    route = for_any_rows(layer.route, fmt, layer.shape, parameter.device.type)
    routed = RoutedWeight.wrap(quantized.store(layer, parameter.data, made), fmt.id, route, parameter.dtype)
    _put(model, layer, routed)
    placed = model.get_parameter(layer.parameters[0]).data
    if not isinstance(placed, RoutedWeight) or type(placed.stored) is not fmt.tensor_type:
        raise ModelError(f"{layer.name} did not become {fmt.id}: its module puts another weight in place")


def _stand_ins(model: nn.Module, layer: LayerChoice) -> str:
    """Where the layer's route is not the plan's, since that one's kernels do not take any number of rows: what it is."""
    weight = model.get_parameter(layer.parameters[0]).data
    if not isinstance(weight, RoutedWeight) or weight.steps() == layer.route:
        return ""
    names = " and ".join(dict.fromkeys(step.kernel for step in layer.route))
    return (
        f"{layer.format}: {names} cannot compute every number of rows, so what is used is {route_words(weight.steps())}"
    )


def _join(model: nn.Module, layers: Sequence[LayerChoice]) -> None:
    """Store the layers' weights behind one another, so that they can be multiplied as one."""
    weights = [model.get_parameter(layer.parameters[0]).data for layer in layers]
    for layer, weight in zip(layers, join(weights), strict=True):
        _put(model, layer, weight)


def _put(model: nn.Module, layer: LayerChoice, weight: torch.Tensor) -> None:
    replacement = nn.Parameter(weight, requires_grad=False)
    for name in layer.parameters:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = replacement


def _formats_text(plan: Plan) -> str:
    return ", ".join(f"{count} {name}" for name, count in plan.formats().items())


def _check_target(target: Path, plan: Plan) -> None:
    from autoquant.files import is_writable

    if checkpoint.plan_in(target) == plan.plan_id:
        raise CheckpointError(f"{target} exists already and holds this plan; load it, or choose another --out")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; choose another --out")
    if not target.parent.is_dir():
        raise CheckpointError(f"the folder {target.parent} does not exist; make it first")
    if not is_writable(target.parent) or (target.exists() and not is_writable(target)):
        raise CheckpointError(f"cannot write into {target.parent}; choose another --out")


def load_searched(plan: Plan, model: str | Path, facts: StudyFacts, device: str | None) -> LoadedModel:
    """The model that a plan was made for, loaded as it was for the search.

    Raises:
        ModelError: What lies at `model` is another model.
        PlanError: A live module was searched, and there is no `model`.
    """
    source = ModelSource(**facts.source)
    if source.kind == "live" and not model:
        raise PlanError("a live module was searched: apply its plan with autoquant.apply(plan, module) from Python")
    place = device or facts.device.type
    loaded = load_request(source.request(dtype=plan.dtype, device=place, model=model))
    if loaded.content_hash != plan.model_hash:
        raise ModelError(
            f"{model} is not the model that was searched (content {loaded.content_hash}, plan for {plan.model_hash}): "
            "give the right one with --model, or search this one"
        )
    return loaded


def _skeleton(loaded: LoadedModel, model: str | Path, plan: Plan, facts: StudyFacts) -> nn.Module | None:
    """A second module for checkpoints that cannot make one: an exported program or a pickled module is loaded again."""
    return None if loaded.describes_itself else load_searched(plan, model, facts, None).module


def _check_same(loaded: LoadedModel, again: nn.Module, target: Path) -> bool:
    """Compare two models that should be the same, by their logits or else their weights; tell whether it was by logits.

    Raises:
        CheckpointError: They differ.
    """
    args, keywords = _check_inputs(loaded)

    def logits(module: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return output_tensor(module(*args, **keywords))

    before, after = logits(loaded.module), logits(again)
    if torch.equal(before, after):
        return True
    if torch.equal(before, logits(loaded.module)) or not _same_weights(loaded.module, again):
        raise CheckpointError(f"what was written for {target} does not compute the same logits; please report this")
    return False


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(same_bits(first.data, second.data) for first, second in pairs)


def _check_inputs(loaded: LoadedModel) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = loaded.example_inputs
    if inputs is not None:
        return ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    if loaded.kind in ("causal_lm", "token_lm"):
        tokens = min(_CHECK_TOKENS, loaded.max_positions or _CHECK_TOKENS)
        return (torch.arange(tokens, device=loaded.device).unsqueeze(0) % 32,), {}
    raise CheckpointError(
        "this model has no sample inputs to check a checkpoint with: search it with --sample-inputs, or use autoquant.apply"
        " from Python"
    )
