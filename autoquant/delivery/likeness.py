"""Compare what another tool makes of an exported plan with the plan in memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from autoquant.candidates.flat import same_bits
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.comparison import Inputs, check_inputs, logits
from autoquant.models import LoadedModel
from autoquant.models.copies import shallow_copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How like a plan in memory a model is that another tool read.

    Attributes:
        weights: How many quantized weights were compared; 0 if the reader does not show them.
        moved: How many of them have other numbers, because the reader rounds their scales.
        farthest: By how much at most, relative to a row's largest number.
        others_differ: Names of unquantized tensors that differ.
        rounded: How many tensors were rounded that the plan leaves alone, as the user asked.
        same_logits: Its logits are bit for bit those of the plan's numbers, multiplied in the
            model's dtype.
        loss: Divergence from the unquantized model: of a language model the mean Kullback-Leibler
            divergence in nats a token, of another ||y - y0||^2 / ||y0||^2 of its output.
        plan_loss: The same of the plan with its own kernels.
        apart: Divergence from the plan's numbers, multiplied in the model's dtype.
        in_nats: The divergences are those of a language model.
    """

    weights: int
    moved: int
    farthest: float
    others_differ: list[str]
    rounded: int
    same_logits: bool
    loss: float
    plan_loss: float
    apart: float = 0.0
    in_nats: bool = True


_TEXT = (
    "The lighthouse stands on a rock at the end of the bay. Every evening a keeper climbs its"
    " ninety steps, lights the lamp and writes the hour into a book. When fog comes in from the"
    " sea, a horn sounds twice a minute, and ships that cannot see the coast turn away in time."
)
"""Something to read: on tokens in no order, logits of any two models are far apart."""


def read_text(loaded: LoadedModel) -> torch.Tensor:
    """Return the logits of a model for a short text, or for other inputs if it reads none."""
    return logits(loaded.module, read_inputs(loaded))


def likeness(
    loaded: LoadedModel,
    again: nn.Module,
    quantized: Collection[str] | None,
    original: torch.Tensor,
    *,
    rounded: Collection[str] = (),
) -> Likeness:
    """Compare a model that another tool read with the plan in memory.

    Args:
        loaded: The model that the plan was applied to.
        original: What `read_text` gave before.
        quantized: Names of the quantized weights, or None if the reader shows no weights.
        rounded: Names of tensors that the plan leaves alone and the export does not.
    """
    inputs = read_inputs(loaded)
    plain = _with_numbers(loaded.module)
    of_plan, of_numbers, found = (logits(m, inputs) for m in (loaded.module, plain, again))
    # Compared after the logits: some readers unpack a weight when it is first used.
    moves: list[float] = []
    others: list[str] = []
    if quantized is not None:
        moves = [_move(plain.get_parameter(name), _numbers(again, name)) for name in quantized]
        others = [
            name
            for name, tensor in plain.state_dict().items()
            if name not in (*quantized, *rounded) and not same_bits(tensor, _numbers(again, name))
        ]
    in_nats = loaded.kind in ("causal_lm", "token_lm")
    parted = divergence if in_nats else _distance
    return Likeness(
        weights=len(moves),
        moved=sum(move > 0 for move in moves),
        farthest=max(moves, default=0.0),
        others_differ=others,
        rounded=len(rounded),
        same_logits=torch.equal(of_numbers, found),
        loss=parted(original, found),
        plan_loss=parted(original, of_plan),
        apart=parted(of_numbers, found),
        in_nats=in_nats,
    )


def read_inputs(loaded: LoadedModel) -> Inputs:
    """Return positional and named arguments that a model is compared on."""
    if loaded.tokenizer is None or loaded.reader is not None:
        return check_inputs(loaded)
    ids = loaded.tokenizer(_TEXT)["input_ids"][: loaded.max_positions]
    return (torch.tensor([ids], device=loaded.device),), {}


def _with_numbers(module: nn.Module) -> nn.Module:
    """Return a copy with plain weights in place of quantized ones, in the model's dtype."""
    copied = shallow_copy(module)
    for part in copied.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and isinstance(parameter.data, RoutedWeight):
                numbers = parameter.data.dequantize().to(parameter.dtype).contiguous()
                part._parameters[name] = nn.Parameter(numbers, requires_grad=False)
    return copied


def _numbers(module: nn.Module, name: str) -> torch.Tensor:
    """Return a tensor of a model by name, as plain numbers."""
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf).detach()
    return tensor if type(tensor) is torch.Tensor else cast(torch.Tensor, tensor.dequantize())


def _move(numbers: torch.Tensor, others: torch.Tensor) -> float:
    """Return how far others are from `[n, k]` numbers, relative to each row's largest."""
    largest = numbers.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    return float(((numbers.float() - others.float()).abs() / largest).max())


def divergence(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of others from logits `[..., vocabulary]`."""
    expected, found = (each.float().log_softmax(-1) for each in (logits, others))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def _distance(output: torch.Tensor, other: torch.Tensor) -> float:
    """Return ||other - output||^2 / ||output||^2."""
    expected, found = output.double(), other.double()
    return float((found - expected).square().sum() / expected.square().sum().clamp(min=1e-30))
