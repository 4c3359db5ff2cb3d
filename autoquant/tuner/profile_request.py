"""The request of `autoquant profile`: the linears to time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from autoquant.errors import WorkloadError
from autoquant.models import ModelRequest, dtype_name, resolve_device, resolve_dtype
from autoquant.profiler.shapes import ListedShapes, parse_shapes, read_shapes
from autoquant.records import Workload
from autoquant.store.connect import check_address

DEFAULT_ROWS = (1, 16, 128, 2048)
Shapes: TypeAlias = str | os.PathLike[str] | Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapesRequest:
    """Shapes to time without a model.

    Attributes:
        shapes: A file of shapes, or its lines.
        dtype: As for a model; auto is the better 16-bit float of the device.
        device: As for a model; never auto once the request is made.

    Raises:
        DeviceError: The device is not there.
    """

    shapes: Shapes
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", resolve_device(self.device))

    def read(self) -> ListedShapes:
        """Read the shapes.

        Raises:
            WorkloadError: They cannot be read, or the dtype is unknown.
        """
        name = "fast16" if self.dtype == "auto" else self.dtype
        dtype = dtype_name(resolve_dtype(name, self.device, torch.float32))
        if isinstance(self.shapes, (str, os.PathLike)):
            return read_shapes(self.shapes, dtype)
        return parse_shapes(self.shapes, dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRequest:
    """The arguments of `autoquant.profile`, read and checked.

    Attributes:
        linears: Those of a model, or listed shapes.
        rows: The m to time at; None for those of the workload, or `DEFAULT_ROWS`.
        workload: None for the one that suits the model, with `batch` sequences.
        candidates: Globs over `FORMAT/KERNEL`.

    Raises:
        WorkloadError: The arguments contradict one another.
        StoreError: The database cannot be used.
    """

    linears: ModelRequest | ShapesRequest
    rows: Sequence[int] | None
    workload: Workload | None
    batch: int
    candidates: Sequence[str]
    db: str | os.PathLike[str]

    def __post_init__(self) -> None:
        if self.rows is not None and (not self.rows or min(self.rows) < 1):
            raise WorkloadError("rows must be numbers from 1 on, e.g. 1,16,2048")
        if isinstance(self.linears, ShapesRequest):
            self._check_shapes()
        check_address(self.db)

    def _check_shapes(self) -> None:
        if self.rows is not None and self.workload is not None:
            raise WorkloadError(
                "give either rows or a workload: both say how many rows the shapes are timed at"
            )
        if self.workload is None and self.batch != 1:
            raise WorkloadError(
                "a batch needs a workload, e.g. --workload prefill=2048,decode=256: rows are timed"
                " as given"
            )

    @property
    def device(self) -> str:
        """The torch device to time on."""
        return self.linears.device


def linears_of(
    model: ModelRequest | None, shapes: ShapesRequest | None
) -> ModelRequest | ShapesRequest:
    """Return whichever is given.

    Raises:
        WorkloadError: Both are, or neither.
    """
    if model is None and shapes is not None:
        return shapes
    if model is None or shapes is not None:
        raise WorkloadError(
            "give either a model or shapes (--shapes FILE): their linears are what is timed"
        )
    return model
