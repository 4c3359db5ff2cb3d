"""The hook on calls of linears: what a user of it sees, and what it may replace."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models.tiny_models import tiny_llama
from torch import nn

import autoquant
from autoquant.candidates.calls import LinearCall, LinearHook

CALLS = (
    lambda x, w, b: F.linear(x, w, b),
    lambda x, w, b: F.linear(x, w, bias=b),
    lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    lambda x, w, b: torch.ops.aten.linear.default(x, w, b),
)


class Rows(LinearHook):
    """A worked user: notes how many rows each weight is multiplied with."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def on_linear(self, call: LinearCall) -> None:
        self.rows.append((id(call.weight), call.x.numel() // call.x.shape[-1]))


class Doubled(LinearHook):
    """A worked user: one weight is multiplied with twice the input."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def on_linear(self, call: LinearCall) -> torch.Tensor | None:
        return call.compute(2 * call.x, call.weight) if call.weight is self.weight else None


class Others(LinearHook):
    def __init__(self):
        super().__init__()
        self.functions = []

    def on_other(self, function, arguments):
        self.functions.append((function, len(arguments)))


def test_a_new_user_sees_every_linear_of_a_model_exactly_once():
    model = tiny_llama()
    linears = [child for child in model.modules() if isinstance(child, nn.Linear)]
    with torch.no_grad(), Rows() as hook:
        model(torch.tensor([[1, 2, 3]]), use_cache=False)
    assert sorted(hook.rows) == sorted((id(linear.weight), 3) for linear in linears)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_seen_however_its_arguments_are_passed(call):
    x, weight, bias = torch.randn(2, 5, 8), torch.randn(4, 8), torch.randn(4)
    seen = []

    class Seen(LinearHook):
        def on_linear(self, call):
            seen.append(call)

    with Seen():
        y = call(x, weight, bias)
    (found,) = seen
    assert found.x is x and found.weight is weight and found.bias is bias
    assert torch.equal(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("call", CALLS)
def test_a_result_that_the_hook_returns_is_used_and_other_calls_run_unchanged(call):
    x, weight, other, bias = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4, 8), torch.randn(4)
    with Doubled(weight):
        replaced, unchanged = call(x, weight, bias), call(x, other, bias)
    torch.testing.assert_close(replaced, 2 * x @ weight.t() + bias)
    torch.testing.assert_close(unchanged, x @ other.t() + bias)


def test_calls_that_a_hook_makes_itself_are_not_seen_again():
    class Again(LinearHook):
        calls = 0

        def on_linear(self, call):
            self.calls += 1
            return F.linear(call.x, call.weight, call.bias)

    with Again() as hook:
        F.linear(torch.randn(2, 8), torch.randn(4, 8))
    assert hook.calls == 1


def test_two_hooks_see_the_same_call_and_none_sees_it_afterwards():
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    with Rows() as outer, Rows() as inner:
        F.linear(x, weight)
    F.linear(x, weight)
    assert outer.rows == inner.rows == [(id(weight), 2)]


def test_other_functions_are_reported_apart_with_all_their_arguments():
    with Others() as hook:
        F.linear(torch.randn(2, 8), torch.randn(4, 8))
        torch.add(torch.ones(2), other=torch.ones(2))
    assert (torch.add, 2) in hook.functions
    assert F.linear not in [function for function, _ in hook.functions]


def test_no_other_function_mode_of_the_package_sees_linears():
    package = Path(autoquant.__file__).parent
    modes = [
        path.name for path in package.rglob("*.py") if "(TorchFunctionMode)" in path.read_text()
    ]
    assert sorted(modes) == ["calls.py", "recorded_steps.py"]  # the latter sees what is read
