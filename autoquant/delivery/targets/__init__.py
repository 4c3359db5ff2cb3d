"""What writes an exported plan, one module for each target.

To add a target, write a `Writer` in a module here and name it in `_HOMES`. What the target holds is
a table of `autoquant.engines.targets`.
"""

from __future__ import annotations

from importlib import import_module

from autoquant.delivery.targets.base import EMBEDDINGS, Contents, ExportedLayer, Writer
from autoquant.errors import PlanError

_HOMES = {
    "compressed-tensors": "compressed_tensors",
    "executorch": "executorch_program",
    "gguf": "gguf_writer",
    "modelopt": "modelopt_folder",
    "qat": "qat_folder",
    "transformers": "torchao_folder",
}
"""The module of each target's writer."""


def writer(name: str) -> Writer:
    """Return the writer of a target.

    Raises:
        PlanError: There is no such target, or none that can be written yet.
    """
    from autoquant.engines import target

    target(name)
    if name not in _HOMES:
        raise PlanError(f"nothing writes {name} yet; choose one of {', '.join(_HOMES)}")
    module = import_module(f"{__name__}.{_HOMES[name]}")
    made: Writer = module.WRITER
    return made


__all__ = ["EMBEDDINGS", "Contents", "ExportedLayer", "Writer", "writer"]
