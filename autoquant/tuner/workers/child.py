"""Run a worker's module in a process that ends with the one that started it.

Run as `python -m autoquant.tuner.workers.child PARENT MODULE FD`. What a worker imports takes
seconds, in which its parent may be killed. So this module binds it to the parent before that.
"""

from __future__ import annotations

import runpy
import sys

from autoquant.processes import die_with


def main() -> None:
    """Bind this process to its parent, and become the worker."""
    _, parent, module, number = sys.argv
    die_with(int(parent))
    sys.argv = [module, number]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
