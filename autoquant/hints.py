"""Guess the intended name or path after a typing error, for the end of an error message."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def did_you_mean(asked: str, known: Iterable[str]) -> str:
    """Return ` (did you mean NAME?)` with the nearest known name, or "" if none is near."""
    close = get_close_matches(asked, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def did_you_mean_path(asked: str | os.PathLike[str]) -> str:
    """Return the same hint for a missing path, from the names in its folder."""
    path = Path(asked).expanduser()
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    others = (str(path.parent / name) for name in names if name != path.name)
    return did_you_mean(str(path), others)
