"""How far a module's outputs are from the unquantized module's, on inputs varied from its sample inputs.

The judge of a module that reads no tokens, where the user gives no loss. It says how well two modules agree, not how good
either is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from autoquant.errors import QualityError, WorkloadError, first_line
from autoquant.evaluators.quality import Comparison, FunctionQuality, TextQuality
from autoquant.evaluators.text import PARTS, Part, deal
from autoquant.models.outputs import output_tensor

SAMPLES: Mapping[Part, int] = {"calibration": 4, "selection": 12, "report": 16}
Inputs = tuple[Any, ...] | dict[str, Any]
"""Arguments of one forward pass: positional, or by name."""
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_WORST = 1e6
_SAME_EVERY_TIME = 1e-6
_VERSION = 1


@dataclass(frozen=True, slots=True)
class VariedInputs:
    """Inputs of one forward pass, dealt in turn to three disjoint parts: `SAMPLES` says how many each part has.

    Input 0 is the sample itself. Every other one is drawn from its number and the seed. Each element of a tensor gets a partner:
    the element at the same place of a random row (entry of the first dimension), or, in a tensor of one row, a random element of
    it. With t drawn from 0 to 1 for the whole input,

    - a floating-point element becomes (1 - t) times itself plus t times its partner;
    - an integer becomes its partner with probability t;
    - booleans, tensors of one element, and what is no tensor, stay.

    So dtypes and shapes stay, and numbers lie in the range of the sample's tensor, or of its column where it has several rows.
    Where every floating-point tensor holds one number only (`torch.zeros`, `torch.ones`), which is a placeholder and no range,
    its elements are drawn from the standard normal distribution, those of input 0 too.

    Attributes:
        sample: The sample inputs, on the model's device.
        integers: Integers are varied too.
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
        """Whether every floating-point tensor holds one number only."""
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
        return any(isinstance(a, torch.Tensor) and not torch.equal(a, b) for a, b in pairs)

    def part(self, part: Part) -> Iterator[Inputs]:
        """The inputs of a part, each made when it is asked for."""
        for number, owner in enumerate(deal(SAMPLES)):
            if owner == part:
                yield self.make(number)

    def make(self, number: int) -> Inputs:
        """One input."""
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
    """For each element the one at the same place of a random row, or any where there is one row only."""
    rows = tensor.reshape(tensor.shape[0], -1) if len(tensor) > 1 else tensor.reshape(-1, 1)
    drawn = torch.randint(0, len(rows), (len(rows), rows.shape[1]), generator=generator).to(
        tensor.device
    )
    return rows.gather(0, drawn).reshape(tensor.shape)


class OutputQuality:
    """Divergence of a module's outputs from the unquantized module's; see `divergence`.

    The unquantized module diverges from itself by 0, so an increase over it is the divergence itself.
    """

    logarithmic = False

    def __init__(self, inputs: VariedInputs) -> None:
        self.inputs = inputs
        self.key = inputs.key

    def compare(
        self, module: nn.Module, reference: nn.Module, part: Part, known: Sequence[float] = ()
    ) -> Comparison:
        losses = tuple(
            divergence(outputs_of(reference, inputs), outputs_of(module, inputs))
            for inputs in self.inputs.part(part)
        )
        return Comparison(losses, (0.0,) * len(losses), None)

    def increase_over(self, reference: nn.Module, part: Part) -> Callable[[nn.Module], float]:
        """What tells the mean divergence of a module from the reference, as that one is now."""
        samples = [(inputs, outputs_of(reference, inputs)) for inputs in self.inputs.part(part)]

        def increase(module: nn.Module) -> float:
            each = [
                divergence(expected, outputs_of(module, inputs)) for inputs, expected in samples
            ]
            return sum(each) / len(each)

        return increase


AnyQuality = TextQuality | FunctionQuality | OutputQuality


def outputs_of(module: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Every floating-point tensor that a forward pass returns, in order.

    Raises:
        QualityError: There is none.
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
            "the model returns no floating-point tensor whose divergence could be measured: judge it by a loss of your own,"
            " --quality package.module:callable"
        )
    return tensors


def divergence(expected: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> float:
    """Relative squared error ||y - y0||^2 / ||y0||^2 of outputs y from expected ones y0, the mean over the tensors.

    Elements that are not finite in y0, and tensors that are all 0 there, do not count. Where y is not finite, it is a million,
    which is also the most that it ever is.

    Raises:
        QualityError: The outputs have another number of tensors, or other shapes.
    """
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in outputs]:
        raise QualityError(
            "the shapes of the model's outputs depend on its numbers, so quantized and unquantized ones cannot be compared:"
            " judge it by a loss of your own, --quality package.module:callable"
        )
    errors = [
        error
        for y0, y in zip(expected, outputs, strict=True)
        if (error := _relative_squared_error(y0, y)) is not None
    ]
    return sum(errors) / len(errors) if errors else 0.0


def _relative_squared_error(expected: torch.Tensor, output: torch.Tensor) -> float | None:
    """None where every expected element is 0 or not finite."""
    y0, y = expected.float(), output.float()
    counts = y0.isfinite()
    scale = torch.where(counts, y0, 0.0).square().sum().item()
    if scale == 0.0:
        return None
    error = torch.where(counts, y - y0, 0.0).square().sum().item() / scale
    return min(error, _WORST) if math.isfinite(error) else _WORST


def vary(module: nn.Module, sample: Inputs, seed: int) -> tuple[VariedInputs, list[str]]:
    """Inputs that the module takes, varied from the sample ones, and what the user should know of them.

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
            f"integer inputs stay as the sample has them, since the model does not take others ({reason})"
        )
    if inputs.placeholder:
        notes.append(
            "the sample inputs are placeholders (one number only), so standard normal numbers stand for them"
        )
    elif not inputs.varies:
        notes.append(
            "nothing in the sample inputs can be varied, so all is judged on one input: give typical ones"
        )
    first = inputs.make(0)
    again = divergence(outputs_of(module, first), outputs_of(module, first))
    if again > _SAME_EVERY_TIME:
        notes.append(
            f"the unquantized model's outputs differ by {again:.2g} from run to run: smaller divergence says nothing"
        )
    return inputs, notes


def _try_floating(module: nn.Module, inputs: VariedInputs, reason: str) -> None:
    try:
        _try(module, inputs)
    except QualityError:
        raise
    except Exception as error:
        raise QualityError(
            f"the model does not take inputs varied from its sample inputs ({reason}): give other ones with --sample-inputs, or"
            " judge it by a loss of your own, --quality package.module:callable"
        ) from error


def _try(module: nn.Module, inputs: VariedInputs) -> None:
    """Run the module on every input. Raises what it raises, and `QualityError` where its outputs are all 0 or not finite."""
    for part in PARTS:
        for each in inputs.part(part):
            outputs = outputs_of(module, each)
            if all(_relative_squared_error(tensor, tensor) is None for tensor in outputs):
                raise QualityError(
                    "the unquantized model's outputs on its sample inputs are all 0 or not finite, so nothing can diverge from"
                    " them: give typical ones with --sample-inputs package.module:callable"
                )
