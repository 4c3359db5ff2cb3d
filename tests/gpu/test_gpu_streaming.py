"""A model three times larger than what it may use of a GPU: the same results block by block."""

import pytest
import torch
from builders.records import make_plan
from models.tiny_models import tiny_tokenizer

from autoquant.candidates import get_format
from autoquant.delivery.applier import applied, module_bytes
from autoquant.devices import backend
from autoquant.devices.memory import LIMIT_VARIABLE, release_memory
from autoquant.evaluators.quality import TextQuality, each_logits, next_token_logits
from autoquant.evaluators.sensitivity import SENSITIVITIES, Change
from autoquant.events import ignore
from autoquant.models import load_model
from autoquant.models.stand_in import to_time
from autoquant.profiler.record import record_model
from autoquant.records import LayerChoice, RouteStep, Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MIB = 1 << 20
WINDOWS = torch.randint(0, 500, (3, 64), generator=torch.Generator().manual_seed(0))
WORKLOAD = Workload.parse("prefill=64,decode=8", 1)
INT8 = "int8-row/plain"


class Parts:
    key, inputs = "text", None
    windows = dict.fromkeys(("calibration", "report", "selection"), WINDOWS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=40,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        LlamaForCausalLM(config).bfloat16().save_pretrained(out, max_shard_size="200MB")
    tiny_tokenizer().save_pretrained(out)
    torch.cuda.empty_cache()
    return out


@pytest.fixture(scope="module")
def whole(folder):
    return load_model(folder, device="cuda")


@pytest.fixture
def limit(whole):
    """A third of the weights, beside what the whole model takes in the same process."""
    release_memory()
    torch.cuda.empty_cache()
    return module_bytes(whole.module) // 3 + torch.cuda.memory_allocated()


@pytest.fixture
def streamed(folder, whole, limit, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, str(limit))
    # What is enforced counts all of this process, and the whole model is there for comparison.
    monkeypatch.setattr(type(backend("cuda")), "keep_to_limit", lambda _self: None)
    loaded = load_model(folder, device="cuda")
    assert loaded.stream is not None and loaded.device.startswith("cuda")
    return loaded


def most_allocated(work):
    """The result of the work, and the most memory of it. What came before has left none."""
    release_memory()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = work()
    return found, torch.cuda.max_memory_allocated() - before


def test_logits_are_the_same_with_a_few_blocks_in_memory(whole, streamed):
    windows = [ids.unsqueeze(0).cuda() for ids in WINDOWS]
    expected = [next_token_logits(whole.module, ids) for ids in windows]
    found, most = most_allocated(lambda: list(each_logits(streamed.module, windows)))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert most < module_bytes(whole.module) // 8


def test_the_recording_is_the_same(whole, streamed):
    ours, theirs = (record_model(each, WORKLOAD, ignore) for each in (streamed, whole))
    assert ours.sites == theirs.sites and ours.skipped == theirs.skipped


@pytest.mark.parametrize("method", ["path", "fisher"])
def test_sensitivities_are_the_same_with_a_few_blocks_in_memory(whole, streamed, method):
    sites = record_model(whole, WORKLOAD, ignore).sites
    changes = [Change(site, "int8+a16", get_format(INT8), "a16") for site in sites]

    def losses(loaded):
        found = {}
        SENSITIVITIES[method].score(
            loaded.module, changes, TextQuality(Parts(), "cuda"), lambda _, each: found.update(each)
        )
        return found

    expected = losses(whole)
    found, most = most_allocated(lambda: losses(streamed))
    assert most < module_bytes(whole.module) // 3
    for key, loss in expected.items():
        assert found[key] == pytest.approx(loss, rel=1e-3, abs=1e-9), key


def test_a_plan_is_applied_without_the_unquantized_model(whole, streamed):
    layers = tuple(
        LayerChoice(
            name=site.name,
            parameters=site.parameters,
            shape=site.shape,
            format=INT8,
            route=(RouteStep(upper_m=None, kernel="dequantize-matmul"),),
            numerics="int8-row+a16",
            latency_us={},
            memory_bytes=0,
            loss=0.0,
        )
        for site in record_model(whole, WORKLOAD, ignore).sites
    )
    plan = make_plan(layers=layers)
    expected = applied(plan, whole.module, None)
    made, most = most_allocated(lambda: applied(plan, streamed.module, None))
    assert most < module_bytes(whole.module) * 0.6
    assert all(parameter.is_cuda for parameter in made.parameters())
    ids = WINDOWS[:1].cuda()
    assert torch.equal(next_token_logits(made, ids), next_token_logits(expected, ids))


def test_a_stand_in_takes_few_blocks(streamed):
    (made, note), most = most_allocated(lambda: to_time(streamed.module))
    assert "blocks, used again" in note and most < module_bytes(streamed.module) // 8
    assert next_token_logits(made, WINDOWS[:1].cuda()).shape == (64, 512)
