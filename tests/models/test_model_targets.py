import pytest
import torch

from autoquant.errors import DeviceError, WorkloadError
from autoquant.models import dtype_name, resolve_device, resolve_dtype


def _devices(monkeypatch, *, cuda=0, mps=False, capability=(8, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")],
    ids=["cuda", "mps", "cpu"],
)
def test_auto_takes_cuda_then_mps_then_cpu(monkeypatch, cuda, mps, expected):
    _devices(monkeypatch, cuda=cuda, mps=mps)
    assert resolve_device("auto") == expected


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_there_is_refused_with_advice(monkeypatch, refusal, name):
    _devices(monkeypatch)
    assert "--device cpu" in refusal(DeviceError, resolve_device, name)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda0", "", "CPU"])
def test_an_unknown_device_name_is_refused_with_the_known_ones(refusal, name):
    assert "cuda:INDEX" in refusal(DeviceError, resolve_device, name)


def test_a_cuda_index_beyond_the_last_device_is_refused(monkeypatch, refusal):
    _devices(monkeypatch, cuda=2)
    assert resolve_device("cuda:1") == "cuda:1"
    assert "2 CUDA device" in refusal(DeviceError, resolve_device, "cuda:2")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_dtype_is_the_stored_one(stored):
    assert resolve_dtype("auto", "cpu", stored) is stored


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp32", torch.float32),
        ("float32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("float16", torch.float16),
    ],
)
def test_both_spellings_of_a_dtype_are_known(name, expected):
    assert resolve_dtype(name, "cpu", torch.float64) is expected


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("cpu", (0, 0), torch.bfloat16),
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda:1", (9, 0), torch.bfloat16),
        ("cuda", (7, 5), torch.float16),
    ],
)
def test_fast16_is_the_16_bit_float_the_device_computes_in(
    monkeypatch, device, capability, expected
):
    _devices(monkeypatch, cuda=2, capability=capability)
    assert resolve_dtype("fast16", device, torch.float32) is expected


@pytest.mark.parametrize(("macos14", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_fast16_on_mps_depends_on_bfloat16_support(monkeypatch, macos14, expected):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos14)
    assert resolve_dtype("fast16", "mps", torch.float32) is expected


def test_an_unknown_dtype_is_refused_with_the_known_ones(refusal):
    assert "fast16" in refusal(WorkloadError, resolve_dtype, "int3", "cpu", torch.float32)


def test_a_dtype_is_named_without_its_prefix():
    assert dtype_name(torch.bfloat16) == "bfloat16"
