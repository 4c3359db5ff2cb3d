"""Write a quantized model to disk, and read it without ever holding unquantized weights.

A checkpoint is a folder:

- `autoquant.json`: the plan's layers, ties, dtype, and the source of the architecture;
- `model.safetensors`: every tensor that fits there. torchao's subclasses are flattened by
  torchao's own scheme, so that other tools can read them;
- `packed.pt`: the rest (kernel-specific packings), read with `weights_only=True`. Each of the two
  is several files with an index if it is large (see `autoquant.delivery.shards`);
- what lies beside the weights of a Hugging Face model (see `autoquant.delivery.beside`). Its
  `config.json` names autoquant as the quantizer, so that transformers' `from_pretrained` finds its
  way here (see `autoquant.delivery.integrations`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.experts import ExpertsWeight
from autoquant.candidates.joined import join
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.beside import copy_beside
from autoquant.delivery.manifest import FORMAT_VERSION, MANIFEST, SHARDED_VERSION, read_manifest
from autoquant.delivery.shards import INDEX, ShardWriter, read_tensors
from autoquant.errors import CheckpointError, ModelError, TrustError, first_line
from autoquant.files import is_taken, is_writable, raise_if_full, read_json_object
from autoquant.models import LoadedModel
from autoquant.models.architecture import build_architecture, without_values
from autoquant.models.factory import tie, tied_names
from autoquant.models.shown import show_linears, shown_names
from autoquant.models.targets import resolve_device
from autoquant.models.trust import NO_TRUST, Trust
from autoquant.records import Plan
from autoquant.runtime.generate.kv_codes import kv_cache_of

QUANT_METHOD = "autoquant"
_PACKED_FOR_A_CPU = {"Int4OpaqueTensor"}
"""Types whose packing depends on the instruction set of the CPU."""


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Raise as `CheckpointError` or `DiskFullError` what keeps a folder from being written."""
    try:
        yield
    except Exception as error:
        raise_if_full(error, target)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise CheckpointError(f"cannot write {target}: {reason}") from error
        raise


def check_new(target: Path) -> None:
    """Refuse a folder that exists, or cannot be made.

    Raises:
        CheckpointError: It says which.
    """
    if is_taken(target):
        raise CheckpointError(f"{target} exists already; choose another --out")
    if not target.parent.is_dir():
        raise CheckpointError(f"the folder {target.parent} does not exist; make it first")
    if not is_writable(target.parent) or (target.exists() and not is_writable(target)):
        raise CheckpointError(f"cannot write into {target.parent}; choose another --out")


def write(loaded: LoadedModel, plan: Plan, folder: Path) -> list[str]:
    """Write a model that a plan was applied to into an existing, empty folder.

    Returns:
        The names of the files.
    """
    write_beside(loaded, plan, folder)
    write_module(loaded.module, describe(plan, asdict(loaded.source), loaded.device), folder)
    return sorted(path.name for path in folder.iterdir())


def write_beside(loaded: LoadedModel, plan: Plan, folder: Path) -> None:
    """Write the configuration and the tokenizer of a model that a plan is applied to."""
    if copy_beside(loaded, folder):
        _name_quantizer(folder / "config.json", plan.dtype)
    if loaded.source.tokenizer and loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)


def describe(plan: Plan, source: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return the fields of a manifest that the module does not show.

    Args:
        source: A `ModelSource` as a mapping.
    """
    return {
        "plan_id": plan.plan_id,
        "study_id": plan.study_id,
        "label": plan.label,
        "model_hash": plan.model_hash,
        "dtype": plan.dtype,
        "device": device.partition(":")[0],
        "source": dict(source),
        "joined": _joined_names(plan),
    } | ({"kv_cache": plan.kv_cache} if plan.kv_cache else {})


def write_module(module: nn.Module, about: Mapping[str, Any], folder: Path) -> None:
    """Write the tensors and the manifest of a module.

    Args:
        about: Fields of the manifest that the module does not show, from `write` or from
            `read_manifest`.
    """
    ties = tied_names(module)
    tensors = named_tensors(module)
    for group in ties:
        for alias in group[1:]:
            tensors.pop(alias, None)
    shown = shown_names(module)
    about = dict(about) | ({"turned": shown} if shown else {})
    about.pop("kv_cache", None)  # the user may have chosen another since
    about |= {"kv_cache": kind} if (kind := kv_cache_of(module)) else {}
    write_tensors(tensors.items(), ties, about, folder)


def write_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    ties: list[list[str]],
    about: Mapping[str, Any],
    folder: Path,
    *,
    check: bool = False,
) -> None:
    """Write tensors as they come, and the manifest. Memory holds those of one file.

    Args:
        ties: Names that share one tensor, of which `tensors` has the first.
        about: As `write_module` takes it.
        check: Read each file back, and compare it.

    Raises:
        CheckpointError: What was read back is not what was written.
    """
    routed: dict[str, dict[str, Any]] = {}
    writer = ShardWriter(folder, check=check)
    for name, tensor in tensors:
        plain = tensor.detach()
        if isinstance(tensor, RoutedWeight):
            routed[name] = _describe(tensor)
            plain = tensor.stored
        writer.add(name, plain)
    writer.finish()
    capability = torch.backends.cpu.get_cpu_capability()
    manifest = {
        **about,
        "format_version": FORMAT_VERSION,
        "ties": ties,
        "routed": routed,
        "cpu_capability": capability if writer.packings & _PACKED_FOR_A_CPU else None,
    }
    if len(writer.packed) > 1 or (folder / INDEX).exists():
        manifest |= {"format_version": SHARDED_VERSION, "packed": writer.packed}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def read(
    folder: Path,
    module: nn.Module | None = None,
    device: str = "cpu",
    *,
    trust: Trust = NO_TRUST,
) -> nn.Module:
    """Rebuild the model of a checkpoint.

    Args:
        module: A module of the architecture, whose weights are replaced in place. Needed only if
            the checkpoint cannot make one (a live module was searched).
        device: The device of the model. Each tensor is moved there as it is read.
        trust: The code that the user named. What the manifest names is never run by itself.

    Raises:
        TrustError: The module is made by code that the user did not name.
        CheckpointError: The folder is no checkpoint, is damaged, or was packed for another CPU.
        DeviceError: The device is not available here.
    """
    device = resolve_device(device)
    manifest = read_manifest(folder)
    tensors = _read_stored(folder, manifest, device)
    if module is None:
        dtype = dtype_in(manifest)
        try:
            module = build_architecture(manifest["source"], folder, dtype, meta=True, trust=trust)
        except TrustError:
            raise
        except ModelError as error:
            raise CheckpointError(f"{error}; apply the plan again") from error
        _assign(module, tensors, manifest, folder)
        if without_values(module):
            # Tensors that are neither parameter nor buffer are only filled by real construction.
            module = build_architecture(manifest["source"], folder, dtype, meta=False, trust=trust)
    _assign(module, tensors, manifest, folder)
    return module


def fill(module: nn.Module, folder: Path, device: str) -> nn.Module:
    """Give a module the tensors of a checkpoint, in place. It may be on the meta device.

    Raises:
        CheckpointError: The folder is no checkpoint, is damaged, was packed for another CPU, or is
            of another architecture.
    """
    manifest = read_manifest(folder)
    tensors = _read_stored(folder, manifest, resolve_device(device))
    _assign(module, tensors, manifest, folder)
    return module


def join_again(module: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Join the weights that are computed as one again, after moving gave each its own memory."""
    for names in manifest.get("joined", []):
        joined = join([module.get_parameter(name).data for name in names])
        for name, weight in zip(names, joined, strict=True):
            owner, _, leaf = name.rpartition(".")
            part = module.get_submodule(owner)
            part._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
    tie(module, manifest["ties"])


def plan_in(folder: Path) -> str | None:
    """Return the id of the plan whose checkpoint a folder holds, or None for another folder."""
    try:
        return str(read_manifest(folder)["plan_id"])
    except CheckpointError:
        return None


def dtype_in(manifest: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that a manifest names. `read_manifest` refuses any other name."""
    dtype: torch.dtype = getattr(torch, manifest["dtype"])
    return dtype


def _read_stored(folder: Path, manifest: Mapping[str, Any], device: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by name, with their routes."""
    packed_for = manifest["cpu_capability"]
    here = torch.backends.cpu.get_cpu_capability()
    if packed_for and packed_for != here:
        raise CheckpointError(
            f"{folder} was packed for a CPU with {packed_for}, this one has {here}: "
            "apply the plan again here"
        )
    for description in manifest["routed"].values():
        get_format(description["format"])  # imports the tensor classes that `packed.pt` may hold
    tensors = read_tensors(folder, manifest.get("packed"), device)
    dtype = dtype_in(manifest)
    joined = manifest.get("joined", [])
    named = {*manifest["routed"], *(name for names in joined for name in names)}
    if absent := sorted(named - tensors.keys()):
        raise _lacking(folder, absent)
    for name, description in manifest["routed"].items():
        route = tuple((upper, kernel) for upper, kernel in description["route"])
        arguments = (tensors[name], description["format"], route, dtype)
        if (experts := description.get("experts")) is None:
            tensors[name] = RoutedWeight(*arguments)
        else:
            turned = description.get("turned", False)
            tensors[name] = ExpertsWeight(*arguments, experts, turned)
    for names in joined:
        tensors |= zip(names, join([tensors[name] for name in names]), strict=True)
    return tensors


def _joined_names(plan: Plan) -> list[list[str]]:
    """Return the parameter names of each group of layers that are computed as one."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for layer in plan.layers:
        if layer.joined:
            groups.setdefault(layer.joined, []).append(layer.parameters[0])
    return list(groups.values())


def _describe(weight: RoutedWeight) -> dict[str, Any]:
    route = [list(step) for step in weight.route]
    described: dict[str, Any] = {"format": weight.format_id, "route": route}
    if isinstance(weight, ExpertsWeight):
        described |= {"experts": weight.experts, "turned": weight.turned}
    return described


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by name, also buffers that a state dict leaves out.

    They make the checkpoint complete: the module's constructor need not compute any of them.
    """
    tensors = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        tensors[name] = parameter.data
    return tensors | dict(module.named_buffers(remove_duplicate=False))


def _assign(
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    manifest: Mapping[str, Any],
    folder: Path,
) -> None:
    """Put tensors into a module by name, and tie what was tied."""
    show_linears(module, set(manifest.get("turned", ())))
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        try:
            part = module.get_submodule(owner)
        except AttributeError as error:
            raise _other_architecture(folder, name) from error
        if name in buffers:
            part._buffers[leaf] = tensor
        elif (old := part._parameters.get(leaf)) is not None and old.shape == tensor.shape:
            part._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            raise _other_architecture(folder, name)
    try:
        tie(module, manifest["ties"])
    except (AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} ties a tensor that the model does not have"
            f" ({first_line(error)}): the checkpoint is damaged, apply the plan again"
        ) from error
    absent = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if absent:
        raise _lacking(folder, absent)


def _lacking(folder: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder} lacks {', '.join(names[:3])}: the checkpoint is damaged, apply the plan again"
    )


def _other_architecture(folder: Path, name: str) -> CheckpointError:
    reason = "which does not fit this model: another architecture"
    return CheckpointError(f"{folder} has {name}, {reason}")


def _name_quantizer(config: Path, dtype: str) -> None:
    """Write the quantizer and the dtype into a `config.json`."""
    fields = read_json_object(config)
    fields.pop("torch_dtype", None)  # older name of `dtype`
    fields |= {
        "dtype": dtype,
        "quantization_config": {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION},
    }
    config.write_text(json.dumps(fields, indent=2), encoding="utf-8")
