"""The timings of a study's shapes from the store, as rows of `autoquant.profiler.latencies`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from autoquant.profiler.latencies import Row, row_of
from autoquant.records import LinearShape, Roofline
from autoquant.study.study import Study


@dataclass(frozen=True, slots=True)
class KernelMap:
    """Timings of a study's shapes.

    Attributes:
        shapes: Rows by shape. Shapes of layers come first, then those of layers computed as one.
        names: Names of the layers by shape.
        roofline: Limits of the device, or None if they were not measured.
    """

    shapes: Mapping[LinearShape, tuple[Row, ...]]
    names: Mapping[LinearShape, tuple[str, ...]]
    roofline: Roofline | None

    def rows(self) -> list[Row]:
        """Return the rows of all shapes."""
        return [row for rows in self.shapes.values() for row in rows]


def kernel_map(study: Study) -> KernelMap:
    """Return the timings of the study's device, protocol and working set."""
    facts = study.facts
    sites = facts.recording.sites if facts.recording else ()
    names: dict[LinearShape, tuple[str, ...]] = {}
    for site in sites:
        names[site.shape] = (*names.get(site.shape, ()), site.name)
    timings = study.store.timings(facts.device, str(facts.identity.get("protocol")))
    roofline = study.store.roofline(facts.device)
    used = Counter(subject.working_set_bytes for subject in timings if subject.shape in names)
    if not used:
        return KernelMap({}, names, roofline)
    # A search times all its shapes with one working set. Another model's covers fewer of them.
    working_set, _ = max(used.items(), key=lambda item: (item[1], item[0]))
    found: dict[LinearShape, list[Row]] = {shape: [] for shape in names}
    for subject, measurement in timings.items():
        if subject.working_set_bytes == working_set:
            found.setdefault(subject.shape, []).append(row_of(measurement))
    shapes = {shape: tuple(rows) for shape, rows in found.items() if rows}
    return KernelMap(shapes, names, roofline)
