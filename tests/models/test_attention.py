"""`nn.MultiheadAttention` opened up into its linears: the same numbers in every setting."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from autoquant.candidates.calls import LinearHook
from autoquant.models.attention import OpenedAttention, open_attentions, opened_names, part_crossed

WIDTH, HEADS, BATCH, QUERIES, KEYS = 16, 4, 3, 5, 7


class Watch(LinearHook):
    """Sees linears, so that opened attentions call theirs."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def on_linear(self, call):
        self.shapes.append(tuple(call.weight.shape))


def attention(**options):
    torch.manual_seed(0)
    made = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def same(expected, found):
    assert len(expected) == len(found) == 2
    for right, got in zip(expected, found, strict=True):
        if right is None:
            assert got is None
        else:
            assert torch.allclose(right, got, rtol=1e-4, atol=1e-4) and right.shape == got.shape


def inputs(part, kind):
    """Query, key and value of one kind: the same tensor, the same keys, or three tensors."""
    queries = QUERIES if kind != "self" else KEYS
    shape = (BATCH, queries) if part.batch_first else (queries, BATCH)
    other = (BATCH, KEYS) if part.batch_first else (KEYS, BATCH)
    query, key, value = (
        torch.randn(*rows, width)
        for rows, width in ((shape, WIDTH), (other, part.kdim), (other, part.vdim))
    )
    if kind == "self":
        return query, query, query
    return (query, key, key) if kind == "cross" else (query, key, value)


OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True, "batch_first": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "dims": {"kdim": 24, "vdim": 8},
    "kdim": {"kdim": 24, "batch_first": True, "bias": False},
}


@pytest.mark.parametrize("parted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_an_opened_attention_computes_what_it_did(options, parted):
    torch_own = attention(**OPTIONS[options])
    opened = copy.deepcopy(torch_own)
    open_attentions(opened, {"q_proj_weight"} if parted else None)
    assert isinstance(opened, OpenedAttention)
    has_dims = not torch_own._qkv_same_embed_dim
    for kind in ("three",) if has_dims else ("self", "cross", "three"):
        q, k, v = inputs(torch_own, kind)
        queries = q.shape[1 if torch_own.batch_first else 0]
        hidden = torch.rand(queries, KEYS) > 0.7
        hidden[:, 0] = False
        padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
        padding[1, -2:] = True
        per_head = torch.randn(BATCH * HEADS, queries, KEYS)
        for mask, pad, weights, averaged in itertools.product(
            (None, hidden, torch.randn(queries, KEYS), per_head),
            (None, padding, padding * -2.0),
            (True, False),
            (True, False),
        ):
            if mask is not None and pad is not None and mask.dtype != pad.dtype:
                continue
            asked = {
                "attn_mask": mask,
                "key_padding_mask": pad,
                "need_weights": weights,
                "average_attn_weights": averaged,
            }
            expected = torch_own(q, k, v, **asked)
            with Watch() as watch:
                found = opened(q, k, v, **asked)
            assert len(watch.shapes) == (2 if kind == "self" and not parted else 4)
            same(expected, found)
            same(expected, opened(q, k, v, **asked))


@pytest.mark.parametrize("add", [False, True])
@torch.no_grad()
def test_causal_hints_are_followed(add):
    torch_own = attention(batch_first=True, add_bias_kv=add)
    opened = copy.deepcopy(torch_own)
    open_attentions(opened)
    q, k, v = inputs(torch_own, "self")
    mask = nn.Transformer.generate_square_subsequent_mask(KEYS)
    for weights in (True, False):
        asked = {"attn_mask": mask, "is_causal": True, "need_weights": weights}
        with Watch():
            same(torch_own(q, k, v, **asked), opened(q, k, v, **asked))


@torch.no_grad()
def test_inputs_without_a_batch_are_computed():
    torch_own = attention()
    opened = copy.deepcopy(torch_own)
    open_attentions(opened)
    x = torch.randn(KEYS, WIDTH)
    mask = torch.randn(HEADS, KEYS, KEYS)
    pad = torch.zeros(KEYS)
    pad[-1] = float("-inf")
    for weights in (True, False):
        asked = {"need_weights": weights, "attn_mask": mask, "key_padding_mask": pad}
        with Watch():
            same(torch_own(x, x, x, **asked), opened(x, x, x, **asked))


def test_training_drops_out_as_before():
    torch_own = attention(dropout=0.5).train()
    opened = copy.deepcopy(torch_own)
    open_attentions(opened)
    q, k, v = inputs(torch_own, "self")
    with Watch():
        assert not torch.allclose(opened(q, k, v)[0], opened(q, k, v)[0])
    with torch.no_grad(), Watch():
        assert torch.allclose(
            opened.eval()(q, k, v)[0], torch_own.eval()(q, k, v)[0], rtol=1e-4, atol=1e-4
        )


class Crossing(nn.Module):
    """One attention of each use, and one that only shares keys."""

    def __init__(self):
        super().__init__()
        self.own, self.cross, self.shifted = (attention(batch_first=True) for _ in range(3))

    def forward(self, x, y):
        x = self.own(x, x, x)[0]
        x = self.cross(x, y, y)[0]
        moved = x + 1
        return self.shifted(moved, moved, value=x)[0]


def test_only_attentions_that_cross_are_parted():
    module = Crossing()
    open_attentions(module)
    x, y = torch.randn(2, 4, WIDTH), torch.randn(2, 6, WIDTH)
    expected = module(x, y)
    part_crossed(module, lambda: module(x, y))
    names = opened_names(module)
    assert names[0] == "own.in_proj_weight" and len(names) == 7
    assert {"cross.q_proj_weight", "cross.v_proj_weight", "shifted.k_proj_weight"} < set(names)
    assert torch.allclose(module(x, y), expected, rtol=1e-4, atol=1e-4)


def test_the_attention_of_a_decoder_to_its_memory_is_parted_where_nothing_runs():
    module = nn.TransformerDecoderLayer(WIDTH, HEADS, 32)
    open_attentions(module)
    part_crossed(module, lambda: module(None))
    assert module.self_attn.in_proj_weight is not None
    assert module.multihead_attn.in_proj_weight is None
    assert opened_names(copy.deepcopy(module)) == opened_names(module)


def test_a_subclass_with_a_forward_pass_of_its_own_stays_as_it_is():
    class Other(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, 2 * x)

    other, patched = Other(WIDTH, HEADS), attention()
    patched.forward = lambda x: x
    module = nn.ModuleDict({"other": other, "patched": patched})
    open_attentions(module)
    assert opened_names(module) == [] and type(module["other"]) is Other


@torch.no_grad()
def test_the_unquantized_encoder_takes_the_fused_path_as_before(monkeypatch):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, pad = torch.randn(2, KEYS, WIDTH), torch.zeros(2, KEYS, dtype=torch.bool)
    pad[0, -2:] = True
    expected, plain = encoder(x, src_key_padding_mask=pad), encoder(x)
    open_attentions(encoder)
    fused = []
    own = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: fused.append(1) or own(*args)
    )
    assert torch.equal(encoder(x, src_key_padding_mask=pad), expected) and len(fused) == 2
    with Watch() as watch:
        assert torch.allclose(encoder(x), plain, rtol=1e-4, atol=1e-4)
    assert len(watch.shapes) == 8 and len(fused) == 2
