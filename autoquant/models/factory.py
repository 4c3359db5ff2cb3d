"""Build a module with the user's factory and fill it, holding no weight twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.errors import ModelError, first_line
from autoquant.models.named import call_named, import_named
from autoquant.models.names import renamed
from autoquant.models.quiet import current_folder_importable, some

_OPTION = "--model-factory"
_OTHER = "give the factory of the model that was saved"


def build(spec: str, state: Mapping[str, Any], path: Path) -> nn.Module:
    """Call the factory `package.module:callable` and fill its module with `state`.

    The factory is first called under the meta device, which takes no memory and no time. If that
    fails, or leaves a tensor that the file does not hold, it is called again for real. Parameters
    that it ties stay tied.

    Raises:
        ModelError: The factory cannot be imported, fails or returns no module. Or the weights, read
            from `path`, do not fit its module.
    """
    with current_folder_importable():
        factory = factory_of(spec)
        module = _build_on_meta(factory, spec, state, path)
        if module is None:
            module = _call(factory, spec)
            _fill(module, state, spec, path)
    if _on_meta(module):
        raise ModelError(
            f"--model-factory {spec} returns a module on the meta device: build it with real"
            " tensors"
        )
    return module


def factory_of(spec: str) -> Callable[[], Any]:
    """Import the callable of `--model-factory`."""
    return import_named(spec, _OPTION, "returns the module")


def _call(factory: Callable[[], Any], spec: str) -> nn.Module:
    module = call_named(factory, spec, _OPTION)
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"--model-factory {spec} returned a {type(module).__name__}: it must return an"
            " nn.Module"
        )
    return module


def _build_on_meta(
    factory: Callable[[], Any], spec: str, state: Mapping[str, Any], path: Path
) -> nn.Module | None:
    try:
        with torch.device("meta"):
            module = _call(factory, spec)
    except ModelError:
        return None
    _fill(module, state, spec, path)
    return None if _on_meta(module) else module


def _on_meta(module: nn.Module) -> bool:
    """Check whether any tensor, registered or a plain attribute, has no values."""
    return any(tensor.is_meta for part in module.modules() for tensor in _tensors(part))


def _tensors(part: nn.Module) -> Iterable[torch.Tensor]:
    for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
        items: Iterable[Any] = (value,)
        if isinstance(value, dict):
            items = value.values()
        elif isinstance(value, (list, tuple)):
            items = value
        yield from (item for item in items if isinstance(item, torch.Tensor))


def _fill(module: nn.Module, state: Mapping[str, Any], spec: str, path: Path) -> None:
    """Make the tensors of `state` the module's own."""
    state = renamed(state, module)
    ties = tied_names(module)
    try:
        result = module.load_state_dict(state, strict=False, assign=True)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()] or [
            first_line(error)
        ]
        raise ModelError(
            f"{path} does not fit --model-factory {spec}: {some(lines, 2)}; {_OTHER}"
        ) from error
    covered: set[str] = set()
    for group in ties:
        if any(name in state for name in group):
            covered.update(group)
    problems = []
    if missing := [name for name in result.missing_keys if name not in covered]:
        problems.append(f"it lacks {some(missing)}")
    if result.unexpected_keys:
        problems.append(f"the module has no {some(list(result.unexpected_keys))}")
    if problems:
        raise ModelError(
            f"{path} does not fit --model-factory {spec}: {'; '.join(problems)}; {_OTHER}"
        )
    for group in ties:
        _check_same(group, state, spec, path)
    tie(module, [sorted(group, key=lambda name: name not in state) for group in ties])


def _check_same(group: list[str], state: Mapping[str, Any], spec: str, path: Path) -> None:
    first, *rest = [name for name in group if name in state] or [""]
    for name in rest:
        if state[name].data_ptr() != state[first].data_ptr() and not torch.equal(
            state[name], state[first]
        ):
            raise ModelError(
                f"--model-factory {spec} ties {first} and {name}, but they differ in {path}"
            )


def tied_names(module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter or buffer that has several."""
    names: dict[int, list[str]] = {}
    for members in (module.named_parameters, module.named_buffers):
        for name, tensor in members(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def tie(module: nn.Module, groups: Iterable[Iterable[str]]) -> None:
    """Give every name of a group the tensor that its first name has."""
    for group in groups:
        shared: torch.Tensor | None = None
        for name in group:
            owner, _, leaf = name.rpartition(".")
            part = module.get_submodule(owner)
            members: dict[str, Any] = (
                part._parameters if leaf in part._parameters else part._buffers
            )
            shared = members[leaf] if shared is None else shared
            members[leaf] = shared
