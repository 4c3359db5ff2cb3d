"""A plan put into modules in memory: all of it or nothing, every weight checked."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates import A16, Format, Kernel, get_format, registry
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.applier import Quantized, apply, module_bytes
from autoquant.delivery.comparison import check_same
from autoquant.errors import CheckpointError, ModelError
from autoquant.events import Notice, StageFinished, StageProgress, StageStarted
from autoquant.records import LayerChoice, LinearShape, Plan, Prediction, RouteStep

ROUTE = (RouteStep(upper_m=4, kernel="dequantize-matmul"), RouteStep(upper_m=None, kernel="int-mm"))


class Model(nn.Module):
    """Two linears, of which the first shares its weight with a third, and an embedding that shares
    the head's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.one = nn.Linear(64, 64)
        self.same = nn.Linear(64, 64, bias=False)
        self.same.weight = self.one.weight
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.same(torch.relu(self.one(self.embed(ids)))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().to(torch.bfloat16).eval().requires_grad_(False)


def layer(
    name, parameters=None, fmt="int8-row/plain", route=ROUTE, n=64, dtype="bfloat16", bias=False
):
    return LayerChoice(
        name=name,
        shape=LinearShape(n=n, k=64, bias=bias, dtype=dtype),
        format=fmt,
        route=route,
        numerics="int8-row+a16",
        latency_us={},
        memory_bytes=0,
        loss=0.0,
        parameters=parameters or (f"{name}.weight",),
    )


def plan(*layers):
    return Plan(
        plan_id="abcd",
        study_id="study",
        label="front 1",
        kind="front",
        model_hash="hash",
        dtype="bfloat16",
        layers=layers,
        prediction=Prediction(request_ms=0, linear_ms=0, loss=0, memory_bytes=0),
    )


SHARED = layer("one", ("one.weight", "same.weight"), bias=True)
HEAD = layer("head")
PLAIN = layer("one", fmt="bfloat16/plain", route=(RouteStep(upper_m=None, kernel="matmul"),))


def test_a_weight_becomes_its_format_with_its_route(model):
    assert apply(plan(SHARED), model) is model
    weight = model.one.weight.data
    assert isinstance(weight, RoutedWeight)
    assert (weight.format_id, weight.steps()) == ("int8-row/plain", ROUTE)
    assert type(weight.stored) is get_format("int8-row/plain").tensor_type
    assert not model.one.weight.requires_grad


def test_another_kernel_stands_in_for_rows_that_the_routes_own_cannot_compute_and_that_is_told(
    model, monkeypatch
):
    few = Kernel(
        id="few",
        numerics=A16,
        linear=F.linear,
        unsupported=lambda _s, m, _d: "too many" if m > 4 else None,
    )
    kernels = (few, Kernel(id="any", numerics=A16, linear=F.linear))
    fmt = Format(
        id="narrow/plain", quantize=torch.clone, dequantize=lambda stored: stored, kernels=kernels
    )
    monkeypatch.setattr(registry, "_registered", {fmt.id: fmt})
    told = []
    narrow = layer(
        "one", fmt="narrow/plain", route=(RouteStep(upper_m=None, kernel="few"),), bias=True
    )
    apply(plan(narrow), model, listener=told.append)
    steps = (RouteStep(upper_m=4, kernel="few"), RouteStep(upper_m=None, kernel="any"))
    assert model.one.weight.data.steps() == steps
    [notice] = [event for event in told if isinstance(event, Notice)]
    assert notice.text == (
        "narrow/plain: few cannot compute every number of rows, so what is used is few up to 4 "
        "rows, any above"
    )


def test_names_that_share_a_weight_share_the_new_one(model):
    apply(plan(SHARED), model)
    assert model.same.weight is model.one.weight


def test_a_kept_embedding_keeps_its_weight(model):
    before = model.embed.weight.clone()
    apply(plan(HEAD), model)
    assert torch.equal(model.embed.weight, before) and type(model.embed.weight.data) is torch.Tensor
    assert isinstance(model.head.weight.data, RoutedWeight)


def test_an_unquantized_layer_keeps_its_very_tensor(model):
    before = model.one.weight
    apply(plan(PLAIN), model)
    assert model.one.weight is before


@pytest.mark.parametrize("tokens", [1, 4, 5, 16])
def test_the_route_decides_by_rows_and_the_result_is_near_the_original(model, tokens):
    ids = torch.arange(tokens).unsqueeze(0)
    wanted = model(ids).float()
    got = apply(plan(SHARED, HEAD), copy.deepcopy(model))(ids).float()
    assert 0 < ((got - wanted).norm() / wanted.norm()) < 0.05


def test_each_side_of_a_route_computes_what_its_kernel_computes(model):
    apply(plan(SHARED), model)
    weight, bias, fmt = model.one.weight.data, model.one.bias, get_format("int8-row/plain")
    for rows, kernel in ((4, "dequantize-matmul"), (5, "int-mm")):
        x = torch.randn(rows, 64).to(torch.bfloat16)
        assert torch.equal(model.one(x), fmt.kernel(kernel).linear(x, weight.stored, bias))


@pytest.mark.parametrize(
    "bad",
    [
        layer("missing"),
        layer("one.deeper"),
        layer("head", n=128),
        layer("head", dtype="float32"),
        layer("head", ("head.weight", "nowhere.weight")),
    ],
)
def test_a_plan_of_another_model_is_refused_and_changes_nothing(model, bad):
    before = {name: parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    with pytest.raises(ModelError) as caught:
        apply(plan(SHARED, bad), model)
    assert "\n" not in str(caught.value)
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())


def test_a_plan_is_not_applied_twice(model):
    apply(plan(SHARED), model)
    with pytest.raises(ModelError, match="already quantized"):
        apply(plan(SHARED), model)


def test_memory_counts_each_weight_once_as_it_is_stored(model):
    plain = 64 * 64 * 2
    assert module_bytes(model) == 2 * plain + 64 * 2
    apply(plan(SHARED), model)
    quantized = module_bytes(model) - plain - 64 * 2
    assert 64 * 64 <= quantized < 64 * 64 * 1.1


def test_progress_is_told_layer_by_layer(model):
    events = []
    apply(plan(SHARED, HEAD), model, listener=events.append)
    assert [type(event) for event in events] == [
        StageStarted,
        StageProgress,
        StageProgress,
        StageFinished,
    ]
    assert [event.what for event in events if isinstance(event, StageProgress)] == ["one", "head"]
    assert "2 int8-row/plain" in events[-1].summary


def test_layers_of_many_formats_live_in_one_model(model):
    ids = torch.arange(12).unsqueeze(0)
    wanted = model(ids).float()
    half = replace(HEAD, format="float16/plain", route=(RouteStep(upper_m=None, kernel="matmul"),))
    got = apply(plan(SHARED, half), model)(ids)
    assert got.dtype == torch.bfloat16
    assert ((got.float() - wanted).norm() / wanted.norm()) < 0.05


def test_only_layers_that_change_from_plan_to_plan_are_quantized_again(model, monkeypatch):
    quantized = []
    fmt = get_format("int8-row/plain")
    monkeypatch.setattr(type(fmt), "store", _counting(type(fmt).store, quantized))
    kept = Quantized()
    modules = [copy.deepcopy(model) for _ in range(4)]
    rerouted = replace(SHARED, route=ROUTE[1:])
    for module, layers in zip(
        modules, ((SHARED,), (rerouted, HEAD), (HEAD,), (SHARED, HEAD)), strict=True
    ):
        apply(plan(*layers), module, quantized=kept)
    assert len(quantized) == 3, (
        "the shared weight, the head, and the shared weight that one plan was without"
    )
    ids = torch.arange(32).unsqueeze(0)
    fresh = apply(plan(SHARED, HEAD), copy.deepcopy(model))
    assert torch.equal(modules[3](ids), fresh(ids))
    assert modules[1].one.weight.data.route != modules[3].one.weight.data.route


class Shaky(nn.Linear):
    """A linear whose sums come out in another order each time."""

    def forward(self, x):
        return super().forward(x) + 1e-3 * torch.rand(())


@pytest.mark.parametrize(("kind", "repeatable"), [(nn.Linear, True), (Shaky, False)])
def test_what_is_read_back_is_compared_by_its_logits_or_else_its_weights(kind, repeatable):
    inputs = (torch.ones(1, 8),)
    written = SimpleNamespace(module=kind(8, 8), kind="module", example_inputs=inputs)
    assert check_same(written, copy.deepcopy(written.module), Path("out")) is repeatable
    other = copy.deepcopy(written.module)
    with torch.no_grad():
        other.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="does not compute the same"):
        check_same(written, other, Path("out"))


def _counting(store, calls):
    def counted(self, weight):
        calls.append(self.id)
        return store(self, weight)

    return counted
