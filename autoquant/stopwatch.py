"""The seconds that the parts of long work take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Adds up the seconds of named parts.

    Attributes:
        seconds: By part, in the order in which parts first ended.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self.seconds: dict[str, float] = {}
        self._now_s = now_s

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, time counts for this part, also if it ends with an error."""
        started_s = self._now_s()
        try:
            yield
        finally:
            self.add(name, self._now_s() - started_s)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a part."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def seconds_words(seconds: Mapping[str, float]) -> str:
    """Return `load 3.1 s, profile 67 s`, without parts that take no time to speak of."""
    return ", ".join(f"{name} {value:.2g} s" for name, value in seconds.items() if value >= 0.05)
