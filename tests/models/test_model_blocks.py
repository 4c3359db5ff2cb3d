"""Running a model from one of its blocks on."""

import pytest
import torch
from models.tiny_models import tiny_llama
from torch import nn

from autoquant.evaluators.quality import next_token_logits
from autoquant.models.blocks import BlockChain

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def chain_of(module):
    return BlockChain(module, lambda: next_token_logits(module, IDS))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class InPlace(Block):
    def forward(self, x):
        return x.add_(torch.tanh(self.linear(x)))


class Tuple(Block):
    def forward(self, x):
        return (super().forward(x), None)


def in_order(blocks, x):
    for block in blocks:
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x
    return x


def something_between(blocks, x):
    for block in blocks:
        x = block(x) * 2
    return x


def all_outputs_read(blocks, x):
    outputs = [x]
    for block in blocks:
        outputs.append(block(outputs[-1]))
    return sum(outputs)


WAYS = {
    "in order": in_order,
    "each on the embedding": lambda blocks, x: sum(block(x) for block in blocks),
    "backwards": lambda blocks, x: in_order(reversed(blocks), x),
    "twice": lambda blocks, x: in_order([*blocks, *blocks], x),
    "something between": something_between,
    "one left out": lambda blocks, x: in_order(blocks[:-1], x),
    "all outputs read": all_outputs_read,
}


class Stack(nn.Module):
    """Token ids to logits through blocks, run by `way`."""

    def __init__(self, way="in order", block=Block, count=3):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(block() for _ in range(count))
        self.head = nn.Linear(8, 16)
        self.way = WAYS[way]

    def forward(self, ids):
        return self.head(self.way(self.blocks, self.embedding(ids)))


def assert_every_start_gives_the_full_logits(module):
    full = next_token_logits(module, IDS).clone()
    chain, outputs = chain_of(module), []
    with chain.capture(outputs):
        next_token_logits(module, IDS)
    assert len(outputs) == len(chain.blocks)
    for _ in range(2):
        for start in range(len(chain.blocks), -1, -1):
            with chain.starting_at(start, outputs):
                assert torch.equal(next_token_logits(module, IDS), full), f"from block {start}"
    assert torch.equal(next_token_logits(module, IDS), full)


def test_the_blocks_of_a_language_model_are_found():
    module = tiny_llama()
    chain = chain_of(module)
    assert chain.blocks == tuple(module.model.layers)
    for index, layer in enumerate(module.model.layers):
        assert all(
            chain.start(linear.weight) == index
            for linear in layer.modules()
            if isinstance(linear, nn.Linear)
        )
    assert chain.start(module.lm_head.weight) == 2
    assert (
        chain.start(module.model.embed_tokens.weight) == 0
    )  # never seen in a linear: nothing may be skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model_started_at_any_block_gives_the_full_logits(dtype):
    assert_every_start_gives_the_full_logits(tiny_llama(dtype=dtype))


@pytest.mark.parametrize("block", [Block, Tuple])
def test_a_list_of_blocks_in_order_is_a_chain(block):
    module = Stack(block=block)
    assert chain_of(module).blocks == tuple(module.blocks)
    assert_every_start_gives_the_full_logits(module)


@pytest.mark.parametrize(
    "way", ["each on the embedding", "backwards", "twice", "something between", "one left out"]
)
def test_a_list_of_blocks_run_in_another_way_is_no_chain(way):
    module = Stack(way)
    chain = chain_of(module)
    assert chain.blocks == ()
    assert all(chain.start(parameter) == 0 for parameter in module.parameters())
    assert_every_start_gives_the_full_logits(module)


def test_blocks_whose_outputs_are_also_read_elsewhere_give_the_full_logits():
    assert_every_start_gives_the_full_logits(Stack("all outputs read"))


def test_blocks_that_change_their_input_in_place_give_the_full_logits():
    assert_every_start_gives_the_full_logits(Stack(block=InPlace))


def test_an_activation_in_place_gives_the_full_logits():
    torch.manual_seed(0)
    layers = nn.Embedding(16, 8), nn.Linear(8, 8), nn.SiLU(inplace=True), nn.Linear(8, 16)
    assert_every_start_gives_the_full_logits(nn.Sequential(*layers))


def test_a_sequential_is_a_chain():
    module = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 16))
    chain = chain_of(module)
    assert chain.blocks == tuple(module) and chain.start(module[3].weight) == 3
    assert_every_start_gives_the_full_logits(module)


def test_a_model_without_a_list_has_no_blocks():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

        def forward(self, ids):
            return self.head(self.embedding(ids))

    module = Plain()
    assert chain_of(module).blocks == ()
    assert_every_start_gives_the_full_logits(module)


def test_the_heaviest_chain_is_taken():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.light = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8))
            self.heavy = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)), nn.Linear(8, 16))

        def forward(self, ids):
            return self.heavy(self.light(ids))

    module = Two()
    assert chain_of(module).blocks == tuple(module.heavy)


def test_a_lighter_chain_is_taken_where_the_heaviest_list_is_none():
    module = Stack("backwards")
    module.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16))
    chain = chain_of(module)
    assert chain.blocks == tuple(module.head)
    assert (
        chain.start(module.blocks[0].linear.weight) == 0 and chain.start(module.head[1].weight) == 1
    )


def test_a_weight_shared_by_blocks_starts_at_the_first():
    module = Stack()
    module.blocks[2].linear.weight = module.blocks[1].linear.weight
    assert chain_of(module).start(module.blocks[2].linear.weight) == 1


def test_skipped_blocks_are_not_run():
    module = Stack()
    chain, outputs, ran = chain_of(module), [], []
    with chain.capture(outputs):
        next_token_logits(module, IDS)
    for index, block in enumerate(module.blocks):
        block.linear.register_forward_hook(lambda *_args, index=index: ran.append(index))
    with chain.starting_at(2, outputs):
        next_token_logits(module, IDS)
    assert ran == [2]


def test_blocks_run_again_after_an_error():
    module = Stack()
    full = next_token_logits(module, IDS)
    chain, outputs = chain_of(module), []
    with chain.capture(outputs):
        next_token_logits(module, IDS)
    with pytest.raises(RuntimeError, match="stop"), chain.starting_at(2, outputs):
        raise RuntimeError("stop")
    with torch.no_grad():
        module.blocks[0].linear.weight.zero_()
    assert not torch.equal(next_token_logits(module, IDS), full)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in module.blocks)


def test_a_block_with_a_forward_of_its_own_keeps_it():
    module = Stack()
    original = module.blocks[0].forward
    module.blocks[0].forward = lambda x: original(x) + 1
    assert_every_start_gives_the_full_logits(module)
