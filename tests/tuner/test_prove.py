"""Plans proven: what their quality is measured with."""

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates import A8_ROW, A16, Format, Kernel, registry, routed
from autoquant.export.applier import apply
from autoquant.records import LayerChoice, LinearShape, Plan, Prediction, RouteStep
from autoquant.tuner.prove import worst_numerics

SHAPE = LinearShape(n=8, k=8, bias=False, dtype="float32")


def few_only(_shape, m, _device):
    return "it takes up to 4 rows" if m > 4 else None


def format_that_tells(calls):
    def kernel(name, numerics, **limits):
        def linear(x, weight, bias):
            calls.append((name, x.numel() // x.shape[-1]))
            return F.linear(x, weight, bias)

        return Kernel(id=name, numerics=numerics, linear=linear, **limits)

    return Format(
        id="spy-any/plain",
        quantize=lambda w: w.clone(),
        dequantize=lambda s: s,
        kernels=(
            kernel("few", A16, unsupported=few_only),
            kernel("any", A16),
            kernel("rounding", A8_ROW),
        ),
    )


def plan_of(numerics, *steps):
    layer = LayerChoice(
        name="0",
        parameters=("0.weight",),
        shape=SHAPE,
        format="spy-any/plain",
        route=tuple(RouteStep(upper_m=upper_m, kernel=kernel) for upper_m, kernel in steps),
        numerics=f"spy-any+{numerics}",
        latency_us={},
        memory_bytes=0,
        loss=0.0,
    )
    prediction = Prediction(request_ms=0, linear_ms=0, loss=0, memory_bytes=0)
    return Plan(
        plan_id="a",
        study_id="s",
        label="l",
        kind="front",
        model_hash="m",
        dtype="float32",
        layers=(layer,),
        prediction=prediction,
    )


def kernels_used(monkeypatch, numerics, *steps):
    """(kernel, rows) of one row and of a window, while quality is measured and after."""
    calls = []
    fmt = format_that_tells(calls)
    monkeypatch.setitem(registry._registered, fmt.id, fmt)
    monkeypatch.setattr(routed, "_KERNEL_FUNCTIONS", {})
    plan, module = (
        plan_of(numerics, *steps),
        nn.Sequential(nn.Linear(8, 8, bias=False)).requires_grad_(False),
    )
    apply(plan, module)
    calls.clear()  # those that check the kernels
    with worst_numerics(module, plan):
        for rows in (1, 32):
            module(torch.randn(rows, 8))
    measured = list(calls)
    calls.clear()
    for rows in (1, 32):
        module(torch.randn(rows, 8))
    return measured, calls


def test_a_window_is_computed_where_the_kernel_that_stands_for_the_loss_takes_few_rows_only(
    monkeypatch,
):
    measured, after = kernels_used(monkeypatch, A16, (None, "few"))
    assert measured == after == [("few", 1), ("any", 32)]


def test_the_worst_numerics_of_a_route_are_used_for_any_rows(monkeypatch):
    measured, after = kernels_used(monkeypatch, A8_ROW, (4, "few"), (None, "rounding"))
    assert measured == [("rounding", 1), ("rounding", 32)] and after == [
        ("few", 1),
        ("rounding", 32),
    ]


def test_exact_numerics_that_score_worse_are_used_for_windows_too(monkeypatch):
    measured, _ = kernels_used(monkeypatch, A16, (4, "few"), (None, "rounding"))
    assert measured == [("few", 1), ("any", 32)]
