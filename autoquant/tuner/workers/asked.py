"""The workers that a user asks for. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from autoquant.errors import WorkersError

RAY = "ray"


@dataclass(frozen=True, slots=True)
class Workers:
    """Workers that share the jobs of a search.

    Attributes:
        count: Processes on this host; None for as many as Ray has room for.
        address: Of a Ray cluster, `ray://HOST:PORT` or `HOST:PORT`; empty to start Ray here.
    """

    count: int | None
    address: str = ""

    @classmethod
    def parse(cls, text: str) -> Workers:
        """Read `2`, `ray` or `ray://ADDRESS`.

        Raises:
            WorkersError: It is none of them, or Ray is not installed.
        """
        if text.isascii() and text.isdigit() and int(text) > 0:
            return cls(int(text))
        name, _, address = text.partition("://")
        if name != RAY or ("://" in text and not address):
            raise WorkersError(
                f"--workers {text}: give a number of processes, ray, or ray://ADDRESS"
            )
        if find_spec("ray") is None:
            raise WorkersError(f"--workers {text} needs Ray: pip install 'autoquant[ray]'")
        return cls(None, text if address else "")
