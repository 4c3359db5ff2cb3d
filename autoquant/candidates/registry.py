"""The one ordered list of formats: those of the project, then those that other packages register.

A package adds formats of its own through an entry point of the group `autoquant.candidates` that names a `Format`, or a
callable that returns one or several of them.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

from autoquant.candidates.base import Candidate, Format, Kernel
from autoquant.errors import CandidateError
from autoquant.hints import did_you_mean
from autoquant.records import LinearShape

ENTRY_POINT_GROUP = "autoquant.candidates"
_registered: dict[str, Format] = {}


def register(candidate: Format) -> None:
    """Add a format for this process.

    Raises:
        CandidateError: Another format has its id.
    """
    known = known_formats()
    if candidate.id in known and known[candidate.id] is not candidate:
        raise CandidateError(f"a format {candidate.id!r} exists already; choose another id")
    _registered[candidate.id] = candidate


def is_registered_here(format_id: str) -> bool:
    """Whether a format was registered by this process, so that another one would not know it."""
    return format_id in _registered


def known_formats() -> dict[str, Format]:
    """Every format by id, in order."""
    return {**_built_in(), **_from_entry_points(), **_registered}


def get_format(format_id: str) -> Format:
    """The format of that id.

    Raises:
        CandidateError: There is none (a package that registered it may be missing).
    """
    found = known_formats().get(format_id)
    if found is None:
        raise CandidateError(f"no format {format_id!r}; `autoquant candidates` lists them (is a plug-in missing?)")
    return found


def select(globs: Sequence[str], device_type: str | None = None) -> list[Candidate]:
    """The candidates whose id `FORMAT/KERNEL` or format id matches one of the globs, in order.

    A glob that matches a format does not also choose its other roundings: `int4*` is rounded to nearest, `int4*-gptq` is not.

    Args:
        device_type: Where they are for: the glob `*` leaves out the formats that must be asked for by name there. Without
            it, `*` chooses every candidate.

    Raises:
        CandidateError: A glob matches nothing.
    """
    every = [Candidate(fmt, kernel) for fmt in known_formats().values() for kernel in fmt.kernels]
    chosen = [each for each in every if any(_matches(each, glob, device_type) for glob in globs)]
    for glob in globs:
        if not any(_matches(each, glob) for each in every):
            raise CandidateError(
                f"no candidate matches {glob!r}{did_you_mean(glob, known_formats())}; `autoquant candidates` lists them"
            )
    return chosen


def timed(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates to time in place of these: one for all that differ only in their rounding."""
    found = {(each.format.timed_as, each.kernel.id): each for each in candidates}
    return [
        each if each.format.id == name else Candidate(get_format(name), each.kernel)
        for (name, _), each in found.items()
    ]


def timed_as(format_id: str) -> str:
    """The format whose timings are this one's; a format that is not known here stands for itself."""
    found = known_formats().get(format_id)
    return found.timed_as if found else format_id


def _matches(candidate: Candidate, glob: str, device_type: str | None = None) -> bool:
    fmt, kernel = candidate.format, candidate.kernel
    if glob == "*":
        return device_type is None or fmt.by_default(device_type)
    return _names(glob, fmt, kernel) and not (fmt.rounds and _names(glob, get_format(fmt.rounds), kernel))


def _names(glob: str, fmt: Format, kernel: Kernel) -> bool:
    names = (fmt.values, fmt.id, Candidate(fmt, kernel).id)
    return any(fnmatch.fnmatch(name, glob) for name in names)


@functools.cache
def _built_in() -> dict[str, Format]:
    # Deferred: torchao takes a second to import.
    from autoquant.candidates.formats import (
        float8,
        floats,
        int4,
        int4_gemlite,
        int4_mslk,
        int4_tiled,
        int4_tinygemm,
        int8,
        low_bit,
        microscaling,
    )

    int4_for_gpus = (int4_tiled, int4_tinygemm, int4_gemlite, int4_mslk)
    modules = (floats, float8, microscaling, int8, int4, *int4_for_gpus, low_bit)
    return {fmt.id: fmt for module in modules for fmt in module.FORMATS}


@functools.cache
def _from_entry_points() -> dict[str, Format]:
    found: dict[str, Format] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        value = point.load()
        produced = value if isinstance(value, Format) else value()
        for fmt in [produced] if isinstance(produced, Format) else _checked(produced, point.value):
            if fmt.id in _built_in() or fmt.id in found:
                raise CandidateError(f"plug-in {point.value} registers {fmt.id!r}, which exists already")
            found[fmt.id] = fmt
    return found


def _checked(produced: object, origin: str) -> list[Format]:
    if isinstance(produced, Iterable):
        items = list(produced)
        if all(isinstance(item, Format) for item in items):
            return items
    raise CandidateError(f"plug-in {origin} must give a Format or several, not {type(produced).__name__}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateStatus:
    """One candidate on one device: whether a large, well-shaped linear could use it, and why not.

    `by_default` tells whether a search that names no candidates tries it there.
    """

    format: str
    kernel: str
    numerics: str
    description: str
    usable: bool
    reason: str
    by_default: bool


def survey(device_type: str) -> list[CandidateStatus]:
    """Every candidate, judged for a 4096 x 4096 linear of bfloat16 at 64 rows."""
    shape = LinearShape(n=4096, k=4096, bias=False, dtype="bfloat16")
    statuses = []
    for candidate in select(["*"]):
        fmt, kernel = candidate.format, candidate.kernel
        reason = candidate.unsupported_reason(shape, 64, device_type)
        statuses.append(
            CandidateStatus(
                format=fmt.id,
                kernel=kernel.id,
                numerics=kernel.numerics,
                description=f"{fmt.description}; {kernel.description}",
                usable=reason is None,
                reason=reason or "",
                by_default=fmt.by_default(device_type),
            )
        )
    return statuses
