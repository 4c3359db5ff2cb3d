"""What the recorder sees of small modules."""

import pytest
import torch
import torch.nn.functional as F
from models.tiny_models import as_loaded, tiny_llama
from torch import nn

from autoquant.errors import WorkloadError
from autoquant.models import from_module
from autoquant.profiler.record import record, record_model
from autoquant.profiler.tables import ASK
from autoquant.records import LinearShape, SiteUse, Workload
from autoquant.runtime.phases import make_phases


class Net(nn.Module):
    """A module from its children and a forward function."""

    def __init__(self, forward, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self._forward_function = forward

    def forward(self, *inputs):
        return self._forward_function(self, *inputs)


def bare(*size):
    return nn.Parameter(torch.randn(*size))


def site_of(recording):
    assert len(recording.sites) == 1
    return recording.sites[0]


def reasons(recording):
    return {skipped.name: skipped.reason for skipped in recording.skipped}


def test_a_linear_module_is_a_site_with_its_shape_and_rows(recorded):
    recording = recorded(Net(lambda self, x: self.up(x), up=nn.Linear(8, 16)), torch.randn(2, 3, 8))
    site = site_of(recording)
    assert (site.name, site.parameters, site.kept, site.siblings) == (
        "up",
        ("up.weight",),
        (),
        ("up",),
    )
    assert site.shape == LinearShape(n=16, k=8, bias=True, dtype="float32")
    assert site.uses == (SiteUse(phase="forward", m=6, calls=1),)
    assert reasons(recording) == {"(vectors)": "vectors (norms, biases): too small to quantize"}


def test_a_linear_without_bias_in_another_dtype_says_so(recorded):
    module = nn.Sequential(nn.Linear(8, 16, bias=False)).bfloat16()
    site = site_of(recorded(module, torch.randn(4, 8).bfloat16()))
    assert site.shape == LinearShape(n=16, k=8, bias=False, dtype="bfloat16")
    assert (site.name, site.uses[0].m) == ("0", 4)


def test_a_functional_linear_on_a_bare_parameter_is_a_site_named_after_it(recorded):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = bare(4, 8)

        def forward(self, x):
            return F.linear(x, self.projection)

    site = site_of(recorded(Net(lambda self, x: self.inner(x), inner=Inner()), torch.randn(5, 8)))
    assert (site.name, site.parameters) == ("inner.projection", ("inner.projection",))


@pytest.mark.parametrize(
    "call",
    [
        lambda self, x: F.linear(x, weight=self.w, bias=self.b),
        lambda self, x: F.linear(input=x, weight=self.w, bias=self.b),
    ],
)
def test_a_linear_called_by_keywords_is_a_site(recorded, call):
    site = site_of(recorded(Net(call, w=bare(4, 8), b=bare(4)), torch.randn(5, 8)))
    assert (site.parameters, site.shape.bias, site.uses[0].m) == (("w",), True, 5)


def test_linears_that_share_a_weight_are_one_site(recorded):
    module = Net(
        lambda self, x: self.second(self.first(x)), first=nn.Linear(8, 8), second=nn.Linear(8, 8)
    )
    module.second.weight = module.first.weight
    recording = recorded(module, torch.randn(3, 8))
    site = site_of(recording)
    assert (site.name, site.parameters, site.kept) == (
        "first",
        ("first.weight", "second.weight"),
        (),
    )
    assert site.uses == (SiteUse(phase="forward", m=3, calls=2),)
    assert recording.parameter_bytes == (64 + 16) * 4


def test_a_head_tied_to_the_embedding_is_a_site_that_keeps_the_embedding(recorded):
    module = Net(
        lambda self, ids: self.head(self.embedding(ids)),
        embedding=nn.Embedding(16, 8),
        head=nn.Linear(8, 16, bias=False),
    )
    module.head.weight = module.embedding.weight
    recording = recorded(module, torch.zeros(1, 4, dtype=torch.long))
    site = site_of(recording)
    assert (site.name, site.parameters, site.kept) == (
        "head",
        ("head.weight",),
        ("embedding.weight",),
    )
    assert "stays unquantized beside it" in reasons(recording)["embedding.weight"]
    assert recording.skipped[0].share == 0.0


def test_a_head_that_reads_the_embeddings_own_weight_is_listed_and_not_covered(recorded):
    module = Net(
        lambda self, ids: F.linear(self.up(self.embedding(ids)), self.embedding.weight),
        embedding=nn.Embedding(16, 8),
        up=nn.Linear(8, 8, bias=False),
    )
    recording = recorded(module, torch.zeros(1, 4, dtype=torch.long))
    assert site_of(recording).name == "up"
    assert "also used by embedding" in reasons(recording)["embedding.weight"]
    assert recording.weights_share == pytest.approx(64 / 192)
    assert recording.flops_share["forward"] == pytest.approx(64 / 192)


def test_linears_that_read_the_same_tensor_are_siblings(recorded):
    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x + 0)
        return self.o(q + k + v)

    module = Net(forward, **{name: nn.Linear(8, 8) for name in "qkvo"})
    siblings = {site.name: site.siblings for site in recorded(module, torch.randn(3, 8)).sites}
    assert siblings == {"q": ("q", "k"), "k": ("q", "k"), "v": ("v",), "o": ("o",)}


def test_a_linear_that_runs_several_times_counts_its_calls_by_rows(recorded):
    module = Net(lambda self, x: (self.step(self.step(x)), self.step(x[:2])), step=nn.Linear(8, 8))
    site = site_of(recorded(module, torch.randn(5, 8)))
    assert site.uses == (
        SiteUse(phase="forward", m=5, calls=2),
        SiteUse(phase="forward", m=2, calls=1),
    )


def test_what_is_no_linear_is_listed_with_its_reason_and_share(recorded):
    def forward(self, image, ids):
        features = self.conv(image).flatten(1)
        return self.head(features) + self.embedding(ids) + self.norm(features[:, :4])

    module = Net(
        forward,
        conv=nn.Conv1d(2, 4, 3, padding=1, bias=False),
        embedding=nn.Embedding(10, 4),
        head=nn.Linear(20, 4, bias=False),
        norm=nn.LayerNorm(4),
        unused=nn.Linear(4, 4, bias=False),
    )
    recording = recorded(module, torch.randn(3, 2, 5), torch.tensor([1, 2, 3]))
    total = 24 + 40 + 80 + 8 + 16
    assert site_of(recording).name == "head"
    assert reasons(recording) == {
        "embedding.weight": f"not used as a linear: embedding{ASK}",
        "conv.weight": "not used as a linear: conv1d",
        "unused.weight": "not used in this workload",
        "(vectors)": "vectors (norms, biases): too small to quantize",
    }
    assert [skipped.numel for skipped in recording.skipped] == [40, 24, 16, 8]
    assert [skipped.share for skipped in recording.skipped] == [n / total for n in (40, 24, 16, 8)]
    assert recording.weights_share == 80 / total


@pytest.mark.parametrize("how", ["t()", "T", "mT"])
def test_a_weight_that_is_multiplied_by_hand_is_not_called_unused(recorded, how):
    products = {
        "t()": lambda self, x: x @ self.w.t(),
        "T": lambda self, x: x @ self.w.T,
        "mT": lambda self, x: x @ self.w.mT,
    }
    recording = recorded(Net(products[how], w=bare(4, 8)), torch.randn(3, 8))
    assert recording.sites == ()
    assert reasons(recording)["w"].startswith("not used as a linear")


@pytest.mark.parametrize(
    "by_hand", [lambda x, w: x @ w, lambda x, w: x @ w.t(), lambda x, w: x @ w.T]
)
def test_a_weight_that_the_same_module_also_multiplies_by_hand_is_not_a_site(recorded, by_hand):
    module = Net(lambda self, x: by_hand(F.linear(x, self.w), self.w), w=bare(8, 8))
    recording = recorded(module, torch.randn(3, 8))
    assert recording.sites == ()
    assert reasons(recording)["w"].startswith("is a linear's weight and also used by")


def test_a_linear_on_a_computed_weight_is_listed_under_its_module(recorded):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = bare(4, 8)

        def forward(self, x):
            return F.linear(x, self.w * 2)

    recording = recorded(Net(lambda self, x: self.inner(x), inner=Scaled()), torch.randn(3, 8))
    assert recording.sites == ()
    assert reasons(recording)["inner"] == "a linear on a computed weight, not on a parameter"
    assert reasons(recording)["inner.w"].startswith("not used as a linear: mul")
    assert recording.flops_share == {"forward": 0.0}


def test_an_exported_program_has_the_sites_of_its_module(recorded):
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False)).eval()
    x = torch.randn(5, 8)
    exported = torch.export.export(module, (x,)).module()
    phases = make_phases(as_loaded(exported, "module", (x,)), Workload.single())
    recording, original = record(exported, phases), recorded(module, x)
    assert [site.name for site in recording.sites] == ["0", "2"]
    assert [(s.parameters, s.shape, s.uses) for s in recording.sites] == [
        (s.parameters, s.shape, s.uses) for s in original.sites
    ]
    assert recording.weights_share == original.weights_share


def test_the_share_of_flops_counts_products_that_are_no_linear(recorded):
    module = Net(lambda self, x: self.up(x) @ torch.ones(16, 8), up=nn.Linear(8, 16, bias=False))
    recording = recorded(module, torch.randn(4, 8))
    assert recording.flops_share == {"forward": pytest.approx(0.5)}
    assert recording.weights_share == 1.0


def test_recording_leaves_no_hooks_and_the_same_output(recorded):
    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    x = torch.randn(2, 8)
    before = module(x)
    recorded(module, x)
    assert torch.equal(module(x), before)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_a_model_that_fails_leaves_no_hooks(recorded):
    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(8, 4))
    with pytest.raises(RuntimeError):
        recorded(module, torch.randn(2, 8))
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_a_module_that_recovers_from_a_childs_error_keeps_its_name(recorded):
    class Recovering(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Linear(9, 9)
            self.w = bare(4, 8)

        def forward(self, x):
            try:
                return self.child(x)
            except RuntimeError:
                return F.linear(x, self.w + 0)

    recording = recorded(Net(lambda self, x: self.inner(x), inner=Recovering()), torch.randn(3, 8))
    assert "a linear on a computed weight" in reasons(recording)["inner"]


def test_a_language_model_is_recorded_once_per_phase():
    module = tiny_llama(tied=True)
    phases = make_phases(as_loaded(module), Workload.parse("prefill=6,decode=3", 2))
    recording = record(module, phases)
    sites = {site.name: site for site in recording.sites}
    assert len(sites) == 2 * 7 + 1
    layer = "model.layers.0"
    assert sites[f"{layer}.self_attn.q_proj"].uses == (
        SiteUse(phase="prefill", m=12, calls=1),
        SiteUse(phase="decode", m=2, calls=1),
    )
    assert sites[f"{layer}.self_attn.q_proj"].siblings == tuple(
        f"{layer}.self_attn.{x}_proj" for x in "qkv"
    )
    assert sites[f"{layer}.mlp.up_proj"].siblings == (
        f"{layer}.mlp.gate_proj",
        f"{layer}.mlp.up_proj",
    )
    assert sites[f"{layer}.mlp.down_proj"].siblings == (f"{layer}.mlp.down_proj",)
    assert sites["lm_head"].uses[0].m == 2  # only the last token of each sequence
    assert sites["lm_head"].kept == ("model.embed_tokens.weight",)
    assert 0.8 < recording.flops_share["prefill"] < 1 and 0.8 < recording.flops_share["decode"] < 1
    linear = sum(site.shape.n * site.shape.k for site in recording.sites)
    total = sum(parameter.numel() for parameter in module.parameters())
    assert recording.weights_share == linear / total and recording.parameter_bytes == 2 * total


class Experts(nn.Module):
    """Sends token ids to experts by their last bit, or all to the first one."""

    def __init__(self, spread):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 32)
        self.spread = spread

    def forward(self, ids):
        x = self.embed(ids)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = (ids % 2 if self.spread else ids * 0) == number
            y[chosen] = expert(x[chosen])
        return self.head(y)


@pytest.mark.parametrize("spread", [True, False])
def test_an_expert_without_rows_is_left_alone_and_that_is_said(spread):
    loaded = from_module(Experts(spread).eval(), tokenizer=object())
    recording = record(loaded.module, make_phases(loaded, Workload.parse("prefill=16", 1)))
    names = {site.name for site in recording.sites}
    assert names == {"experts.0", "head"} | ({"experts.1"} if spread else set())
    assert all(use.m > 0 for site in recording.sites for use in site.uses)
    idle = {skipped.name: skipped.reason for skipped in recording.skipped}
    assert ("experts.1.weight" in idle) is not spread
    assert spread or "no rows" in idle["experts.1.weight"]


def test_memory_that_runs_out_in_a_request_is_blamed_on_its_size():
    def forward(_self, _x):
        return torch.empty(1 << 60)

    loaded = as_loaded(Net(forward), "module", inputs=(torch.ones(2, 8),))
    with pytest.raises(WorkloadError, match="does not fit into the memory of cpu: lower --batch"):
        record_model(loaded, Workload.single(), print)
