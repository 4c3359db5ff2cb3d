"""`autoquant export` with a stand-in for the work itself."""

import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace

import pytest
from builders.searched import MIXED, UNIFORM

from autoquant.cli.main import app
from autoquant.engines import PROGRAMS, target


@dataclass(frozen=True)
class Likeness:
    weights: int = 60
    moved: int = 0
    farthest: float = 0.0
    same_logits: bool = True
    rounded: int = 0
    loss: float = 0.0123
    plan_loss: float = 0.0119
    apart: float = 0.0042
    in_nats: bool = True


@dataclass(frozen=True)
class Report:
    out: object
    target: object = None
    files: tuple = ("config.json", "model.safetensors")
    schemes: object = None
    unquantized: int = 30
    file_bytes: int = 2**24
    plan_bytes: int = 2**23
    notes: tuple = ()
    reader: str = "transformers 5 and compressed-tensors 0.20"
    likeness: object = Likeness()
    unread: str = ""
    written: str = "Each layer was decoded."
    closing: str = "Kernels are not those that the search timed."


@pytest.fixture
def work(monkeypatch):
    """A stand-in for exporting: `calls` notes what was asked, `changes` alters the report."""
    module = ModuleType("autoquant.tuner.exporting")
    module.calls, module.changes, module.bases, module.activations = [], {}, [], []
    module.embeddings = []

    def write_export(_study, plan, model, out, *, to, base, embedding, activations, **_options):
        module.bases.append(base)
        module.embeddings.append(embedding)
        module.activations.append(activations)
        module.calls.append((plan.plan_id, str(model), out.name, to))
        made = Report(out.absolute(), target(to), schemes={"int8-row as pack-quantized": 60})
        return replace(made, **module.changes)

    module.write_export = write_export
    monkeypatch.setitem(sys.modules, "autoquant.tuner.exporting", module)
    return module


def run(runner, database, *more, to="compressed-tensors"):
    return runner.invoke(app, ["export", str(database), "--to", to, *more])


def test_the_recommended_plan_is_exported_beside_the_database(runner, database, work):
    result = run(runner, database)
    assert result.exit_code == 0, result.stderr
    folder = f"tiny-model-{MIXED}-compressed-tensors"
    assert work.calls == [(MIXED, "/somewhere/tiny-model", folder, "compressed-tensors")]
    assert "60 x int8-row as pack-quantized" in result.stdout
    assert "30 layers are left unquantized" in result.stdout
    assert "Files 16.0 MiB, parameters in the plan 8.00 MiB" in result.stdout


def test_it_says_who_read_it_back_and_that_kernels_are_the_engines(runner, database, work):
    text = run(runner, database).stdout
    assert "Read back by transformers 5 and compressed-tensors 0.20: all 60" in text
    assert "Logits are bit for bit those of these numbers" in text
    assert "KL to the unquantized model 0.012 nats a token" in text
    assert "not those that the search timed" in text and "was decoded" in text


def test_it_says_what_differs(runner, database, work):
    work.changes = {
        "likeness": Likeness(moved=2, farthest=0.002, same_logits=False),
        "notes": ("2 layers round otherwise",),
    }
    text = run(runner, database).stdout
    assert "2 of 60 quantized weights differ by up to 0.20 % of a row's largest" in text
    assert "not bit for bit the plan's" in text and "Note: 2 layers round otherwise" in text


def test_it_says_that_no_reader_was_there(runner, database, work):
    work.changes = {"likeness": None, "unread": "it is not installed: pip install it"}
    assert "Not read back by transformers" in run(runner, database).stdout


def test_plan_model_and_folder_can_be_named(runner, database, work):
    run(runner, database, "--plan", UNIFORM[:5], "--model", "elsewhere", "--out", "DIR")
    assert work.calls == [(UNIFORM, "elsewhere", "DIR", "compressed-tensors")]


def test_a_gguf_begins_with_the_file_that_is_named(runner, database, work):
    run(runner, database, "--base", "model-bf16.gguf", to="gguf")
    run(runner, database)
    assert list(map(str, work.bases)) == ["model-bf16.gguf", "None"]


def test_a_rounded_embedding_is_asked_for_and_said(runner, database, work):
    work.changes = {"likeness": Likeness(rounded=1, same_logits=False)}
    result = run(runner, database, "--embedding", "head", to="gguf")
    assert work.embeddings == ["head"]
    assert "with a rounded embedding, which is not the plan's" in result.stdout
    refused = run(runner, database, "--embedding", "int5", to="gguf")
    assert refused.exit_code == 2 and "int5" in refused.stderr


def test_a_plan_and_a_limit_exclude_each_other(runner, database, work):
    result = run(runner, database, "--plan", "b", "--max-ppl-increase", "1%")
    assert result.exit_code == 2 and "cannot be combined" in result.stderr


def test_an_unknown_target_is_refused_with_those_that_there_are(runner, database, work):
    result = run(runner, database, to="compressed-tensor")
    assert result.exit_code == 2 and not work.calls
    assert "did you mean compressed-tensors?" in result.stderr


@dataclass(frozen=True)
class Agreement:
    places: int = 32
    same: bool = False
    error: float = 0.0071
    same_tokens: int | None = 31
    loss: float = 0.0123
    plan_loss: float = 0.0119
    times_ms: object = None


@dataclass(frozen=True)
class ProgramReport:
    out: object
    form: object = PROGRAMS["aoti"]
    files: tuple = ("model.pt2", "run.py")
    programs: object = None
    unquantized: int = 0
    operators: tuple = ("autoquant::cpu_int8_rows",)
    file_bytes: int = 2**24
    plan_bytes: int = 2**23
    notes: tuple = ("in tokens_1 a layer runs another kernel",)
    agreement: object = None
    workload: str = "prefill=8,decode=4"
    request_ms: tuple = (12.0, 13.0)


@pytest.fixture
def programs(work):
    """The stand-in writes programs; `found` alters what it found of them."""
    found = {}

    def write_export(_study, plan, model, out, *, to, **_options):
        work.calls.append((plan.plan_id, str(model), out.name, to))
        agreement = replace(Agreement(times_ms={"prompt": 8.0, "token": 1.0}), **found)
        kernels = {"tokens_1": {"int8-row/plain/cpu-rows": 57}}
        return ProgramReport(out.absolute(), programs=kernels, agreement=agreement)

    work.write_export = write_export
    return found


def test_programs_say_which_kernels_run_and_how_like_the_plan_they_are(
    runner, database, work, programs
):
    result = run(runner, database, to="aoti")
    assert result.exit_code == 0, result.stderr
    assert work.calls == [(MIXED, "/somewhere/tiny-model", f"tiny-model-{MIXED}-aoti", "aoti")]
    assert "tokens_1: 57 x int8-row/plain/cpu-rows" in result.stdout
    assert "has the operators autoquant::cpu_int8_rows" in result.stdout
    assert "outputs differ from the plan's by 0.0071 (relative)" in result.stdout
    assert "the same at 31 of 32 places. KL to the unquantized model 0.012" in result.stdout
    assert "Note: in tokens_1 a layer runs another kernel" in result.stdout
    assert "takes 12.0 ms (prompt 8.00 ms, token 1.00 ms); the search predicted 13.0" in (
        result.stdout
    )


def test_programs_of_a_module_have_no_tokens(runner, database, programs):
    programs.update(same=True, same_tokens=None)
    text = run(runner, database, to="pt2").stdout
    assert "outputs are bit for bit the plan's. From the unquantized model they differ by" in text


def test_help_names_the_engines_of_each_target(runner):
    text = " ".join(runner.invoke(app, ["export", "--help"]).stdout.split())
    assert "aoti (PyTorch, from Python and C++)" in text
    assert "compressed-tensors (vllm, sglang)" in text and "gguf (llama.cpp)" in text


def test_activations_are_rounded_unless_it_is_said(runner, database, work):
    run(runner, database)
    run(runner, database, "--activations", "a16")
    assert work.activations == ["rounded", "a16"]


def test_a_text_to_judge_by_needs_something_to_judge(runner, database, work):
    result = run(runner, database, "--eval-text", "text.txt")
    assert result.exit_code == 2 and not work.calls
    assert "with --requantize only" in " ".join(result.stderr.split())


def test_what_was_rounded_anew_is_said_with_its_quality(runner, database, work):
    asked = {}

    def write_export(_study, plan, model, out, *, to, **options):
        asked.update(options, to=to, plan=plan.plan_id)
        made = Report(out.absolute(), target(to), schemes={"int4s-g32 as pack-quantized": 6})
        why = "holds no real zero points"
        changes = {("int4-g32", "int4s-g32", why): 6, ("mxfp4", "bfloat16", "unknown"): 1}
        return SimpleNamespace(
            export=made, plan=plan, changes=changes, quality=("Perplexity 20, 21, 22",)
        )

    work.write_export = write_export
    result = run(runner, database, "--requantize", "--plan", UNIFORM, "--max-ppl-increase", "3%")
    assert result.exit_code == 0, result.stderr
    assert "6 layers from int4-g32 to int4s-g32: holds no real zero points" in result.stdout
    assert "1 layer from mxfp4 to bfloat16: unknown" in result.stdout
    assert "Perplexity 20, 21, 22" in result.stdout
    assert (asked["plan"], asked["limits"].max_ppl_increase) == (UNIFORM, 0.03)
    assert asked["requantize"]


def test_a_program_that_shows_no_weights_is_said_to_run(runner, database, work):
    work.changes = {"likeness": Likeness(weights=0, same_logits=False)}
    text = run(runner, database, to="executorch").stdout
    assert "it runs, and shows no weights. KL to these numbers" in text
    assert "0.0042 nats a token, to the unquantized model 0.012" in text
