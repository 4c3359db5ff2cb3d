"""Keys and values in 8 bits.

What is read from codes is what was written but for rounding, in attention and in `generate`.
"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from models.tiny_models import tiny_llama

from autoquant.candidates.kernels.cpu_source import cpu_kernels_work
from autoquant.devices.cpu import CpuBackend
from autoquant.errors import DeviceError, ModelError
from autoquant.models import LoadedModel, ModelSource
from autoquant.records import KV_CACHES, Workload
from autoquant.runtime.generate import attention, decoder
from autoquant.runtime.generate.attention import token_attention_codes
from autoquant.runtime.generate.decoder import Decoder
from autoquant.runtime.generate.generation import decoders_of
from autoquant.runtime.generate.kv_codes import (
    bytes_of_a_sequence,
    codes_of,
    kv_cache_of,
    rounded,
    rounding_in_passes,
    set_kv_cache,
)
from autoquant.runtime.parts import as_if_compiled
from autoquant.runtime.phases import make_phases
from autoquant.runtime.prepare import prepare

WORST = {"int8": 0.5 / 127, "float8": 2**-4}
"""Of a rounding, in parts of the largest number of a head, or of the number itself."""


def wide_llama():
    """Heads of 16 columns, which the CPU's kernel takes."""
    model = tiny_llama().float().eval().requires_grad_(False)
    config = copy.deepcopy(model.config)
    config.hidden_size, config.head_dim, config.max_position_embeddings = 64, 16, 512
    config.pad_token_id, config.vocab_size = 0, 64
    torch.manual_seed(1)
    made = type(model)(config).float().eval().requires_grad_(False)
    made.generation_config.pad_token_id = 0
    return made


def prompts(batch=2, tokens=70):
    return torch.randint(1, 60, (batch, tokens), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def kernels():
    if not cpu_kernels_work():
        pytest.skip("no kernels of the project's own here")


@pytest.fixture
def not_compiled(monkeypatch):
    monkeypatch.setattr(CpuBackend, "compile_failure", lambda _backend: "not in these tests")


@pytest.mark.parametrize("kind", KV_CACHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_head_of_each_token_is_rounded_by_its_own_scale(kind, dtype):
    numbers = torch.randn(2, 3, 5, 16).to(dtype)
    numbers *= 10.0 ** torch.arange(-4, 1)[:, None].to(dtype)  # tokens of other sizes
    numbers[1, 2, 3] = 0
    back = rounded(numbers, kind)
    largest = numbers.abs().amax(-1, keepdim=True).float()
    unit = largest if kind == "int8" else torch.maximum(numbers.abs().float(), largest * 2**-9)
    off = (back.float() - numbers.float()).abs()
    assert (off <= unit * (WORST[kind] + 2**-8)).all() and back.dtype == dtype
    assert (back[1, 2, 3] == 0).all()
    alone = rounded(numbers[:1, 1:2, 2:3], kind)
    assert torch.equal(back[:1, 1:2, 2:3], alone)  # of no other token


@pytest.mark.parametrize("kind", KV_CACHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "heads", "length", "widths"), [(1, 2, 7, (16, 16)), (3, 8, 700, (80, 32))]
)
def test_attention_reads_codes_as_it_would_read_their_numbers(
    kernels, kind, dtype, batch, heads, length, widths
):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, 1, widths[0], generator=generator).to(dtype)
    keys, values = (
        codes_of(torch.randn(batch, 2, length, width, generator=generator).to(dtype), kind)
        for width in widths
    )
    for mask in (
        None,
        torch.rand(batch, 1, 1, length) < 0.5,
        torch.rand(1, heads, 1, length) < 0.5,
    ):
        found = token_attention_codes(
            *(q, keys.codes, keys.scales, values.codes, values.scales, mask, 0.2, kind == "float8")
        )
        k, v = (
            each.numbers(torch.float64).repeat_interleave(heads // 2, dim=1)
            for each in (keys, values)
        )
        scores = q.double() @ k.mT * 0.2
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        expected = scores.softmax(-1).nan_to_num(0) @ v
        error = (found - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.004)


def test_every_float8_is_read_as_pytorch_reads_it(kernels):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    codes = codes[codes & 0x7F != 0x7F]  # but those that are no number
    count = len(codes)
    values = codes.view(1, 1, count, 1).expand(-1, -1, -1, 16).contiguous()
    keys, ones = torch.zeros_like(values), torch.ones(1, 1, count)
    for place in range(count):
        seen = (torch.arange(count) == place)[None, None, None]
        q = torch.zeros(1, 1, 1, 16)
        found = token_attention_codes(q, keys, ones, values, ones, seen, 1.0, True)
        assert (found == codes[place].view(torch.float8_e4m3fn).float()).all()


@pytest.mark.parametrize("float8", [False, True])
def test_codes_that_no_query_sees_have_no_effect(kernels, float8):
    q, codes = torch.randn(1, 4, 1, 16), torch.randint(-127, 127, (1, 2, 40, 16)).to(torch.int8)
    scales = torch.rand(1, 2, 40)
    seen = (torch.arange(40) < 20)[None, None, None]
    before = token_attention_codes(q, codes, scales, codes, scales, seen, 0.2, float8)
    codes[:, :, 20:], scales[:, :, 20:] = 0x7F, math.nan
    after = token_attention_codes(q, codes, scales, codes, scales, seen, 0.2, float8)
    assert torch.equal(before, after)
    scales[:, :, 7] = math.nan
    hidden = token_attention_codes(q, codes, scales, codes, scales, seen, 0.2, float8)
    assert hidden.isnan().all()


@pytest.mark.parametrize("kind", KV_CACHES)
def test_generate_reads_what_a_pass_with_rounded_keys_and_values_reads(not_compiled, kind):
    model, ids = wide_llama(), prompts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare(model, kv_cache=kind)
        made = model.generate(
            ids,
            max_new_tokens=12,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    with torch.no_grad(), rounding_in_passes(model, kind):
        logits = model(made.sequences[:, :-1]).logits[:, ids.shape[1] - 1 :]
    found = torch.stack(made.logits, dim=1)
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        plain = model(made.sequences[:, :-1]).logits[:, ids.shape[1] - 1 :]
    assert (found - plain).abs().max() > 1e-4  # it was rounded
    kept = made.past_key_values.layers[0].keys
    assert torch.equal(kept, rounded(kept, kind)) or kind == "int8"


@pytest.mark.parametrize("kind", KV_CACHES)
def test_compiled_steps_attend_to_the_codes_themselves(kernels, monkeypatch, kind):
    seen = []

    def counted(*arguments):
        seen.append(arguments[1].dtype)
        return token_attention_codes(*arguments)

    monkeypatch.setattr(attention, "token_attention_codes", counted)
    model = wide_llama()
    plain = Decoder(model, 1, 256, padded=False, kv_cache=kind, divisions=())
    steps = Decoder(model, 1, 256, padded=False, kv_cache=kind, divisions=())
    ids, positions = prompts(1, 20), torch.arange(20)[None]
    with torch.no_grad():
        for each in (plain, steps):
            each.start(None)
            each.prompt(ids, positions)
        ready = steps._ready(regions=False)
        with as_if_compiled():
            found = steps._step_of(ready)(ids[:, :1])[:, -1]
        torch.testing.assert_close(found, plain.token(ids[:, :1]), rtol=1e-3, atol=1e-4)
    assert seen == [torch.int8] * model.config.num_hidden_layers


@pytest.mark.slow
@pytest.mark.parametrize("kind", KV_CACHES)
def test_compiled_steps_write_the_text_of_steps_that_are_not(kernels, kind, monkeypatch):
    model, ids = wide_llama(), prompts(1, 20)
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = prepare(model, kv_cache=kind).generate(ids, max_new_tokens=9, do_sample=False)
    monkeypatch.setattr(CpuBackend, "compile_failure", lambda _backend: "not here")
    with pytest.warns(UserWarning, match="without being compiled"):
        eager = prepare(other, kv_cache=kind).generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(compiled, eager)


@pytest.mark.slow
def test_a_model_whose_heads_no_kernel_takes_says_what_that_costs():
    model = tiny_llama().float().eval().requires_grad_(False)  # of 8 columns
    model.generation_config.pad_token_id = 0
    with pytest.warns(UserWarning, match="unpacks all keys and values"):
        prepare(model, kv_cache="int8").generate(prompts(1, 8), max_new_tokens=3, do_sample=False)


def test_another_format_gets_a_cache_of_its_own(not_compiled):
    model, ids = wide_llama(), prompts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("int8", "off", "int8"):
            prepare(model, kv_cache=kind).generate(ids, max_new_tokens=2, do_sample=False)
    assert kv_cache_of(model) == "int8" and kv_cache_of(copy.deepcopy(model)) == "int8"
    assert [key[-1] for key in decoders_of(model)._kept] == [None, "int8"]


def test_a_call_that_is_not_replayed_says_that_it_keeps_no_codes(not_compiled):
    model = prepare(wide_llama(), kv_cache="int8")
    with pytest.warns(UserWarning, match="in the model's dtype and not in int8: beam search"):
        model.generate(prompts(), num_beams=2, max_new_tokens=2, do_sample=False)


def test_models_and_formats_that_cannot_be_are_refused(monkeypatch):
    with pytest.raises(ModelError, match="no causal language model"):
        prepare(torch.nn.Linear(2, 2), kv_cache="int8")
    with pytest.raises(ModelError, match="'int4': give int8 or float8"):
        prepare(wide_llama(), kv_cache="int4")
    monkeypatch.setattr(CpuBackend, "converts_float8", lambda _backend: False)
    with pytest.raises(DeviceError, match="keep them in int8"):
        set_kv_cache(wide_llama(), "float8")


def test_bytes_of_a_sequence_are_those_of_its_cache():
    model = wide_llama().bfloat16()
    for kind in (None, *KV_CACHES):
        made = decoder.Decoder(model, 1, 256, padded=False, kv_cache=kind, divisions=())
        tensors = [
            tensor
            for layer in made._cache.layers
            for kept in (layer.keys, layer.values)
            for tensor in ((kept.codes, kept.scales) if kind else (kept,))
        ]
        assert bytes_of_a_sequence(model, kind, 256) == sum(map(lambda t: t.nbytes, tensors))


def test_phases_time_and_judge_the_cache_of_the_model():
    model = prepare(wide_llama(), kv_cache="int8")
    source = ModelSource(kind="live")
    loaded = LoadedModel(
        module=model,
        content_hash="0",
        source=source,
        tokenizer=None,
        kind="causal_lm",
        example_inputs=None,
        max_positions=512,
        stored_dtype="float32",
        vocabulary=64,
    )
    phases = make_phases(loaded, Workload.parse("prefill=30,decode=4", 1))
    phases.reset("decode")
    kept = phases._decoder._cache.layers[0].keys
    assert kept.codes[:, :, :30].ne(0).any() and phases.run("decode").isfinite().all()
    ids = prompts(1, 30)
    with torch.no_grad(), rounding_in_passes(model, "int8"):
        expected = model(ids).logits
    torch.testing.assert_close(phases.compiled_prompt()(ids), expected, rtol=1e-3, atol=1e-4)
