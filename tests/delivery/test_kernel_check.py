"""Kernels checked where a plan is applied or loaded: the line names the layer and the kernel."""

import pytest
import torch
from models.tiny_models import as_loaded, tiny_llama
from torch import nn

from autoquant.candidates import get_format, routed
from autoquant.delivery.kernel_check import KernelsInModel, check_kernels
from autoquant.errors import KernelError
from autoquant.records import RouteStep, Workload
from autoquant.runtime.phases import make_phases
from autoquant.runtime.prepare import prepare

PACK, MATMUL = "int8pack-mm", "dequantize-matmul"
FORMAT = "int8-row/plain"


@pytest.fixture
def lie(monkeypatch):
    """Let a kernel of int8-row/plain compute otherwise."""

    def tell(kernel, function):
        real = routed.get_kernel_function(FORMAT, kernel)
        fmt = get_format(FORMAT)
        linear = lambda x, stored, bias: function(x, real(x, stored, bias))  # noqa: E731
        one = next(each for each in fmt.kernels if each.id == kernel)
        monkeypatch.setitem(routed._KERNEL_FUNCTIONS, (FORMAT, kernel), linear)
        before = one.linear
        object.__setattr__(one, "linear", linear)
        restored.append((one, before))

    restored = []
    yield tell
    for one, before in restored:
        object.__setattr__(one, "linear", before)


def quantized(*steps):
    """A tiny Llama with all its linears in int8."""
    model, fmt = tiny_llama(), get_format(FORMAT)
    route = tuple(RouteStep(upper_m=upper, kernel=kernel) for upper, kernel in steps)
    for child in model.modules():
        if isinstance(child, nn.Linear):
            weight = child.weight.data
            wrapped = routed.RoutedWeight.wrap(fmt.store(weight), fmt.id, route, weight.dtype)
            child.weight = nn.Parameter(wrapped, requires_grad=False)
    return prepare(model)


def test_each_shape_and_kernel_is_checked_once():
    told = []
    model = quantized((4, PACK), (None, MATMUL))
    shapes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)}
    assert check_kernels(model, lambda *what: told.append(what)) == 5 * len(shapes)
    assert len(told) == 2 * len(shapes) and {what[1:] for what in told} == {
        (FORMAT, PACK),
        (FORMAT, MATMUL),
    }


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: y * 1.1,
        lambda x, y: y * float("nan"),
        lambda x, y: y * 1.1 if x.shape[-2] == 33 else y,
        lambda x, y: y * (1 + 1e-2 * torch.randn_like(y)),
        lambda x, y: y[..., :-1],
    ],
    ids=["scaled", "NaN", "for some rows", "noisy", "too short"],
)
def test_a_wrong_kernel_is_refused_in_a_line_with_its_layer(lie, function):
    model = quantized((None, PACK))
    lie(PACK, function)
    with pytest.raises(KernelError) as caught:
        check_kernels(model)
    text = str(caught.value)
    assert f"kernel {FORMAT}/{PACK} computes wrong numbers here at m=" in text
    assert "in model.layers.0.self_attn.q_proj: " in text and "\n" not in text
    assert (caught.value.format, caught.value.kernel) == (FORMAT, PACK)


def test_a_kernel_is_checked_only_with_rows_that_its_route_gives_it(lie):
    model = quantized((4, PACK), (None, MATMUL))
    lie(PACK, lambda x, y: y * 1.1 if x.shape[-2] > 4 else y)
    assert check_kernels(model) > 0
    lie(MATMUL, lambda x, y: y * 1.1 if x.shape[-2] >= 5 else y)
    with pytest.raises(KernelError, match=f"{MATMUL} computes wrong numbers here at m=5"):
        check_kernels(model)


def test_a_lie_that_only_a_models_own_numbers_bring_out_is_found_there(lie):
    model = quantized((None, PACK))
    lie(PACK, lambda x, y: y * 1.2 if x.shape[-2] == 7 else y)  # not among the rows tried
    check_kernels(model)
    phases = make_phases(
        as_loaded(model, "causal_lm", max_positions=128), Workload.parse("prefill=7,decode=1")
    )
    told = []
    with (
        KernelsInModel(model, lambda *what: told.append(what)),
        pytest.raises(
            KernelError, match=r"at m=7 in model\.layers\.0\.self_attn\.q_proj: relative"
        ),
    ):
        phases.reset("prefill")
        phases.run_eager("prefill")
    assert told == [("model.layers.0.self_attn.q_proj", FORMAT, PACK)]


def test_a_right_model_passes_with_its_own_numbers():
    model = quantized((4, PACK), (None, "int-mm"))
    phases = make_phases(
        as_loaded(model, "causal_lm", max_positions=128), Workload.parse("prefill=20,decode=1")
    )
    told = []
    with KernelsInModel(model, lambda *what: told.append(what)):
        phases.reset("decode")
        phases.run_eager("decode")
    assert {what[2] for what in told} == {PACK, "int-mm"}
