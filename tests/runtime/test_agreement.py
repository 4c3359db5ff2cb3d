"""What compiled code may differ by from a model's own code."""

import pytest
import torch
import torch.nn.functional as F

from autoquant.runtime.agreement import unexplained_error

TOKENS = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def linear(weight):
    """A run whose result is a product with the weight; each call is counted."""
    calls = []

    def run():
        calls.append(weight)
        return F.linear(TOKENS, weight)

    return run, calls


def robust():
    return linear(torch.eye(64).bfloat16())


def chaotic():
    """Large terms that cancel each other, so that rounding decides what is left."""
    one = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    both = torch.stack((100 * one, -100 * one), dim=-1).flatten(1)
    alike = TOKENS.reshape(4, 32, 2).mean(-1, keepdim=True).expand(-1, -1, 2).reshape(4, 64)
    calls = []

    def run():
        calls.append(both)
        return F.linear(alike.bfloat16(), (both + 0.5).bfloat16())

    return run, calls


def test_a_small_difference_is_not_looked_into():
    run, calls = robust()
    expected = run()
    assert unexplained_error(1.05 * expected, expected, run) is None and len(calls) == 1


@pytest.mark.parametrize("factor", [1.3, 0.0, float("nan"), float("inf")])
def test_what_rounding_does_not_move_must_be_the_same(factor):
    run, _ = robust()
    expected = run()
    error = unexplained_error(factor * expected, expected, run)
    assert error is not None and not error <= 0.1


def test_what_rounding_moves_as_far_is_taken_for_rounding():
    run, _ = chaotic()
    expected = run()
    assert unexplained_error(1.3 * expected, expected, run) is None


def test_the_answer_is_the_same_each_time():
    run, _ = robust()
    expected = run()
    errors = {unexplained_error(1.3 * expected, expected, run) for _ in range(3)}
    assert len(errors) == 1
