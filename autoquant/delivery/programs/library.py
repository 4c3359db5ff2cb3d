"""The project's own CPU operators as one library, for processes without autoquant."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from autoquant.candidates.kernels.cpu_source import compiled_with
from autoquant.delivery.programs.operators import OWN

LIBRARY = "libautoquant_cpu.so"
"""Name of the file. Python would take `kernels.so` beside a script for a module."""

_DEFINITIONS = """#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT({namespace}, library) {{
{lines}
}}
"""


def library_of(names: Iterable[str]) -> bytes:
    """Return the library of some operators. In a process with autoquant, they are defined already.

    Args:
        names: Such as `autoquant::cpu_int8_rows`.

    Raises:
        CandidateError: The compiler fails.
    """
    lines = "\n".join(f'  library.def("{_schema(name)}");' for name in sorted(names))
    return compiled_with({"definitions.cpp": _DEFINITIONS.format(namespace=OWN, lines=lines)})


def _schema(name: str) -> str:
    operator = name.partition("::")[2]
    schema = str(getattr(getattr(torch.ops, OWN), operator).default._schema)
    return schema.partition("::")[2]
