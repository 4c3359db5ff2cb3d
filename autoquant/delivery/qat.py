"""Train a model on while its layers are rounded as a plan says (quantization-aware training).

torchao replaces each linear by one whose weight is rounded in every forward pass, while gradients
reach the unrounded one. Afterwards the plan is applied to the trained weights as it is to any.

Source: torchao 0.18, `quantization/qat/`; Jacob et al. 2018, "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import MinLen
from torch import nn
from typing_extensions import TypedDict

from autoquant.errors import CheckpointError, ModelError, first_line
from autoquant.files import read_text
from autoquant.models.copies import unwrapped
from autoquant.models.quiet import some
from autoquant.records.numbers import Positive
from autoquant.typed import read

FILE = "qat.json"
FORMAT_VERSION = 1


class _Rounding(TypedDict, total=False):
    """What numbers are rounded to. `per` names what shares a scale, or is so many along k."""

    type: Literal["int2", "int3", "int4", "int8", "float8"]
    per: Literal["row", "tensor", "token"] | Positive
    symmetric: bool


class _Layer(TypedDict):
    weight: _Rounding
    activation: _Rounding | None


class _File(TypedDict):
    format_version: Literal[1]
    layers: Annotated[dict[str, _Layer], MinLen(1)]


def prepare_qat(model: nn.Module, folder: str | Path) -> nn.Module:
    """Let linears of a model round their weights in every forward pass, in place, for training.

    Parameters stay the model's own. Train all or some of them as usual, in float32 or bfloat16.

    Args:
        model: The unquantized model, on any device.
        folder: What `autoquant export --to qat` wrote.

    Returns:
        The same module.

    Raises:
        CheckpointError: The folder holds no such description, or a damaged one.
        ModelError: The model lacks a layer, or has it as another module than a linear. It has not
            been changed.
    """
    from torchao.quantization import FqnToConfig, quantize_

    layers = _read(Path(folder))
    inner = unwrapped(model)
    parts = dict(inner.named_modules())
    missing = [name for name in layers if not isinstance(parts.get(name), nn.Linear)]
    if missing:
        raise ModelError(
            f"{folder} is for another model: this one has no linear {some(missing)}; give the model"
            " that was searched"
        )
    configs: Any = {name: _config(layer) for name, layer in layers.items()}
    quantize_(inner, FqnToConfig(configs), filter_fn=None)
    return model


def finish_qat(model: nn.Module) -> nn.Module:
    """Give a model that `prepare_qat` returned its plain linears back, in place.

    They hold the trained weights, unrounded: save them, and apply the plan to them.

    Returns:
        The same module.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(unwrapped(model), QATConfig(step="convert"))
    return model


def _read(folder: Path) -> Mapping[str, _Layer]:
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {FILE}: give a folder that `autoquant export --to qat` wrote"
        )
    try:
        found: _File = read(_File, read_text(path))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({first_line(error)}): export it again"
        ) from error
    return found["layers"]


def _config(layer: _Layer) -> Any:
    """Return torchao's configuration of a layer."""
    from torchao.quantization.qat import QATConfig

    activation = layer["activation"]
    return QATConfig(
        weight_config=_rounding(layer["weight"]),
        activation_config=None if activation is None else _rounding(activation),
        step="prepare",
    )


def _rounding(rounding: _Rounding) -> Any:
    from torchao.quantization import PerRow, PerTensor, ZeroPointDomain
    from torchao.quantization.qat import Float8FakeQuantizeConfig, IntxFakeQuantizeConfig

    per = rounding["per"]
    if rounding["type"] == "float8":
        return Float8FakeQuantizeConfig(granularity=PerTensor() if per == "tensor" else PerRow())
    symmetric = rounding.get("symmetric", True)
    dtype = getattr(torch, rounding["type"])
    if per == "token":
        return IntxFakeQuantizeConfig(dtype, "per_token", is_symmetric=symmetric)
    if per == "row":
        return IntxFakeQuantizeConfig(dtype, "per_channel", is_symmetric=symmetric)
    if symmetric:
        return IntxFakeQuantizeConfig(dtype, group_size=per)
    unsigned = getattr(torch, f"u{rounding['type']}")
    return IntxFakeQuantizeConfig(
        unsigned,
        group_size=per,
        is_symmetric=False,
        zero_point_domain=ZeroPointDomain.FLOAT,
        zero_point_precision=torch.float32,  # integers would move it by up to half a unit
    )
