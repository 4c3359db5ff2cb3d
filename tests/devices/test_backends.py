"""One file for each kind of device.

How it is found, what it says, and how another kind is added.
"""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from autoquant import devices
from autoquant.candidates import A16, Candidate, Format, Kernel
from autoquant.candidates.kernels.caches import kernels_kept
from autoquant.devices import BACKENDS, Backend, backend, cuda
from autoquant.devices.cuda import CudaBackend
from autoquant.devices.effort import TimingEffort, timing_effort, timing_effort_of
from autoquant.devices.mps import MpsBackend
from autoquant.errors import DeviceError
from autoquant.models import resolve_device, resolve_dtype
from autoquant.profiler.roofline import measure_roofline
from autoquant.profiler.timing import compare
from autoquant.records import Device, LinearShape
from autoquant.runtime.attribution import attribute
from autoquant.runtime.request import time_in_turn
from autoquant.tuner.workers.start import start_runner

SMALL = TimingEffort(
    largest_copy_bytes=1 << 20, largest_product=32, linear_rounds=4, sample_s=1e-4, request_rounds=3
)


class Quiet:
    def share(self):
        return 0.0


class MetaBackend(Backend):
    """A kind of device that this project does not know: all that one has to write."""

    type = "meta"
    arithmetic = ("bfloat16", "float32")
    waits = 0

    @classmethod
    def count(cls):
        return 2

    @classmethod
    def missing_reason(cls):
        return "PyTorch sees no meta device here"

    def fingerprint(self):
        return Device(
            type="meta", name="nothing", capability="1", threads=0, cache_bytes=1 << 20, versions={}
        )

    def float16(self):
        return torch.float16

    def synchronize(self):
        type(self).waits += 1

    def watch_load(self):
        return Quiet()


@pytest.fixture
def meta(monkeypatch):
    """The new kind, registered; PyTorch has tensors for it, which hold nothing."""
    monkeypatch.setattr(devices, "BACKENDS", (MetaBackend, *BACKENDS))
    monkeypatch.setattr("autoquant.models.targets.BACKENDS", (MetaBackend, *BACKENDS))
    monkeypatch.setattr(MetaBackend, "waits", 0)


def test_a_new_kind_of_device_is_named_by_users(meta):
    assert resolve_device("auto") == "meta" and resolve_device("meta:1") == "meta:1"
    with pytest.raises(DeviceError, match=r"there is no meta:2: PyTorch sees 2 META device\(s\)"):
        resolve_device("meta:2")
    assert resolve_dtype("fast16", "meta", torch.float32) == torch.float16


def test_a_new_kind_of_device_has_a_roofline(meta):
    found = measure_roofline("meta", effort=SMALL)
    assert set(found.flops_per_s) == {"bfloat16", "float32"} and MetaBackend.waits > 0


def test_linears_are_timed_on_a_new_kind_of_device(meta, monkeypatch):
    kernel = Kernel(id="own", numerics=A16, linear=torch.nn.functional.linear)
    fmt = Format(
        id="own/plain",
        quantize=lambda w: w.clone(),
        dequantize=lambda s: s.float(),
        kernels=(kernel,),
    )
    monkeypatch.setattr(torch, "Generator", lambda _device="cpu": _Seeded())
    monkeypatch.setattr(
        torch, "randn", lambda *size, generator, device: torch.ones(size, device=device)
    )
    monkeypatch.setattr(torch.Tensor, "item", lambda _tensor: 0.0)  # nothing to compare
    shape = LinearShape(n=8, k=8, bias=False, dtype="float32")
    arena = SimpleNamespace(
        device="meta",
        bytes=torch.empty(64, dtype=torch.uint8),
        views=lambda tensors, _most: [list(tensors)],
    )
    (found,) = compare(
        shape, 1, [Candidate(fmt, kernel)], arena=arena, compiled=False, effort=SMALL
    )
    assert found.outcome == "ok" and len(found.samples_us) == 4, found.reason


class _Seeded:
    def manual_seed(self, _seed):
        return self


class Phases:
    """One phase that waits for nothing."""

    workload = SimpleNamespace(phases=[SimpleNamespace(name="prefill")])

    def reset(self, phase):
        pass

    def run(self, phase):
        pass

    def limit(self, phase):
        return 100


def test_models_are_timed_on_a_new_kind_of_device(meta):
    times, note = time_in_turn([Phases(), Phases()], "meta", SMALL)
    assert len(times) == 2 and note == "" and MetaBackend.waits > 0


def test_what_a_new_kind_of_device_does_not_promise_is_not_asked_of_it(meta):
    with kernels_kept("meta"):  # nothing to keep
        pass
    with pytest.raises(DeviceError, match="does not see the kernels of meta"):
        attribute(None, None, {}, "meta")
    step = torch.neg
    assert backend("meta").graphed(step, list) is step
    told = []
    start_runner(SimpleNamespace(device="meta"), [], told.append)
    assert "a process that uses meta cannot be forked" in told[0].text


@pytest.mark.parametrize("kind", [each.type for each in BACKENDS])
def test_a_backend_is_found_by_any_name_of_its_device(kind):
    assert (
        backend(kind).type == backend(f"{kind}:0").type == backend(torch.device(kind)).type == kind
    )
    assert backend(f"{kind}:0").device == f"{kind}:0"


def test_a_kind_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(
        DeviceError, match=r"^xpu devices are not supported: use one of cuda, mps, cpu$"
    ):
        backend("xpu")


@pytest.fixture
def libraries(monkeypatch):
    monkeypatch.setattr("autoquant.devices.base.version", lambda name: f"{name}-1")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")


def test_a_gpu_of_nvidia_keeps_its_key(libraries, monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = CudaBackend("cuda:1").fingerprint()
    libraries = {name: f"{name}-1" for name in ("torchao", "triton", "gemlite", "mslk-cuda")}
    assert found == Device(
        type="cuda",
        name="NVIDIA H200",
        capability="sm_90",
        threads=0,
        cache_bytes=50 << 20,
        versions={"torch": "2.11.0+cu130", **libraries, "cuda": "13.0"},
    )
    assert found.key == KEY


KEY = "9e3d41aa270c"


@pytest.fixture
def smi(libraries, monkeypatch):
    """A GPU, and what nvidia-smi says of it: a test may change that."""
    told = {name: "1" for name in cuda._ASKED} | {"driver_version": "580.65"}
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, L2_cache_size=50 << 20, uuid="12ab"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)

    def run(command, **_options):
        assert command[:2] == ["nvidia-smi", "--id=GPU-12ab"]
        return SimpleNamespace(stdout=", ".join(told.values()) + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    cuda._nvidia_smi.cache_clear()
    yield told
    cuda._nvidia_smi.cache_clear()


def test_another_driver_or_power_limit_is_another_key(smi):
    gpu = CudaBackend("cuda")
    first = gpu.fingerprint()
    assert first.versions["driver"] == "580.65" and "power limit" not in first.versions
    assert gpu.concerns() == {}
    smi["driver_version"] = "590.1"
    cuda._nvidia_smi.cache_clear()  # as in another process
    second = gpu.fingerprint()
    smi["power.limit"] = "400.00 W"
    cuda._nvidia_smi.cache_clear()
    third = gpu.fingerprint()
    assert third.versions["power limit"] == "400.00 W" and len(gpu.concerns()) == 1
    assert len({first.key, second.key, third.key}) == 3


def test_a_gpu_without_nvidia_smi_says_that_drivers_are_not_told_apart(smi, monkeypatch):
    def absent(*_arguments, **_options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", absent)
    gpu = CudaBackend("cuda")
    assert "driver" not in gpu.fingerprint().versions
    assert "nvidia-smi does not report" in next(iter(gpu.concerns()))


@pytest.fixture
def mac(libraries, monkeypatch):
    """A Mac: what the system says of itself."""
    says = {"machdep.cpu.brand_string": "Apple M3 Max", "hw.memsize": str(64 << 30)}

    def run(command, **_options):
        return SimpleNamespace(stdout=says[command[-1]] + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(MpsBackend, "compile_failure", lambda _backend: None)
    return says


def test_two_macs_have_two_keys(mac):
    found = MpsBackend("mps").fingerprint()
    assert (found.type, found.name, found.threads) == ("mps", "Apple M3 Max (64 GB)", 0)
    assert torch.backends.cpu.get_cpu_capability() not in found.capability
    assert found.versions["macos"] == "15.1" and "compiler" not in found.versions
    mac["hw.memsize"] = str(36 << 30)
    assert MpsBackend("mps").fingerprint().key != found.key
    mac["machdep.cpu.brand_string"] = "Apple M2"
    assert "M2" in MpsBackend("mps").fingerprint().name


def test_a_mac_that_cannot_compile_has_another_key(mac, monkeypatch):
    before = MpsBackend("mps").fingerprint()
    monkeypatch.setattr(MpsBackend, "compile_failure", lambda _backend: "no compiler")
    after = MpsBackend("mps").fingerprint()
    assert after.versions["compiler"] == "none" and after.key != before.key


def test_the_effort_of_a_process_is_given_back():
    before = timing_effort()
    with pytest.raises(RuntimeError), timing_effort_of(SMALL):
        assert timing_effort() is SMALL
        raise RuntimeError("stopped")
    assert timing_effort() is before == TimingEffort()


def test_the_compiler_of_a_gpu_is_started_ahead_where_candidates_are_prepared(monkeypatch):
    started = []
    monkeypatch.setattr(
        "torch._inductor.async_compile.AsyncCompile.use_process_pool",
        classmethod(lambda _cls: started.append(True)),
    )
    backend("cpu").warm_compiler()
    monkeypatch.setattr(CudaBackend, "prepares", False)
    CudaBackend("cuda").warm_compiler()
    assert not started
    monkeypatch.setattr(CudaBackend, "prepares", True)
    CudaBackend("cuda").warm_compiler()
    assert started == [True]
