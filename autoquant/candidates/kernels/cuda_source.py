"""The project's own CUDA kernels, compiled by PyTorch's compiler library on first use.

The machine code is kept in the cache folder, so that a machine compiles each kernel once.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import torch

from autoquant.cache import kept
from autoquant.devices.gpu import needs_cuda, needs_library
from autoquant.errors import CandidateError
from autoquant.records import content_key

_MOST_ARGUMENTS = 16


def cuda_source_unsupported(
    device_type: str, what: str, capability: tuple[int, int] = (8, 0)
) -> str | None:
    """Return why one of the project's own kernels does not run on the current device."""
    return needs_cuda(device_type, what, capability) or needs_library(
        "cuda.bindings", "cuda-bindings"
    )


class CudaKernel:
    """One kernel of a source file, loaded on a device.

    Args:
        file: Name of a file in this folder, which may include the headers (`.cuh`) there.
        name: Name of the kernel, declared `extern "C"`.
        defines: Macros of the source, with their values.

    Raises:
        CandidateError: It does not compile, or the driver does not take it.
    """

    def __init__(
        self, file: str, name: str, defines: Sequence[tuple[str, int]], device: torch.device
    ) -> None:
        from cuda.bindings import driver

        source = "".join(f"#define {key} {value}\n" for key, value in defines)
        source += files("autoquant.candidates.kernels").joinpath(file).read_text()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # PyTorch's context is the current one from here on
            self._device = torch.cuda.current_device()
            module = _checked(
                driver.cuModuleLoadData(binary_of(source, file, torch.cuda.get_device_capability()))
            )
            self._function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        self._start = driver.cuLaunchKernel
        self._slots = _Slots()

    def launch(
        self, blocks: int, threads: int, *arguments: torch.Tensor | int | None, high: int = 1
    ) -> None:
        """Launch on the current stream of the kernel's device; None is a null pointer.

        This runs for every product of eager code, so it does nothing twice.

        Args:
            high: The grid has as many rows of `blocks` blocks.
        """
        slots = self._slots
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments]
        slots.values[: len(values)] = values
        if torch.cuda.current_device() == self._device:
            self._launch(blocks, high, threads, slots.address)
        else:
            with torch.cuda.device(self._device):
                self._launch(blocks, high, threads, slots.address)

    def _launch(self, blocks: int, high: int, threads: int, address: int) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        _checked(self._start(self._function, blocks, high, 1, threads, 1, 1, 0, stream, address, 0))


class _Slots(threading.local):
    """Memory for the arguments of a launch, for each thread.

    Attributes:
        values: Each argument in eight bytes. The driver reads as many of them as the argument has.
        address: Of the pointers to them, as `cuLaunchKernel` takes them.
    """

    def __init__(self) -> None:
        self.values: Any = (ctypes.c_int64 * _MOST_ARGUMENTS)()
        start, size = ctypes.addressof(self.values), ctypes.sizeof(ctypes.c_int64)
        self._pointers = (ctypes.c_void_p * _MOST_ARGUMENTS)(
            *(start + size * i for i in range(_MOST_ARGUMENTS))
        )
        self.address = ctypes.addressof(self._pointers)


@functools.cache
def cuda_kernel(
    file: str, name: str, defines: tuple[tuple[str, int], ...], device: torch.device
) -> CudaKernel:
    """Return the kernel, loaded once in a process."""
    return CudaKernel(file, name, defines, device)


def binary_of(source: str, file: str, capability: tuple[int, int]) -> bytes:
    """Return the machine code of a source file, which is compiled once on a machine."""
    folder = files("autoquant.candidates.kernels")
    entries = [entry for entry in folder.iterdir() if entry.name.endswith(".cuh")]
    # Sorted, since the key below must not depend on the order of a folder.
    entries.sort(key=lambda entry: entry.name)
    headers = {entry.name: entry.read_text() for entry in entries}
    major, minor = capability
    options = [f"--gpu-architecture=sm_{major}{minor}"]
    key = content_key([source, headers, options, _compiler_version()], length=32)
    return kept("cubin", key, lambda: _compile(source, file, headers, options))


def _compiler_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return int(major), int(minor)


def _compile(source: str, file: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
    from cuda.bindings import nvrtc

    texts = [text.encode() for text in headers.values()]
    names = [name.encode() for name in headers]
    program = _checked(
        nvrtc.nvrtcCreateProgram(source.encode(), file.encode(), len(headers), texts, names)
    )
    (failed,) = nvrtc.nvrtcCompileProgram(
        program, len(options), [option.encode() for option in options]
    )
    if int(failed):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise CandidateError(f"{file} does not compile: {log.decode(errors='replace').strip()}")
    binary: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return binary


def _checked(result: tuple[Any, ...]) -> Any:
    """Return the result of a call of the CUDA library, or raise its error."""
    error, *given = result
    if int(error):
        raise CandidateError(f"CUDA refused a kernel of the project's own: {error!r}")
    return given[0] if given else None
