"""Plans solved for an engine's speed: real exports and quality, and a stand-in for the engine."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace

import pytest
from builders.records import make_recording
from delivery.targets.conftest import Planned
from delivery.targets.test_gguf_convert import llama, saved
from typer.testing import CliRunner

from autoquant.cli.main import app
from autoquant.devices import backend
from autoquant.errors import ConstraintError, PlanError
from autoquant.events import Notice, ignore
from autoquant.models import load_model
from autoquant.records import Workload
from autoquant.report.tables.in_engine import in_engine_lines, in_engine_object
from autoquant.solver.limits import Limits
from autoquant.solver.planning import PlanContext, make_plan
from autoquant.solver.space import SearchSpace
from autoquant.store import open_store
from autoquant.study.engine_times import known_times
from autoquant.study.study import Study
from autoquant.tuner.engine_bench import ROUNDS, timed_engine
from autoquant.tuner.engine_solve import check_solvable, solve_in_engine
from autoquant.tuner.judge import Asked, make_judge

pytest.importorskip("gguf")

WORKLOAD = Workload.parse("prefill=8,decode=4")
STUDY = "5tudy001"
TOOL = """#!/bin/sh
echo "$@" >> "{folder}/calls"
for word in "$@"; do case "$word" in *.gguf) size=$(wc -c < "$word");; esac; done
cat <<END
[{{"build_commit": "{commit}", "build_number": 7, "n_prompt": 8, "n_gen": 0, "avg_ns": 1000}},
 {{"build_commit": "{commit}", "build_number": 7, "n_prompt": 8, "n_gen": 3, "avg_ns": ${{size}}000}}]
END
"""
"""Says that a request takes a microsecond for each byte of the file, and a prompt one in all."""
FORMATS = {
    "bfloat16/plain": ("matmul", 2.0, 0.0),
    "int8-row/plain": ("dequantize-matmul", 1.06, 1e-6),
    "int4s-g32/lanes": ("unpack-matmul", 0.56, 1e-5),
}
"""Kernel, bytes of a weight, and predicted loss."""
WITHIN = Limits(max_ppl_increase=0.5)


@pytest.fixture
def tool(tmp_path):
    def put(commit="abc"):
        path = tmp_path / "llama-bench"
        path.write_text(TOOL.format(folder=tmp_path, commit=commit))
        path.chmod(0o755)
        return tmp_path / "calls"

    return put


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Planned(saved(tmp_path_factory.mktemp("model"), llama(tie_word_embeddings=False)))


@pytest.fixture
def study(model, tmp_path):
    """A study with the options of every linear, of which nothing was proven."""
    store = open_store(tmp_path / "plan.db")
    loaded = load_model(model.folder, device="cpu")
    judge = make_judge(Asked.of(None, None, None), loaded, [], 0, ignore)
    device = backend("cpu").fingerprint()
    store.put_device(device)
    store.put_model(loaded.content_hash, model.facts.source)
    identity = {"candidates": [], "seed": 0, "quality": judge.quality.key}
    store.put_study(
        STUDY,
        model_hash=loaded.content_hash,
        device=device,
        identity=identity,
        workload=WORKLOAD,
        limits=WITHIN.as_object(),
    )
    store.update_study(STUDY, recording=make_recording(model.sites))
    space = space_of(model, loaded.content_hash)
    store.put_options(STUDY, space.options, space.about())
    plain = [layer[0] for layer in space.options]
    store.put_plan(make_plan(plain, "original", "original", space.context))
    yield Study(store, STUDY)
    store.close()


def space_of(model, content_hash):
    columns = [model.plan({"": (fmt, kernel)}).layers for fmt, (kernel, _, _) in FORMATS.items()]
    options = [
        [
            replace(
                choice,
                latency_us={"prefill": 1.0, "decode": 1.0},
                memory_bytes=int(FORMATS[choice.format][1] * choice.shape.n * choice.shape.k),
                loss=FORMATS[choice.format][2],
            )
            for choice in layer
            if choice.shape.n % 16 == 0 or choice.format != "int4s-g32/lanes"
        ]
        for layer in zip(*columns, strict=True)
    ]
    context = PlanContext(
        study_id=STUDY,
        model_hash=content_hash,
        dtype="bfloat16",
        workload=WORKLOAD,
        other_bytes=1000,
    )
    return SearchSpace(options, context, logarithmic=True)


def solved(study, model, tool_calls, limits=WITHIN, **options):
    timed = timed_engine("llama.cpp", WORKLOAD, tool_calls.parent)
    asked = Asked.of(None, None, None)
    return solve_in_engine(study, limits, str(model.folder), timed, asked=asked, **options)


def runs(calls):
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_the_plan_is_solved_by_the_engines_times_and_proven_in_it(study, model, tool):
    calls = tool()
    found = solved(study, model, calls)
    # A request takes as long as the file is large, so each layer gets the smallest type it can.
    many = len(model.sites) - 1
    assert found.solved.plan.formats() == {"int4s-g32/lanes": many, "int8-row/plain": 1}
    original, row, uniform = found.rows
    assert uniform.label == "uniform int4s-g32 a16" and row.memory_bytes < uniform.memory_bytes
    shares = row.memory_bytes / uniform.memory_bytes
    assert found.beside_uniform.value == pytest.approx(shares)
    assert found.beside_uniform.high < 1, "the uniform plan leaves the head unquantized"
    assert original.plan_id is None and row.plan_id == found.solved.plan.plan_id
    assert row.ratio.value == pytest.approx(row.memory_bytes / original.memory_bytes)
    assert found.predicted_ratio[row.plan_id] == pytest.approx(row.ratio.value, rel=0.01)
    judged = found.judged[row.plan_id]
    assert judged.selection.high < 0.5 and judged.loss > 0
    assert runs(calls) == ROUNDS * (3 + 3), (
        "two types, then two plans, each beside the unquantized model"
    )
    lines = "\n".join(in_engine_lines(found, WITHIN, WORKLOAD))
    assert (
        "limit 50%" in lines
        and ": shown)" in lines
        and "Types timed in llama.cpp abc (build 7)" in lines
    )
    shown = in_engine_object(found, WORKLOAD)
    assert shown["rows"][1]["quality"]["selection"]["high"] == judged.selection.high


def test_the_command_prints_what_was_predicted_and_measured(study, model, tool, tmp_path):
    space = study.space()
    study.store.put_options(STUDY, [layer[:2] for layer in space.options], space.about())
    calls = tool()
    command = ["solve", str(tmp_path / "plan.db"), "--engine", "llama.cpp"]
    command += ["--engine-path", str(calls.parent), "--max-ppl-increase", "50%"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert f"{len(model.sites)} x int8-row/plain" in said
    assert "Timed in turn: llama.cpp abc (build 7)" in said
    assert "No other plan to compare with: the plan itself has one format for all layers." in said
    assert re.search(
        r"Predicted for solved for llama.cpp by its times: .*; off by [+-]0\.\d%", said
    )
    assert re.search(r"autoquant export .*plan.db --plan \w+ --to gguf --out DIR", said)
    result = CliRunner().invoke(app, [*command, "--json"])
    shown = json.loads(result.stdout)
    assert shown["rows"][1]["plan_id"] == shown["plan"]["plan_id"]
    assert shown["times"]["types"].keys() == {"Q8_0"}, "known from the first time"


@pytest.mark.slow
def test_types_are_timed_once_for_a_version_of_the_engine(study, model, tool):
    calls = tool()
    solved(study, model, calls)
    before = runs(calls)
    solved(study, model, calls)
    assert runs(calls) - before == ROUNDS * 3
    before = runs(calls)
    solved(study, model, calls, again=True)
    assert runs(calls) - before == ROUNDS * (3 + 3)
    tool("new")
    heard = []
    found = solved(study, model, calls, listener=heard.append)
    assert found.times.version == "new (build 7)"
    assert known_times(study.store, STUDY, "llama.cpp").version == "new (build 7)"
    assert any(isinstance(each, Notice) and "timed again" in each.text for each in heard)


def test_beyond_the_limits_nothing_is_recommended(study, model, tool):
    space = study.space()
    free = [[replace(each, loss=0.0) for each in layer[1:]] for layer in space.options]
    study.store.put_options(STUDY, free, space.about())
    with pytest.raises(PlanError, match=r"no plan was measured .*: the last one's .* allow more"):
        solved(study, model, tool(), Limits(max_ppl_increase=1e-9))


def test_where_only_the_unquantized_model_is_left_that_is_said(study, model, tool):
    with pytest.raises(PlanError, match=r"nothing faster in llama\.cpp than the unquantized model"):
        solved(study, model, tool(), Limits(max_ppl_increase=1e-9))


def test_what_cannot_be_solved_for_is_refused_before_any_work(study, model, tool, monkeypatch):
    calls = tool()
    with pytest.raises(ConstraintError, match=r"only llama\.cpp is timed by types .* --for vllm"):
        check_solvable("vllm")
    check_solvable("llama.cpp")
    facts = study.facts
    other = replace(facts, device=replace(facts.device, name="Another CPU"))
    monkeypatch.setattr(Study, "facts", property(lambda _self: other))
    with pytest.raises(ConstraintError, match=r"the study is of Another CPU .* solve it there"):
        solved(study, model, calls)
    assert not runs(calls)


def test_a_study_without_its_unquantized_plan_is_refused(study, model, tool):
    calls = tool()
    study.store.update_study(STUDY, recording=None)
    with pytest.raises(PlanError, match="run its search again"):
        solved(study, model, calls)
    assert not runs(calls) and os.listdir(calls.parent)
