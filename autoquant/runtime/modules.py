"""Models that are no language models, compiled as `autoquant bench` times them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autoquant.runtime.compiled import compile_forward, ready_to_compile


def compile(module: nn.Module) -> Callable[..., Any]:
    """Return `module` as a function, compiled for the shapes that it is called with.

    The weights are the module's own tensors. A weight that is replaced later is not seen by the
    function.
    """
    ready = ready_to_compile(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return ready(*args, **kwargs)

    compiled = compile_forward(forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return compiled(*args, **kwargs)

    return run
