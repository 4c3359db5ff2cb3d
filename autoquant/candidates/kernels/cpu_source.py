"""The project's own CPU kernels, compiled on first use by the compiler that PyTorch's needs too.

The library is kept in the cache folder, so that a machine compiles it once. It is made for the
instructions of the machine that compiles it. It uses PyTorch's stable interface for extensions, and
PyTorch's threads.
"""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from autoquant.cache import kept
from autoquant.candidates.kernels.operators import declare_operator
from autoquant.devices.cpu import instructions
from autoquant.errors import CandidateError
from autoquant.records import content_key

_OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11, as pyproject.toml says
# Not `-ffast-math`: a library that is linked so rounds the whole process's denormals to 0.
_OPTIONS = "-std=c++20 -O3 -march=native -Wno-psabi -shared -fPIC"
_LONGEST_S = 300
_log = logging.getLogger(__name__)
_warned: set[str] = set()


def cpu_source_unsupported(device_type: str, dtype: str) -> str | None:
    """Return why the project's own CPU kernels do not compute with `dtype` here, or None."""
    if device_type != "cpu":
        return "this kernel of the project's own is for CPUs"
    if dtype not in ("bfloat16", "float32"):
        return f"the project's own CPU kernels take bfloat16 and float32, not {dtype}"
    return load_cpu_kernels()


@functools.cache
def load_cpu_kernels() -> str | None:
    """Give the operators `autoquant::cpu_*` their code, and `token_attention` the one for CPUs.

    Returns:
        Why that is impossible, or None. The answer stays the same in a process.
    """
    try:
        # Loading needs a file. It may be removed at once.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "autoquant_cpu.so"
            path.write_bytes(_binary())
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except (CandidateError, OSError) as error:
        return str(error)
    return None


def cpu_operator(
    name: str, schema: str, fake: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Return the operator `autoquant::NAME` of the kernels' source.

    It can be called if `cpu_kernels_work`.

    Args:
        schema: Its arguments, as PyTorch writes them.
        fake: Returns an empty result of the right shape and dtype.
    """

    def loading(*arguments: Any) -> torch.Tensor:
        load_cpu_kernels()  # what is traced may be called by code that does not know this module
        return fake(*arguments)

    return declare_operator(name, f"({schema}) -> Tensor", loading)


@functools.cache
def tiles_missing() -> str | None:
    """Return why the CPU's matrix instructions cannot be used, or None.

    Programs must ask the system for them first, which this does.
    """
    has = "amx_bf16" in instructions().split() and torch.cpu._init_amx()
    return None if has else "it needs a CPU with matrix instructions for bfloat16 (AMX)"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cpu_tiles_work() -> bool:
    """Check that the kernels that use matrix instructions can be called."""
    return tiles_missing() is None and cpu_kernels_work()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cpu_kernels_work() -> bool:
    """Check that the kernels are compiled and loaded; warn once if they cannot be."""
    reason = load_cpu_kernels()
    if reason and reason not in _warned:
        _warned.add(reason)
        _log.warning("slower library kernels stand in for the project's own: %s", reason)
    return reason is None


def compiled_with(more: Mapping[str, str]) -> bytes:
    """Return the library with more source files, by name, for processes without this package.

    Raises:
        CandidateError: They do not compile.
    """
    return _binary({**_sources(), **more})


def _binary(sources: Mapping[str, str] | None = None) -> bytes:
    sources, command = sources or _sources(), _command()
    made_for = [sources, command, _version(command[0]), torch.__version__, instructions()]
    key = content_key(made_for, length=32)
    return kept("cpu", key, lambda: _compile(sources, command))


def _sources() -> dict[str, str]:
    """Return the kernels' files by name, in an order that does not depend on the folder's."""
    entries = files("autoquant.candidates.kernels").iterdir()
    names = sorted(entry.name for entry in entries if entry.name.endswith((".cpp", ".h")))
    folder = files("autoquant.candidates.kernels")
    return {name: folder.joinpath(name).read_text() for name in names}


def _command() -> list[str]:
    root = Path(torch.__file__).parent
    include = root / "include"
    folders = [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{root / 'lib'}"]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    return [os.environ.get("CXX", "g++"), *_OPTIONS.split(), _OLDEST_TORCH, *folders, *libraries]


def _version(compiler: str) -> str:
    return _output([compiler, "--version"]).splitlines()[0]


def _compile(sources: Mapping[str, str], command: list[str]) -> bytes:
    """Return the library. Its files are compiled at the same time, by a process each."""
    compiler, *options = command
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:
        library = Path(folder) / "library.so"
        for name, text in sources.items():
            (Path(folder) / name).write_text(text)
        units = [Path(folder) / name for name in sources if name.endswith(".cpp")]
        objects = [str(file.with_suffix(".o")) for file in units]
        for _ in threads.map(
            lambda file, made: _output([compiler, "-c", str(file), "-o", made, *options]),
            units,
            objects,
        ):
            pass
        # Objects are named before libraries: a linker takes from these what it needs so far.
        _output([compiler, *objects, "-o", str(library), *options])
        return library.read_bytes()


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S)
    except FileNotFoundError:
        raise CandidateError(
            f"the project's own CPU kernels need the C++ compiler {command[0]}: install it, or "
            "set CXX to another"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CandidateError(f"the C++ compiler {command[0]} failed: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise CandidateError(
            f"the project's own CPU kernels do not compile by {command[0]}: {lines[0].strip()}"
        )
    return done.stdout
