"""Round weights for their layers' inputs on a calibration text.

The text passes through the unquantized model once, block by block. Memory holds one block's outputs
for all windows and the Hessians of its linears. Each weight is rounded as soon as its layer's
Hessian is known, and kept on disk, where it takes an eighth of the space or less.
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

from autoquant.candidates import Format, InputStatistics
from autoquant.candidates.calls import LinearCall, LinearHook, expert_rows
from autoquant.candidates.experts import ExpertInputs, store_for_inputs
from autoquant.errors import CandidateError
from autoquant.models.blocks import BlockChain
from autoquant.models.loaded import device_of
from autoquant.models.outputs import run_on_tokens
from autoquant.models.streaming import brought

Windows = Sequence[Sequence[int]] | torch.Tensor
"""Token ids `[windows, tokens]`."""
Wanted = Mapping[str, Sequence[Format]]
"""Parameter names, with the formats they are wanted in; all of these need inputs."""


class Calibration:
    """Rounds weights for their layers' inputs on windows of text, and keeps them.

    The same windows, model, device and number of threads give the same bits. Processes forked from
    the one that made this object share what has been made.

    Attributes:
        idle: Experts that no row of the text reached, by parameter name. They are rounded to
            nearest.
    """

    def __init__(self, windows: Windows) -> None:
        self.idle: dict[str, list[int]] = {}
        self._windows = torch.as_tensor(windows)
        self._kept = _KeptTensors()

    def prepare(self, module: nn.Module, wanted: Wanted) -> dict[tuple[str, str], str]:
        """Make the wanted weights that are still missing, from the unquantized model.

        Returns:
            Reasons for those that cannot be made, by parameter name and format id.
        """
        known = self._kept.keys()
        missing: dict[str, list[Format]] = {}
        reasons: dict[tuple[str, str], str] = {}
        for name, formats in wanted.items():
            for fmt in formats:
                if (name, fmt.id) not in known:
                    missing.setdefault(name, []).append(fmt)
                    reasons[name, fmt.id] = "the calibration text does not reach the layer"
        if not missing:
            return {}
        device = device_of(module)
        with torch.no_grad():
            for name, inputs in self.inputs(module, list(missing)):
                weight = brought(module.get_parameter(name).data, device)
                if isinstance(inputs, ExpertInputs) and inputs.idle:
                    self.idle[name] = inputs.idle
                for fmt in missing[name]:
                    try:
                        self._kept.put((name, fmt.id), _stored(fmt, weight, inputs))
                        del reasons[name, fmt.id]
                    except CandidateError as error:
                        reasons[name, fmt.id] = str(error)
        return reasons

    def stored(self, name: str, fmt: Format) -> torch.Tensor:
        """Return a parameter in a format, as `prepare` made it.

        Raises:
            CandidateError: It was not made, or could not be.
        """
        stored = self._kept.get((name, fmt.id))
        if stored is None:
            unknown = "what it reads on the calibration text is not known"
            raise CandidateError(f"{name} cannot be {fmt.id}: {unknown}")
        return stored

    def inputs(
        self,
        module: nn.Module,
        names: Sequence[str],
    ) -> Iterator[tuple[str, InputStatistics | ExpertInputs]]:
        """Yield each parameter's name with the statistics of its inputs, block by block."""
        parameters = {name: module.get_parameter(name) for name in names}
        device = device_of(module)
        forwards = [
            partial(run_on_tokens, module, ids.unsqueeze(0).to(device)) for ids in self._windows
        ]
        chain = BlockChain(module, forwards[0])
        starts = {name: chain.start(parameter) for name, parameter in parameters.items()}
        outputs: list[Any] = [None] * len(forwards)
        for index in range(max(starts.values()) + 1):
            here = {id(parameters[name]): name for name, start in starts.items() if start == index}
            pairs = list(zip(outputs, forwards, strict=True))
            with _InputSums(here) as sums:
                outputs = [chain.step(index, before, run) for before, run in pairs]
            yield from sums.statistics().items()


class _InputSums(LinearHook):
    """Sums the statistics of all rows that each parameter is multiplied with.

    Args:
        names: Names of the parameters, by their identity.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self._sums: dict[str, InputStatistics] = {}
        self._by_expert: dict[str, ExpertInputs] = {}
        self._read: dict[str, list[int]] = {}  # numbers of the inputs it was multiplied with
        self._last: torch.Tensor | None = None
        self._read_last = InputStatistics(torch.empty(0))
        self._number = 0

    def on_linear(self, call: LinearCall) -> None:
        if (name := self._names.get(id(call.weight))) is None:
            return
        if call.ends is None:
            self._add(name, call.x)
        else:
            self._add_experts(name, call, call.ends)

    def _add_experts(self, name: str, call: LinearCall, ends: torch.Tensor) -> None:
        none: list[InputStatistics | None] = [None] * len(call.weight)
        each = self._by_expert.setdefault(name, ExpertInputs(none, call.turned)).each
        for expert, start, end in expert_rows(ends):
            statistics = InputStatistics.of(call.x[start:end])
            if (known := each[expert]) is not None:
                statistics.add(known)
            each[expert] = statistics

    def _add(self, name: str, x: torch.Tensor) -> None:
        if x is not self._last:  # siblings read the same tensor, one right after the other
            self._last, self._read_last = x, InputStatistics.of(x.reshape(-1, x.shape[-1]))
            self._number += 1
        self._read.setdefault(name, []).append(self._number)
        if name in self._sums:
            self._sums[name].add(self._read_last)
        else:
            self._sums[name] = self._read_last.copy()

    def statistics(self) -> dict[str, InputStatistics | ExpertInputs]:
        """Return statistics by name. Parameters that read the same inputs share one object."""
        shared: dict[tuple[int, ...], InputStatistics] = {}
        linears = {
            name: shared.setdefault(tuple(self._read[name]), total)
            for name, total in self._sums.items()
        }
        return {**linears, **self._by_expert}


def _stored(
    fmt: Format, weight: torch.Tensor, inputs: InputStatistics | ExpertInputs
) -> torch.Tensor:
    if isinstance(inputs, ExpertInputs):
        return store_for_inputs(fmt, weight, inputs)
    return fmt.store(weight, inputs)


class _KeptTensors:
    """Tensors by key, in a temporary file without a name.

    The file is deleted when the last process that has it open ends. Forked processes share it. Only
    one of them may write at a time. A record is: size of the key, size of the tensor, key, tensor.
    """

    _SIZES = struct.Struct("<QQ")

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object lives
        self._places: dict[tuple[str, str], tuple[int, int]] = {}
        self._end = 0

    def keys(self) -> set[tuple[str, str]]:
        self._look()
        return set(self._places)

    def put(self, key: tuple[str, str], tensor: torch.Tensor) -> None:
        """Append a tensor.

        Raises:
            CandidateError: The disk is full.
        """
        self._look()
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        name = json.dumps(key).encode()
        sizes = self._SIZES.pack(len(name), buffer.tell())
        record = memoryview(sizes + name + buffer.getvalue())
        number = self._file.fileno()
        try:
            os.ftruncate(number, self._end)  # drop what a killed process left unfinished
            written = 0
            while written < len(record):
                written += os.pwrite(number, record[written:], self._end + written)
        except OSError as error:
            full = f"no room for rounded weights in {tempfile.gettempdir()}: {error.strerror}"
            raise CandidateError(full) from error

    def get(self, key: tuple[str, str]) -> torch.Tensor | None:
        self._look()
        if key not in self._places:
            return None
        start, size = self._places[key]
        number, data = self._file.fileno(), bytearray()
        while len(data) < size:
            part = os.pread(number, size - len(data), start + len(data))
            if not part:
                break
            data += part
        return cast(torch.Tensor, torch.load(io.BytesIO(data), weights_only=True))

    def _look(self) -> None:
        """Find the records that any process has written since the last look."""
        number = self._file.fileno()
        size = os.fstat(number).st_size
        while len(sizes := os.pread(number, self._SIZES.size, self._end)) == self._SIZES.size:
            name_size, data_size = self._SIZES.unpack(sizes)
            start = self._end + self._SIZES.size + name_size
            if start + data_size > size:  # still being written
                return
            name, fmt = json.loads(os.pread(number, name_size, self._end + self._SIZES.size))
            self._places[name, fmt] = (start, data_size)
            self._end = start + data_size
