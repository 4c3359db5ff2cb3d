"""A plan as a program of ExecuTorch: what is traced, what is refused, and what its runtime makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from autoquant.candidates import get_format
from autoquant.delivery.applier import apply
from autoquant.delivery.exporting import export_to_disk
from autoquant.delivery.likeness import read_text
from autoquant.delivery.targets import executorch_program
from autoquant.delivery.targets.base import ExportedLayer
from autoquant.delivery.targets.executorch_program import (
    WRITER,
    _check_inside,
    _in_float32,
    _tensor,
)
from autoquant.engines import TARGETS, Refusal, Values, engine
from autoquant.errors import CheckpointError, PlanError
from autoquant.models import load_model
from autoquant.records import LinearShape

INT8 = ("int8-row/plain", "int-mm")
INT4S = ("int4s-g32/lanes", "unpack-matmul")
MIXED = {
    "q_proj": INT8,
    "o_proj": INT4S,
    "down_proj": ("int3-g32/bit-planes", "dequantize-matmul"),
    "lm_head": INT8,
}


def layer(name, dtype="bfloat16", activation="a16"):
    values = Values.parse(name)
    shape = LinearShape(n=64, k=128, bias=False, dtype=dtype)
    scheme = TARGETS["executorch"].scheme(str(values), activation, shape)
    choice = type("Choice", (), {"shape": shape})()
    return ExportedLayer("layer", values, scheme, choice)


def neutral(name, dtype=torch.bfloat16):
    fmt = get_format(name)
    torch.manual_seed(0)
    return fmt.neutral(fmt.store(torch.randn(64, 128).to(dtype)))


@pytest.mark.parametrize(
    "name", ["int8-row/plain", "int4s-g64/lanes", "int3-g32/bit-planes", "int2-g32/bit-planes"]
)
def test_the_tensor_that_is_traced_has_the_numbers_of_the_plan(name):
    weight = neutral(name)
    assert torch.equal(_tensor(layer(name), weight).dequantize(), weight.dequantize())


def test_scales_of_groups_that_bfloat16_does_not_hold_are_refused():
    name = "int4s-g32/lanes"
    with pytest.raises(PlanError, match=r"those of a float32 model are finer.*--dtype bf16"):
        _tensor(layer(name, "float32"), neutral(name, torch.float32))


@pytest.mark.parametrize("name", ["int8-row/plain", "int4s-g32/lanes"])
def test_a_program_with_other_integers_or_scales_is_an_error(name):
    made, weight = layer(name), neutral(name)
    codes = weight.codes
    if name.startswith("int4s"):
        unsigned = (codes + 8).to(torch.uint8)
        codes = unsigned[:, 1::2] * 16 + unsigned[:, ::2]
    scale = weight.scale.float()
    parts = [codes.contiguous().numpy().tobytes(), scale.contiguous().numpy().tobytes()]
    _check_inside(b"..".join(parts), made, weight, "layer.weight")
    for missing in parts:
        with pytest.raises(CheckpointError, match=r"XNNPACK did not take layer\.weight"):
            _check_inside(b"..".join(set(parts) - {missing}), made, weight, "layer.weight")


def test_what_is_traced_is_the_plan_in_float32_with_rounded_activations(planned):
    loaded = load_model(planned.folder, device="cpu")
    before = read_text(loaded)
    plan = planned.plan(MIXED)
    apply(plan, loaded.module)
    weights = {
        each.parameters[0]: _tensor(
            layer(each.format),
            get_format(each.format).neutral(
                loaded.module.get_parameter(each.parameters[0]).data.stored
            ),
        )
        for each in plan.layers
        if "plain" not in each.format or each.format == INT8[0]
    }
    traced = _in_float32(loaded.module, weights)
    assert {p.dtype for p in traced.parameters()} == {torch.float32}
    assert type(traced.model.layers[0].self_attn.q_proj) is nn.Linear
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        found, plans = traced(ids).logits, loaded.module(ids).logits.float()
    error = (found - plans).norm() / plans.norm()
    assert 0 < error < 0.05 and before.isfinite().all()


def test_it_is_refused_where_executorch_is_not_installed(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(type(WRITER), "reader", ("no-such-package",))
    with pytest.raises(PlanError, match="pip install no-such-package"):
        exported(planned, MIXED, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_it_has_no_integers_for_is_refused_with_what_it_has(planned, tmp_path):
    with pytest.raises(
        PlanError, match=r"nearest: int4s-g32. Search or solve with --for executorch"
    ):
        exported(planned, {"o_proj": ("int4-g32/lanes", "unpack-matmul")}, tmp_path / "out")


def test_a_search_for_it_rounds_activations_where_a_kernel_does():
    shape = LinearShape(n=64, k=128, bias=False, dtype="bfloat16")
    served = engine("executorch")
    assert served.refuses("int8-row", "a8-row", shape, device="cpu") is None
    assert "int8-row+a8-row" in served.refuses("int8-row", "a16", shape, device="cpu")
    assert served.refuses("int4s-g32", "a16", shape, device="cpu") is None
    assert isinstance(TARGETS["executorch"].scheme("mxfp8", "a16", shape), Refusal)


def exported(planned, formats, out):
    return export_to_disk(
        planned.plan(formats), planned.folder, out, to="executorch", facts=planned.facts
    )


@pytest.mark.slow
def test_the_runtime_computes_the_plan_for_any_number_of_tokens(planned, tmp_path):
    pytest.importorskip("executorch")
    report = exported(planned, MIXED, tmp_path / "out")
    assert "model.pte" in report.files and report.likeness.weights == 0
    assert report.likeness.apart < report.likeness.loss < 2 * report.likeness.plan_loss + 1e-3
    program = executorch_program.Program(tmp_path / "out" / "model.pte")
    original = load_model(planned.folder, device="cpu").module
    for tokens in (1, 2, 5, 100):
        ids = torch.arange(tokens).unsqueeze(0) % 90
        expected = original(ids).logits.float()
        assert (program(ids) - expected).norm() / expected.norm() < 0.5, tokens


@pytest.mark.slow
def test_other_numbers_than_the_plan_has_are_an_error(planned, tmp_path, monkeypatch):
    pytest.importorskip("executorch")
    make = executorch_program._tensor
    monkeypatch.setattr(
        executorch_program,
        "_tensor",
        lambda one, weight: make(one, replace(weight, scale=weight.scale * 2)),
    )
    with pytest.raises(CheckpointError, match="o_proj as 8da4w has other numbers"):
        exported(planned, {"o_proj": INT4S}, tmp_path / "out")
    assert not list(tmp_path.iterdir())
