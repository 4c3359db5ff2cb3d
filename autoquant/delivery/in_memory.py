"""Plans applied to a user's own module, and such a module saved."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.delivery import applier, checkpoint
from autoquant.delivery.comparison import same_tensors
from autoquant.delivery.manifest import FORMAT_VERSION
from autoquant.delivery.rounding_inputs import Calibration, Windows
from autoquant.errors import CheckpointError
from autoquant.events import Listener, Notice, ignore
from autoquant.files import is_taken, move_whole, scratch_folder
from autoquant.models import ModelSource
from autoquant.models.content import content_hash, module_architecture
from autoquant.models.copies import own_copy, shallow_copy, unwrapped
from autoquant.models.huggingface import hash_as_saved
from autoquant.models.loaded import device_of, is_causal_lm, is_transformers
from autoquant.records import Plan

MANIFEST_ATTRIBUTE = "autoquant_manifest"
_ADAPTERS = "save them by model.save_pretrained(FOLDER), and then what model.unload() returns"


def apply(
    plan: Plan,
    model: nn.Module,
    *,
    calibration: Windows | Calibration | None = None,
    listener: Listener = ignore,
) -> nn.Module:
    """Quantize the weights of `model` as `plan` says, in place and one at a time.

    `save` writes the result. What `torch.compile` or data parallelism wrapped is changed inside. So
    is what PEFT gave adapters of LoRA, which stay as they are beside quantized weights.

    If the contents of `model` are not those that were searched, as far as their hash shows it, that
    is reported: to `listener`, or else as a warning. A model that was cast or changed since then
    has another hash.

    Args:
        model: The model that was searched, loaded in the plan's dtype.
        calibration: The token ids of the search, `study.calibration`. Needed by a plan with weights
            that are rounded for their layers' inputs. The same device with the same number of
            threads makes the same bits from them.

    Returns:
        The same module.

    Raises:
        PlanError: The plan needs a calibration.
        ModelError: The model lacks a layer of the plan, or has it with another shape or dtype, or
            has adapters of another kind than LoRA. The model has not been changed.
        CandidateError: A weight could not be quantized as planned.
    """
    inner = unwrapped(model, with_lora=True)
    applier.check_fits(plan, inner)
    if not _is_searched(plan, inner):
        _tell(
            f"not checked that {type(inner).__name__} holds the weights that were searched: it was"
            f" loaded, cast or changed otherwise than plan {plan.plan_id} knows; `autoquant apply`"
            " checks them",
            listener,
        )
    applier.apply(plan, inner, calibration=calibration, listener=listener)
    source = ModelSource(kind="huggingface" if is_causal_lm(inner) else "live")
    about = checkpoint.describe(plan, asdict(source), device_of(inner))
    remember(inner, about | {"format_version": FORMAT_VERSION})
    return model


def remember(model: nn.Module, manifest: dict[str, Any]) -> nn.Module:
    """Let a quantized module know what `save`, and its own `save_pretrained`, write."""
    setattr(model, MANIFEST_ATTRIBUTE, manifest)
    if is_transformers(model):
        from autoquant.delivery.integrations.saving import settle_loaded  # imports transformers

        settle_loaded(model, manifest)
    return model


def save(model: nn.Module, folder: str | Path, *, tokenizer: Any | None = None) -> None:
    """Write a model that `apply` or `load` returned into a new folder, and read it back.

    `load` reads the folder. Of a causal language model of transformers it makes the module by
    itself, and `from_pretrained` reads it, too. Of another module it needs one of the same
    architecture, `load(folder, module)`.

    Args:
        tokenizer: A tokenizer of transformers to write beside the model.

    Raises:
        ModelError: It has adapters.
        CheckpointError: No plan was applied to the model, the folder exists and is not empty, or it
            cannot be written.
    """
    inner, target = unwrapped(model, _ADAPTERS), Path(folder).absolute()
    manifest = getattr(inner, MANIFEST_ATTRIBUTE, None)
    if manifest is None:
        raise CheckpointError(
            f"no plan was applied to this {type(inner).__name__}: call autoquant.apply(plan, model)"
            " first"
        )
    if is_taken(target):
        raise CheckpointError(f"{target} exists already: choose another folder")
    with checkpoint.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target) as scratch:
            part = scratch / target.name
            part.mkdir()
            _write(inner, manifest, part, tokenizer)
            again = checkpoint.fill(shallow_copy(inner), part, device_of(inner))
            if not same_tensors(inner, again):
                raise CheckpointError(
                    f"what was written for {target} is not the model in memory; please report this"
                )
            move_whole(part, target)


def _write(model: nn.Module, manifest: dict[str, Any], folder: Path, tokenizer: Any | None) -> None:
    if is_transformers(model):
        writer: Any = model
        writer.save_pretrained(folder)
    else:
        checkpoint.write_module(model, manifest, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _is_searched(plan: Plan, model: nn.Module) -> bool:
    """Check whether the model's hash is the plan's, as a live module or as its folder."""
    plain = own_copy(model)  # without what torch.compile wrapped
    state = plain.state_dict().items()
    tensors = ((name, value) for name, value in state if isinstance(value, torch.Tensor))
    if content_hash(tensors, module_architecture(plain)) == plan.model_hash:
        return True
    return is_transformers(model) and hash_as_saved(model) == plan.model_hash


def _tell(text: str, listener: Listener) -> None:
    if listener is ignore:
        warnings.warn(text, stacklevel=3)
    else:
        listener(Notice(text))
