"""What a part does while it is traced, and a quicker way to find that another part does the same.

Tracing runs a part's Python code, and works out the result of each operator on fake tensors, which
takes nearly all of the time. The operators, and what goes into them, are recorded meanwhile.
Another part is followed instead: its code runs too, but each operator is only compared with the
recorded one, and gives the recorded result. If all are the same, so are the graphs, but for the
tensors that each part holds itself. On the way it is found which of these correspond.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

_DEVICE = torch.ops.prim.device.default
_Run = Callable[..., Sequence[torch.Tensor]]
"""Runs a part from tensors to tensors."""


class _DiffersError(Exception):
    """A part does something else than the recorded one."""


@dataclass(frozen=True, slots=True)
class _Call:
    """An operator that was called.

    Attributes:
        what: The operator, and its arguments that are no tensors, see `_look`.
        tensors: The numbers of its arguments that are tensors.
        results: The numbers of its results. None: it returns no tensor.
        several: Returns several results; how they are put together.
    """

    what: Sequence[Any]
    tensors: Sequence[int]
    results: Sequence[int] | None
    several: type | None


@dataclass(slots=True)
class Trace:
    """What a part did. Tensors are known by numbers, in the order in which they turned up.

    Attributes:
        tensors: All of them: what the part was given, what it holds itself, and results.
        given: How many it was given. They are the first.
        held: The numbers of those that it holds itself.
        calls: What it called, in order.
        returned: The numbers of what it returned.
        complete: All that it did was recorded, so that another part can be compared with it.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    given: int = 0
    held: set[int] = field(default_factory=set)
    calls: list[_Call] = field(default_factory=list)
    returned: Sequence[int] = ()
    complete: bool = True
    _numbers: dict[int, int] = field(default_factory=dict)

    def add(self, tensor: torch.Tensor) -> int:
        """Return the number of a tensor, a new one if it is new."""
        number = self._numbers.setdefault(id(tensor), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(tensor)
        return number

    def numbers_of(self, held: Sequence[torch.Tensor]) -> list[int] | None:
        """Return the numbers of tensors that the part holds, or None if some did not turn up."""
        numbers = [self._numbers.get(id(tensor), -1) for tensor in held]
        return numbers if self.held.issuperset(numbers) else None


def recorded(run: _Run, trace: Trace) -> _Run:
    """Return what runs as `run` does, and records it in an empty trace."""

    def recording(*given: torch.Tensor) -> Sequence[torch.Tensor]:
        for tensor in given:
            trace.add(tensor)
        trace.given = len(given)
        trace.complete = len(trace.tensors) == len(given)
        with _Recorder(trace):
            found = run(*given)
        trace.returned = [trace.add(tensor) for tensor in found]
        return found

    return recording


def followed(run: _Run, trace: Trace) -> dict[int, torch.Tensor] | None:
    """Return the tensors that a part holds by the numbers of those that it stands for.

    None if it does something else than what was recorded. Nothing is computed.
    """
    if not trace.complete:
        return None
    follower = _Follower(trace)
    views = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    try:  # a recorded result may not be made a view of its argument again
        with torch._C._ExcludeDispatchKeyGuard(views), follower:
            found = run(*trace.tensors[: trace.given])
    except Exception:  # noqa: BLE001 - tracing the part says what is wrong, if anything is
        return None
    ended = not follower.differed and follower.position == len(trace.calls)
    if not ended or [follower.numbers.get(id(tensor)) for tensor in found] != trace.returned:
        return None
    return follower.held


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace

    # Such an operator runs code that is not seen here.
    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:
            return func(*args, **kwargs)
        trace = self._trace
        tensors, what = _look((args, kwargs))
        known = len(trace.tensors)
        numbers = [trace.add(tensor) for tensor in tensors]
        trace.held |= {number for number in numbers if number >= known}
        result = func(*args, **kwargs)
        several = type(result) if isinstance(result, (tuple, list)) else None
        results = list(result) if several else [] if result is None else [result]
        trace.complete &= (
            isinstance(func, torch._ops.OpOverload)
            and several in (None, tuple, list)
            and all(isinstance(each, torch.Tensor) for each in results)
            and not any(map(is_traceable_wrapper_subclass, [*tensors, *results]))
        )
        if trace.complete:
            found = None if result is None else [trace.add(each) for each in results]
            trace.calls.append(_Call([func, *what], numbers, found, several))
        return result


class _Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compares what is called with a trace, and gives the results from there."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace
        given = trace.tensors[: trace.given]
        self.numbers = {id(tensor): number for number, tensor in enumerate(given)}
        self.held: dict[int, torch.Tensor] = {}
        self.position, self.differed = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].device
        tensors, what = _look((args, kwargs or {}))
        calls = self._trace.calls
        call = calls[self.position] if self.position < len(calls) else None
        same = call is not None and not self.differed and call.what == [func, *what]
        if call is None or not same or not self._takes(tensors, call.tensors):
            self.differed = True  # the part's code may go on after an error
            raise _DiffersError
        self.position += 1
        if call.results is None:
            return None
        results = [self._result(number) for number in call.results]
        return call.several(results) if call.several else results[0]

    def _takes(self, tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> bool:
        """Check that the tensors stand for those of the numbers."""
        return len(tensors) == len(numbers) and all(map(self._stands_for, tensors, numbers))

    def _stands_for(self, tensor: torch.Tensor, number: int) -> bool:
        known = self.numbers.get(id(tensor))
        if known is not None:
            return known == number
        if number not in self._trace.held or number in self.held:
            return False
        if _kind(tensor) != _kind(self._trace.tensors[number]):
            return False
        self.held[number] = tensor
        self.numbers[id(tensor)] = number
        return True

    def _result(self, number: int) -> torch.Tensor:
        if number in self.held:  # changed in place
            return self.held[number]
        result = self._trace.tensors[number]
        self.numbers[id(result)] = number
        return result


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what operators may depend on of a tensor beside its values."""
    place = tensor.dtype, tensor.device, tensor.requires_grad
    return type(tensor), place, tensor.shape, tensor.stride()


def _look(value: Any) -> tuple[list[torch.Tensor], list[Any]]:
    """Return the tensors in arguments, and all else, with marks where tensors are."""
    tensors: list[torch.Tensor] = []
    rest: list[Any] = []

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            rest.append(torch.Tensor)
        elif isinstance(value, (tuple, list)):
            rest.append((type(value), len(value)))
            for each in value:
                look(each)
        elif isinstance(value, dict):
            rest.append(tuple(value))
            look(tuple(value.values()))
        else:
            rest.append((type(value), value))

    look(value)
    return tensors, rest
