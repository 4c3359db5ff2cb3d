"""The project's own CUDA kernels: compiled when they are first needed, by the compiler library that PyTorch brings along."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch

from autoquant.candidates.gpu import needs_cuda, needs_library
from autoquant.errors import CandidateError


def cuda_source_unsupported(device_type: str, what: str, capability: tuple[int, int] = (8, 0)) -> str | None:
    """Why `what`, a kernel of the project's own, does not run on the current device."""
    return needs_cuda(device_type, what, capability) or needs_library("cuda.bindings", "cuda-bindings")


class CudaKernel:
    """A kernel of a source file on one device.

    Args:
        file: Name of the file beside this one, which may include the headers (`.cuh`) there.
        name: The kernel's, declared `extern "C"`.
        defines: What the source is to be compiled with. If OVERLAP is 1, the kernel starts while the one before it ends, in
            CUDA graphs from compute capability 9.0 on: the source must wait for that one before it touches what others write.

    Raises:
        CandidateError: It does not compile, or the driver does not take it.
    """

    def __init__(self, file: str, name: str, defines: Sequence[tuple[str, int]], device: torch.device) -> None:
        from cuda.bindings import driver

        source = "".join(f"#define {key} {value}\n" for key, value in defines)
        source += files("autoquant.candidates").joinpath(file).read_text()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # PyTorch's context is the current one from here on
            module = _checked(driver.cuModuleLoadData(_compile(source, file, torch.cuda.get_device_capability())))
            self._function = _checked(driver.cuModuleGetFunction(module, name.encode()))
            self._overlaps = dict(defines).get("OVERLAP") == 1 and torch.cuda.get_device_capability() >= (9, 0)

    def launch(self, blocks: int, threads: int, *arguments: torch.Tensor | int | None) -> None:
        """Launch on the current stream of the tensors' device; None is a null pointer."""
        from cuda.bindings import driver

        values = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments)
        types = tuple(ctypes.c_int if isinstance(a, int) else ctypes.c_void_p for a in arguments)
        stream = torch.cuda.current_stream().cuda_stream
        if self._overlaps and torch.cuda.is_current_stream_capturing():
            _launch_overlapping(self._function, blocks, threads, stream, (values, types))
        else:
            _checked(driver.cuLaunchKernel(self._function, blocks, 1, 1, threads, 1, 1, 0, stream, (values, types), 0))


@functools.cache
def cuda_kernel(file: str, name: str, defines: tuple[tuple[str, int], ...], device: torch.device) -> CudaKernel:
    """The kernel, compiled once in a process."""
    return CudaKernel(file, name, defines, device)


def _compile(source: str, file: str, capability: tuple[int, int]) -> bytes:
    from cuda.bindings import nvrtc

    headers = [entry for entry in files("autoquant.candidates").iterdir() if entry.name.endswith(".cuh")]
    texts, names = [header.read_bytes() for header in headers], [header.name.encode() for header in headers]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), file.encode(), len(headers), texts, names))
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode()]
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(failed):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise CandidateError(f"{file} does not compile: {log.decode(errors='replace').strip()}")
    binary: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return binary


def _launch_overlapping(function: Any, blocks: int, threads: int, stream: int, parameters: Any) -> None:
    """Launch a kernel that may start before the one before it has ended (programmatic dependent launch).

    Args:
        parameters: As `cuLaunchKernel` takes them.
    """
    from cuda.bindings import driver

    overlap, config = driver.CUlaunchAttribute(), driver.CUlaunchConfig()
    overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = 1
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.hStream = stream
    config.attrs, config.numAttrs = [overlap], 1
    _checked(driver.cuLaunchKernelEx(config, function, parameters, 0))


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the CUDA library gave."""
    error, *given = result
    if int(error):
        raise CandidateError(f"CUDA refused a kernel of the project's own: {error!r}")
    return given[0] if given else None
