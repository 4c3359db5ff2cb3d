"""Tell whether compiled code computes what a model's own code does, but for rounding.

Compiled code rounds at other places. In a deep model that rounds activations to 8 bits the outputs
of both may part by far more than one rounding, and mean the same. So the model's own code tells how
far: it runs once more with the input of each linear rounded otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from autoquant.candidates.calls import LinearCall, LinearHook

ALWAYS_ALLOWED = 0.1
"""A relative difference that rounding is taken to explain without being asked."""
_TIMES_AS_FAR = 2.0
"""`studies/search_cost/agreement.py` finds 0.6 to 1.5 times in models of 4 to 48 blocks."""


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over that of `expected`, of tensors of one shape."""
    difference = (got.float() - expected.float()).norm()
    return float((difference / expected.float().norm().clamp(min=1e-30)).item())


def unexplained_error(
    got: torch.Tensor, expected: torch.Tensor, run_eagerly: Callable[[], torch.Tensor]
) -> float | None:
    """Return the relative error of compiled code if rounding does not explain it, or None.

    Args:
        got: What compiled code gave.
        expected: What the model's own code gave.
        run_eagerly: Runs that code once more. It is called only for an error above
            `ALWAYS_ALLOWED`.
    """
    error = relative_error(got, expected)
    if error <= ALWAYS_ALLOWED:
        return None
    with _RoundedOtherwise():
        noise = relative_error(run_eagerly(), expected)
    return None if error <= _TIMES_AS_FAR * noise else error  # NaN is not explained


class _RoundedOtherwise(LinearHook):
    """Moves the input of each linear by up to half a unit in the last place."""

    def __init__(self) -> None:
        super().__init__()
        self._generators: dict[torch.device, torch.Generator] = {}

    def on_linear(self, call: LinearCall) -> torch.Tensor:
        x = call.x
        if x.device not in self._generators:
            self._generators[x.device] = torch.Generator(x.device).manual_seed(0)
        half = torch.finfo(x.dtype).eps / 2
        noise = torch.empty(x.shape, device=x.device)
        noise.uniform_(-half, half, generator=self._generators[x.device])
        return call.compute((x.float() * (1 + noise)).to(x.dtype), call.straight())
