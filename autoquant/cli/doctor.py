"""`autoquant doctor`: what this machine is, what it can use, and what is wrong."""

from __future__ import annotations

import typer

from autoquant.cli.options import DeviceOption
from autoquant.cli.output import JsonFlag, print_json, print_table

_NARROWEST = 40


def doctor(
    device: DeviceOption = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Examine this machine for a search, in some seconds and without a model.

    Exit code 0 if a search would work, 2 if not.
    """
    from autoquant.models import resolve_device
    from autoquant.report.tables.doctor import checkup_object, checkup_screen
    from autoquant.tuner.doctor import examine

    checkup = examine(resolve_device(device))
    if as_json:
        print_json(checkup_object(checkup))
    else:
        print_table(lambda _width: checkup_screen(checkup), narrowest=_NARROWEST)
    if not checkup.works:
        raise typer.Exit(2)
