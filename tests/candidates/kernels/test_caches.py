"""Compiled and tuned kernels, kept from one process to the next."""

import os

import pytest

from autoquant.candidates.kernels import caches, gemlite
from autoquant.candidates.kernels.caches import kernels_kept, tuning_folder
from autoquant.records import Device

GPU = Device(type="cuda", name="a GPU", capability="sm_90", threads=0, cache_bytes=1 << 20, versions={"torch": "2"})
VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What the library that tunes is asked for, in order."""
    found = []
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path))
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(caches, "fingerprint", lambda _device: GPU)
    monkeypatch.setattr(gemlite, "load_tuning", lambda folder: found.append(("load", folder)))
    monkeypatch.setattr(gemlite, "tune_alone", lambda threads: found.append(("tune", threads)))
    monkeypatch.setattr(gemlite, "save_tuning", lambda folder: found.append(("save", folder)))
    yield found
    for variable in VARIABLES:
        os.environ.pop(variable, None)


def test_what_was_tuned_on_a_gpu_is_taken_from_its_folder_and_what_is_new_kept_there(calls):
    folder = str(tuning_folder(GPU))
    with pytest.raises(RuntimeError), kernels_kept("cuda"):
        calls.append("compile")
        raise RuntimeError("the compiler gave up")  # what was tuned until then is kept all the same
    assert calls == [("load", folder), ("tune", os.cpu_count()), "compile", ("save", folder)]
    assert all(os.environ[variable].startswith(os.environ["AUTOQUANT_CACHE"]) for variable in VARIABLES)


def test_a_cpu_has_no_kernels_to_keep(calls):
    with kernels_kept("cpu"):
        pass
    assert calls == [] and not any(variable in os.environ for variable in VARIABLES)
