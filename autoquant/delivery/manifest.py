"""The manifest of a checkpoint, `autoquant.json`: what its tensors are, and of which model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, cast

from annotated_types import MinLen
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from autoquant.errors import CheckpointError, first_line
from autoquant.files import read_text, stays_inside
from autoquant.records import KvCache
from autoquant.records.numbers import Positive
from autoquant.typed import read

MANIFEST = "autoquant.json"
FORMAT_VERSION = 1
SHARDED_VERSION = 2
"""Of a checkpoint whose tensors lie in several files, which earlier versions cannot read."""

_open = with_config(ConfigDict(extra="allow"))


@_open
class Version(TypedDict):
    """What every version of the manifest has."""

    format_version: int


@_open
class Source(TypedDict):
    """Where the architecture comes from: a `ModelSource`."""

    kind: Literal["huggingface", "state_dict", "exported", "pickle", "live"]
    path: NotRequired[str]
    model_factory: NotRequired[str | None]
    tokenizer: NotRequired[str | None]


@_open
class Routed(TypedDict):
    """The format of a weight, and its kernels by the largest number of rows.

    Of the weights of experts, also how many there are, and whether each is kept as `[k, n]`.
    """

    format: str
    route: Annotated[list[tuple[Positive | None, str]], MinLen(1)]
    experts: NotRequired[Positive]
    turned: NotRequired[bool]


@_open
class Manifest(Version):
    """What this version reads."""

    plan_id: str
    model_hash: str
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    device: NotRequired[str]
    source: Source
    joined: NotRequired[list[list[str]]]
    ties: list[list[str]]
    turned: NotRequired[list[str]]
    routed: dict[str, Routed]
    cpu_capability: str | None
    packed: NotRequired[list[str]]
    kv_cache: NotRequired[KvCache]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: There is none, it is damaged, or a newer version wrote it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a model that autoquant saved (no {MANIFEST})")
    try:
        text = read_text(path)
        version = read(Version, text)["format_version"]
        if version not in (FORMAT_VERSION, SHARDED_VERSION):
            raise CheckpointError(
                f"{folder} has checkpoint version {version}, this autoquant reads"
                f" {FORMAT_VERSION} and {SHARDED_VERSION}; upgrade it"
            )
        manifest = cast(dict[str, Any], read(Manifest, text))
        if outside := [name for name in manifest.get("packed", []) if not stays_inside(name)]:
            raise ValueError(f"it names {outside[0]} of another folder")
        return manifest
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({first_line(error)}): apply the plan again"
        ) from error
