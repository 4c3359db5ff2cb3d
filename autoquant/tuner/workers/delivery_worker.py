"""The new process of `tuner.deliver`, run by `child.py` with the number of a socket.

It is not forked, so it starts without the search's memory and can use a GPU. It is started before
there is a plan, and imports what it will need. It ends when the search does.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection

import torch

from autoquant.devices import backend
from autoquant.devices.effort import use_timing_effort
from autoquant.tuner.deliver import DeliverySpec, load_and_deliver
from autoquant.tuner.workers.forking import receive, send
from autoquant.tuner.workers.worker import portable


def main() -> None:
    """Answer (True, delivery), or (False, the error)."""
    connection = Connection(int(sys.argv[1]))
    sys.path[:], device = receive(connection)
    import_ahead()
    backend(device).warm_compiler()
    spec: DeliverySpec = receive(connection)
    torch.set_num_threads(spec.threads)
    use_timing_effort(spec.effort)
    try:
        send(connection, (True, load_and_deliver(spec, spec.model.load, "new process")))
    except Exception as error:  # noqa: BLE001 - raised again on the other side
        send(connection, (False, portable(error)))


def import_ahead() -> None:
    """Import what loading and compiling a model takes. No GPU is used by that."""
    for name in ("transformers.generation", "torchao.quantization", "torch._inductor.compile_fx"):
        with suppress(ImportError):
            import_module(name)


if __name__ == "__main__":
    main()
