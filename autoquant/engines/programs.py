"""Exports that hold the plan's own programs, and so every format, route and kernel that packs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramForm:
    """One way to keep programs in files.

    Attributes:
        name: As `--to` takes it.
        reader: What runs them.
        compiled: They are machine code, made ahead of time by the compiler of PyTorch.
    """

    name: str
    reader: str
    compiled: bool


AOTI = ProgramForm(name="aoti", reader="PyTorch, from Python and C++", compiled=True)
"""AOTInductor's package. Source: PyTorch 2.13, `torch/_inductor/package`."""

PT2 = ProgramForm(name="pt2", reader="torch.export.load", compiled=False)
"""Exported programs. Source: PyTorch 2.13, `torch/export`."""

PROGRAMS: Mapping[str, ProgramForm] = {form.name: form for form in (AOTI, PT2)}
"""All forms by name."""
