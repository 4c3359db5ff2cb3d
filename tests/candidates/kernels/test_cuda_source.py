"""Compiling, keeping and launching the project's own CUDA kernels, with a stand-in for the CUDA
library.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

from autoquant.candidates.calls import is_plain_call
from autoquant.candidates.kernels import cuda_source
from autoquant.candidates.kernels.cuda_source import CudaKernel, binary_of
from autoquant.errors import CandidateError


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """What the compiler was asked for; its version and answer can be changed."""
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path))
    stand_in = SimpleNamespace(calls=[], version=(13, 0))

    def compile_(source, file, headers, options):
        stand_in.calls.append((source, file, sorted(headers), options))
        return f"code of {source} for {options}".encode()

    monkeypatch.setattr(cuda_source, "_compile", compile_)
    monkeypatch.setattr(cuda_source, "_compiler_version", lambda: stand_in.version)
    return stand_in


def test_a_kernel_is_compiled_once_on_a_machine(compiled):
    first, second = (binary_of("source", "a.cu", (9, 0)) for _ in range(2))
    assert first == second == b"code of source for ['--gpu-architecture=sm_90']"
    assert compiled.calls == [("source", "a.cu", ["rows.cuh"], ["--gpu-architecture=sm_90"])]


def test_another_source_device_or_compiler_is_another_code(compiled, monkeypatch):
    binary_of("source", "a.cu", (9, 0))
    binary_of("other", "a.cu", (9, 0))
    binary_of("source", "a.cu", (8, 0))
    compiled.version = (13, 1)
    binary_of("source", "a.cu", (9, 0))
    assert len(compiled.calls) == 4
    monkeypatch.setattr(cuda_source, "files", lambda _: Headers("changed"))
    binary_of("source", "a.cu", (9, 0))
    assert len(compiled.calls) == 5, "a header changed"


class Headers:
    """A package that holds one header."""

    def __init__(self, text):
        self.name, self.read_text = "rows.cuh", lambda: text

    def iterdir(self):
        return [self]


@pytest.fixture
def driver(monkeypatch, compiled):
    """A driver that notes launches.

    Function, grid, block, stream and the eight bytes of each argument.
    """
    stand_in = SimpleNamespace(launches=[], error=0, device=0, devices=[])

    def launch(function, x, y, z, threads, ty, tz, shared, stream, parameters, extra):
        assert (y, z, ty, tz, shared, extra) == (1, 1, 1, 1, 0, 0)
        pointers = (ctypes.c_void_p * 5).from_address(parameters)
        arguments = [ctypes.c_int64.from_address(pointer).value for pointer in pointers]
        stand_in.launches.append((function, x, threads, stream, arguments))
        return (stand_in.error,)

    library = ModuleType("cuda.bindings")
    library.driver = SimpleNamespace(
        cuModuleLoadData=lambda code: (0, ("module", code[:4])),
        cuModuleGetFunction=lambda module, name: (0, (module, name)),
        cuLaunchKernel=launch,
    )
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", library)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: stand_in.devices.append(device) or nullcontext()
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: stand_in.device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False
    )
    return stand_in


@pytest.fixture
def kernel(driver):
    kernel = CudaKernel("float8_rows.cu", "name", (("WARPS", 4),), torch.device("cuda", 0))
    driver.devices.clear()
    return kernel


def test_a_launch_passes_pointers_numbers_and_null(driver, kernel):
    x, y = torch.ones(3), torch.ones(4)
    kernel.launch(7, 64, x, None, y, 5, 2**31 - 1)
    kernel.launch(8, 32, y, x, None, 0, 1)
    function = (("module", b"code"), b"name")
    assert driver.launches == [
        (function, 7, 64, 100, [x.data_ptr(), 0, y.data_ptr(), 5, 2**31 - 1]),
        (function, 8, 32, 100, [y.data_ptr(), x.data_ptr(), 0, 0, 1]),
    ]
    assert driver.devices == [], "the kernel's device is the current one already"


def test_a_launch_is_made_on_the_kernels_device(driver, kernel):
    driver.device = 1
    kernel.launch(7, 64, None, None, None, 0, 0)
    assert driver.devices == [0] and driver.launches[0][3] == 100


def test_threads_do_not_share_the_memory_of_arguments(kernel):
    places = [kernel._slots.address]
    thread = threading.Thread(target=lambda: places.append(kernel._slots.address))
    thread.start()
    thread.join()
    assert len(set(places)) == 2


def test_a_launch_that_the_driver_refuses_is_an_error(driver, kernel):
    driver.error = 1
    with pytest.raises(CandidateError, match="refused"):
        kernel.launch(7, 64, None, None, None, 0, 0)


def test_only_a_call_that_nobody_traces_watches_or_differentiates_is_a_plain_one():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    x, bias = torch.ones(2), torch.nn.Parameter(torch.ones(2), requires_grad=False)
    assert is_plain_call(x) and is_plain_call(x, None) and is_plain_call(x, bias)
    assert not is_plain_call(torch.ones(2, requires_grad=True), None)
    assert not is_plain_call(x, torch.nn.Parameter(torch.ones(2)))
    with FakeTensorMode() as mode:
        assert not is_plain_call(mode.from_tensor(x))
    assert not is_plain_call(mode.from_tensor(x))
    with FlopCounterMode(display=False):
        assert not is_plain_call(x)


def test_compiled_code_never_makes_a_plain_call():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x + 1 if is_plain_call(x) else x - 1, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(torch.ones(2)), torch.zeros(2))
