"""`autoquant candidates`: list what a device can use, and why it cannot use the rest."""

from __future__ import annotations

from autoquant.cli.options import DeviceOption
from autoquant.cli.output import JsonFlag, echo, print_json, print_table


def candidates(
    device: DeviceOption = "auto",
    as_json: JsonFlag = False,
) -> None:
    """List the formats and kernels known here, usable or not, with the reason."""
    from autoquant.candidates import survey
    from autoquant.models import resolve_device

    device_type = resolve_device(device).partition(":")[0]
    found = survey(device_type)
    if as_json:
        fields = ("format", "kernel", "numerics", "description", "usable", "reason", "by_default")
        print_json([{name: getattr(candidate, name) for name in fields} for candidate in found])
        return
    from autoquant.report.tables.plans import candidates_table

    usable = sum(candidate.usable for candidate in found)
    opt_in = sum(candidate.usable and not candidate.by_default for candidate in found)
    named = f", {opt_in} of them (opt-in) only where --candidates names them" if opt_in else ""
    echo(f"{usable} of {len(found)} candidates can be used on {device_type}{named}\n")
    print_table(lambda width: candidates_table(found, width))
