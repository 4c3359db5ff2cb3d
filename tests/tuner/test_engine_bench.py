"""Plans timed in engines: real exports, and stand-ins for the engines' programs."""

from __future__ import annotations

import ast
import os
import signal
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from delivery.targets.conftest import Planned
from delivery.targets.test_gguf import INT8
from delivery.targets.test_gguf_convert import llama, saved

from autoquant.errors import ConstraintError, PlanError, ProcessDiedError, WorkloadError
from autoquant.records import Workload
from autoquant.tuner.engine_bench import ROUNDS, bench_engine, timed_engine

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


def timed_in_llama_cpp(small):
    pytest.importorskip("gguf")
    plans, original = plans_of(small)
    engine = timed_engine("llama.cpp", small.facts.workload)
    return bench_engine(plans, original, small.folder, small.facts, engine)


def test_models_are_timed_in_turn_and_compared(small, tool):
    calls = tool()
    first, second = timed_in_llama_cpp(small)
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
        timed_in_llama_cpp(small)


def test_what_cannot_be_timed_is_refused_before_any_work(tool, tmp_path, monkeypatch):
    one = Workload.parse("prefill=8,decode=4")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConstraintError, match=r"llama-bench is not on the PATH: .*--engine-path"):
        timed_engine("llama.cpp", one)
    with pytest.raises(ConstraintError, match=r"only llama\.cpp and vllm are timed here"):
        timed_engine("sglang", one)
    with pytest.raises(ConstraintError, match=r"did you mean llama\.cpp"):
        timed_engine("llama.cp", one)
    empty = tmp_path / "empty"
    with pytest.raises(ConstraintError, match=rf"is not in {empty} or {empty}/bin: install"):
        timed_engine("vllm", one, empty)
    tool()
    timed_engine("llama.cpp", one)
    with pytest.raises(WorkloadError, match="a batch of 2: search with --batch 1"):
        timed_engine("llama.cpp", Workload.parse("prefill=8", batch=2))
    with pytest.raises(WorkloadError, match="has no prompt"):
        timed_engine("llama.cpp", Workload.single())


VLLM = """
import os, time
from pathlib import Path

print("vLLM prints a lot")
__version__ = "7.0"
now = 0.0
time.perf_counter = lambda: now
assert os.environ["OMP_NUM_THREADS"] == "3" and "PYTHONPATH" not in os.environ


class SamplingParams:
    def __init__(self, **limits):
        self.tokens = limits["max_tokens"]


class LLM:
    def __init__(self, model, **settings):
        with open({calls!r}, "a") as calls:
            print(Path(model).name, settings, file=calls)
        {fault}
        self.bytes = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
        self.model_config = self

    def get_vocab_size(self):
        return 5

    def generate(self, prompts, limits, use_tqdm):
        global now
        assert all(0 <= token < 5 for each in prompts for token in each["prompt_token_ids"])
        rows = len(prompts[0]["prompt_token_ids"]) * len(prompts)
        now += self.bytes * (rows + limits.tokens)
"""
"""A clock that says seconds: a byte of the weights for each token."""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Make an environment with a stand-in for vLLM."""

    def make(fault=""):
        folder = tmp_path / "its own"
        (folder / "bin").mkdir(parents=True)
        (folder / "vllm.py").write_text(VLLM.format(calls=str(tmp_path / "calls"), fault=fault))
        (folder / "bin" / "vllm").write_text("#!/bin/sh")
        python = folder / "bin" / "python"
        code = f"import sys; sys.path.insert(0, {str(folder)!r}); "
        run = "import os, runpy; os.environ.pop('PYTHONPATH', 0); sys.argv = sys.argv[1:]; "
        run += "runpy.run_path(sys.argv[0], run_name='__main__')"
        python.write_text(
            f"#!/bin/sh\n[ $1 = -I ] || exit 9\nshift\n"
            f'if [ $1 = -c ]; then exec {sys.executable} -I -c "{code}$2"; fi\n'
            f'exec {sys.executable} -I -c "{code}{run}" "$@"\n'
        )
        for each in (folder / "bin").iterdir():
            each.chmod(0o755)
        monkeypatch.setenv("PYTHONPATH", "/of/this/process")
        return folder

    return make


INT_MM = ("int8-row/plain", "int-mm")


def timed_in_vllm(small, folder, plan=None, batch=2):
    facts = SimpleNamespace(**vars(small.facts))
    facts.workload = Workload.parse("prefill=8,decode=4", batch=batch)
    engine = timed_engine("vllm", facts.workload, folder)
    _, original = plans_of(small)
    return bench_engine(
        [plan or small.plan({"_proj": INT_MM})], original, small.folder, facts, engine
    )


def test_models_are_timed_in_vllm_of_an_environment_of_its_own(small, environment, tmp_path):
    folder = environment()
    first, second = timed_in_vllm(small, folder)
    own = sum(path.stat().st_size for path in small.folder.glob("*.safetensors"))
    assert first.memory_bytes == own and 0.4 < second.memory_bytes / own < 1
    assert first.plan_id is None and second.plan_id == "abcd"
    assert first.times.request_ms == pytest.approx(own * (2 * 8 + 4) * 1e3)
    assert first.times.first_token_ms == pytest.approx(own * (2 * 8 + 1) * 1e3)
    assert second.ratio.value == pytest.approx(second.memory_bytes / own)
    assert first.loop == "vllm 7.0"
    lines = (tmp_path / "calls").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [small.folder.name, "abcd"]  # one start each
    settings = ast.literal_eval(lines[0].split(" ", 1)[1])
    assert settings["max_num_seqs"] == 2 and settings["max_model_len"] == 12
    assert settings["trust_remote_code"] is False and not settings["enable_prefix_caching"]
    assert settings["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise ValueError('1 fault:\\n  no such model')", "ValueError: 1 fault: no such model"),
        ("os.write(2, b'no memory'); os._exit(4)", r"no memory \(exit code 4\)"),
        ("os.write(2, b'on'); os.kill(os.getpid(), 4)", r"on \(SIGILL\)"),
    ],
)
def test_a_vllm_that_fails_is_told_with_what_it_said(small, environment, fault, said):
    with pytest.raises(ProcessDiedError, match=f"vLLM failed, and said: {said}"):
        timed_in_vllm(small, environment(fault))


def test_ctrl_c_ends_vllm_and_leaves_no_timer_to_wait_for(small, environment, tmp_path):
    fault = "import signal; os.kill(os.getppid(), signal.SIGINT); time.sleep(99)"
    fault = f"Path({str(tmp_path / 'id')!r}).write_text(str(os.getpid())); {fault}"
    # A runner in the background ignores interrupts, and so does what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            timed_in_vllm(small, environment(fault))
    finally:
        signal.signal(signal.SIGINT, before)
    waiting = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
    for timer in waiting:
        timer.join(5)  # cancelled ones end at once
    assert not any(timer.is_alive() for timer in waiting)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "id").read_text()), 0)


def test_an_environment_without_vllm_is_refused(small, environment):
    folder = environment()
    (folder / "vllm.py").unlink()
    with pytest.raises(ConstraintError, match=r"bin/python, beside .*, has no vLLM: give the"):
        timed_in_vllm(small, folder)
    (folder / "bin" / "python").unlink()
    with pytest.raises(ConstraintError, match="does not run"):
        timed_in_vllm(small, folder)


def test_a_plan_that_vllm_cannot_compute_is_refused_before_it_starts(small, environment, tmp_path):
    folder = environment()
    with pytest.raises(PlanError, match=r"abcd does not run there: vllm cannot compute 14 layers"):
        timed_in_vllm(small, folder, small.plan({"_proj": INT8}))
    mixed = small.plan({"q_proj": ("bfloat16/plain", "matmul"), "_proj": INT_MM})
    with pytest.raises(PlanError, match="vllm cannot load it: it computes layers such as q_proj"):
        timed_in_vllm(small, folder, mixed)
    assert not (tmp_path / "calls").exists()
