"""Plans proven: what their quality is measured with."""

from dataclasses import replace
from math import nan

import pytest
import torch
import torch.nn.functional as F
from models.tiny_models import as_loaded, tiny_llama
from torch import nn

from autoquant.candidates import A8_ROW, A16, ACTIVATION_ROUNDING, Format, Kernel, registry, routed
from autoquant.delivery.applier import apply
from autoquant.errors import ModelError
from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.text import PARTS, TextParts
from autoquant.records import (
    PARTLY,
    LayerChoice,
    LinearShape,
    Plan,
    Prediction,
    RouteStep,
    Workload,
)
from autoquant.runtime import parts
from autoquant.runtime.decoder_phases import DecoderPhases
from autoquant.solver.limits import Limits
from autoquant.tuner.prove import Prover, prompts_lose_most, worst_numerics

SHAPE = LinearShape(n=8, k=8, bias=False, dtype="float32")


def few_only(_shape, m, _device):
    return "it takes up to 4 rows" if m > 4 else None


def format_that_tells(calls):
    def kernel(name, numerics, **limits):
        def linear(x, weight, bias):
            calls.append((name, x.numel() // x.shape[-1]))
            return F.linear(ACTIVATION_ROUNDING[numerics](x), weight, bias)

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


def test_a_prompt_loses_most_unless_other_rows_lose_more(monkeypatch):
    fmt = format_that_tells([])
    monkeypatch.setitem(registry._registered, fmt.id, fmt)
    mixed = ((4, "rounding"), (None, "any"))
    assert prompts_lose_most(plan_of(A8_ROW, *mixed), 4)
    assert not prompts_lose_most(plan_of(A8_ROW, *mixed), 5)
    assert prompts_lose_most(plan_of(A16, (4, "few"), (None, "any")), 32)


WINDOW = 8


@pytest.fixture
def prover(monkeypatch):
    """Proves plans of a tiny model whose steps are traced, and run as they were traced."""

    def start(window=WINDOW, count=3, **changes):
        generator = torch.Generator().manual_seed(0)
        size = (count, window)
        windows = {part: torch.randint(0, 64, size, generator=generator) for part in PARTS}
        return Prover(
            loaded=as_loaded(tiny_llama(dtype=torch.float32).requires_grad_(False)),
            workload=Workload.parse(f"prefill={WINDOW},decode=2"),
            quality=TextQuality(TextParts(windows), "cpu", keep_reference=True),
            device="cpu",
            execution="compiled",
            **changes,
        )

    monkeypatch.setattr(parts, "FUNCTIONS", {})
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda graph, _inputs, **_options: graph
    )
    return start


@pytest.fixture
def calls():
    """(kernel, rows) of each product of the plan."""
    return []


@pytest.fixture
def plan(calls, monkeypatch):
    """Rounds the weight of one layer to whole tenths, and its activation not at all."""
    fmt = replace(
        format_that_tells(calls), quantize=lambda w: (w * 10).round() / 10, id="tenths-any/plain"
    )
    monkeypatch.setitem(registry._registered, fmt.id, fmt)
    monkeypatch.setattr(routed, "_KERNEL_FUNCTIONS", {})
    name = "model.layers.1.mlp.up_proj"
    plan = plan_of(A16, (None, "any"))
    layer = replace(
        plan.layers[0],
        name=name,
        parameters=(f"{name}.weight",),
        shape=LinearShape(n=64, k=32, bias=False, dtype="float32"),
        format=fmt.id,
        numerics=f"tenths-any+{A16}",
    )
    return replace(plan, layers=(layer,))


def rounding_steps(plan):
    """The plan with activations rounded in steps, and not in the prompt: quality is that of both."""
    (layer,) = plan.layers
    steps = ((4, "rounding"), (None, "any"))
    route = tuple(RouteStep(upper_m=upper_m, kernel=kernel) for upper_m, kernel in steps)
    return replace(plan, layers=(replace(layer, route=route, numerics=f"tenths-any+{A8_ROW}"),))


def test_what_only_steps_lose_is_measured_on_windows(prover, plan, calls):
    prover().prove(rounding_steps(plan))
    assert ("rounding", WINDOW) in calls and ("any", WINDOW) in calls
    calls.clear()
    prover().prove(plan)
    assert calls and "rounding" not in dict(calls)


@pytest.mark.parametrize("made", [lambda plan: plan, rounding_steps])
def test_windows_as_long_as_the_prompt_are_read_by_it(prover, plan, made, monkeypatch):
    compiled, eager = prover(), prover()
    plan = made(plan)
    proof = compiled.prove(plan)
    monkeypatch.setattr(Prover, "_compared_compiled", lambda *_: None)
    expected = eager.prove(plan)
    assert compiled._compiled_reference and not compiled.reference
    assert eager.reference and expected.increase.value != 0
    assert proof.loss == pytest.approx(expected.loss, abs=1e-4)
    assert proof.increase.value == pytest.approx(expected.increase.value, abs=1e-4)
    assert proof.kl == pytest.approx(expected.kl, abs=1e-4)


def test_the_unquantized_models_own_proof_makes_the_logits_that_plans_are_compared_with(
    prover, plan, monkeypatch
):
    proving, made = prover(), []
    original = replace(plan, layers=(), kind="original")
    proof = proving.prove(original)
    assert proof.increase.value == 0 and proof.kl == 0
    known = dict(proving._compiled_reference)
    assert len(known["report"]) == len(known["selection"]) and not proving.reference
    logits = DecoderPhases.all_logits

    def counted(phases, ids):
        made.append(phases)
        return logits(phases, ids)

    monkeypatch.setattr(DecoderPhases, "all_logits", counted)
    proving.prove(plan)
    assert made and proving._original[0] not in made and proving._compiled_reference == known


def test_an_unquantized_model_whose_loss_is_not_finite_is_refused(prover, plan, monkeypatch):
    monkeypatch.setattr(
        DecoderPhases, "all_logits", lambda _, ids: torch.full((1, WINDOW, 64), nan)
    )
    original = replace(plan, layers=(), kind="original")
    with pytest.raises(ModelError, match=r"not finite .* on 6 of 6 samples"):
        prover().prove(original)


def test_windows_of_another_length_are_read_eagerly(prover, plan):
    proving = prover(window=WINDOW + 1)
    proving.prove(plan)
    assert proving.reference and not proving._compiled_reference


@pytest.mark.parametrize("how", ["compiled", "eager"])
def test_a_plan_surely_beyond_the_limit_is_measured_on_some_windows(prover, plan, how):
    proving = prover(count=20, window=WINDOW if how == "compiled" else WINDOW + 1)
    whole = proving.prove(plan, limits=Limits(max_ppl_increase=10.0))
    known = proving._compiled_reference if how == "compiled" else proving.reference
    before = {part: len(losses) for part, losses in known.items()}
    cut = proving.prove(plan, limits=Limits(max_ppl_increase=-0.9))
    note = f"{PARTLY} 14 of 40 windows, surely beyond the limit"
    assert note in cut.notes and note not in whole.notes
    assert cut.selection_losses == pytest.approx(whole.selection_losses[:6], abs=1e-5)
    assert cut.increase.high - cut.increase.low > whole.increase.high - whole.increase.low
    again = proving._compiled_reference if how == "compiled" else proving.reference
    assert (
        before
        == {part: len(losses) for part, losses in again.items()}
        == {
            "report": 20,
            "selection": 20,
        }
    )


def test_the_seconds_of_a_proof_are_those_of_its_parts(prover, plan):
    proof = prover().prove(plan)
    assert list(proof.seconds) == ["apply", "check", "compile", "quality", "time"]
    assert all(seconds > 0 for seconds in proof.seconds.values())
