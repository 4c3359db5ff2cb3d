"""What is found on a machine that is fine, and on one that is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from autoquant.candidates import survey
from autoquant.devices.cpu import CpuBackend
from autoquant.tuner import doctor
from autoquant.tuner.doctor import examine


class Watch:
    def share(self):
        return SHARES[0]


SHARES = [0.0]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """A quiet machine that compiles, and a short look at its clock."""
    SHARES[:] = [0.0]
    monkeypatch.setattr(CpuBackend, "watch_load", lambda _backend: Watch())
    monkeypatch.setattr(CpuBackend, "compile_failure", lambda _backend: None)
    monkeypatch.setattr(CpuBackend, "concerns", lambda _backend: {})
    monkeypatch.setattr(doctor, "failure_of_the_compiler", lambda _device: None)
    monkeypatch.setattr(doctor, "_CLOCK_S", 0.05)
    monkeypatch.setattr(doctor, "_SAMPLE_S", 1e-4)
    monkeypatch.setattr(doctor, "_UNSTEADY", 1e9)
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def whats(checkup):
    return [problem.what for problem in checkup.problems]


def test_a_machine_that_is_fine_works_and_has_no_problem():
    found = examine("cpu")
    assert found.works and whats(found) == []
    assert "cores usable" in found.facts["device"] and "torch" in found.facts["versions"]
    assert found.facts["key"].startswith(CpuBackend("cpu").fingerprint().key)
    assert "int8pack-mm" in found.usable["int8-row"] and "int4-g32-hqq" not in found.usable
    (reason,) = [why for why, names in found.unusable.items() if "int4-g32/tiled/rows" in names]
    assert "needs a CUDA GPU" in reason
    assert found.clock.spread >= 0 and found.clock.slowest >= 1


def test_a_machine_on_which_nothing_compiles_works_with_a_remedy(monkeypatch):
    monkeypatch.setattr(CpuBackend, "compile_failure", lambda _backend: "g++ not found")
    (problem,) = examine("cpu").problems
    assert problem.what == "torch.compile does not work: g++ not found" and not problem.stops
    assert "install g++" in problem.remedy


def test_a_compiler_that_hangs_is_left_alone(monkeypatch):
    gate = doctor.threading.Event()
    monkeypatch.setattr(CpuBackend, "compile_failure", lambda _backend: gate.wait(30) and None)
    monkeypatch.setattr(doctor, "_COMPILE_LIMIT_S", 0.05)
    found = examine("cpu")
    assert whats(found)[0].startswith("torch.compile did not end within")
    assert found.facts["key"] == "not known before torch.compile ends"
    gate.set()


@pytest.mark.parametrize(
    ("here", "what"), [("2.1.0", "torch is 2.1.0"), (None, "torch is missing")]
)
def test_a_wrong_or_missing_library_stops_a_search(monkeypatch, here, what):
    def version(name):
        if name == "torch" and here is None:
            raise doctor.PackageNotFoundError
        return here if name == "torch" else real(name)

    real = doctor.version
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "_versions", dict)
    found = examine("cpu")
    assert whats(found) == [what] and not found.works
    assert found.problems[0].remedy.startswith('pip install "torch>=')


def test_a_folder_that_cannot_be_written_stops_a_search(tmp_path, monkeypatch):
    folder = tmp_path / "sealed"
    folder.mkdir(mode=0o555)
    monkeypatch.chdir(folder)
    found = examine("cpu")
    assert whats(found) == [f"{folder} cannot be written"] and not found.works


def test_little_room_and_memory_are_told(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1 << 29))
    monkeypatch.setattr(doctor, "available_bytes", lambda: 1 << 28)
    found = examine("cpu")
    assert any("only 0.5 GiB are free" in what for what in whats(found)) and found.works
    assert "less than 1 GiB of memory is free" in whats(found)


def test_an_unsteady_clock_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "_UNSTEADY", -1)
    (unsteady,) = whats(examine("cpu"))
    assert unsteady.startswith("the clock is unsteady")


def test_a_busy_machine_is_told_and_its_clock_is_not_blamed(monkeypatch):
    SHARES[:] = [0.6]
    monkeypatch.setattr(doctor, "_UNSTEADY", -1)
    (busy,) = whats(examine("cpu"))
    assert busy == "measured while others used 60% of the machine"


def test_a_machine_without_a_kernel_stops_a_search(monkeypatch):
    monkeypatch.setattr(doctor, "survey", lambda _type: [])
    assert not examine("cpu").works


def test_a_machine_that_can_only_leave_models_unquantized_stops_a_search(monkeypatch):
    floats = [each for each in survey("cpu") if each.format in ("bfloat16/plain", "float16/plain")]
    monkeypatch.setattr(doctor, "survey", lambda _type: floats)
    (problem,) = examine("cpu").problems
    assert problem.stops and "no format but the unquantized ones" in problem.what
