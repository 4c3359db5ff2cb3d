"""Divergence of a module's outputs from the unquantized module's, on varied sample inputs.

It judges a module that reads no tokens if the user gives no loss. It measures how well two modules
agree, and not how good either is.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from autoquant.errors import QualityError, WorkloadError, first_line
from autoquant.evaluators.quality import Comparison, Enough, FunctionQuality, TextQuality
from autoquant.evaluators.text import PARTS, Part, deal
from autoquant.models.outputs import output_tensor

SAMPLES: Mapping[Part, int] = {"calibration": 4, "selection": 12, "report": 16}
Inputs = tuple[Any, ...] | dict[str, Any]
"""Arguments of one forward pass, positional or by name."""
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
WORST = 1e6
"""The largest divergence, which also stands for outputs that are not finite."""
_SAME_EVERY_TIME = 1e-6
_VERSION = 1


@dataclass(frozen=True, slots=True)
class VariedInputs:
    """Inputs varied from sample inputs, dealt in turn to three disjoint parts.

    `SAMPLES` holds the number of inputs of each part. Input 0 is the sample itself. The number and
    the seed of every other input determine it. Each element of a tensor gets a partner: the element
    at the same place of a random row (entry of the first dimension), or a random element if the
    tensor has one row. With t drawn from 0 to 1 for the whole input,

    - a floating-point element becomes (1 - t) times itself plus t times its partner;
    - an integer becomes its partner with probability t;
    - booleans, tensors of one element, and objects that are no tensors do not change.

    So dtypes and shapes do not change, and numbers stay in the range of the sample's tensor (or of
    its column, with several rows). If every floating-point tensor repeats one number
    (`torch.zeros`, `torch.ones`), the sample is a placeholder without a range. Then all elements
    are drawn from the standard normal distribution, also in input 0.

    Attributes:
        sample: The sample inputs, on the model's device.
        integers: Vary integers too.
    """

    sample: Inputs
    seed: int
    integers: bool = True

    @property
    def key(self) -> str:
        """Hash of everything that the inputs depend on."""
        digest = hashlib.sha256(f"{_VERSION} {self.seed} {self.integers} {dict(SAMPLES)}".encode())
        if isinstance(self.sample, dict):
            digest.update(repr(list(self.sample)).encode())
        for leaf in tree_leaves(self.sample):
            if isinstance(leaf, torch.Tensor):
                digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
                digest.update(
                    leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                )
            else:
                digest.update(repr(leaf).encode())
        return f"outputs-{digest.hexdigest()[:12]}"

    @property
    def placeholder(self) -> bool:
        """Whether every floating-point tensor repeats one number."""
        tensors = [
            leaf
            for leaf in tree_leaves(self.sample)
            if isinstance(leaf, torch.Tensor) and leaf.numel() > 1
        ]
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        return bool(floating) and all(_is_constant(tensor) for tensor in floating)

    @property
    def varies(self) -> bool:
        """Whether there is more than one input."""
        pairs = zip(tree_leaves(self.make(0)), tree_leaves(self.make(1)), strict=True)
        tensors = [(one, other) for one, other in pairs if isinstance(one, torch.Tensor)]
        return any(not torch.equal(one, other) for one, other in tensors)

    def part(self, part: Part) -> Iterator[Inputs]:
        """Yield the inputs of a part, each made when it is asked for."""
        for number, owner in enumerate(deal(SAMPLES)):
            if owner == part:
                yield self.make(number)

    def make(self, number: int) -> Inputs:
        """Return the input with a number."""
        placeholder = self.placeholder
        if number == 0 and not placeholder:
            return self.sample
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        share = float(torch.rand((), generator=generator))

        def varied(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.numel() < 2:
                return tensor
            if tensor.is_floating_point():
                if placeholder:
                    return torch.randn(tensor.shape, generator=generator).to(tensor)
                return tensor.lerp(_partners(tensor, generator), share)
            if tensor.dtype in _INTEGERS and self.integers:
                taken = torch.rand(tensor.shape, generator=generator) < share
                return torch.where(taken.to(tensor.device), _partners(tensor, generator), tensor)
            return tensor

        made: Inputs = tree_map_only(torch.Tensor, varied, self.sample)
        return made


def _is_constant(tensor: torch.Tensor) -> bool:
    return bool((tensor == tensor.reshape(-1)[0]).all())


def _partners(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return for each element the one at its place in a random row.

    A single row gives random elements of itself.
    """
    rows = tensor.reshape(tensor.shape[0], -1) if len(tensor) > 1 else tensor.reshape(-1, 1)
    drawn = torch.randint(0, len(rows), rows.shape, generator=generator)
    return rows.gather(0, drawn.to(tensor.device)).reshape(tensor.shape)


class DivergenceQuality(ABC):
    """Divergence from the unquantized model, which itself has 0.

    So an increase over it is the divergence itself.
    """

    logarithmic = False
    key: str

    @abstractmethod
    def compare(
        self,
        module: nn.Module,
        reference: nn.Module,
        part: Part,
        known: Sequence[float] = (),
        enough: Enough | None = None,
    ) -> Comparison:
        """Return the divergence of each sample; see `autoquant.evaluators.quality.Quality`."""

    @abstractmethod
    def increase_over(self, reference: nn.Module, part: Part) -> Callable[[nn.Module], float]:
        """Return a function for the mean divergence of a module from today's reference."""


class OutputQuality(DivergenceQuality):
    """Divergence of a module's outputs from the unquantized module's, see `divergence`."""

    def __init__(self, inputs: VariedInputs) -> None:
        self.inputs = inputs
        self.key = inputs.key

    def compare(
        self,
        module: nn.Module,
        reference: nn.Module,
        part: Part,
        known: Sequence[float] = (),
        enough: Enough | None = None,
    ) -> Comparison:
        losses = tuple(
            divergence(outputs_of(reference, inputs), outputs_of(module, inputs))
            for inputs in self.inputs.part(part)
        )
        return Comparison(losses, (0.0,) * len(losses), None)

    def increase_over(self, reference: nn.Module, part: Part) -> Callable[[nn.Module], float]:
        samples = [(inputs, outputs_of(reference, inputs)) for inputs in self.inputs.part(part)]

        def increase(module: nn.Module) -> float:
            each = [
                divergence(expected, outputs_of(module, inputs)) for inputs, expected in samples
            ]
            return sum(each) / len(each)

        return increase


AnyQuality = TextQuality | FunctionQuality | DivergenceQuality


def outputs_of(module: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Return every floating-point tensor that a forward pass returns, in order.

    Raises:
        QualityError: It returns none.
    """
    with torch.no_grad():
        output = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    try:
        tensors = [leaf for leaf in leaves or [output_tensor(output)] if leaf.is_floating_point()]
    except WorkloadError:
        tensors = []
    if not tensors:
        raise QualityError(
            "the model returns no floating-point tensor whose divergence could be measured: judge"
            " it by a loss of your own, --quality package.module:callable"
        )
    return tensors


def divergence(expected: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> float:
    """Return ||y - y0||^2 / ||y0||^2 of outputs y from expected y0, averaged over tensors.

    Elements that are not finite in y0 do not count, nor do tensors that are all 0 there. The error
    of a tensor is at most a million, which also stands for a y that is not finite.

    Raises:
        QualityError: The numbers of tensors or their shapes differ.
    """
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in outputs]:
        raise QualityError(
            "the shapes of the model's outputs depend on its numbers, so quantized and unquantized"
            " ones cannot be compared: judge it by a loss of your own, --quality"
            " package.module:callable"
        )
    errors = [
        error
        for y0, y in zip(expected, outputs, strict=True)
        if (error := _relative_squared_error(y0, y)) is not None
    ]
    return sum(errors) / len(errors) if errors else 0.0


def _relative_squared_error(expected: torch.Tensor, output: torch.Tensor) -> float | None:
    """Return the error, or None if every expected element is 0 or not finite."""
    y0, y = expected.float(), output.float()
    counts = y0.isfinite()
    scale = torch.where(counts, y0, 0.0).square().sum().item()
    if scale == 0.0:
        return None
    error = torch.where(counts, y - y0, 0.0).square().sum().item() / scale
    return min(error, WORST) if math.isfinite(error) else WORST


def vary(module: nn.Module, sample: Inputs, seed: int) -> tuple[VariedInputs, list[str]]:
    """Return varied inputs that the module takes, and notes on them for the user.

    Raises:
        QualityError: The module takes no varied inputs, or its outputs cannot be compared.
    """
    inputs = VariedInputs(sample, seed)
    notes = []
    try:
        _try(module, inputs)
    except QualityError:
        raise
    except Exception as error:  # noqa: BLE001 - a module may refuse numbers in any way
        reason = first_line(error, with_type=True)
        inputs = VariedInputs(sample, seed, integers=False)
        _try_floating(module, inputs, reason)
        notes.append(
            "integer inputs stay as the sample has them, since the model does not take others "
            f"({reason})"
        )
    if inputs.placeholder:
        notes.append(
            "the sample inputs are placeholders (one number only), so standard normal numbers "
            "stand for them"
        )
    elif not inputs.varies:
        notes.append(
            "nothing in the sample inputs can be varied, so all is judged on one input: give "
            "typical ones"
        )
    first = inputs.make(0)
    again = divergence(outputs_of(module, first), outputs_of(module, first))
    if again > _SAME_EVERY_TIME:
        notes.append(
            f"the unquantized model's outputs differ by {again:.2g} from run to run: smaller "
            "divergence says nothing"
        )
    return inputs, notes


def _try_floating(module: nn.Module, inputs: VariedInputs, reason: str) -> None:
    try:
        _try(module, inputs)
    except QualityError:
        raise
    except Exception as error:
        raise QualityError(
            f"the model does not take inputs varied from its sample inputs ({reason}): give other "
            "ones with --sample-inputs, or judge it by a loss of your own, --quality"
            " package.module:callable"
        ) from error


def _try(module: nn.Module, inputs: VariedInputs) -> None:
    """Run the module on every input.

    Raises:
        QualityError: The outputs are all 0 or not finite.
        Exception: Any error of the module.
    """
    for part in PARTS:
        for each in inputs.part(part):
            outputs = outputs_of(module, each)
            if all(_relative_squared_error(tensor, tensor) is None for tensor in outputs):
                raise QualityError(
                    "the unquantized model's outputs on its sample inputs are all 0 or not finite,"
                    " so nothing can diverge from them: give typical ones with --sample-inputs"
                    " package.module:callable"
                )
