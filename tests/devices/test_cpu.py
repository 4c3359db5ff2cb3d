"""The fingerprint of this machine, and how busy others keep it."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from autoquant.devices import backend, base, cpu, load
from autoquant.devices.cpu import CpuBackend
from autoquant.records import Device

CPU = backend("cpu")
OTHER = {
    "type": "mps",
    "name": "another",
    "capability": "another",
    "threads": 1024,
    "cache_bytes": 1,
    "versions": {"torch": "0.1"},
}


@pytest.fixture
def compiles(monkeypatch):
    """Set what the compiler says; None: it works."""

    def set_failure(reason):
        monkeypatch.setattr(CpuBackend, "compile_failure", lambda _backend: reason)

    set_failure(None)
    return set_failure


def test_the_fingerprint_names_the_cpu_its_threads_and_the_libraries(compiles):
    found = CPU.fingerprint()
    assert (found.type, found.threads) == ("cpu", torch.get_num_threads())
    assert found.name and found.cache_bytes > 0
    assert found.capability.split()[0] == torch.backends.cpu.get_cpu_capability()
    assert found.versions["torch"] == torch.__version__ and "torchao" in found.versions
    assert found.versions["compiler"] not in ("", "none")


def test_the_fingerprint_of_an_unchanged_machine_is_the_same(compiles):
    assert CPU.fingerprint().key == CPU.fingerprint().key


def test_another_thread_count_is_another_key(compiles):
    before, threads = CPU.fingerprint(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        after = CPU.fingerprint()
    finally:
        torch.set_num_threads(threads)
    assert after.threads == threads + 1 and after.key != before.key


def test_a_machine_without_a_compiler_is_another_key(compiles):
    before = CPU.fingerprint()
    compiles("no compiler found")
    after = CPU.fingerprint()
    assert after.versions["compiler"] == "none" and after.key != before.key


def test_another_compiler_is_another_key(compiles, monkeypatch):
    before = CPU.fingerprint()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert CPU.fingerprint().key != before.key


@pytest.mark.parametrize("name", [each.name for each in fields(Device)])
def test_a_change_of_any_field_is_another_key(compiles, name):
    found = CPU.fingerprint()
    changed = replace(found, **{name: OTHER[name]})
    assert changed.key != found.key


def test_a_change_of_any_version_is_another_key(compiles):
    found = CPU.fingerprint()
    keys = {found.key} | {
        replace(found, versions={**found.versions, name: "0.0.1"}).key
        for name in (*found.versions, "triton-cpu")
    }
    assert len(keys) == len(found.versions) + 2


@pytest.fixture
def limited(monkeypatch, tmp_path):
    """A machine whose files about the clock a test writes."""
    monkeypatch.setattr(cpu, "_CPUS", tmp_path)
    monkeypatch.setattr(cpu, "cpu_quota", lambda: None)

    def write(**texts):
        for name, text in texts.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    write(cpu0__cpufreq__cpuinfo_max_freq=3500000, cpu0__cpufreq__scaling_max_freq=3500000)
    return write


def test_a_limit_of_the_clock_is_another_key_and_none_keeps_it(compiles, limited, monkeypatch):
    keys = [CPU.fingerprint().key]
    assert CPU.fingerprint().versions.keys() & {"clock limit", "turbo", "CPU quota"} == set()
    limited(cpu0__cpufreq__scaling_max_freq=2000000)
    keys.append(CPU.fingerprint().key)
    assert CPU.fingerprint().versions["clock limit"] == "2 of 3.5 GHz"
    assert "the clock is limited to 2 of 3.5 GHz" in CPU.concerns()
    limited(cpufreq__boost=0)
    keys.append(CPU.fingerprint().key)
    monkeypatch.setattr(cpu, "cpu_quota", lambda: 0.5)
    keys.append(CPU.fingerprint().key)
    assert len(set(keys)) == 4


def test_a_container_with_less_time_than_threads_is_a_concern(limited, monkeypatch):
    monkeypatch.setattr(cpu, "cpu_quota", lambda: 0.5)
    (what,), (remedy,) = CPU.concerns().keys(), CPU.concerns().values()
    assert "threads share 0.5 CPUs' time" in what and remedy.startswith("set OMP_NUM_THREADS=1")


def test_another_version_of_a_plug_in_is_another_key(compiles, monkeypatch):
    keys = [CPU.fingerprint().key]
    for number in ("1.0", "1.1"):
        plug_in = SimpleNamespace(dist=SimpleNamespace(name="my-kernels", version=number))
        monkeypatch.setattr(base, "entry_points", lambda group, found=plug_in: [found])
        assert CPU.fingerprint().versions["plug-in my-kernels"] == number
        keys.append(CPU.fingerprint().key)
    assert len(set(keys)) == 3


def test_compilation_is_off_where_the_user_says_so(monkeypatch):
    monkeypatch.setenv("AUTOQUANT_EAGER", "1")
    assert CPU.compile_failure() == "AUTOQUANT_EAGER is set; unset it to compile"


def test_a_compiler_that_fails_gives_its_first_line(monkeypatch):
    monkeypatch.delenv("AUTOQUANT_EAGER", raising=False)

    def fails(*_args, **_kwargs):
        raise RuntimeError("g++ not found\nlong trace")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(base, "failure_of_the_compiler", base.failure_of_the_compiler.__wrapped__)
    assert (
        CPU.compile_failure() == "g++ not found; install a C++ compiler (g++ or clang++) to compile"
    )


def test_waiting_for_the_cpu_needs_nothing():
    CPU.synchronize()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 6 cores, 4 of them ours: set its clock, the busy seconds of the 4 and of this process."""
    stat = tmp_path / "stat"
    now = {"wall": 100.0, "own": 5.0}
    monkeypatch.setattr(load, "_STAT", stat)
    monkeypatch.setattr(load.time, "monotonic", lambda: now["wall"])
    monkeypatch.setattr(load, "_own_s", lambda: now["own"])
    monkeypatch.setattr(load.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(load.os, "sched_getaffinity", lambda _process: {0, 1, 2, 5}, raising=False)
    monkeypatch.setattr(load.os, "sysconf", lambda _name: 100)

    def set_busy(wall, own, user, system, steal):
        now.update(wall=wall, own=own)
        each = [int(100 * seconds / 4) for seconds in (user, system, steal)]
        fields = f"{each[0]} 0 {each[1]} 99999 50 0 0 {each[2]} 0 0"
        others = "77777 0 7777 1 0 0 0 0 0 0"  # they say nothing of our cores
        rows = [f"cpu{core} {fields if core in (0, 1, 2, 5) else others}" for core in range(6)]
        stat.write_text("\n".join(["cpu 1 2 3", *rows, "intr 17 0 0"]) + "\n")

    return set_busy


def test_the_load_of_others_is_what_this_process_did_not_use(machine):
    machine(100, 5, user=50, system=10, steal=0)
    watch = load.OtherLoad()
    machine(110, 8, user=57, system=12, steal=2)  # 11 s busy, 3 of them ours, of 40
    assert watch.share() == pytest.approx(8 / 40)


def test_a_machine_that_only_works_for_us_has_no_other_load(machine):
    machine(100, 5, user=50, system=10, steal=0)
    watch = load.OtherLoad()
    machine(110, 25, user=69.5, system=10, steal=0)
    assert watch.share() == 0.0


def test_a_machine_that_does_not_tell_its_load_counts_as_quiet(machine):
    watch = load.OtherLoad()  # no file yet
    assert watch.share() == 0.0
    machine(110, 8, user=57, system=12, steal=2)
    assert watch.share() == 0.0


@pytest.fixture
def cores(monkeypatch):
    """Set the usable cores, the threads that PyTorch computes with, and a quota of CPUs."""

    def use(usable, threads, quota=None):
        monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _process: usable, raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(cpu, "cpu_quota", lambda: quota)
        return [place.cores for place in CPU.places()]

    return use


def test_workers_get_different_cores_one_for_each_thread(cores):
    assert cores({0, 1, 2, 3, 4}, threads=2) == [(0, 1), (2, 3)]
    assert cores({1, 7, 9}, threads=1) == [(1,), (7,), (9,)]


def test_a_single_worker_may_use_all_cores(cores):
    assert cores({0, 1, 2}, threads=2) == [()]
    assert cores({0}, threads=4) == [()]


def test_there_are_no_more_workers_than_a_quota_has_room_for(cores):
    assert cores(set(range(8)), threads=1, quota=2.5) == [(0,), (1,)]
