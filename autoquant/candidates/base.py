"""Define candidates: a format (how a weight is stored) and a kernel (how a linear uses it)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from autoquant.candidates.inputs import InputStatistics
from autoquant.candidates.kernels.library import TunedLibrary
from autoquant.candidates.neutral import NeutralWeight
from autoquant.errors import CandidateError
from autoquant.records import LOOKUP, LinearShape

LinearFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
GroupedFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
LookupFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Unsupported = Callable[[LinearShape, int, str], str | None]

A16 = "a16"
"""Numerics of a kernel that does not round the activation."""
A8_ROW = "a8-row"
"""Numerics of a kernel that rounds each row of the activation to symmetric int8."""
A8_FLOAT8_ROW = "a8-float8-row"
"""Numerics of a kernel that rounds the activation to float8 (e4m3) with a scale for each row."""
A8_FLOAT8_TENSOR = "a8-float8-tensor"
"""Numerics of a kernel that rounds the activation to float8 (e4m3) with one scale."""
W8_A8_FLOAT8_ROW = "w8-a8-float8-row"
"""Numerics of a kernel that rounds each row of activation and stored weight to float8 (e4m3)."""
A8_STATIC = "a8-static"
"""Numerics of a kernel that rounds the activation to symmetric int8 in a range that is stored."""
A8_FLOAT8_STATIC = "a8-float8-static"
"""Numerics of a kernel that rounds the activation to float8 (e4m3) in a range that is stored."""
A8_ROW_SCALED = "a8-row-scaled"
"""Numerics of a kernel that multiplies each column of the activation, then rounds as `A8_ROW`."""
FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: FLOAT8_MAX}
"""The largest number of an 8-bit dtype that is used."""


def always_supported(_shape: LinearShape, _m: int, _device_type: str) -> str | None:
    """Return None: the `unsupported` of a kernel without conditions of its own."""
    return None


def always_by_default(_device_type: str) -> bool:
    """Return True: the `by_default` of a format that every search tries."""
    return True


def by_name_only(_device_type: str) -> bool:
    """Return False: the `by_default` of a format that a search tries only if it is named."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One way to compute `linear(x, weight, bias)` from a stored weight.

    Attributes:
        id: Name within its format, e.g. `int-mm`.
        numerics: Key of its rounding (`A16`, `A8_ROW` or another key of `ACTIVATION_ROUNDING`, or
            one of `STORED_ROUNDING`).
            Kernels of one format with the same numerics share one quality score.
        linear: Function of x `[..., k]`, a stored weight `[n, k]` and a bias `[n]` or None. It
            returns `[..., n]` in x's dtype and must trace under `torch.compile(fullgraph=True)`.
        grouped: Function of x `[rows, k]`, sorted by expert, the stored weights of experts
            `[experts * n, k]` and int32 `[experts]`, the row after the last of each. It returns
            `[rows, n]` without asking the device for numbers. None if experts are computed one by
            one, which only CPUs can do.
        opaque: It only calls a library's kernels, so compiling it changes nothing. On GPUs it is
            timed uncompiled.
        library: The library that tunes it for each shape at its first call, or None.
        arithmetic: The type of number it multiplies on a GPU, for the roofline. None is the
            activation's dtype.
        materializes: It writes the weight to memory in the activation's dtype and reads it again.
        nests: The compiler takes it in a nested region (see `autoquant.runtime.compiled`).
        repeats: The same input gives the same bits each time. One that adds in another order each
            time says False; then its results may differ by rounding.
        by_name: A search tries it only if it is named.
        unsupported: Function of (shape, m, device type) that returns why the kernel cannot be used
            there, or None.
        description: One line for `autoquant candidates`.
    """

    id: str
    numerics: str
    linear: LinearFunction
    grouped: GroupedFunction | None = None
    opaque: bool = False
    library: TunedLibrary | None = None
    arithmetic: str | None = None
    materializes: bool = False
    nests: bool = True
    repeats: bool = True
    by_name: bool = False
    unsupported: Unsupported = always_supported
    description: str = ""

    @property
    def tuned(self) -> bool:
        """Check whether a library tunes it, which takes seconds for each shape."""
        return self.library is not None


def _no_product(
    _x: torch.Tensor, _weight: torch.Tensor, _bias: torch.Tensor | None
) -> torch.Tensor:
    raise CandidateError("a table is there to look up rows, not to multiply with")


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a weight is stored, and the kernels that compute with it.

    Attributes:
        id: `VALUES/LAYOUT`, e.g. `int8-row/plain`. Formats with the same `VALUES` hold the same
            numbers.
        quantize: Function of a weight `[n, k]` in the model's dtype that returns the stored tensor,
            also `[n, k]`. If the format `needs_inputs`, `InputStatistics` are its second argument.
        dequantize: Function of the stored tensor that returns its float32 numbers `[n, k]`.
        kernels: The kernels. Of equally fast ones, the first is preferred.
        unsupported: Function of (shape, m, device type) that returns why the format cannot be used
            there, or None. It ignores m.
        tensor_type: The type that `quantize` must return. Another type is an error: some
            libraries leave a weight unquantized without saying so.
        joins: Every tensor inside has one row per row of the weight. Adjacent weights
            then form one larger weight.
        by_default: Function of a device type that returns whether a search that names no candidates
            tries the format there.
        needs_inputs: The numbers depend on the layer's inputs on a calibration text, too.
        without_inputs: Function of a weight that stores it as for normally distributed inputs, so
            that it can be timed. None if it needs no inputs, or is timed as another format.
        neutral: Function of the stored tensor that returns its numbers without the layout, for
            exports to other tools. None if the format has none.
        lookup: Function of the stored tensor and rows `[m]` that returns the float32 numbers
            `[m, k]` of these rows, without those of the others. None if the layout does not allow
            it. It must trace as kernels do.
        input_kept: Function of the stored tensor that returns what it keeps for its activation, in
            float32: the largest magnitude `[]` that is held, or what each column is multiplied with
            `[k]`. None if kernels need no more than the activation to round it.
        rounds: Id of a format with the same stored tensors and kernels, or "". The two differ only
            in how the numbers are chosen, so they share timings.
        values: The `VALUES` of the id.
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
    without_inputs: Callable[[torch.Tensor], torch.Tensor] | None = None
    neutral: Callable[[torch.Tensor], NeutralWeight] | None = None
    lookup: LookupFunction | None = None
    input_kept: Callable[[torch.Tensor], torch.Tensor] | None = None
    rounds: str = ""
    values: str = field(init=False)

    def __post_init__(self) -> None:
        values, slash, layout = self.id.partition("/")
        if not values or not slash or not layout or "/" in layout:
            raise CandidateError(
                f"format id {self.id!r} must read VALUES/LAYOUT, e.g. int8-row/plain"
            )
        if len({kernel.id for kernel in self.kernels}) != len(self.kernels) or not self.kernels:
            raise CandidateError(
                f"format {self.id} needs at least one kernel, each with an id of its own"
            )
        object.__setattr__(self, "values", values)

    def kernel(self, kernel_id: str) -> Kernel:
        """Return the kernel with an id, or what stands for lookups in routes.

        Raises:
            CandidateError: The format has no such kernel.
        """
        for kernel in self.kernels:
            if kernel.id == kernel_id:
                return kernel
        if kernel_id == LOOKUP and self.lookup is not None:
            return Kernel(id=LOOKUP, numerics=LOOKUP, linear=_no_product)
        known = ", ".join(kernel.id for kernel in self.kernels)
        raise CandidateError(f"format {self.id} has no kernel {kernel_id!r}; it has {known}")

    @property
    def timed_as(self) -> str:
        """Return the id of the format whose timings, bytes and layout are also this one's."""
        return self.rounds or self.id

    def store(self, weight: torch.Tensor, inputs: InputStatistics | None = None) -> torch.Tensor:
        """Quantize a weight `[n, k]`, and check that it really was quantized.

        Args:
            inputs: Statistics of the layer's inputs, ignored unless the format needs them.

        Raises:
            CandidateError: The result does not have the format's type and shape, or the inputs are
                missing.
        """
        if self.needs_inputs and inputs is None:
            raise CandidateError(
                f"{self.id} is rounded for a layer's inputs on a calibration text, "
                "which were not given"
            )
        arguments = (weight.detach(), inputs) if self.needs_inputs else (weight.detach(),)
        stored = self.quantize(*arguments)
        if type(stored) is not self.tensor_type or stored.shape != weight.shape:
            found = f"{type(stored).__name__} {tuple(stored.shape)}"
            raise CandidateError(
                f"{self.id} gave {found} for a weight {tuple(weight.shape)}, "
                f"not a {self.tensor_type.__name__} of that shape: the weight was not quantized"
            )
        return stored

    def activation_rounding(
        self, numerics: str, stored: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return how kernels of these numerics round the activation of a stored weight."""
        return activation_rounding(numerics, self.input_kept(stored) if self.input_kept else None)

    def sample(self, weight: torch.Tensor) -> torch.Tensor:
        """Quantize a weight `[n, k]` to be timed, for whatever inputs."""
        if self.without_inputs is None:
            return self.store(weight)
        return self.without_inputs(weight.detach())

    def unsupported_reason(
        self, kernel: Kernel, shape: LinearShape, m: int, device_type: str
    ) -> str | None:
        """Return why a kernel cannot compute `shape` at m rows on a device, or None if it can."""
        return self.unsupported(shape, m, device_type) or kernel.unsupported(shape, m, device_type)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A format and one of its kernels: what a search chooses between for each layer."""

    format: Format
    kernel: Kernel

    @property
    def id(self) -> str:
        """`FORMAT/KERNEL`, e.g. `int8-row/plain/int-mm`."""
        return f"{self.format.id}/{self.kernel.id}"

    def unsupported_reason(self, shape: LinearShape, m: int, device_type: str) -> str | None:
        """Return why it cannot compute `shape` at m rows on a device, or None if it can."""
        return self.format.unsupported_reason(self.kernel, shape, m, device_type)


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
    """Round to float8 (e4m3), scaled so that the largest number is float8's largest.

    Args:
        x: `[m, k]`.
        per_row: Scale each row on its own.

    Returns:
        float8 `[m, k]` and its float32 scales, `[m, 1]` or `[]`.
    """
    largest = x.abs().amax(dim=-1, keepdim=True) if per_row else x.abs().amax()
    scale = largest.float().clamp(min=1e-12) / FLOAT8_MAX
    return (x.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn), scale


def round_static(x: torch.Tensor, largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to symmetric int8 or to float8 (e4m3) in a given range, beyond which x is clipped.

    Args:
        largest: Float32 `[]`, what the largest number of the dtype stands for.

    Returns:
        x's numbers over `static_step`, in the dtype.
    """
    scaled = x.float() / static_step(largest, dtype)
    scaled = scaled.round() if dtype == torch.int8 else scaled
    most = LARGEST[dtype]
    return scaled.clamp(-most, most).to(dtype)


def static_step(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what a 1 of the dtype stands for in a range, float32 `[]`."""
    return largest / LARGEST[dtype]


def _fake_static(x: torch.Tensor, largest: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    return (round_static(x, largest, dtype).float() * static_step(largest, dtype)).to(x.dtype)


def _fake_row_int8(x: torch.Tensor) -> torch.Tensor:
    rounded, scale = round_row_int8(x.reshape(-1, x.shape[-1]))
    return (rounded.float() * scale).to(x.dtype).reshape(x.shape)


def _fake_float8(x: torch.Tensor, *, per_row: bool) -> torch.Tensor:
    rounded, scale = round_float8(x.reshape(-1, x.shape[-1]), per_row=per_row)
    return (rounded.float() * scale).to(x.dtype).reshape(x.shape)


ACTIVATION_ROUNDING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    A16: lambda x: x,
    LOOKUP: lambda x: x,
    A8_ROW: _fake_row_int8,
    A8_FLOAT8_ROW: functools.partial(_fake_float8, per_row=True),
    A8_FLOAT8_TENSOR: functools.partial(_fake_float8, per_row=False),
    W8_A8_FLOAT8_ROW: functools.partial(_fake_float8, per_row=True),
}
"""The rounding of an activation by numerics, in floating point. Quality is scored with it.

Modules of formats add the numerics of their own kernels.
"""

STORED_ROUNDING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    A8_STATIC: functools.partial(_fake_static, dtype=torch.int8),
    A8_FLOAT8_STATIC: functools.partial(_fake_static, dtype=torch.float8_e4m3fn),
    A8_ROW_SCALED: lambda x, scale: (_fake_row_int8(x * scale) / scale).to(x.dtype),
}
"""As `ACTIVATION_ROUNDING`, of an activation and what the format's `input_kept` returned."""


def activation_rounding(
    numerics: str, kept: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return how kernels of these numerics round an activation.

    Args:
        kept: What the format's `input_kept` returned, if it has one.
    """
    if numerics not in STORED_ROUNDING:
        return ACTIVATION_ROUNDING[numerics]
    assert kept is not None  # a format with such a kernel keeps it
    return lambda x: STORED_ROUNDING[numerics](x, kept)


_WEIGHT_ROUNDING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    W8_A8_FLOAT8_ROW: functools.partial(_fake_float8, per_row=True),
}


def multiplied_numbers(fmt: Format, stored: torch.Tensor, numerics: str) -> torch.Tensor:
    """Return the float32 numbers `[n, k]` that kernels of these numerics multiply with.

    They are the stored numbers, rounded again by kernels that do so.
    """
    rounding = _WEIGHT_ROUNDING.get(numerics)
    numbers = fmt.dequantize(stored).float()
    return rounding(numbers) if rounding else numbers
