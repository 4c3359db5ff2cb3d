"""The process that loads a plan as its user will: started ahead, since its imports take long."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing.connection import Connection
from typing import Any

from autoquant.errors import HungError, ProcessDiedError
from autoquant.tuner.workers.forking import end_process, receive, send, start_process

WORKER = "autoquant.tuner.workers.delivery_worker"
_LONGEST_ENDING_S = 10
_LONGEST_S = 3600


class DeliveryProcess:
    """Runs one delivery in a process of its own, which is then ended; the next gets another."""

    def __init__(self) -> None:
        self._started: tuple[subprocess.Popen[bytes], Connection] | None = None

    def start(self, device: str) -> None:
        """Start the process, unless it waits already. It gets ready for the device, and waits."""
        if self._started is None:
            self._started = start_process(WORKER)
            send(self._started[1], (sys.path, device))

    def run(self, spec: Any) -> Any:
        """Return the delivery of a `DeliverySpec`.

        Raises:
            HungError: It did not end.
            ProcessDiedError: It was ended, by what it loaded or from outside.
        """
        self.start(spec.usage.device)
        assert self._started is not None
        process, connection = self._started
        try:
            send(connection, spec)
            if not connection.poll(_LONGEST_S):
                raise HungError(f"running it as its user will did not end in {_LONGEST_S} s")
            succeeded, value = receive(connection)
        except (EOFError, ConnectionError):
            process.wait(_LONGEST_ENDING_S)
            raise ProcessDiedError(
                f"the process that loaded it was ended (exit code {process.returncode})"
            ) from None
        finally:
            self.close()
        if not succeeded:
            raise value
        return value

    def close(self) -> None:
        """End the process, if there is one."""
        if self._started is not None:
            end_process(*self._started)
            self._started = None
