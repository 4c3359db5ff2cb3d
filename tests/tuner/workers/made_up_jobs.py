"""Jobs that do what a test wants to see, in whichever process they run."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import ClassVar

import torch


class OddError(Exception):
    """Cannot be sent: it wants two arguments and remembers one."""

    def __init__(self, first, second):
        super().__init__(first)


@dataclass(frozen=True)
class Count:
    """Tells 0, 1, ... and gives the number of the process and of its threads."""

    until: int
    needs_model: ClassVar[bool] = False
    keeps_process: ClassVar[bool] = False
    silence_s: ClassVar[float | None] = None

    def run(self, bench, tell):
        for number in range(self.until):
            tell(number)
        return os.getpid(), torch.get_num_threads()


@dataclass(frozen=True)
class Stay:
    """Gives the number of the process, which it keeps if nothing else is to come of it."""

    then: str = ""
    needs_model: ClassVar[bool] = False
    keeps_process: ClassVar[bool] = True
    silence_s: ClassVar[float | None] = None

    def run(self, bench, tell):
        if self.then == "crash":
            os._exit(3)
        if self.then == "fail":
            raise ValueError("no luck")
        return os.getpid()


@dataclass(frozen=True)
class Fail:
    error: str
    needs_model: ClassVar[bool] = False
    keeps_process: ClassVar[bool] = False
    silence_s: ClassVar[float | None] = None

    def run(self, bench, tell):
        raise ValueError(self.error) if self.error else OddError(1, 2)


@dataclass(frozen=True)
class Crash:
    """Ends its process by a signal, or by an exit code where `number` is negative; tells a large message before."""

    number: int
    needs_model: ClassVar[bool] = False
    keeps_process: ClassVar[bool] = False
    silence_s: ClassVar[float | None] = None

    def run(self, bench, tell):
        tell(b"x" * 100_000)
        os.kill(os.getpid(), self.number) if self.number > 0 else os._exit(-self.number)


@dataclass(frozen=True)
class Fill:
    """Fills so much memory, and computes with several threads."""

    mib: int
    needs_model: ClassVar[bool] = False
    keeps_process: ClassVar[bool] = False
    silence_s: ClassVar[float | None] = None

    def run(self, bench, tell):
        memory = torch.ones(self.mib << 18)
        return (
            (memory[: 1 << 20].reshape(1024, 1024) @ memory[: 1 << 20].reshape(1024, 1024))
            .sum()
            .item()
        )


@dataclass(frozen=True)
class Sleep:
    """Tells its process and does nothing for so long."""

    seconds: float = 60.0
    needs_model: ClassVar[bool] = False
    keeps_process: ClassVar[bool] = False
    silence_s: ClassVar[float | None] = None

    def run(self, bench, tell):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tell(os.getpid())
        time.sleep(self.seconds)


@dataclass(frozen=True)
class Hang:
    """Never ends."""

    silence_s: float
    needs_model: ClassVar[bool] = False
    keeps_process: ClassVar[bool] = False

    def run(self, bench, tell):
        tell("begun")
        while True:
            time.sleep(0.1)


@dataclass(frozen=True)
class Devour:
    """Takes ever more memory, 64 MiB at a time, up to 4 GiB."""

    needs_model: ClassVar[bool] = False
    keeps_process: ClassVar[bool] = False
    silence_s: ClassVar[float | None] = None

    def run(self, bench, tell):
        taken = []
        for _ in range(64):
            taken.append(torch.ones(1 << 24))
            time.sleep(0.02)
