"""Parts that are found to do the same as one that was traced."""

import pytest
import torch
from torch import nn

from autoquant.runtime import parts
from autoquant.runtime.parts import compile_parts
from runtime.test_compiled import INT8, INT8_DEQUANTIZED, X, quantized_blocks
from runtime.test_parts import deep_llama, in_parts, run, steps


@pytest.fixture
def traced(monkeypatch):
    """Counts the parts that are traced; what they compile to is run as it is."""
    counts = [0]
    make_fx = parts.make_fx

    def counting(*args):
        counts[0] += 1
        return make_fx(*args)

    monkeypatch.setattr(parts, "make_fx", counting)
    monkeypatch.setattr(parts, "FUNCTIONS", {})
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, _inputs: graph)
    return counts


def test_as_many_parts_are_traced_for_many_layers_as_for_few(traced):
    counts = []
    for layers in (2, 5):
        traced[0] = 0
        for result, expected, length, expected_length in steps(deep_llama(layers)):
            torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
            assert length == expected_length
        counts.append(traced[0])
    # Embedding, positions, block and norm, for each of two phases, and the head of one token.
    assert counts == [9, 9]


def test_each_make_of_blocks_is_traced_once_and_computes_with_its_own_weights(traced):
    module = quantized_blocks(INT8, INT8_DEQUANTIZED, None, INT8, None, INT8_DEQUANTIZED)
    torch.testing.assert_close(run(in_parts(module)), run(module), rtol=0.05, atol=0.05)
    assert traced == [3]


class Block(nn.Module):
    """Computes what a function makes of it."""

    def __init__(self, function, **held):
        super().__init__()
        self.function = function
        for name, value in held.items():
            self.register_buffer(name, value)

    def forward(self, *args):
        return self.function(self, *args)


def of(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outputs(*blocks, x=X):
    """What the blocks give, compiled, and as they are."""
    plain = [run(block, x) for block in blocks]
    holder = nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})
    compile_parts(holder)
    return [run(block, x) for block in holder.values()], plain


PAIRS = {
    "another operator": (lambda b, x: x + b.w, lambda b, x: x - b.w),
    "another number": (lambda b, x: x * 2 + b.w, lambda b, x: x * 3 + b.w),
    "a number of another type": (lambda b, x: x + b.w * 1, lambda b, x: x + b.w * 1.0),
    "more operators": (lambda b, x: x + b.w, lambda b, x: (x + b.w) * 2),
    "fewer operators": (lambda b, x: (x + b.w) * 2, lambda b, x: x + b.w),
    "other operands": (lambda b, x: x * b.w - x, lambda b, x: x - x * b.w),
    "another result": (lambda b, x: (x + b.w, x - b.w)[0], lambda b, x: (x + b.w, x - b.w)[1]),
    "what it was given": (lambda b, x: (x + b.w, x)[0], lambda b, x: (x + b.w, x)[1]),
    "one tensor for two": (lambda b, x: x * b.w + b.v, lambda b, x: x * b.w + b.w),
    "two tensors for one": (lambda b, x: x * b.w + b.w, lambda b, x: x * b.w + b.v),
    "a number of its own": (lambda b, x: x + torch.tensor(2.0), lambda b, x: x + torch.tensor(3.0)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_part_that_does_something_else_computes_that(pair, traced):
    blocks = [
        Block(function, w=of(seed, 64), v=of(9 - seed, 64))
        for seed, function in enumerate([*pair, *pair])
    ]
    compiled, plain = outputs(*blocks)
    for result, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(result, expected)
    assert traced[0] <= 2


@pytest.mark.parametrize(
    "other", [of(1, 1), of(1, 64, dtype=torch.float64), of(1, 64, 2)[:, 0]], ids=lambda t: t.dtype
)
def test_a_part_that_holds_tensors_of_another_kind_is_traced(other, traced):
    blocks = [Block(lambda b, x: x + b.w, w=w) for w in (of(0, 64), other, of(2, 64))]
    compiled, plain = outputs(*blocks)
    for result, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(result, expected)
    assert traced == [2]


def test_parts_that_change_what_they_hold_change_their_own(traced):
    def count(block, x):
        block.seen.add_(1)
        block.last.copy_(x)
        return x + block.seen

    blocks = [Block(count, seen=torch.tensor(start), last=of(0, *X.shape)) for start in (0, 5)]
    holder = compile_parts(nn.ModuleList(blocks))
    x = X.float()
    for calls in (1, 2):
        for block, start in zip(holder, (0, 5), strict=True):
            torch.testing.assert_close(run(block, x), x + start + calls)
            assert block.seen == start + calls and torch.equal(block.last, x)
    assert traced == [1]


def test_a_part_that_catches_errors_is_traced_and_computes_what_it_does(traced):
    def careful(block, x):
        try:
            return x * block.factor + block.w
        except Exception:  # noqa: BLE001 - what says that it differs, too
            return x

    blocks = [Block(careful, w=of(seed, 64)) for seed in (0, 1)]
    for factor, block in enumerate(blocks, start=2):
        block.factor = factor
    compiled, plain = outputs(*blocks)
    for result, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(result, expected)
    assert traced == [2]


def test_what_else_a_part_returns_is_its_own(traced):
    blocks = [Block(lambda b, x: {"y": x + b.w, "name": b.name}, w=of(s, 64)) for s in (0, 1)]
    blocks[0].name, blocks[1].name = "first", "second"
    compiled, plain = outputs(*blocks)
    assert [each["name"] for each in compiled] == ["first", "second"]
    for result, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(result["y"], expected["y"])
    assert traced == [1]
