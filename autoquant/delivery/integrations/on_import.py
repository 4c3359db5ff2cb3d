"""Register autoquant's quantizer with transformers, in whichever order the two are imported.

This module imports neither of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"
_QUANTIZER = "autoquant.delivery.integrations.quantizer"  # registers itself when it is imported


def register() -> None:
    """Register the quantizer now if transformers' registry is imported, else when it is."""
    if _REGISTRY in sys.modules:
        import_module(_QUANTIZER)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(MetaPathFinder):
    """Finds the registry through the other finders, and imports the quantizer after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)  # its work is done, and `find_spec` must not come back here
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module(_QUANTIZER)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
