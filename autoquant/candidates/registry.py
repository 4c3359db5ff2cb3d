"""List all formats in order: the project's own, then those that other packages register.

A package adds its formats through an entry point of the group `autoquant.candidates`. It names a
`Format`, or a callable that returns one or several of them.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

from autoquant.candidates.base import Candidate, Format, Kernel
from autoquant.devices.base import ENTRY_POINT_GROUP
from autoquant.errors import CandidateError
from autoquant.hints import did_you_mean
from autoquant.records import LinearShape, TimingSubject

_registered: dict[str, Format] = {}


def register(candidate: Format) -> None:
    """Add a format for this process.

    Raises:
        CandidateError: Another format has the same id.
    """
    known = known_formats()
    if candidate.id in known and known[candidate.id] is not candidate:
        raise CandidateError(f"a format {candidate.id!r} exists already; choose another id")
    _registered[candidate.id] = candidate


def is_registered_here(format_id: str) -> bool:
    """Check whether this process registered a format, so that other processes lack it."""
    return format_id in _registered


def known_formats() -> dict[str, Format]:
    """Return all formats by id, in order."""
    return {**_built_in(), **_from_entry_points(), **_registered}


def get_format(format_id: str) -> Format:
    """Return the format with an id.

    Raises:
        CandidateError: There is no such format. The package that registers it may be missing.
    """
    found = known_formats().get(format_id)
    if found is None:
        raise CandidateError(
            f"no format {format_id!r}; `autoquant candidates` lists them (is a plug-in missing?)"
        )
    return found


def candidate_of(subject: TimingSubject) -> Candidate:
    """Return the candidate that a subject names.

    Raises:
        CandidateError: There is no such format, or it has no such kernel.
    """
    fmt = get_format(subject.format)
    return Candidate(fmt, fmt.kernel(subject.kernel))


def select(globs: Sequence[str], device_type: str | None = None) -> list[Candidate]:
    """Return the candidates that match one of the globs, in order.

    A glob matches `VALUES`, a format's id or a candidate's id `FORMAT/KERNEL`. It does not choose
    the other roundings of a format that it matches: `int4-*` rounds to nearest, `int4-*-gptq` does
    not.

    Args:
        device_type: Device to choose for. The glob `*` omits the formats that a search there tries
            only by name. If None, `*` chooses every candidate.

    Raises:
        CandidateError: A glob matches nothing.
    """
    every = [Candidate(fmt, kernel) for fmt in known_formats().values() for kernel in fmt.kernels]
    chosen = [each for each in every if any(_matches(each, glob, device_type) for glob in globs)]
    for glob in globs:
        if not any(_matches(each, glob) for each in every):
            hint = did_you_mean(glob, known_formats())
            raise CandidateError(
                f"no candidate matches {glob!r}{hint}; `autoquant candidates` lists them"
            )
    return chosen


def timed(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates to time, one for all that differ in their rounding alone."""
    found = {(each.format.timed_as, each.kernel.id): each for each in candidates}
    return [
        each if each.format.id == name else Candidate(get_format(name), each.kernel)
        for (name, _), each in found.items()
    ]


def timed_as(format_id: str) -> str:
    """Return the id of the format that shares its timings with this one.

    An id that is not known here is returned unchanged.
    """
    found = known_formats().get(format_id)
    return found.timed_as if found else format_id


def _matches(candidate: Candidate, glob: str, device_type: str | None = None) -> bool:
    fmt, kernel = candidate.format, candidate.kernel
    if glob == "*":
        return device_type is None or _by_default(candidate, device_type)
    if fmt.rounds and _names(glob, get_format(fmt.rounds), kernel):
        return False
    return _names(glob, fmt, kernel)


def _by_default(candidate: Candidate, device_type: str) -> bool:
    return candidate.format.by_default(device_type) and not candidate.kernel.by_name


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
        int4_lanes,
        int4_mslk,
        int4_tiled,
        int4_tinygemm,
        int8,
        low_bit,
        microscaling,
        nf4,
        scaled,
        sparse24,
        sparse24_cusparselt,
        static,
        super_blocks,
    )

    int4_for_gpus = (int4_tiled, int4_tinygemm, int4_gemlite, int4_mslk)
    int4_for_cpus = (int4_lanes, int4)
    other_bits = (low_bit, super_blocks, nf4)
    sparse = (sparse24, sparse24_cusparselt)
    int4s = (*int4_for_cpus, *int4_for_gpus)
    modules = (floats, float8, microscaling, int8, static, *int4s, scaled, *other_bits, *sparse)
    return {fmt.id: fmt for module in modules for fmt in module.FORMATS}


@functools.cache
def _from_entry_points() -> dict[str, Format]:
    found: dict[str, Format] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        value = point.load()
        produced = value if isinstance(value, Format) else value()
        formats = [produced] if isinstance(produced, Format) else _checked(produced, point.value)
        for fmt in formats:
            if fmt.id in _built_in() or fmt.id in found:
                raise CandidateError(
                    f"plug-in {point.value} registers {fmt.id!r}, which exists already"
                )
            found[fmt.id] = fmt
    return found


def _checked(produced: object, origin: str) -> list[Format]:
    if isinstance(produced, Iterable):
        items = list(produced)
        if all(isinstance(item, Format) for item in items):
            return items
    raise CandidateError(
        f"plug-in {origin} must give a Format or several, not {type(produced).__name__}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateStatus:
    """Use of one candidate on one device.

    Attributes:
        usable: A large linear with round sizes can use it, in a model of bfloat16 or of float32,
            for many rows or for one.
        reason: Why it cannot, or "".
        by_default: A search that names no candidates tries it there.
    """

    format: str
    kernel: str
    numerics: str
    description: str
    usable: bool
    reason: str
    by_default: bool


def survey(device_type: str) -> list[CandidateStatus]:
    """Return every candidate's status for a 4096 x 4096 linear at 64 rows or at one.

    No model is known, so what a model of float32 can use is usable.
    """
    cases = [
        (LinearShape(n=4096, k=4096, bias=False, dtype=dtype), m)
        for dtype in ("bfloat16", "float32")
        for m in (64, 1)
    ]
    statuses = []
    for candidate in select(["*"]):
        fmt, kernel = candidate.format, candidate.kernel
        reasons = [candidate.unsupported_reason(shape, m, device_type) for shape, m in cases]
        reason = None if None in reasons else reasons[0]
        statuses.append(
            CandidateStatus(
                format=fmt.id,
                kernel=kernel.id,
                numerics=kernel.numerics,
                description=f"{fmt.description}; {kernel.description}",
                usable=reason is None,
                reason=reason or "",
                by_default=_by_default(candidate, device_type),
            )
        )
    return statuses
