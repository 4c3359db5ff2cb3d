"""Plans as programs: written, and run in a process without autoquant."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import autoquant
from autoquant.delivery.programs import exporting, reading
from autoquant.delivery.programs.exporting import export_programs
from autoquant.delivery.programs.run import Programs, check_machine
from autoquant.delivery.programs.tracing import Subject, ranges_of, resized, trace
from autoquant.engines import PROGRAMS
from autoquant.errors import CheckpointError, PlanError

from ..targets.conftest import Planned, save_llama
from .conftest import inputs, make

INT8 = "int8-row/plain"
ROUTES = {
    "inner": (INT8, (8, "int8pack-mm"), (None, "dequantize-matmul")),
    "head": (INT8, (None, "int-mm")),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    planned = Planned(save_llama(tmp_path_factory.mktemp("programs") / "llama", tied=True))
    planned.facts.workload = autoquant.Workload.parse("prefill=8,decode=4")
    return planned


def exported(patches, out, to, routes=ROUTES):
    return export_programs(
        patches.plan(routes),
        patches.path,
        out,
        form=PROGRAMS[to],
        facts=patches.facts,
        trust=patches.trust,
    )


@pytest.fixture(scope="module")
def written(patches, tmp_path_factory):
    out = tmp_path_factory.mktemp("pt2") / "out"
    return exported(patches, out, "pt2")


@pytest.mark.slow
@pytest.mark.processes
def test_a_module_is_one_program_for_each_range_and_gives_the_plans_bits(written):
    assert list(written.programs) == ["batch_1_to_2", "batch_3_up"]
    assert written.programs["batch_1_to_2"] == {
        f"{INT8}/int8pack-mm": 1,
        f"{INT8}/int-mm": 1,
    }
    assert written.agreement.same and written.agreement.places == 3
    assert written.agreement.loss == written.agreement.plan_loss > 0
    assert not written.operators and not written.notes


@pytest.mark.slow
@pytest.mark.processes
def test_the_folders_own_reader_takes_any_batch(written):
    code = (
        "import sys; sys.modules['autoquant'] = sys.modules['torchao'] = None\n"
        "import torch; from run import Programs\n"
        "programs = Programs()\n"
        "print([list(programs(torch.ones(n, 4, 64).bfloat16()).shape) for n in (1, 2, 3, 9)])"
    )
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=written.out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[1, 32], [2, 32], [3, 32], [9, 32]]"


@pytest.mark.slow
@pytest.mark.processes
def test_a_size_without_a_program_is_refused(written, tmp_path):
    about = json.loads((written.out / "program.json").read_text())
    about["programs"] = about["programs"][:1]
    (tmp_path / "batch_1_to_2.pt2").write_bytes((written.out / "batch_1_to_2.pt2").read_bytes())
    (tmp_path / "program.json").write_text(json.dumps(about))
    programs = Programs(tmp_path)
    with pytest.raises(ValueError, match="no program takes 3 batch"):
        programs(*inputs())


@pytest.mark.slow
@pytest.mark.processes
def test_a_language_model_steps_over_its_cache_with_the_plans_bits(llama, tmp_path):
    plan = llama.plan({"proj": (INT8, "int8pack-mm", "dequantize-matmul")})
    study = SimpleNamespace(best_of_search=lambda: plan, facts=llama.facts, limits=None)
    study.facts.source["path"] = str(llama.folder)
    report = autoquant.export(study, tmp_path / "out", to="pt2")
    assert list(report.programs) == ["tokens_1", "tokens_2_to_4", "tokens_5_to_128"]
    assert report.agreement.same
    assert report.agreement.same_tokens == report.agreement.places > 20
    assert {"run.py", "program.json", "tokenizer.json"} <= set(report.files)
    assert not list(tmp_path.glob("out*/__pycache__"))
    done = subprocess.run(
        [sys.executable, "run.py", "--prompt", "w3 w4", "--max-new-tokens", "3"],
        cwd=report.out,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("w3 w4") and "tokens read, 3 written" in done.stdout


@pytest.mark.slow
@pytest.mark.processes
def test_compiled_programs_share_their_weights(patches, tmp_path):
    report = exported(patches, tmp_path / "out", "aoti")
    assert list(report.programs) == ["batch_1", "batch_2", "batch_3_up"]
    assert report.agreement.error < 0.01 and set(report.agreement.times_ms) == {"request"}
    weights = torch.load(report.out / "weights.pt", weights_only=True)
    codes = [each for each in weights.values() if each.dtype == torch.int8]
    assert sorted(map(tuple, (each.shape for each in codes))) == [(32, 96), (96, 64)]
    assert not torch.equal(Programs(report.out)(*inputs()), make()(*inputs()))


@pytest.mark.processes
def test_programs_that_do_not_run_are_not_delivered(patches, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_READER", "raise SystemExit('it is broken')")
    with pytest.raises(CheckpointError, match=r"a process of their own \(it is broken\)"):
        exported(patches, tmp_path / "out", "pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.processes
def test_programs_that_compute_something_else_are_not_delivered(patches, tmp_path, monkeypatch):
    run = reading.Reading._run

    def wrong(self, *arguments):
        answered = run(self, *arguments)
        return answered | {"outputs": [-each for each in answered["outputs"]]}

    monkeypatch.setattr(reading.Reading, "_run", wrong)
    with pytest.raises(CheckpointError, match="compute something else than the plan"):
        exported(patches, tmp_path / "out", "pt2")
    assert list(tmp_path.iterdir()) == []


def only_three(forward, x):
    if len(x) != 3:
        raise ValueError("three samples only")
    return forward(x)


def by_its_number(forward, x):
    return forward(x, float(len(x)))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("changed", "reason"),
    [(only_three, "three samples only"), (by_its_number, "torch.export cannot trace")],
)
def test_a_module_that_takes_one_size_only_gets_one_program(
    patches, tmp_path, monkeypatch, changed, reason
):
    load = exporting.load_searched

    def fixed(*arguments):
        loaded = load(*arguments)
        loaded.module.forward = functools.partial(changed, loaded.module.forward)
        return loaded

    monkeypatch.setattr(exporting, "load_searched", fixed)
    report = exported(patches, tmp_path / "out", "pt2")
    assert list(report.programs) == ["batch_3"]
    assert report.programs["batch_3"][f"{INT8}/dequantize-matmul"] == 1
    (note,) = report.notes
    assert "sample inputs' size only" in note and reason in note


def test_a_model_that_is_not_in_memory_is_refused(patches, tmp_path, monkeypatch):
    load = exporting.load_searched

    def streamed(*arguments):
        loaded = load(*arguments)
        monkeypatch.setattr(type(loaded), "stream", property(lambda _: object()))
        return loaded

    monkeypatch.setattr(exporting, "load_searched", streamed)
    with pytest.raises(PlanError, match="needs the model in memory"):
        exported(patches, tmp_path / "out", "pt2")


def test_without_a_compiler_aoti_is_refused_before_any_work(patches, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQUANT_EAGER", "1")
    with pytest.raises(PlanError, match="aoti needs PyTorch's compiler"):
        exported(patches, tmp_path / "out", "aoti")


def test_windows_are_refused(llama, tmp_path, monkeypatch):
    load = exporting.load_searched

    def windowed(*arguments):
        loaded = load(*arguments)
        loaded.module.config.layer_types = ["sliding_attention", "full_attention"]
        return loaded

    monkeypatch.setattr(exporting, "load_searched", windowed)
    with pytest.raises(PlanError, match="has windows"):
        export_programs(
            llama.plan({"proj": (INT8, "int8pack-mm")}),
            llama.folder,
            tmp_path / "out",
            form=PROGRAMS["pt2"],
            facts=llama.facts,
        )


def test_options_that_programs_have_no_use_for_are_refused_together(patches, tmp_path):
    study = SimpleNamespace(
        facts=SimpleNamespace(source={"path": "x"}), limits=None, best_of_search=lambda: None
    )
    with pytest.raises(PlanError, match="leave out --base and --activations and --requantize"):
        autoquant.export(study, tmp_path, to="aoti", base="x", activations="a16", requantize=True)


def test_a_machine_without_the_instructions_is_refused():
    about = {"torch": torch.__version__.partition("+")[0], "library": None}
    with pytest.raises(ValueError, match=r"lacks instructions.*\(avx1024\)"):
        check_machine(about | {"instructions": ["avx1024"]})


def test_operators_are_not_defined_twice():
    about = {"torch": torch.__version__, "library": "libautoquant_cpu.so", "instructions": []}
    with pytest.raises(ValueError, match="in a process of their own"):
        check_machine(about)


def test_another_pytorch_is_said(capsys):
    check_machine({"torch": "1.0.0", "library": None, "instructions": []})
    assert "made with PyTorch 1.0.0" in capsys.readouterr().err


class Named(nn.Module):
    """Takes its inputs by name, one of them without a batch, and returns a dict."""

    def __init__(self):
        super().__init__()
        self.inner = make().inner

    def forward(self, *, x, weights):
        return {"y": self.inner(x) * weights}


def test_inputs_by_name_keep_their_own_sizes():
    module = Named()
    given = {"x": torch.ones(3, 64).bfloat16(), "weights": torch.ones(96).bfloat16()}
    subject = Subject(
        unit="batch",
        dimension=0,
        most=None,
        steps=False,
        inputs=lambda size: resized(((), given), 0, size),
    )
    found, reason = ranges_of(module, subject, joins_one=False)
    assert reason is None and [each.least for each in found] == [1, 2]
    program = trace(module, subject, found[1]).module()
    x = torch.randn(7, 64).bfloat16()
    expected = module(x=x, weights=given["weights"])["y"]
    assert torch.equal(program(x, given["weights"])["y"], expected)
