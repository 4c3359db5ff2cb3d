"""Plans timed in llama.cpp: real exports, and a stand-in for its program on the PATH."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
from delivery.targets.conftest import Planned
from delivery.targets.test_gguf import INT8
from delivery.targets.test_gguf_convert import llama, saved

from autoquant.errors import ConstraintError, ProcessDiedError, WorkloadError
from autoquant.records import Workload
from autoquant.tuner.engine_bench import ROUNDS, bench_engine, check_engine

pytest.importorskip("gguf")

TOOL = """#!/bin/sh
echo "$@" >> "{folder}/calls"
for word in "$@"; do case "$word" in *.gguf) size=$(wc -c < "$word");; esac; done
cat <<END
[{{"build_commit": "abc", "build_number": 7, "n_prompt": 8, "n_gen": 0, "avg_ns": ${{size}}0}},
 {{"build_commit": "abc", "build_number": 7, "n_prompt": 8, "n_gen": 3, "avg_ns": ${{size}}00}}]
END
"""
"""Says that the first token takes ten nanoseconds a byte of the file, and a request a hundred."""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Put a program on the PATH that writes down how it was called."""

    def put(text=TOOL):
        path = tmp_path / "llama-bench"
        path.write_text(text.format(folder=tmp_path))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return tmp_path / "calls"

    return put


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    planned = Planned(saved(tmp_path_factory.mktemp("model"), llama(tie_word_embeddings=False)))
    planned.facts.workload = Workload.parse("prefill=8,decode=4")
    planned.facts.device = SimpleNamespace(type="cpu", threads=3)
    return planned


def plans_of(small):
    original = replace(small.plan({}), plan_id="0000", kind="original", label="original")
    return [small.plan({"_proj": INT8})], original


def test_models_are_timed_in_turn_and_compared(small, tool):
    calls = tool()
    plans, original = plans_of(small)
    first, second = bench_engine(plans, original, small.folder, small.facts, "llama.cpp")
    assert first.plan_id is None and first.ratio is None and second.plan_id == "abcd"
    share = second.memory_bytes / first.memory_bytes
    assert 0.5 < share < 1
    assert second.ratio.value == pytest.approx(share)
    assert first.times.request_ms == pytest.approx(first.memory_bytes * 100 / 1e6)
    assert first.times.first_token_ms == pytest.approx(first.memory_bytes * 10 / 1e6)
    assert first.times.step_ms == pytest.approx(first.memory_bytes * 90 / 3 / 1e6)
    assert second.loop == "llama.cpp abc (build 7)"
    lines = calls.read_text().splitlines()
    files = [line.split(" -p ")[0].rsplit("/", 2)[1] for line in lines]
    assert files == ["0000", "abcd"] * ROUNDS
    assert all(line.endswith("-p 8 -n 0 -r 1 -o json -pg 8,3 -t 3 -ngl 0") for line in lines)
    assert not any(os.path.exists(line.split()[1]) for line in lines)


def test_a_program_that_fails_is_told_with_what_it_said(small, tool):
    tool("#!/bin/sh\necho loading >&2\necho no such device >&2\nexit 3\n")
    with pytest.raises(ProcessDiedError, match=r"exit code 3.* said: no such device"):
        bench_engine(*plans_of(small), small.folder, small.facts, "llama.cpp")


def test_what_cannot_be_timed_is_refused_before_any_work(tool, monkeypatch):
    one = Workload.parse("prefill=8,decode=4")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConstraintError, match="needs its program llama-bench on the PATH"):
        check_engine("llama.cpp", one)
    with pytest.raises(ConstraintError, match=r"only llama\.cpp is timed here"):
        check_engine("vllm", one)
    with pytest.raises(ConstraintError, match=r"did you mean llama\.cpp"):
        check_engine("llama.cp", one)
    tool()
    check_engine("llama.cpp", one)
    with pytest.raises(WorkloadError, match="a batch of 2: search with --batch 1"):
        check_engine("llama.cpp", Workload.parse("prefill=8", batch=2))
    with pytest.raises(WorkloadError, match="has no prompt"):
        check_engine("llama.cpp", Workload.single())
