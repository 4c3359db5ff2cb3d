"""The project's own operators, which compilers do not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library: Any = torch.library.Library("autoquant", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_operator(
    name: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Return `function` as the operator `autoquant::NAME` for CUDA.

    It is bound to the dispatcher directly: `torch.library.custom_op` adds some 20 us of Python to
    each call, which is as long as four products.

    Args:
        fake: Returns an empty result of the right shape and dtype.
    """
    schema = torch.library.infer_schema(function, mutates_args=())
    operator = declare_operator(name, schema, fake)
    _library.impl(name, function, "CUDA")
    return operator


def declare_operator(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Return the operator `autoquant::NAME`, whose code a library registers.

    Args:
        schema: Arguments and result, as PyTorch writes them.
        fake: Returns an empty result of the right shape and dtype.
    """
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"autoquant::{name}", fake, lib=_library)
    operator: Callable[..., Any] = getattr(torch.ops.autoquant, name).default
    return operator
