"""Trust: which code a user allowed in one call, and which code a stored model needs."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from autoquant.errors import TrustError, option_words
from autoquant.models.code import named_code
from autoquant.models.exported import is_exported
from autoquant.models.exported_check import needs_trust
from autoquant.models.request import ModelPath, ModelRequest, ModelSource, SampleInputs
from autoquant.models.weights import read_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """The code that the user named in this call. No other is run, imported or unpickled.

    The attributes are those of `autoquant.models.request.ModelRequest`. What a database or a
    checkpoint says is never one of them: it is repeated in the error.
    """

    trust_pickle: bool = False
    trust_remote_code: bool = False
    model_factory: str | None = None
    sample_inputs: SampleInputs = None

    def as_keywords(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


NO_TRUST = Trust()


@dataclass(frozen=True, slots=True)
class _Need:
    """Code that a model needs: the keyword that names it, its value, and what would run."""

    keyword: str
    value: str | bool
    runs: str


def request_again(
    source: ModelSource, trust: Trust, *, dtype: str, device: str, model: ModelPath | None = None
) -> ModelRequest:
    """Return what loads a stored model again, with the code that the user named now.

    Args:
        model: Where the model lies now; None if it was not moved.

    Raises:
        TrustError: The model needs code that the user did not name. All of it is in the message.
    """
    place = source.path if model is None else os.fspath(model)
    _refuse_missing(_needs(source, trust, Path(place).expanduser().absolute()))
    return replace(source.request(dtype=dtype, device=device, model=model), **trust.as_keywords())


def named_factory(source: Mapping[str, Any], trust: Trust) -> str:
    """Return the factory that the user named for a checkpoint that has one.

    Args:
        source: A `ModelSource` as a mapping, with a factory.

    Raises:
        TrustError: The user named none.
    """
    if trust.model_factory is None:
        _refuse_missing([_imported("model_factory", source["model_factory"])])
    return str(trust.model_factory)


def _refuse_missing(needs: Iterable[_Need]) -> None:
    """Raise the error that names all of what is needed, if anything is."""
    found = list(needs)
    if not found:
        return
    options = " ".join(option_words(need.keyword, need.value) for need in found)
    runs = "; ".join(need.runs for need in found)
    raise TrustError(
        f"this needs code that a file names, and only you can allow it: add {options} if you trust"
        f" its author ({runs})",
        options={need.keyword: need.value for need in found},
        runs=[need.runs for need in found],
    )


def _needs(source: ModelSource, trust: Trust, place: Path) -> Iterator[_Need]:
    if source.trust_pickle and not trust.trust_pickle and _holds_code(place):
        checked = "" if source.file_hash else ", whose bytes an older version did not note"
        yield _Need("trust_pickle", True, f"runs what is pickled in {place}{checked}")
    if source.trust_remote_code and not trust.trust_remote_code:
        folder = place.parent if place.is_file() else place
        names = named_code(folder)
        if names or not folder.is_dir():
            yield _Need(
                "trust_remote_code", True, f"runs the code of {folder}: {', '.join(names) or 'all'}"
            )
    for keyword in ("model_factory", "sample_inputs"):
        if (spec := getattr(source, keyword)) is not None and getattr(trust, keyword) is None:
            yield _imported(keyword, spec)


def _holds_code(path: Path) -> bool:
    """Check whether reading a file takes trust. Nothing in it is run."""
    if not path.is_file():
        return False
    if is_exported(path):
        return bool(needs_trust(path))
    try:
        read_tensors(path)
    except pickle.UnpicklingError:
        return True
    except Exception:  # noqa: BLE001 - the loader reports what is wrong with the file
        return False
    return False


def _imported(keyword: str, spec: str) -> _Need:
    """Return the need of `package.module:callable`, with the file that would be imported.

    The file is found without importing anything, so for a package it is that of the package.
    """
    name = spec.partition(":")[0].partition(".")[0]
    found = PathFinder.find_spec(name, [os.getcwd(), *sys.path])
    where = f" from {found.origin}" if found is not None and found.origin else ""
    return _Need(keyword, spec, f"imports {spec}{where}")
