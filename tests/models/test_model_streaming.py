"""Models larger than their device: brought there block by block, with the same results."""

import pytest
import torch
from models.tiny_models import tiny_tokenizer

from autoquant.candidates import get_format
from autoquant.devices.memory import LIMIT_VARIABLE, memory_limit
from autoquant.errors import DeviceError, ModelError
from autoquant.evaluators.quality import TextQuality, each_logits, next_token_logits
from autoquant.evaluators.sensitivity import SENSITIVITIES, Change, gradients, together
from autoquant.models import load_model, streaming
from autoquant.models.copies import shallow_copy
from autoquant.models.stand_in import to_time
from autoquant.models.streaming import Stream, share_blocks, stream_of
from autoquant.profiler.record import record, record_model
from autoquant.records import Workload
from autoquant.runtime.phases import make_phases

WINDOWS = torch.randint(0, 60, (3, 24), generator=torch.Generator().manual_seed(0))
WORKLOAD = Workload.parse("prefill=16,decode=4", 1)
LAYERS = 4


class Parts:
    key, inputs = "text", None
    windows = dict.fromkeys(("calibration", "report", "selection"), WINDOWS)


def save(folder, *, tied, hidden=32, layers=LAYERS):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden if hidden > 32 else 64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    size = "30KB" if hidden == 32 else "20MB"
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size=size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), tied=request.param)


def load_whole(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(LIMIT_VARIABLE, raising=False)
        loaded = load_model(folder)
    assert loaded.stream is None
    return loaded


@pytest.fixture
def whole(folder):
    return load_whole(folder)


@pytest.fixture
def streamed(folder, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "100kB")
    return load_model(folder)


def bytes_of(module):
    return sum(parameter.nbytes for parameter in module.parameters())


def wide_blocks(module):
    """The numbers of the blocks that have weights in float32 now."""
    return [
        number
        for number, block in enumerate(module.model.layers)
        if any(parameter.dtype == torch.float32 for parameter in block.parameters())
    ]


def test_a_model_with_too_little_room_is_streamed_and_another_is_not(whole, streamed):
    assert whole.stream is None and streamed.stream is not None
    assert streamed.content_hash == whole.content_hash
    assert (streamed.device, streamed.dtype, streamed.vocabulary) == ("cpu", "bfloat16", 64)


def test_what_it_computes_is_bit_for_bit_the_same(whole, streamed):
    for ids in WINDOWS.unsqueeze(1):
        expected = next_token_logits(whole.module, ids)
        assert torch.equal(next_token_logits(streamed.module, ids), expected)


def test_windows_that_pass_block_after_block_give_the_same_logits(whole, streamed):
    windows = list(WINDOWS.unsqueeze(1))
    for ids, logits in zip(windows, each_logits(streamed.module, windows), strict=True):
        assert torch.equal(logits, next_token_logits(whole.module, ids))


def uploads(module, work):
    """Run some work; return the numbers of the blocks in the order in which they were brought."""
    blocks, brought = list(module.model.layers), []
    bring = Stream._bring

    def noted(self, unit):
        number = blocks.index(unit) if unit in blocks else None
        if number is not None and brought[-1:] != [number]:
            brought.append(number)
        bring(self, unit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "_bring", noted)
        work()
    return brought


def test_all_windows_pass_a_block_while_its_weights_are_there(streamed):
    windows = list(WINDOWS.unsqueeze(1))
    list(each_logits(streamed.module, windows))  # finds the chain of blocks
    brought = uploads(streamed.module, lambda: list(each_logits(streamed.module, windows)))
    assert brought == list(range(LAYERS))


def test_a_model_that_reads_a_block_elsewhere_too_is_run_window_by_window(streamed, whole):
    windows = list(WINDOWS.unsqueeze(1))

    def add_first_block_at_the_end(module):
        kept = []
        module.model.layers[0].register_forward_hook(lambda *given: kept.append(given[2]))
        module.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + kept.pop(),))

    for loaded in (streamed, whole):
        add_first_block_at_the_end(loaded.module)
    found = list(each_logits(streamed.module, windows))
    assert streamed.stream.looked_for_chain and streamed.stream.chain is None
    for ids, logits in zip(windows, found, strict=True):
        assert torch.equal(logits, next_token_logits(whole.module, ids))


def test_one_block_is_wide_at_a_time_and_all_are_as_before_at_the_end(streamed):
    module = streamed.module
    before = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    seen = []
    for block in module.model.layers:
        block.register_forward_hook(lambda *_: seen.append(wide_blocks(module)))
    with streamed.stream.in_float32():
        logits = next_token_logits(module, WINDOWS[:1])
        assert logits.dtype == torch.float32
    assert seen == [[number] for number in range(LAYERS)]
    assert wide_blocks(module) == []
    assert before == {name: parameter.data_ptr() for name, parameter in module.named_parameters()}


class Elsewhere:
    """Stands in for a device with memory of its own: what is uploaded is a copy."""

    type = "elsewhere"

    def upload(self, tensor):
        return tensor.clone()


def test_a_device_holds_the_weights_of_one_unit_at_a_time(whole, folder, monkeypatch):
    module = load_model(folder).module
    rest = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    monkeypatch.setattr(streaming, "backend", lambda _device: Elsewhere())
    stream = Stream(module, "cpu")

    def there():
        return {n for n, parameter in module.named_parameters() if parameter.data_ptr() != rest[n]}

    seen = []
    for name, block in module.named_modules():
        block.register_forward_hook(lambda *_, name=name: seen.append((name, there())))
    logits = next_token_logits(module, WINDOWS[:1])
    assert torch.equal(logits, next_token_logits(whole.module, WINDOWS[:1]))
    held = dict(seen)
    blocks = [f"model.layers.{number}" for number in range(LAYERS)]
    for block in blocks:
        assert held[block] == {n for n in rest if n.startswith(f"{block}.")}
    assert held["lm_head"] == {n for n in rest if module.get_parameter(n) is module.lm_head.weight}
    assert held["model.embed_tokens"] == set(), "rows are looked up where they rest"
    stream.let_go()
    assert there() == set()


class TiedToSmall(torch.nn.Module):
    """A head that is small beside a block, and tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 8)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(8, 512), torch.nn.Linear(512, 8)) for _ in range(2)
        )
        self.norm = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def test_a_weight_is_brought_for_each_module_that_has_it(monkeypatch):
    module, ids = TiedToSmall().requires_grad_(False), torch.tensor([[0, 3]])
    expected = module(ids)
    monkeypatch.setattr(streaming, "backend", lambda _device: Elsewhere())
    Stream(module, "cpu")
    rest = module.embed.weight.data_ptr()
    there = []
    run = module.head.forward
    module.head.forward = lambda x: (run(x), there.append(module.head.weight.data_ptr() != rest))[0]
    assert torch.equal(module(ids), expected) and there == [True]


def test_the_recording_is_the_same_by_shapes_and_by_values(whole, streamed):
    expected = record_model(whole, WORKLOAD, print)
    assert record_model(streamed, WORKLOAD, print) == expected
    assert record(streamed.module, make_phases(streamed, WORKLOAD)) == expected


def test_a_model_whose_code_asks_for_values_is_recorded_with_them(streamed, whole):
    norm = streamed.module.model.norm
    run = norm.forward
    norm.forward = lambda x: run(x) if bool(x.isfinite().all()) else x  # no value on meta
    assert record_model(streamed, WORKLOAD, print) == record_model(whole, WORKLOAD, print)


@pytest.mark.parametrize("method", sorted(SENSITIVITIES))
def test_every_sensitivity_is_bit_for_bit_the_same(whole, streamed, method):
    sites = record_model(whole, WORKLOAD, print).sites
    fmt = get_format("int8-row/plain")
    changes = [
        Change(site, f"int8+{activation}", fmt, activation)
        for site in sites
        for activation in ("a16", "a8-row")
    ]

    def losses(loaded):
        found = {}
        SENSITIVITIES[method].score(
            loaded.module, changes, TextQuality(Parts(), "cpu"), lambda _, each: found.update(each)
        )
        return found

    expected = losses(whole)
    assert losses(streamed) == expected and max(expected.values()) > 0


def test_all_windows_pass_a_block_in_both_directions_while_its_weights_are_there(
    streamed, monkeypatch
):
    monkeypatch.setattr(together, "_LOGITS_AT_ONCE", 1)  # three batches of one window
    monkeypatch.setattr(gradients, "_KEPT_SHARE", 1)
    site = next(s for s in record_model(streamed, WORKLOAD, print).sites if "layers.1" in s.name)
    change = Change(site, "int8+a16", get_format("int8-row/plain"), "a16")

    def score():
        quality = TextQuality(Parts(), "cpu")
        SENSITIVITIES["path"].score(streamed.module, [change], quality, lambda *_: None)

    score()
    there = list(range(LAYERS))
    back = there[-2::-1]  # the last is there already
    logits = [*there, *there, *there]  # how large they are, all of them, how large inputs are
    assert uploads(streamed.module, score) == [*logits, *there, *back, *there[1:]]


def test_the_reference_is_computed_once_for_all_plans(whole, streamed, monkeypatch):
    quality = TextQuality(Parts(), "cpu")
    other = shallow_copy(whole.module)
    first = quality.compare(other, streamed.module, "report")
    assert first.losses == first.reference and first.kl == 0
    monkeypatch.setattr(Stream, "_bring", lambda *_: pytest.fail("weights were brought again"))
    assert quality.compare(other, streamed.module, "report") == first


def test_a_copy_is_not_streamed_and_has_the_same_weights(streamed):
    copied = shallow_copy(streamed.module)
    assert stream_of(copied) is None and stream_of(streamed.module) is streamed.stream
    assert all("forward" not in vars(part) for part in copied.modules())
    for one, other in zip(copied.parameters(), streamed.module.parameters(), strict=True):
        assert one is other
    ids = WINDOWS[:1]
    assert torch.equal(next_token_logits(copied, ids), next_token_logits(streamed.module, ids))


def test_a_stand_in_computes_every_block_with_the_weights_of_few(streamed):
    stand_in, note = to_time(streamed.module)
    assert note.endswith(f"1 of {LAYERS} blocks, used again for the others")
    block = bytes_of(stand_in.model.layers[0])
    assert bytes_of(stand_in) == bytes_of(streamed.module) - (LAYERS - 1) * block
    seen = []
    for block in stand_in.model.layers:
        block.register_forward_hook(lambda block, *_: seen.append(block))
    next_token_logits(stand_in, WINDOWS[:1])
    assert seen == list(stand_in.model.layers)


def test_blocks_share_only_with_blocks_of_their_make(whole):
    copied = shallow_copy(whole.module)
    odd = copied.model.layers[2].mlp.up_proj
    odd.weight = torch.nn.Parameter(torch.ones(64, 32))
    assert share_blocks(copied, 0) == f"2 of {LAYERS} blocks"
    first, second, third, fourth = (block.mlp.up_proj.weight for block in copied.model.layers)
    assert first is second is fourth and third is odd.weight


def test_what_fits_is_timed_by_itself(whole):
    copied, note = to_time(whole.module)
    assert not note and bytes_of(copied) == bytes_of(whole.module)


def test_a_cast_that_there_is_no_room_for_is_refused(folder, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "100kB")
    with pytest.raises(ModelError, match=r"leave out --dtype, or save it in float32"):
        load_model(folder, dtype="fp32")


def test_an_unreadable_limit_is_refused(monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "plenty")
    with pytest.raises(DeviceError, match="'plenty'; write a size such as 8GiB"):
        memory_limit()
