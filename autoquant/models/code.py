"""Code that lies beside a model: which files name it, and whether it has changed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autoquant.errors import ModelError, TrustError, first_line
from autoquant.files import hash_files
from autoquant.models.quiet import some
from autoquant.models.request import ModelRequest

_CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_CUSTOM_GENERATE = "custom_generate/generate.py"
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_FLASH = "flash_attention"


def named_code(folder: Path) -> list[str]:
    """Return the code that files of a Hugging Face folder name, e.g. `modeling_my.MyModel`."""
    found = [name for config in _CONFIGS for name in _named(_read(folder / config))]
    found += [f"code on the hub: {name}" for name in _kernels(_read(folder / _CONFIGS[0]))]
    if (folder / _CUSTOM_GENERATE).is_file():
        found.append(_CUSTOM_GENERATE)
    return list(dict.fromkeys(found))


def code_hash(folder: Path) -> str:
    """Return the hash of a folder's Python files; empty if nothing names them."""
    return hash_files(_python_files(folder)) if named_code(folder) else ""


def check_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse what a Hugging Face folder may not name, before transformers reads it.

    Raises:
        TrustError: Its `config.json` has code fetched from the hub, which is not trusted.
        ModelError: It names other weights than those that are hashed, or code of another place.
    """
    config = _read(folder / _CONFIGS[0])
    if (other := config.get("transformers_weights")) is not None:
        raise ModelError(
            f"{folder / _CONFIGS[0]} names other weights ({other}): take out transformers_weights,"
            " and name them model.safetensors"
        )
    if kernels := list(_kernels(config)):
        refuse_code(folder, kernels, trust_remote_code)
    if not trust_remote_code:
        return
    if away := [name for name in named_code(folder) if "--" in name]:
        raise ModelError(
            f"{folder} names code of another place ({some(away)}), which cannot be checked: copy it"
            " into the folder, and name it there"
        )


def refuse_code(folder: Path, names: Sequence[str], trust_remote_code: bool) -> None:
    """Refuse a folder whose code is needed, unless it is trusted.

    Raises:
        TrustError: It is not trusted.
    """
    if trust_remote_code:
        return
    raise TrustError(
        f"{folder} needs code that comes with it ({some(list(names))}), which can do anything: read"
        " it, and pass --trust-remote-code if you trust its author",
        options={"trust_remote_code": True},
        runs=[f"{name}, which {folder} names" for name in names],
    )


def refuse_needed_code(folder: Path, error: BaseException, trust_remote_code: bool) -> None:
    """Do as `refuse_code` if transformers raised `error` because it did not run a folder's code."""
    if "trust_remote_code" in str(error):
        refuse_code(folder, named_code(folder) or [first_line(error)], trust_remote_code)


def with_checked_file(request: ModelRequest, path: Path) -> ModelRequest:
    """Return the request with the hash of a file that is trusted, which is not parsed yet.

    Raises:
        ModelError: The request knows the hash already, and it is another one.
    """
    digest = hash_files([path])
    _check_same(request.file_hash, digest, path)
    return replace(request, file_hash=digest)


def with_checked_code(request: ModelRequest, *folders: Path) -> ModelRequest:
    """Return the request with the hash of folders whose code is trusted, which has not run yet.

    Raises:
        ModelError: The request knows the hash already, and it is another one.
    """
    configs = [folder / name for folder in folders for name in _CONFIGS]
    code = [path for folder in folders for path in _python_files(folder)]
    digest = hash_files([*filter(Path.is_file, configs), *code])
    _check_same(request.code_hash, digest, folders[0])
    return replace(request, code_hash=digest)


def _check_same(known: str | None, digest: str, place: Path) -> None:
    if known not in (None, digest):
        raise ModelError(
            f"{place} holds other code than it did when it was searched, and none of it was run:"
            " give the right one, or search this one"
        )


def _python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _read(path: Path) -> Mapping[str, Any]:
    """Return what a JSON file holds, or {}. The loader reports what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _named(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the classes of a configuration's `auto_map`."""
    found = config.get("auto_map", {})
    for value in found.values() if isinstance(found, dict) else [found]:
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str):
                yield name


def _kernels(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the compiled code that a configuration has fetched from the hub, at any depth."""
    for key, value in config.items():
        if isinstance(value, dict) and key not in _KERNELS:
            yield from _kernels(value)
        elif key in _KERNELS:
            names = value.values() if isinstance(value, dict) else [value]
            yield from (name for name in names if isinstance(name, str) and _is_fetched(name))


def _is_fetched(implementation: str) -> bool:
    """Check whether transformers would fetch this attention from the hub."""
    if "/" in implementation:
        return True
    return (
        _FLASH in implementation
        and find_spec("flash_attn") is None
        and find_spec("kernels") is not None
    )
