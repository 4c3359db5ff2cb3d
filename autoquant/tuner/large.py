"""Say before the work what does not fit into the device's memory, and what would."""

from __future__ import annotations

import re
from collections.abc import Sequence

from autoquant.candidates import Format
from autoquant.delivery.applier import module_bytes
from autoquant.devices.memory import LIMIT_VARIABLE
from autoquant.errors import PlanError
from autoquant.models import LoadedModel
from autoquant.models.fitting import gib
from autoquant.records import Recording
from autoquant.tuner.request import SettledRequest

_BITS = re.compile(r"\d+")


def streaming_notice(loaded: LoadedModel) -> str:
    """Say how a model is searched that does not fit; empty if it fits."""
    if loaded.stream is None:
        return ""
    text = (
        f"the unquantized model takes {gib(module_bytes(loaded.module))}, and a search needs twice"
        f" that: {loaded.device} has too little memory, so blocks are brought there one at a time"
    )
    most = loaded.stream.most_plan_bytes
    return text if most is None else f"{text}, and plans of up to {gib(most)} are searched"


def check_smallest(settled: SettledRequest, recording: Recording) -> None:
    """Refuse a streamed model of which no plan can fit, before anything is timed.

    Raises:
        PlanError: The formats with fewest bits take more than there is room for.
    """
    stream = settled.loaded.stream
    most = None if stream is None else stream.most_plan_bytes
    if most is None:
        return
    least = least_bytes(recording, [each.format for each in settled.candidates])
    if least > most:
        raise PlanError(
            f"no plan fits: with the fewest bits that the candidates have, the weights take"
            f" {gib(least)}, and {settled.loaded.device} has room for {gib(most)}: use a device"
            f" with more memory, allow more with {LIMIT_VARIABLE}, or name candidates with fewer"
            " bits"
        )


def least_bytes(recording: Recording, formats: Sequence[Format]) -> int:
    """Return what the weights take in the format with fewest bits, without its scales."""
    bits = min(_bits(fmt) for fmt in formats)
    least = recording.parameter_bytes
    for site in recording.sites:
        elements = site.weights
        stored = elements * _bits_of(site.shape.dtype) // 8
        least += elements * bits // 8 - (0 if site.kept else stored)
    return least


def _bits(fmt: Format) -> int:
    return _bits_of(fmt.values)


def _bits_of(name: str) -> int:
    """Return the first number of a name, such as 4 of `int4-g32`."""
    found = _BITS.search(name)
    return int(found[0]) if found else 1
