"""Examine a machine: what it is, what a search could use here, what is wrong, how steady it is."""

from __future__ import annotations

import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

from autoquant.cache import cache_folder
from autoquant.candidates import get_format, survey
from autoquant.candidates.formats.floats import FLOATS
from autoquant.devices import Backend, backend
from autoquant.devices.base import failure_of_the_compiler, library_versions
from autoquant.devices.effort import timing_effort
from autoquant.devices.memory import available_bytes
from autoquant.devices.watch import Watch
from autoquant.files import is_writable

_OURS = "autoquant"
_COMPILE_LIMIT_S = 60.0
_NOT_ENDED = "torch.compile did not end"
_NO_KEY = "not known before torch.compile ends"
_CLOCK_S = 2.0
_SAMPLE_S = 0.01
_SIDE = 384
_UNSTEADY = 0.10
_LEAST_DISK_BYTES = 2 << 30
_LEAST_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong.

    Attributes:
        what: What is wrong.
        remedy: What to do about it.
        stops: A search would not work.
    """

    what: str
    remedy: str
    stops: bool = False


@dataclass(frozen=True, slots=True)
class Steadiness:
    """Times of a fixed matrix product, repeated for some seconds.

    Attributes:
        spread: Interquartile range over the median.
        slowest: How many times the median the slowest twentieth of the samples takes at least.
    """

    spread: float
    slowest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """All that was found.

    Attributes:
        facts: What the machine is, in words by topic, in the order in which to show them.
        usable: Kernels that can be used here, by the numbers that a weight is stored as.
        unusable: Candidates by the reason why they cannot be used.
        clock: How steady the device computes.
    """

    device: str
    facts: Mapping[str, str]
    usable: Mapping[str, Sequence[str]]
    unusable: Mapping[str, Sequence[str]]
    clock: Steadiness
    problems: Sequence[Problem]

    @property
    def works(self) -> bool:
        """Check that a search would work."""
        return not any(problem.stops for problem in self.problems)


def examine(device: str) -> Checkup:
    """Examine the machine and one of its devices, in some seconds.

    Args:
        device: The torch device, resolved.
    """
    place = backend(device)
    problems = _wrong_versions()
    compiler = _compiler(place, problems)
    ended = compiler != _NOT_ENDED  # the device's key says whether it compiles
    watch = Watch(place.watch_load())
    clock = _steadiness(place)
    disturbance = watch.disturbance(timing_effort().highest_other_load)
    if disturbance:
        problems.append(
            Problem(f"measured while {disturbance}", "close other programs, or search later")
        )
    elif clock.spread > _UNSTEADY:
        problems.append(
            Problem(
                f"the clock is unsteady: the same product takes {clock.spread:.0%} more or less",
                "fix the clock rate, or cool the machine; until then timings are repeated and"
                " marked",
            )
        )
    key = f"{place.fingerprint().key}: timings with these versions and limits" if ended else _NO_KEY
    facts = {
        "machine": _machine(),
        **place.about(),
        "key": key,
        "versions": ", ".join(f"{name} {number}" for name, number in _versions().items()),
        "compiler": compiler,
        "storage": _storage(problems),
        "load": disturbance or "others leave the machine alone",
    }
    usable, unusable = _candidates(place.type)
    if not set(usable) - set(FLOATS):
        reason = "no format but the unquantized ones can be used"
        problems.append(Problem(reason, "see `autoquant candidates` for the reasons", stops=True))
    problems += [Problem(what, remedy) for what, remedy in place.concerns().items()]
    return Checkup(
        device=device,
        facts=facts,
        usable=usable,
        unusable=unusable,
        clock=clock,
        problems=tuple(sorted(problems, key=lambda problem: not problem.stops)),
    )


def _machine() -> str:
    free = available_bytes()
    memory = "" if free is None else f"; {free / 2**30:.1f} GiB of memory free"
    return f"{platform.system()} {platform.release()} on {platform.machine()}{memory}"


def _versions() -> dict[str, str]:
    named = {_OURS: version(_OURS), "python": platform.python_version(), **library_versions()}
    return {**named, "transformers": version("transformers")}


def _wrong_versions() -> list[Problem]:
    """Return what is missing, or of a version that autoquant does not take."""
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, requires(_OURS) or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            here = version(requirement.name)
        except PackageNotFoundError:
            here = "missing"
        if here == "missing" or not requirement.specifier.contains(here, prereleases=True):
            remedy = f'pip install "{wanted}"'
            found.append(Problem(f"{requirement.name} is {here}", remedy, stops=True))
    return found


def _compiler(place: Backend, problems: list[Problem]) -> str:
    """Compile something tiny, and return how that went."""
    answers: list[str | None] = []
    started_s = time.monotonic()
    thread = threading.Thread(
        target=lambda: answers.append(
            place.compile_failure() or failure_of_the_compiler(place.device)
        ),
        daemon=True,
    )  # a compiler that hangs cannot be stopped, only left alone
    thread.start()
    thread.join(_COMPILE_LIMIT_S)
    took_s = time.monotonic() - started_s
    if not answers:
        what = f"torch.compile did not end within {_COMPILE_LIMIT_S:.0f} s"
        remedy = "close other programs, or see whether g++ or clang++ works by itself"
        problems.append(Problem(what, remedy))
        return _NOT_ENDED
    reason = answers[0]
    if reason is None:
        return f"torch.compile works (something tiny took {took_s:.1f} s)"
    remedy = "models run eagerly, and so slower, until it does; install g++ or clang++"
    problems.append(Problem(f"torch.compile does not work: {reason}", remedy))
    return "torch.compile does not work"


def _storage(problems: list[Problem]) -> str:
    """Return where the cache and scratch files are, and how much room there is."""
    cache = cache_folder()
    home = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    if not is_writable(home):
        remedy = "set AUTOQUANT_CACHE to a folder that can be written into"
        problems.append(Problem(f"the cache {cache} cannot be written", remedy))
    words = [f"cache {cache} of {size / 2**20:.0f} MiB"]
    for name, folder in (("here", Path.cwd()), ("scratch", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        words.append(f"{free / 2**30:.0f} GiB free {name} ({folder})")
        if not is_writable(folder):
            reason = f"{folder} cannot be written"
            problems.append(Problem(reason, "choose another folder (TMPDIR for scratch)", True))
        if free < _LEAST_DISK_BYTES:
            reason = f"only {free / 2**30:.1f} GiB are free in {folder}"
            problems.append(Problem(reason, "make room for the quantized model"))
    available = available_bytes()
    if available is not None and available < _LEAST_MEMORY_BYTES:
        problems.append(Problem("less than 1 GiB of memory is free", "close other programs"))
    return "; ".join(words)


def _steadiness(place: Backend) -> Steadiness:
    """Time a fixed matrix product for some seconds."""
    a = torch.randn(_SIDE, _SIDE, device=place.device)
    calls = max(1, round(_SAMPLE_S / max(place.time_s(lambda: a @ a), 1e-6)))

    def several() -> None:
        for _ in range(calls):
            torch.mm(a, a)

    several()
    samples: list[float] = []
    end_s = time.monotonic() + _CLOCK_S
    while time.monotonic() < end_s or len(samples) < 20:
        samples.append(place.time_s(several))
    low, middle, high = statistics.quantiles(samples, n=4)
    slowest = statistics.quantiles(samples, n=20)[-1]
    return Steadiness((high - low) / middle, slowest / middle)


def _candidates(device_type: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return what can be used, and the formats that cannot with the reason.

    Formats that differ from another only in their rounding are left out.
    """
    usable: dict[str, list[str]] = {}
    unusable: dict[str, list[str]] = {}
    for each in survey(device_type):
        if get_format(each.format).rounds:
            continue
        if each.usable:
            usable.setdefault(each.format.partition("/")[0], []).append(each.kernel)
        else:
            unusable.setdefault(each.reason, []).append(f"{each.format}/{each.kernel}")
    return usable, unusable
