"""Text of files and models, made safe to show: nothing in it can steer the terminal."""

from __future__ import annotations

import re

# Control characters but tab and newline; separators of lines; marks that reverse the reading order.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return text with characters that steer a terminal written out, e.g. as `\\x1b`."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
