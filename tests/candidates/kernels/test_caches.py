"""Compiled and tuned kernels, kept from one process to the next."""

import os
from contextlib import contextmanager

import pytest
import torch.nn.functional as F

from autoquant.candidates import A16, Format, Kernel, registry
from autoquant.candidates.kernels.caches import kernels_kept, tuning_folder, untuned
from autoquant.candidates.kernels.library import TunedLibrary
from autoquant.devices.cuda import CudaBackend
from autoquant.records import Device

GPU = Device(
    type="cuda",
    name="a GPU",
    capability="sm_90",
    threads=0,
    cache_bytes=1 << 20,
    versions={"torch": "2"},
)
VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class Library(TunedLibrary):
    """Notes what it is asked for."""

    def __init__(self, calls):
        self._calls = calls
        self.missing = None

    def missing_reason(self):
        return self.missing

    def load(self, folder):
        self._calls.append(("load", folder))

    def save(self, folder):
        self._calls.append(("save", folder))

    def tune_briefly(self):
        self._calls.append(("briefly",))

    def tune_alone(self, threads):
        self._calls.append(("tune", threads))

    @contextmanager
    def untuned(self, *, timed):
        self._calls.append(("timed" if timed else "untuned",))
        yield


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What the library that tunes is asked for, in order."""
    found = []
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path))
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(CudaBackend, "fingerprint", lambda _backend: GPU)
    kernel = Kernel(id="own", numerics=A16, linear=F.linear, library=Library(found))
    own = Format(id="own/plain", quantize=lambda w: w, dequantize=lambda s: s, kernels=(kernel,))
    monkeypatch.setattr(registry, "_registered", {"own/plain": own})
    yield found
    for variable in VARIABLES:
        os.environ.pop(variable, None)


def test_what_was_tuned_on_a_gpu_is_taken_from_its_folder_and_what_is_new_kept_there(calls):
    folder = tuning_folder(GPU)
    with pytest.raises(RuntimeError), kernels_kept("cuda"):
        calls.append("compile")
        raise RuntimeError("the compiler gave up")  # what was tuned until then is kept all the same
    assert calls == [("load", folder), ("tune", os.cpu_count()), "compile", ("save", folder)]
    assert all(
        os.environ[variable].startswith(os.environ["AUTOQUANT_CACHE"]) for variable in VARIABLES
    )


def test_a_cpu_has_no_kernels_to_keep(calls):
    with kernels_kept("cpu"):
        pass
    assert calls == [] and not any(variable in os.environ for variable in VARIABLES)


def test_a_library_is_left_untuned_where_that_is_asked_for(calls):
    with untuned():
        assert calls == [("untuned",)]


def test_a_library_that_is_not_installed_is_asked_for_nothing(calls, monkeypatch):
    monkeypatch.setattr(Library, "missing_reason", lambda _library: "needs own: pip install own")
    with kernels_kept("cuda"), untuned():
        pass
    assert calls == []
