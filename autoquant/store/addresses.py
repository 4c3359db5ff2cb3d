"""Addresses of databases: how they are shown, and those whose password nobody could tell."""

from __future__ import annotations

import re

_USER = re.compile(r"(://[^:]*):.*@", re.DOTALL)
_OPTION = re.compile(r"((?:password|secret|key)=)[^&\s]*", re.IGNORECASE)
_NO_URL = re.compile(r"postgres\w*(\+\w+)?:(?!//)|.*\bpassword\s*=", re.IGNORECASE | re.DOTALL)


def shown_address(address: str) -> str:
    """Return an address with *** for its passwords, to be shown.

    It hides too much rather than too little, since what was typed may be no valid URL.
    """
    if "://" not in address:
        return address
    return _USER.sub(r"\1:***@", _OPTION.sub(r"\1***", address))


def without_passwords(address: str) -> str:
    """Return an address that connects if the passwords are given otherwise, as by ~/.pgpass."""
    return _USER.sub(r"\1@", _OPTION.sub("", address)) if "://" in address else address


def why_unclear(address: str) -> str:
    """Return what is wrong with an address that may hold a password anywhere, or "".

    A driver would take a part of such a password for the name of a host, and print it.
    """
    if "://" not in address:
        unlike = _NO_URL.match(address) is not None
        return "is neither a path nor a URL" if unlike else ""
    place = address.partition("://")[2].partition("?")[0]
    if place.count("@") > 1 and not address.startswith("sqlite"):
        return "has more than one @ (in a user's name or a password, write @ as %40 and / as %2F)"
    return ""
