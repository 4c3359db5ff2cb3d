"""A quantized model on disk: written whole or not at all, read back without ever holding the unquantized weights.

A checkpoint is a folder:

- `autoquant.json`: the plan's layers, ties, dtype, and where the architecture comes from;
- `model.safetensors`: every tensor that can be kept there, torchao's subclasses flattened by torchao's own scheme, so that
  other tools can read them;
- `packed.pt`: the rest (kernel-specific packings), read with `weights_only=True`;
- the configuration and tokenizer of a Hugging Face model; its `config.json` names autoquant as what quantized it, by which
  transformers' own `from_pretrained` finds the way here (see `autoquant.export.integrations`).
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.flat import move_tensor
from autoquant.candidates.joined import join
from autoquant.candidates.routed import RoutedWeight
from autoquant.errors import CheckpointError, ModelError
from autoquant.models import LoadedModel
from autoquant.models.architecture import build_architecture, without_values
from autoquant.models.factory import tie, tied_names
from autoquant.models.huggingface import download
from autoquant.models.targets import resolve_device
from autoquant.records import Plan

MANIFEST = "autoquant.json"
SAFETENSORS = "model.safetensors"
PACKED = "packed.pt"
QUANT_METHOD = "autoquant"
FORMAT_VERSION = 1
_MOVED_CLASSES = {
    "autoquant.candidates.int4_gemlite_tensor.Int4GemliteTensor": "autoquant.candidates.formats.int4_gemlite",
    "autoquant.candidates.int4_tiled_tensor.Int4TiledTensor": "autoquant.candidates.formats.int4_tiled",
    "autoquant.candidates.low_bit.BitPlaneTensor": "autoquant.candidates.formats.low_bit",
}
"""Names of classes that earlier versions wrote into `packed.pt`, with the modules that hold them now."""
_CONFIG_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "chat_template*",
    "tekken.json",
    "*.model",
    "*.tiktoken",
)


def write(loaded: LoadedModel, plan: Plan, folder: Path) -> list[str]:
    """Write a model that a plan was applied to into an existing, empty folder.

    Returns:
        Names of the files written.
    """
    about = {
        "plan_id": plan.plan_id,
        "study_id": plan.study_id,
        "label": plan.label,
        "model_hash": plan.model_hash,
        "dtype": plan.dtype,
        "device": loaded.device.partition(":")[0],
        "source": asdict(loaded.source),
        "joined": _joined_names(plan),
    }
    if loaded.source.kind == "huggingface":
        own = () if loaded.source.tokenizer else _TOKENIZER_FILES
        _copy_files(Path(loaded.source.path), (*_CONFIG_FILES, *own), folder)
        _name_quantizer(folder / "config.json", plan.dtype)
    if loaded.source.tokenizer and loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    write_module(loaded.module, about, folder)
    return sorted(path.name for path in folder.iterdir())


def write_module(module: nn.Module, about: Mapping[str, Any], folder: Path) -> None:
    """Write the tensors and the manifest of a module.

    Args:
        about: What the module itself does not show: fields of the manifest that `write` made, or `read_manifest` read.
    """
    ties = tied_names(module)
    aliases = {name for group in ties for name in group[1:]}
    tensors = {name: tensor for name, tensor in _named_tensors(module).items() if name not in aliases}
    routed = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, RoutedWeight)}
    plain = {
        name: tensor.stored if isinstance(tensor, RoutedWeight) else tensor.detach() for name, tensor in tensors.items()
    }
    packed = {name: tensor for name, tensor in plain.items() if not _fits_safetensors(name, tensor)}
    _write_safetensors({name: tensor for name, tensor in plain.items() if name not in packed}, folder / SAFETENSORS)
    if packed:
        torch.save({name: move_tensor(tensor, "cpu") for name, tensor in packed.items()}, folder / PACKED)
    manifest = {
        **about,
        "format_version": FORMAT_VERSION,
        "ties": ties,
        "routed": {name: _describe(weight) for name, weight in routed.items()},
        "cpu_capability": torch.backends.cpu.get_cpu_capability() if _packed_for_this_cpu(packed) else None,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def read(folder: Path, module: nn.Module | None = None, device: str = "cpu") -> nn.Module:
    """Rebuild the model of a checkpoint.

    Args:
        module: The architecture, where the checkpoint cannot make it itself (a live module was searched): its weights are
            replaced in place.
        device: Where every tensor is put as it is read.

    Raises:
        CheckpointError: The folder is no checkpoint, is damaged, or was packed for another CPU.
        DeviceError: There is no such device here.
    """
    device = resolve_device(device)
    manifest = read_manifest(folder)
    tensors = _read_stored(folder, manifest, device)
    if module is None:
        dtype = getattr(torch, manifest["dtype"])
        try:
            module = build_architecture(manifest["source"], folder, dtype, meta=True)
        except ModelError as error:
            raise CheckpointError(f"{error}; apply the plan again") from error
        _assign(module, tensors, manifest["ties"], folder)
        if without_values(module):  # a tensor that is neither parameter nor buffer: only real construction fills it
            module = build_architecture(manifest["source"], folder, dtype, meta=False)
    _assign(module, tensors, manifest["ties"], folder)
    return module


def fill(module: nn.Module, folder: Path, device: str) -> nn.Module:
    """Give a module, which may be on the meta device, the tensors of a checkpoint, in place.

    Raises:
        CheckpointError: The folder is no checkpoint, is damaged, was packed for another CPU, or is of another architecture.
    """
    manifest = read_manifest(folder)
    _assign(module, _read_stored(folder, manifest, resolve_device(device)), manifest["ties"], folder)
    return module


def join_again(module: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Store the weights that are computed as one behind one another: each that is moved gets memory of its own."""
    for names in manifest.get("joined", []):
        joined = join([module.get_parameter(name).data for name in names])
        for name, weight in zip(names, joined, strict=True):
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
    tie(module, manifest["ties"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: There is none, or it is of a newer version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a model that autoquant saved (no readable {MANIFEST})") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint version {version}, this autoquant reads {FORMAT_VERSION}; upgrade it"
        )
    return cast(dict[str, Any], manifest)


def plan_in(folder: Path) -> str | None:
    """Id of the plan whose checkpoint a folder holds; None for any other folder."""
    try:
        return str(read_manifest(folder)["plan_id"])
    except CheckpointError:
        return None


def _read_stored(folder: Path, manifest: Mapping[str, Any], device: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, with their routes."""
    capability = manifest["cpu_capability"]
    if capability and capability != torch.backends.cpu.get_cpu_capability():
        raise CheckpointError(
            f"{folder} was packed for a CPU with {capability}, this one has {torch.backends.cpu.get_cpu_capability()}: "
            "apply the plan again here"
        )
    for description in manifest["routed"].values():
        get_format(description["format"])  # brings in the tensor classes that `packed.pt` may hold
    tensors = _read_tensors(folder, device)
    dtype = getattr(torch, manifest["dtype"])
    for name, description in manifest["routed"].items():
        if name not in tensors:
            raise CheckpointError(f"{folder} lacks {name}: the checkpoint is damaged, apply the plan again")
        route = tuple((upper, kernel) for upper, kernel in description["route"])
        tensors[name] = RoutedWeight(tensors[name], description["format"], route, dtype)
    for names in manifest.get("joined", []):
        tensors |= zip(names, join([tensors[name] for name in names]), strict=True)
    return tensors


def _packed_for_this_cpu(packed: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor's packing depends on the CPU's instruction set."""
    return any(type(tensor).__name__ == "Int4OpaqueTensor" for tensor in packed.values())


def _joined_names(plan: Plan) -> list[list[str]]:
    """Parameter names of the layers that are computed as one."""
    groups = dict.fromkeys(layer.joined for layer in plan.layers if layer.joined)
    return [[layer.parameters[0] for layer in plan.layers if layer.name in names] for names in groups]


def _describe(weight: RoutedWeight) -> dict[str, Any]:
    return {"format": weight.format_id, "route": [list(step) for step in weight.route]}


def _named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, those that a state dict leaves out too: with them no module needs to be run to be whole."""
    parameters = {name: parameter.data for name, parameter in module.named_parameters(remove_duplicate=False)}
    return parameters | dict(module.named_buffers(remove_duplicate=False))


def _fits_safetensors(name: str, tensor: torch.Tensor) -> bool:
    from torchao.prototype.safetensors.safetensors_utils import ALLOWED_TENSORS_SUBCLASSES

    if type(tensor) is torch.Tensor:
        return True
    return type(tensor).__name__ in ALLOWED_TENSORS_SUBCLASSES and "." in name


def _write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    dotted = {name if "." in name else f".{name}": tensor for name, tensor in tensors.items()}
    flat, metadata = flatten_tensor_state_dict(dotted)
    flat = {
        name: tensor.contiguous().clone() if tensor._is_view() else tensor.contiguous() for name, tensor in flat.items()
    }
    save_file(flat, path, metadata={**metadata, "format": "pt"})


def _read_tensors(folder: Path, device: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    try:
        with safe_open(folder / SAFETENSORS, framework="pt") as file:
            metadata = file.metadata()
            names = file.keys()
            flat = {name: file.get_tensor(name).to(device, copy=True) for name in names}  # copies are aligned
        tensors, rest = unflatten_tensor_state_dict(flat, metadata)
        if rest:
            raise CheckpointError(f"{folder / SAFETENSORS} holds tensors nobody described: {', '.join(list(rest)[:3])}")
        if (folder / PACKED).exists():
            with torch.serialization.safe_globals(_moved_classes()):
                packed = torch.load(folder / PACKED, map_location="cpu", weights_only=True)
            tensors |= {name: move_tensor(tensor, device) for name, tensor in packed.items()}
    except torch.OutOfMemoryError as error:
        raise CheckpointError(
            f"{folder} does not fit into the memory of {device}: free some, or use another device"
        ) from error
    except (OSError, SafetensorError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"cannot read {folder}: {reason}; apply the plan again") from error
    return {name.removeprefix("."): tensor for name, tensor in tensors.items()}


def _moved_classes() -> list[Any]:
    """Return each class of `_MOVED_CLASSES` with the name that it had, as `torch.load` takes them."""
    return [(getattr(import_module(module), name.rpartition(".")[2]), name) for name, module in _MOVED_CLASSES.items()]


def _assign(module: nn.Module, tensors: Mapping[str, torch.Tensor], ties: list[list[str]], folder: Path) -> None:
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        try:
            part = module.get_submodule(owner)
        except AttributeError as error:
            raise CheckpointError(f"{folder} has {name}, which this model does not: another architecture") from error
        if name in buffers:
            part._buffers[leaf] = tensor
        elif leaf in part._parameters:
            part._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            raise CheckpointError(f"{folder} has {name}, which this model does not: another architecture")
    tie(module, ties)
    absent = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {', '.join(absent[:3])}: the checkpoint is damaged, apply the plan again"
        )


def _copy_files(source: Path, patterns: Iterable[str], folder: Path) -> None:
    """Copy what describes a Hugging Face model from its folder, from beside its file of weights, or from the hub."""
    here = source.parent if source.is_file() else source if source.is_dir() else download(str(source))
    for pattern in patterns:
        for path in here.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _name_quantizer(config: Path, dtype: str) -> None:
    """Say in a `config.json` what quantized the model, and the dtype that it computes in."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields.pop("torch_dtype", None)  # the older name of the same
    fields |= {"dtype": dtype, "quantization_config": {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}}
    config.write_text(json.dumps(fields, indent=2), encoding="utf-8")
