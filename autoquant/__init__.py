"""Find by measurement how to store and compute each linear of a PyTorch model on this device.

>>> study = autoquant.search("model/", eval_text="text.txt")
>>> study.pareto()
>>> model = autoquant.apply(study.best(max_ppl_increase=0.01), model)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from autoquant.delivery.integrations import on_import
from autoquant.logs import levels_kept, quiet_libraries

if TYPE_CHECKING:
    from autoquant.candidates import Format, Kernel, register
    from autoquant.delivery.in_memory import apply, save
    from autoquant.delivery.on_disk import load
    from autoquant.delivery.qat import finish_qat, prepare_qat
    from autoquant.errors import AutoquantError
    from autoquant.records import Phase, Plan, Workload
    from autoquant.runtime.modules import compile
    from autoquant.runtime.prepare import prepare
    from autoquant.study.study import Study
    from autoquant.tuner.driver import search
    from autoquant.tuner.exporting import export
    from autoquant.tuner.profile import profile

__all__ = [
    "AutoquantError",
    "Format",
    "Kernel",
    "Phase",
    "Plan",
    "Study",
    "Workload",
    "apply",
    "compile",
    "export",
    "finish_qat",
    "load",
    "prepare",
    "prepare_qat",
    "profile",
    "register",
    "save",
    "search",
]

_HOMES = {
    "AutoquantError": "autoquant.errors",
    "Format": "autoquant.candidates",
    "Kernel": "autoquant.candidates",
    "Phase": "autoquant.records",
    "Plan": "autoquant.records",
    "Study": "autoquant.study.study",
    "Workload": "autoquant.records",
    "apply": "autoquant.delivery.in_memory",
    "compile": "autoquant.runtime.modules",
    "export": "autoquant.tuner.exporting",
    "finish_qat": "autoquant.delivery.qat",
    "load": "autoquant.delivery.on_disk",
    "prepare": "autoquant.runtime.prepare",
    "prepare_qat": "autoquant.delivery.qat",
    "profile": "autoquant.tuner.profile",
    "register": "autoquant.candidates",
    "save": "autoquant.delivery.in_memory",
    "search": "autoquant.tuner.driver",
}


# From now on, transformers' from_pretrained knows the folders that `autoquant apply` writes.
on_import.register()
quiet_libraries()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `autoquant --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'autoquant' has no attribute {name!r}")
    with levels_kept():
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
