"""Exports in general: the function for Python, targets without a writer, models that do not fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from end_to_end.conftest import python
from torch import nn

import autoquant
from autoquant.delivery import exporting, targets
from autoquant.delivery.exporting import export_to_disk
from autoquant.delivery.targets import writer
from autoquant.errors import CheckpointError, PlanError

from .test_compressed_tensors import INT8, MIXED, exported


def study_of(planned, formats):
    plan = planned.plan(formats)
    return SimpleNamespace(best_of_search=lambda: plan, facts=planned.facts, limits=None)


def test_a_study_is_exported_from_python(planned, tmp_path):
    study = study_of(planned, {"o_proj": INT8})
    report = autoquant.export(study, tmp_path / "out", to="compressed-tensors")
    assert report.out == tmp_path / "out" and report.schemes == {"int8-row as pack-quantized": 2}
    assert report.file_bytes == sum(path.stat().st_size for path in report.out.iterdir())


def test_a_layer_that_is_no_linear_module_is_refused(planned, tmp_path, monkeypatch):
    load = exporting.load_searched

    def with_a_router(*args, **options):
        loaded = load(*args, **options)
        loaded.module.model.layers[0].self_attn.o_proj.__class__ = type("Router", (nn.Module,), {})
        return loaded

    monkeypatch.setattr(exporting, "load_searched", with_a_router)
    with pytest.raises(PlanError, match=r"model.layers.0.self_attn.o_proj are none.*--keep"):
        exported(planned, MIXED, tmp_path / "out")


def test_a_folder_that_exists_is_refused_before_anything_is_loaded(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "load_searched", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        exported(planned, MIXED, tmp_path / "out")


def test_a_target_that_nothing_writes_is_refused(monkeypatch):
    monkeypatch.setattr(targets, "_HOMES", {"transformers": "torchao_folder"})
    with pytest.raises(PlanError, match="nothing writes gguf yet; choose one of transformers"):
        writer("gguf")


def test_a_model_that_does_not_fit_is_written_layer_by_layer(planned, tmp_path, monkeypatch):
    whole = exported(planned, MIXED, tmp_path / "whole")
    load = exporting.load_searched

    def streamed(*args, **options):
        loaded = load(*args, **options)
        monkeypatch.setattr(
            type(loaded), "stream", property(lambda _: SimpleNamespace(let_go=lambda: None))
        )
        return loaded

    monkeypatch.setattr(exporting, "load_searched", streamed)
    report = exported(planned, MIXED, tmp_path / "layers")
    assert report.likeness is None and report.unread == "the unquantized model does not fit"
    assert report.files == whole.files
    for name in report.files:
        assert (report.out / name).read_bytes() == (whole.out / name).read_bytes(), name


@pytest.mark.processes
def test_what_was_exported_loads_where_autoquant_is_not_installed(planned, tmp_path):
    folders = [tmp_path / name for name in ("compressed-tensors", "transformers")]
    for out in folders:
        export_to_disk(
            planned.plan({"proj": INT8}), planned.folder, out, to=out.name, facts=planned.facts
        )
    lines = [
        "import sys; sys.modules['autoquant'] = None",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "for folder in sys.argv[1:]:",
        "    model = AutoModelForCausalLM.from_pretrained(folder)",
        "    ids = AutoTokenizer.from_pretrained(folder)('w3 w4', return_tensors='pt').input_ids",
        "    print(model.generate(ids, max_new_tokens=4, do_sample=False).tolist())",
    ]
    ended = python("-c", "\n".join(lines), *folders)
    assert ended.returncode == 0, ended.stderr
    one, other = ended.stdout.splitlines()
    assert one == other and one.startswith("[[3, 4, ")
