"""What a candidate is: a format (how a weight is stored) and a kernel (how a linear is computed from it)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch

from autoquant.candidates.kernels.library import TunedLibrary
from autoquant.errors import CandidateError
from autoquant.records import LinearShape

LinearFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Unsupported = Callable[[LinearShape, int, str], str | None]

A16 = "a16"
"""Numerics of a kernel that leaves the activation as it is."""
A8_ROW = "a8-row"
"""Numerics of a kernel that rounds each row of the activation to symmetric int8."""
A8_FLOAT8_ROW = "a8-float8-row"
"""Numerics of a kernel that rounds the activation to float8 (e4m3) with a scale for each row."""
A8_FLOAT8_TENSOR = "a8-float8-tensor"
"""The same with one scale for the whole activation."""
W8_A8_FLOAT8_ROW = "w8-a8-float8-row"
"""Numerics of a kernel that rounds each row of the activation, and of a weight of other numbers, to float8 (e4m3)."""
_DAMPING = 0.01
_DAMPED_TIMES = 4
FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


def always_supported(_shape: LinearShape, _m: int, _device_type: str) -> str | None:
    """The `unsupported` of a kernel without conditions of its own."""
    return None


def always_by_default(_device_type: str) -> bool:
    """The `by_default` of a format that every search tries."""
    return True


def by_name_only(_device_type: str) -> bool:
    """The `by_default` of a format that a search tries only where it is named."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One way to compute `linear(x, weight, bias)` from a stored weight.

    Attributes:
        id: Name within its format, e.g. `int-mm`.
        numerics: What it rounds (`A16`, `A8_ROW`, or the name of another entry of `ACTIVATION_ROUNDING`). Kernels of one format
            with the same numerics share one quality score.
        linear: x `[..., k]`, stored weight of `[n, k]`, bias `[n]` or None; returns `[..., n]` in x's dtype. It must trace
            under `torch.compile(fullgraph=True)`.
        opaque: Calls a library's kernels and nothing else, so that compiling it changes nothing: timed on GPUs as it is.
        library: The library that tunes it for each shape when it is first called, or None.
        arithmetic: What it multiplies in on a GPU, for the roofline; None is the activation's dtype.
        materializes: Writes the weight out in the activation's dtype and reads it again.
        nests: The compiler takes it in a nested region (see `autoquant.runtime.compiled`).
        unsupported: (shape, m, device type) to the reason why it cannot be used there, or None.
        description: One line for `autoquant candidates`.
    """

    id: str
    numerics: str
    linear: LinearFunction
    opaque: bool = False
    library: TunedLibrary | None = None
    arithmetic: str | None = None
    materializes: bool = False
    nests: bool = True
    unsupported: Unsupported = always_supported
    description: str = ""

    @property
    def tuned(self) -> bool:
        """Whether a library tunes it, which takes seconds for each shape."""
        return self.library is not None


class InputStatistics:
    """What calibration found of a linear's input. Linears that read the same input share one.

    Attributes:
        hessian: Float32 `[k, k]`, the sum of x x' over the rows x of the input: half the Hessian of the squared error of each
            output in its weights.
    """

    def __init__(self, hessian: torch.Tensor) -> None:
        self.hessian = hessian

    @functools.cached_property
    def inverse_factor(self) -> torch.Tensor:
        """Upper triangular `[k, k]`, U of U' U = inverse of the damped Hessian.

        Damped by 1 % of the mean of its diagonal, as in GPTQ, and by ten times as much for as long as it is not positive
        definite. Inputs that never were anything but 0 stand apart.

        Raises:
            CandidateError: The inputs were not finite.
        """
        diagonal = self.hessian.diagonal()
        if not bool(diagonal.isfinite().all()):
            raise CandidateError("the layer's inputs on the calibration text are not finite")
        dead = (diagonal == 0).to(diagonal.dtype)
        damping = _DAMPING * diagonal.mean()
        for _ in range(_DAMPED_TIMES):
            factor, failed = torch.linalg.cholesky_ex(self.hessian + torch.diag(dead + damping))
            if not failed:
                inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
                if not failed:
                    return cast(torch.Tensor, inverse)
            damping = 10 * damping
        raise CandidateError("the layer's inputs on the calibration text have no positive definite Hessian")


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a weight is stored, and the kernels that compute with it.

    Attributes:
        id: `VALUES/LAYOUT`, e.g. `int8-row/plain`. Formats with the same `VALUES` hold the same numbers.
        quantize: Weight `[n, k]` in the model's dtype to the stored tensor, whose shape is `[n, k]` too; where it `needs_inputs`,
            weight and `InputStatistics`.
        tensor_type: What `quantize` must return; anything else (a library that leaves the weight alone) is an error.
        dequantize: Stored tensor to the float32 `[n, k]` numbers that it holds.
        kernels: In order of preference where they are equally fast.
        unsupported: (shape, m, device type) to a reason or None; m is not looked at.
        joins: Every tensor inside has a row for each of the weight's, so that weights behind one another are one weight.
        by_default: Device type to whether a search that names no candidates tries the format there.
        needs_inputs: The numbers depend on the layer's inputs on a calibration text, not on the weight alone.
        rounds: Id of the format that this one is, but for how its numbers were found: it has the same stored tensors and kernels,
            whose timings stand for both. Empty for a format of its own.
    """

    id: str
    quantize: Callable[..., torch.Tensor]
    dequantize: Callable[[torch.Tensor], torch.Tensor]
    kernels: tuple[Kernel, ...]
    unsupported: Unsupported = always_supported
    description: str = ""
    tensor_type: type[torch.Tensor] = torch.Tensor
    joins: bool = False
    by_default: Callable[[str], bool] = always_by_default
    needs_inputs: bool = False
    rounds: str = ""
    values: str = field(init=False)

    def __post_init__(self) -> None:
        values, slash, layout = self.id.partition("/")
        if not values or not slash or not layout or "/" in layout:
            raise CandidateError(f"format id {self.id!r} must read VALUES/LAYOUT, e.g. int8-row/plain")
        if len({kernel.id for kernel in self.kernels}) != len(self.kernels) or not self.kernels:
            raise CandidateError(f"format {self.id} needs at least one kernel, each with an id of its own")
        object.__setattr__(self, "values", values)

    def kernel(self, kernel_id: str) -> Kernel:
        """The kernel of that id.

        Raises:
            CandidateError: The format has none.
        """
        for kernel in self.kernels:
            if kernel.id == kernel_id:
                return kernel
        known = ", ".join(kernel.id for kernel in self.kernels)
        raise CandidateError(f"format {self.id} has no kernel {kernel_id!r}; it has {known}")

    @property
    def timed_as(self) -> str:
        """Id of the format whose timings, bytes and layout are this one's."""
        return self.rounds or self.id

    def store(self, weight: torch.Tensor, inputs: InputStatistics | None = None) -> torch.Tensor:
        """Quantize a weight `[n, k]` and check that it really was.

        Args:
            inputs: Of the layer; only a format that needs them looks at them.

        Raises:
            CandidateError: The result has another type or shape than the format promises, or the inputs are missing.
        """
        if self.needs_inputs and inputs is None:
            raise CandidateError(
                f"{self.id} is rounded for a layer's inputs on a calibration text, which were not given"
            )
        stored = self.quantize(weight.detach(), inputs) if self.needs_inputs else self.quantize(weight.detach())
        if type(stored) is not self.tensor_type or stored.shape != weight.shape:
            raise CandidateError(
                f"{self.id} gave {type(stored).__name__} {tuple(stored.shape)} for a weight {tuple(weight.shape)}, "
                f"not a {self.tensor_type.__name__} of that shape: the weight was not quantized"
            )
        return stored

    def unsupported_reason(self, kernel: Kernel, shape: LinearShape, m: int, device_type: str) -> str | None:
        """Why `kernel` cannot compute `shape` at `m` rows on that device, or None."""
        return self.unsupported(shape, m, device_type) or kernel.unsupported(shape, m, device_type)


def round_row_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to symmetric int8.

    Args:
        x: `[m, k]`.

    Returns:
        int8 `[m, k]` and its float32 scales `[m, 1]`.
    """
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / 127
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def round_float8(x: torch.Tensor, *, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to float8 (e4m3), the largest number of each row or of all being the largest that float8 has.

    Args:
        x: `[m, k]`.

    Returns:
        float8 `[m, k]` and its float32 scales, `[m, 1]` or `[]`.
    """
    largest = x.abs().amax(dim=-1, keepdim=True) if per_row else x.abs().amax()
    scale = largest.float().clamp(min=1e-12) / FLOAT8_MAX
    return (x.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn), scale


def _fake_row_int8(x: torch.Tensor) -> torch.Tensor:
    rounded, scale = round_row_int8(x.reshape(-1, x.shape[-1]))
    return (rounded.float() * scale).to(x.dtype).reshape(x.shape)


def _fake_float8(x: torch.Tensor, *, per_row: bool) -> torch.Tensor:
    rounded, scale = round_float8(x.reshape(-1, x.shape[-1]), per_row=per_row)
    return (rounded.float() * scale).to(x.dtype).reshape(x.shape)


ACTIVATION_ROUNDING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    A16: lambda x: x,
    A8_ROW: _fake_row_int8,
    A8_FLOAT8_ROW: functools.partial(_fake_float8, per_row=True),
    A8_FLOAT8_TENSOR: functools.partial(_fake_float8, per_row=False),
    W8_A8_FLOAT8_ROW: functools.partial(_fake_float8, per_row=True),
}
"""What each numerics does to an activation, in floating point: used where quality is scored without the kernel.

Modules of formats add those of their own kernels.
"""

_WEIGHT_ROUNDING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    W8_A8_FLOAT8_ROW: functools.partial(_fake_float8, per_row=True),
}


def multiplied_numbers(fmt: Format, stored: torch.Tensor, numerics: str) -> torch.Tensor:
    """The float32 `[n, k]` numbers that kernels of these numerics multiply with: those stored, unless they round them again."""
    rounding = _WEIGHT_ROUNDING.get(numerics)
    numbers = fmt.dequantize(stored).float()
    return rounding(numbers) if rounding else numbers
