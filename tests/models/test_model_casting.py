"""Weights are cast, and what is no weight keeps its dtype unless the model would not run."""

import pytest
import torch
from models.tiny_models import tiny_llama
from torch import nn

from autoquant.models import from_module, load_model
from autoquant.models.casting import cast

IDS = torch.arange(48).unsqueeze(0) % 60
FACTORY = """
from models.test_model_casting import {name}

def build():
    return {name}()
"""


class Tokens(nn.Module):
    """Embeds tokens, changes them by a buffer, and predicts the next ones."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, ids):
        return self.head(self.changed(self.embed(ids)))


class Rotary(Tokens):
    """Turns by frequencies that 16 bits round."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", 1000 ** -torch.linspace(0, 1, 8), persistent=False)

    def changed(self, x):
        angles = torch.arange(x.shape[1]).float()[:, None] * self.inv_freq.float()
        return (x.float() * angles.cos()).to(x.dtype)


class Complex(Tokens):
    def __init__(self, persistent=False):
        super().__init__()
        angles = torch.outer(torch.arange(64).float(), torch.linspace(1, 0.01, 4))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent)

    def changed(self, x):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (4, 2)).contiguous())
        return torch.view_as_real(pairs * self.turns[: x.shape[1]]).flatten(-2).to(x.dtype)


class StoredComplex(Complex):
    def __init__(self):
        super().__init__(persistent=True)


class Slopes(Tokens):
    """Adds positions times slopes in double precision."""

    def __init__(self):
        super().__init__()
        self.register_buffer("slopes", torch.linspace(0.01, 1, 8).double())
        self.register_buffer("order", torch.arange(8))
        self.register_buffer("mask", torch.ones(8, dtype=torch.bool))

    def changed(self, x):
        places = torch.arange(x.shape[1])[:, None] * self.slopes
        return torch.where(self.mask, (x + places).to(x.dtype), x)[..., self.order]


class Table(Tokens):
    """Adds a table of positions, which must have the dtype of the weights."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(64, 8), persistent=False)
        self.register_buffer("inv_freq", torch.rand(8), persistent=False)

    def changed(self, x):
        return x + self.table[: x.shape[1]] + self.inv_freq.sum().to(x.dtype)


class Normed(Tokens):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def changed(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


EXACT = {
    "inv_freq": Rotary,
    "turns": Complex,
    "stored turns": StoredComplex,
    "slopes": Slopes,
}


def dtypes_of(module):
    return {name: buffer.dtype for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("way", ["live", "state dict", "stored in 16 bits", "pickle"])
@pytest.mark.parametrize("kind", EXACT)
def test_buffers_keep_their_dtype_and_the_model_its_logits(kind, way, tmp_path, factory):
    torch.manual_seed(0)
    model = EXACT[kind]().eval()
    buffers = dtypes_of(model)
    path, options = tmp_path / "model.pt", {"dtype": "bf16"}
    if way == "live":
        loaded = from_module(model, **options)
    else:
        spec = factory(FACTORY.format(name=EXACT[kind].__name__))
        if way == "pickle":
            torch.save(model, path)
            options["trust_pickle"] = True
        else:
            state = model.state_dict()
            if way == "stored in 16 bits":
                state = {
                    name: value.bfloat16() if value.dtype is torch.float32 else value
                    for name, value in state.items()
                }
                options = {}
            torch.save(state, path)
            options["model_factory"] = spec
        loaded = load_model(path, **options)
    assert dtypes_of(loaded.module) == buffers and loaded.notes == ()
    assert loaded.dtype == "bfloat16" and model.head.weight.dtype is torch.float32
    with torch.no_grad():
        right, found = model(IDS), loaded.module(IDS).float()
    assert (found - right).norm() / right.norm() < 0.02


def test_a_buffer_is_cast_only_if_the_model_does_not_run_without():
    loaded = from_module(Table().eval(), dtype="bf16")
    assert dtypes_of(loaded.module) == {"table": torch.bfloat16, "inv_freq": torch.float32}
    assert "table" in loaded.notes[0] and "inv_freq" not in loaded.notes[0]
    assert loaded.module(IDS).dtype is torch.bfloat16


def test_running_statistics_follow_the_weights_beside_them():
    loaded = from_module(Normed().eval(), dtype="bf16")
    kinds = dtypes_of(loaded.module)
    assert kinds["norm.running_mean"] is kinds["norm.running_var"] is torch.bfloat16
    assert kinds["norm.num_batches_tracked"] is torch.int64
    assert loaded.module(IDS).dtype is torch.bfloat16


def test_buffers_stay_if_casting_them_does_not_help():
    class Broken(Table):
        def forward(self, ids):
            raise RuntimeError("needs other inputs")

    assert dtypes_of(from_module(Broken().eval(), dtype="bf16").module)["table"] is torch.float32


def test_parameters_that_are_kept_in_another_dtype_stay_so():
    class Mixed(Tokens):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def changed(self, x):
            return (x.float() * self.scale).to(x.dtype)

    model = Mixed().to(torch.bfloat16)
    model.scale.data = model.scale.data.float()
    cast(model, torch.float16, "cpu")
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds.pop("scale") is torch.float32 and set(kinds.values()) == {torch.float16}


@pytest.mark.parametrize(
    ("strict", "dtype", "exact"),
    [(False, "fp16", True), (False, "bf16", False), (True, "bf16", True)],
)
def test_modules_that_transformers_keeps_in_float32_stay_so(monkeypatch, strict, dtype, exact):
    model = tiny_llama(dtype=torch.float32)
    name = "_keep_in_fp32_modules_strict" if strict else "_keep_in_fp32_modules"
    monkeypatch.setattr(model, name, {"down_proj"})
    kinds = {n: p.dtype for n, p in from_module(model, dtype=dtype).module.named_parameters()}
    found = kinds["model.layers.0.mlp.down_proj.weight"] is torch.float32
    assert found is exact and kinds["model.layers.0.mlp.up_proj.weight"] is not torch.float32


def test_tied_parameters_stay_tied():
    loaded = from_module(tiny_llama(tied=True, dtype=torch.float32), dtype="bf16")
    assert loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight
