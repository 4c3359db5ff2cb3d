"""Load exported programs: `.pt2`, written by `torch.export.save`."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map_only

from autoquant.errors import ModelError, TrustError, first_line
from autoquant.files import check_stored
from autoquant.models.casting import cast
from autoquant.models.content import DtypeTally, content_hash, without_addresses
from autoquant.models.exported_check import lost_tensor, needs_trust
from autoquant.models.factory import tie
from autoquant.models.kinds import embedding_rows, model_kind
from autoquant.models.loaded import LoadedModel, device_of, settle
from autoquant.models.quiet import current_folder_importable
from autoquant.models.request import ModelRequest
from autoquant.models.targets import dtype_name, resolve_dtype
from autoquant.models.tokenizers import tokenizer_of
from autoquant.models.weights import damaged

_Inputs = tuple[Any, ...] | dict[str, Any]


def is_exported(path: Path) -> bool:
    """Check whether a file holds an exported program, by its content."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(
                name.endswith(("/archive_format", "serialized_exported_program.json"))
                for name in archive.namelist()
            )
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def load_exported(path: Path, request: ModelRequest) -> LoadedModel:
    """Load an exported program with the inputs it was exported on.

    Raises:
        ModelError: It cannot be read, needs positional and keyword inputs, or does not run in the
            dtype. Or it can run code on loading, and is not trusted.
    """
    if request.model_factory is not None:
        raise ModelError(
            f"{path} is an exported program, which holds its module: leave out --model-factory"
        )
    program = _read(path, trust=request.trust_pickle)
    inputs = _example_inputs(program, path)
    tally = DtypeTally()
    digest = content_hash(
        tally.watch(_tensors(program)), {"graph": without_addresses(str(program.graph))}
    )
    stored = tally.main() or torch.float32
    words = tokenizer_of(request)
    module, inputs = _place(program, inputs, path, request, stored)
    return LoadedModel(
        module=module,
        content_hash=digest,
        source=request.source("exported", str(path)),
        tokenizer=words,
        kind=model_kind(module, request.device, may_be_lm=words is not None),
        vocabulary=embedding_rows(module, request.device),
        example_inputs=inputs or None,
        max_positions=None,
        stored_dtype=dtype_name(stored),
    )


def _read(path: Path, *, trust: bool) -> ExportedProgram:
    if not is_exported(path):
        raise ModelError(
            f"{path} is damaged or no exported program: write it with torch.export.save"
        )
    try:
        check_stored(path)
        if lost := lost_tensor(path):
            raise ValueError(f"the values of {lost} are lost")
    except Exception as error:  # its JSON may have any shape
        raise ModelError(damaged(path, error)) from error
    if not trust and (reason := needs_trust(path)):
        raise TrustError(
            f"{path} holds more than tensors and their operations ({reason}), which can run"
            " anything on loading; pass --trust-pickle if you trust its author",
            options={"trust_pickle": True},
            runs=[f"{path}: {reason}"],
        )
    try:
        if trust:
            with current_folder_importable():
                return torch.export.load(path)
        # The first thing that torch.export.load does. What it does next reads an older form, which
        # was not checked.
        from torch.export.pt2_archive._package import load_pt2

        return load_pt2(str(path)).exported_programs["model"]
    except Exception as error:
        raise ModelError(
            f"cannot read the exported program {path} ({type(error).__name__}:"
            f" {first_line(error)}): export it again with PyTorch {torch.__version__}"
        ) from error


def _tensors(program: ExportedProgram) -> Iterator[tuple[str, torch.Tensor]]:
    yield from program.state_dict.items()
    stored = set(program.state_dict)
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor) and name not in stored:
            yield name, value


def _example_inputs(program: ExportedProgram, path: Path) -> _Inputs:
    """Return the inputs that the program was exported on; empty if the file holds none."""
    inputs, keywords = program.example_inputs or ((), {})
    if inputs and keywords:
        raise ModelError(
            f"{path} was exported with positional and keyword inputs ({', '.join(keywords)}):"
            " export it with either, e.g. torch.export.export(module, (), all_inputs_by_name)"
        )
    return keywords or inputs


def _place(
    program: ExportedProgram,
    inputs: _Inputs,
    path: Path,
    request: ModelRequest,
    stored: torch.dtype,
) -> tuple[nn.Module, _Inputs]:
    """Return the module and its inputs, on the device and in the dtype asked for."""
    from torch.export.passes import move_to_device_pass

    ties = _shared(program)
    dtype = resolve_dtype(request.dtype, request.device, stored)
    try:
        if any(tensor.device != torch.device(request.device) for _, tensor in _tensors(program)):
            program = move_to_device_pass(program, request.device)
        # Guards are Python source kept in the file: not run.
        module = settle(program.module(check_guards=False))
    except Exception as error:
        raise ModelError(f"cannot put {path} on {request.device}: {first_line(error)}") from error
    tie(module, ties)
    inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(request.device), inputs)
    if request.dtype != "auto" and dtype != stored:
        inputs = _cast(module, inputs, dtype, path)
    return module, inputs


def _cast(module: nn.Module, inputs: _Inputs, dtype: torch.dtype, path: Path) -> _Inputs:
    """Cast the module and its inputs. Check that the graph, whose dtypes are fixed, still runs."""
    inputs = tree_map_only(
        torch.Tensor, lambda item: item.to(dtype) if item.is_floating_point() else item, inputs
    )
    cast(module, dtype, device_of(module), inputs or None)
    if inputs:
        try:
            with torch.no_grad():
                module(**inputs) if isinstance(inputs, dict) else module(*inputs)
        except Exception as error:
            raise ModelError(
                f"{path} does not run in {dtype_name(dtype)} ({first_line(error)}): export it in"
                " that dtype, or use --dtype auto"
            ) from error
    return inputs


def _shared(program: ExportedProgram) -> list[list[str]]:
    """Return groups of parameter names that share memory, which a move or a cast would split."""
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in program.state_dict.items():
        if isinstance(tensor, nn.Parameter) and tensor.numel():
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            names.setdefault(key, []).append(name)
    return [group for group in names.values() if len(group) > 1]
