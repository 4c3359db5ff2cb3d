"""Exports in general: the function for Python, targets without a writer, models that do not fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import autoquant
from autoquant.errors import CheckpointError, PlanError
from autoquant.export import exporting
from autoquant.export.targets import writer

from .test_compressed_tensors import INT8, MIXED, exported


def study_of(planned, formats):
    plan = planned.plan(formats)
    return SimpleNamespace(best_of_search=lambda: plan, facts=planned.facts)


def test_a_study_is_exported_from_python(planned, tmp_path):
    study = study_of(planned, {"o_proj": INT8})
    report = autoquant.export(study, tmp_path / "out", to="compressed-tensors")
    assert report.out == tmp_path / "out" and report.schemes == {"int8-row as pack-quantized": 2}
    assert report.file_bytes == sum(path.stat().st_size for path in report.out.iterdir())


def test_a_folder_that_exists_is_refused_before_anything_is_loaded(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "load_searched", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        exported(planned, MIXED, tmp_path / "out")


@pytest.mark.parametrize("name", ["ggml", "vllm"])
def test_an_unknown_target_is_refused(name):
    with pytest.raises(PlanError, match="no target"):
        writer(name)


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
