"""Models that are no language models, compiled as `autoquant bench` times them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn

from autoquant.devices import backend
from autoquant.runtime.compiled import compile_forward, ready_to_compile


def compile(module: nn.Module) -> Callable[..., Any]:
    """Return `module` as a function, compiled for the shapes that it is called with.

    The weights are the module's own tensors. A weight that is replaced later is not seen by the
    function. Where `torch.compile` does not work, the module runs as it is, and a warning says why.
    """
    called: Callable[..., Any] = module
    reason = _compile_failure(module)
    if reason is None:
        ready = ready_to_compile(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return ready(*args, **kwargs)

        called = compile_forward(forward)
    else:
        # Reported at the line that called this function.
        warnings.warn(
            "autoquant: the module runs without being compiled, since torch.compile does not work"
            f" here: {reason}",
            stacklevel=2,
        )

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return called(*args, **kwargs)

    return run


def _compile_failure(module: nn.Module) -> str | None:
    """Return why the module's device cannot compile it, or None."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    return None if tensor is None else backend(tensor.device).compile_failure()
