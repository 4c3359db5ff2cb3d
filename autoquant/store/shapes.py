"""Shapes of the JSON objects that rows hold and that are no records: facts by name.

Those that later versions add are kept as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import MaxLen, MinLen
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from autoquant.records import BASELINES, LayerChoice, Objective
from autoquant.records.numbers import AboveZero, Count, Finite, NonNegative

_open = with_config(ConfigDict(extra="allow"))


@_open
class ModelObject(TypedDict):
    """Where a model was read from: a `ModelSource` of `autoquant.models`."""

    kind: str
    path: NotRequired[str]
    model_factory: NotRequired[str | None]
    tokenizer: NotRequired[str | None]
    trust_pickle: NotRequired[bool]
    sample_inputs: NotRequired[str | None]


@_open
class LimitsObject(TypedDict, total=False):
    """The limits of a search: `Limits` of `autoquant.solver`."""

    max_ppl_increase: Finite | None
    max_kl: Finite | None
    max_memory_bytes: Count | None
    minimize: Objective
    measure: Literal["increase", "divergence"]


@_open
class ConstraintsObject(TypedDict, total=False):
    """The options of a search for single layers."""

    keep: list[str]
    pin: list[str]
    engine: str


@_open
class Identity(TypedDict, total=False):
    """What a study's id is made of."""

    model_hash: str
    device: str
    workload: str
    dtype: str
    quality: str
    candidates: list[str]
    seed: int
    protocol: str
    method: str
    fuse: bool
    embeddings: bool
    constraints: ConstraintsObject


@_open
class SpaceObject(TypedDict):
    """What all plans of a study have in common."""

    other_bytes: Count
    rest_ms: Finite
    original_request_ms: NotRequired[Finite | None]
    dtype: str
    curvature: float
    groups: list[list[str]]
    reasons: dict[str, str]
    logarithmic: bool


class ProblemObject(TypedDict):
    """What plans are solved from: the options of every layer.

    Unlike the others it is not open: its records would be, too, and have no place for more fields.
    """

    options: list[Annotated[list[LayerChoice], MinLen(1)]]
    about: NotRequired[SpaceObject | Annotated[dict[str, Any], MaxLen(0)] | None]


@_open
class Windows(TypedDict):
    """Token ids `[windows, tokens]`."""

    windows: list[list[Count]]


@_open
class Words(TypedDict):
    """What quality was judged by."""

    words: str


@_open
class Options(TypedDict):
    """The options of a command, by name."""

    options: dict[str, str | int | float | bool | list[str]]


@_open
class Refinement(TypedDict):
    """How many plans a refinement proved, and why it ended."""

    plans: Count
    ended: str


@_open
class StageSeconds(TypedDict):
    """What each stage of a search took, over all its runs.

    The bytes are the most that were taken at once, by `host` and `device`.
    """

    seconds: dict[str, NonNegative]
    memory_bytes: NotRequired[dict[str, dict[str, Count]]]


@_open
class Work(TypedDict):
    """What a search had to do, over all its runs, for what it took to be compared with."""

    timings: Count
    scores: NonNegative


@_open
class Reason(TypedDict):
    """Why something is missing."""

    reason: str


@_open
class TypeTimesObject(TypedDict):
    """A `TypeTimes` of `autoquant.study.engine_times`."""

    phase_ms: dict[str, AboveZero]
    layers: list[str]


@_open
class EngineTimesObject(TypedDict):
    """An `EngineTimes` of `autoquant.study.engine_times`, without its engine."""

    version: str
    device: str
    original_ms: dict[str, AboveZero]
    types: dict[str, TypeTimesObject]


@_open
class EnginesObject(TypedDict):
    """What was measured in inference engines, by their names."""

    engines: dict[str, EngineTimesObject]


REFERENCES: Mapping[str, Any] = {
    "calibration": Windows,
    "judge": Words,
    "command": Options,
    "refinement": Refinement,
    "stages": StageSeconds,
    "work": Work,
    "times in engines": EnginesObject,
    **{f"no {kind} plan": Reason for kind in BASELINES},
}
"""The shape of what is known of a study, by its name."""
