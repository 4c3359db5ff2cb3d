"""Weights rounded for what their layers read on a calibration text.

The text goes through the unquantized model block by block, once: a block's outputs on all windows, and the Hessians of its own
linears, are all that is held. Each weight is rounded when its layer's Hessian is there, and kept on disk, where it takes an
eighth of the space or less.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoquant.candidates import Format, InputStatistics
from autoquant.candidates.calls import LINEAR_FUNCTIONS, linear_arguments
from autoquant.errors import CandidateError
from autoquant.models.blocks import BlockChain
from autoquant.models.outputs import run_on_tokens

Windows = Sequence[Sequence[int]] | torch.Tensor
"""Token ids `[windows, tokens]`."""
Wanted = Mapping[str, Sequence[Format]]
"""Parameter names to the formats that they are wanted in, all of which need inputs."""


class Calibration:
    """Makes and keeps weights that are rounded for their layers' inputs on some windows of text.

    The same windows, model, device and number of threads give the same bits. Processes forked from the one that made this object
    share what has been made.
    """

    def __init__(self, windows: Windows) -> None:
        self._windows = torch.as_tensor(windows)
        self._kept = _KeptTensors()

    def prepare(self, module: nn.Module, wanted: Wanted) -> dict[tuple[str, str], str]:
        """Make what is wanted and not there yet, from the unquantized model.

        Returns:
            Why a parameter (its name) cannot have a format (its id), for those that cannot.
        """
        known = self._kept.keys()
        missing = {name: [fmt for fmt in formats if (name, fmt.id) not in known] for name, formats in wanted.items()}
        missing = {name: formats for name, formats in missing.items() if formats}
        reasons = {
            (name, fmt.id): "the calibration text does not reach the layer"
            for name, formats in missing.items()
            for fmt in formats
        }
        if not missing:
            return reasons
        with torch.no_grad():
            for name, inputs in self.inputs(module, list(missing)):
                weight = module.get_parameter(name).data
                for fmt in missing[name]:
                    try:
                        self._kept.put((name, fmt.id), fmt.store(weight, inputs))
                        del reasons[name, fmt.id]
                    except CandidateError as error:
                        reasons[name, fmt.id] = str(error)
        return reasons

    def stored(self, name: str, fmt: Format) -> torch.Tensor:
        """A parameter in a format, as it was prepared.

        Raises:
            CandidateError: It could not be.
        """
        stored = self._kept.get((name, fmt.id))
        if stored is None:
            raise CandidateError(f"{name} cannot be {fmt.id}: what it reads on the calibration text is not known")
        return stored

    def inputs(self, module: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, InputStatistics]]:
        """What was found of each parameter's inputs, block by block."""
        parameters = {name: module.get_parameter(name) for name in names}
        device = next(iter(parameters.values())).device
        forwards = [partial(run_on_tokens, module, ids.unsqueeze(0).to(device)) for ids in self._windows]
        chain = BlockChain(module, forwards[0])
        starts = {name: chain.start(parameter) for name, parameter in parameters.items()}
        outputs: list[Any] = [None] * len(forwards)
        for index in range(max(starts.values()) + 1):
            watch = _Watch({id(parameters[name]): name for name, start in starts.items() if start == index})
            with watch:
                outputs = [chain.step(index, before, run) for before, run in zip(outputs, forwards, strict=True)]
            yield from watch.statistics().items()


class _Watch(TorchFunctionMode):
    """Sums x x' over all rows x that each parameter is multiplied with.

    Args:
        names: By the parameter's identity.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self._sums: dict[str, torch.Tensor] = {}
        self._read: dict[str, list[int]] = {}  # the numbers of the inputs
        self._last: torch.Tensor | None = None
        self._product = torch.empty(0)
        self._number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LINEAR_FUNCTIONS:
            x, weight, _ = linear_arguments(args, kwargs)
            if (name := self._names.get(id(weight))) is not None:
                self._add(name, x)
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, x: torch.Tensor) -> None:
        if x is not self._last:  # siblings read the same input one after the other
            rows = x.reshape(-1, x.shape[-1]).float()
            self._last, self._product = x, rows.t() @ rows
            self._number += 1
        self._read.setdefault(name, []).append(self._number)
        self._sums[name] = self._sums[name].add_(self._product) if name in self._sums else self._product.clone()

    def statistics(self) -> dict[str, InputStatistics]:
        """By name; those that read the same inputs share one."""
        shared: dict[tuple[int, ...], InputStatistics] = {}
        return {
            name: shared.setdefault(tuple(self._read[name]), InputStatistics(total))
            for name, total in self._sums.items()
        }


class _KeptTensors:
    """Tensors under keys in a temporary file without a name, which is gone with the last process that has it open.

    Processes forked from the one that made this object share them, as long as one of them writes at a time.
    """

    _SIZES = struct.Struct("<QQ")

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object is there
        self._places: dict[tuple[str, str], tuple[int, int]] = {}
        self._end = 0

    def keys(self) -> set[tuple[str, str]]:
        self._look()
        return set(self._places)

    def put(self, key: tuple[str, str], tensor: torch.Tensor) -> None:
        """Raises `CandidateError` where there is no room on the disk."""
        self._look()
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        name = json.dumps(key).encode()
        record = memoryview(self._SIZES.pack(len(name), buffer.tell()) + name + buffer.getvalue())
        number = self._file.fileno()
        try:
            os.ftruncate(number, self._end)  # what a process wrote that ended while it wrote
            written = 0
            while written < len(record):
                written += os.pwrite(number, record[written:], self._end + written)
        except OSError as error:
            raise CandidateError(f"no room for rounded weights in {tempfile.gettempdir()}: {error.strerror}") from error

    def get(self, key: tuple[str, str]) -> torch.Tensor | None:
        self._look()
        if key not in self._places:
            return None
        start, size = self._places[key]
        data = bytearray()
        while len(data) < size and (part := os.pread(self._file.fileno(), size - len(data), start + len(data))):
            data += part
        return cast(torch.Tensor, torch.load(io.BytesIO(data), weights_only=True))

    def _look(self) -> None:
        """Find what has been written since."""
        number = self._file.fileno()
        size = os.fstat(number).st_size
        while len(sizes := os.pread(number, self._SIZES.size, self._end)) == self._SIZES.size:
            name_size, data_size = self._SIZES.unpack(sizes)
            start = self._end + self._SIZES.size + name_size
            if start + data_size > size:
                return
            name, fmt = json.loads(os.pread(number, name_size, self._end + self._SIZES.size))
            self._places[name, fmt] = (start, data_size)
            self._end = start + data_size
