"""Export a plan: apply it in memory, write it as a folder, and load it through transformers.

The room itself can be called: `autoquant.export(study, DIR, to=TARGET)` is
`autoquant.export.exporting.export`.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        from autoquant.export.exporting import export

        return export(*args, **options)


sys.modules[__name__].__class__ = _Room
