"""Models made ready for the compiler.

If a quantized model is given to `torch.compile` directly, each of its blocks is compiled, although
most are alike. And on every call PyTorch checks each weight's tensor subclass and takes it apart.
Here weights are taken apart once, before. Blocks of the same class become nested regions
(`torch.compiler.nested_compile_region`), and regions that are alike are compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autoquant.candidates import get_format
from autoquant.candidates.linears import ApartLinear, is_product, take_apart
from autoquant.candidates.routed import RoutedWeight
from autoquant.devices import backend
from autoquant.models.copies import shallow_copy
from autoquant.records import content_key
from autoquant.runtime.caches import REGION_CLASSES

_FEWEST_BLOCKS = 2


def ready_to_compile(module: nn.Module, *, regions: bool = True) -> nn.Module:
    """Return a copy, with the same tensors, that compiles to the same kernels in less time.

    Adjacent weights (see `autoquant.candidates.joined`) are multiplied as one.

    Args:
        regions: Make repeated blocks nested regions, which the compiler reuses where they are
            alike.
    """
    ready = take_apart(shallow_copy(module), any_subclass=True)
    for block in repeated_blocks(ready):
        if regions and _nests(block):
            linears = [
                (name, linear)
                for name, linear in block.named_modules()
                if isinstance(linear, ApartLinear)
            ]
            for _, linear in linears:
                linear.keeps = False  # a nested region may change nothing outside
            make = content_key([(name, linear.key()) for name, linear in linears])
            block.__class__ = _region_class(type(block), make)
    return ready


def compile_forward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with static shapes.

    PyTorch keeps compiled code per code object, so each model gets its own copy. Otherwise every
    plan would add to the same list, whose guards are tried in turn on each call, until it reaches
    the compiler's recompile limit.
    """
    return torch.compile(_copy(function, function.__name__), dynamic=False, backend=_backend)


def _backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Compile with Inductor, after having equal products of several linears computed once."""
    for part in graph.modules():
        if isinstance(part, torch.fx.GraphModule):
            _compute_once(part)
    return compile_graph(graph, inputs)


def compile_graph(
    graph: torch.fx.GraphModule, inputs: Sequence[Any], *, settings: Mapping[str, Any] | None = None
) -> Any:
    """Compile a graph with Inductor, or take it from the compiler's cache on disk.

    Args:
        settings: Of Inductor, beside those of the devices.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    tensors = [given for given in inputs if isinstance(given, torch.Tensor)]
    merged = {
        key: value
        for tensor in tensors
        for key, value in backend(tensor.device).compiler_settings.items()
    } | dict(settings or {})
    with config.patch(merged), _traced(inputs) as traced:
        for node, given in zip(graph.graph.find_nodes(op="placeholder"), traced, strict=True):
            node.meta["val"] = given  # what calls a graph from C++ looks for it there
        return compile_fx(graph, traced)


@contextmanager
def _traced(inputs: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield the inputs as `torch.compile` hands them to a compiler.

    The compiler keeps on disk only what it compiles for tensors without numbers, whose shapes one
    environment knows.
    """
    if TracingContext.try_get() is not None:  # called by torch.compile
        yield list(inputs)
        return
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with tracing(TracingContext(mode)):
        yield [
            mode.from_tensor(given, static_shapes=True)
            if isinstance(given, torch.Tensor)
            else given
            for given in inputs
        ]


def _compute_once(graph: torch.fx.GraphModule) -> None:
    """Replace every product by the first one with the same input and weight."""
    # Each linear whose weight lies beside others asks for the product with all of them.
    known: dict[Any, torch.fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not is_product(node.target):
            continue
        first = known.setdefault((node.target, node.args), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)
    graph.recompile()


def _copy(function: Any, name: str) -> Callable[..., Any]:
    """Return the function with its own code object."""
    code = function.__code__.replace(co_name=name)
    own = FunctionType(
        code, function.__globals__, name, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of lists of modules that hold several of one class.

    Of nested lists, the outer one counts.
    """
    for child in module.children():
        members = list(child) if isinstance(child, (nn.ModuleList, nn.Sequential)) else []
        kinds = [type(member) for member in members if next(member.children(), None) is not None]
        blocks = [member for member in members if kinds.count(type(member)) >= _FEWEST_BLOCKS]
        yield from blocks
        if not blocks:
            yield from repeated_blocks(child)


def _nests(block: nn.Module) -> bool:
    """Check whether the compiler takes what this block calls in a nested region."""
    for owner in block.modules():
        for parameter in owner.parameters(recurse=False):
            apart = isinstance(owner, ApartLinear) and _kernels_nest(parameter)
            if is_traceable_wrapper_subclass(parameter) and not apart:
                return False
    return True


def _kernels_nest(weight: torch.Tensor) -> bool:
    if not isinstance(weight, RoutedWeight):
        return True
    fmt = get_format(weight.format_id)
    return all(fmt.kernel(kernel).nests for _, kernel in weight.route)


def _region_class(kind: type[nn.Module], make: str) -> type[nn.Module]:
    """Return a class whose forward pass is a nested region, one for all blocks of a make.

    The compiler keeps regions by code object and compares these by value, so their names must
    differ.
    """
    key = (kind, make)
    if key not in REGION_CLASSES:
        region = torch.compiler.nested_compile_region(
            _copy(kind.forward, f"{kind.forward.__name__}_{make}")
        )
        REGION_CLASSES[key] = type(
            kind.__name__, (kind,), {"forward": region, "__module__": kind.__module__}
        )
    return REGION_CLASSES[key]
