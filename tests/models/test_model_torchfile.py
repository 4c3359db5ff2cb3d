import pickle

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import Payload, Perceptron
from torch import nn

from autoquant.errors import ModelError
from autoquant.models import load_model

PERCEPTRON = """
class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(16, 4)

    def forward(self, x):
        return self.down(self.drop(torch.relu(self.up(x))))

build = Perceptron
"""

RECORDED = """
devices = []

def build():
    module = Perceptron()
    devices.append(str(module.up.weight.device))
    return module
"""

TIED = """
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))

build = Tied
"""

BUFFERS = """
class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("scale", torch.arange(4.0) + 1, persistent=False)
        self.attribute = torch.ones(4)

    def forward(self, x):
        return self.layer(x) * self.scale + self.attribute

build = Buffers
"""


def _save(path, state):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("file", ["weights.pt", "weights.pth", "weights.safetensors"])
def test_a_state_dict_and_a_factory_give_back_the_module(factory, tmp_path, file):
    module = Perceptron().eval()
    path = _save(tmp_path / file, module.state_dict())
    spec = factory(PERCEPTRON)
    loaded = load_model(path, model_factory=spec)
    x = torch.randn(3, 8)
    torch.testing.assert_close(loaded.module(x), module(x), rtol=0, atol=0)
    assert not loaded.module.training and not any(
        p.requires_grad for p in loaded.module.parameters()
    )
    assert (loaded.kind, loaded.stored_dtype, loaded.tokenizer) == ("module", "float32", None)
    assert (loaded.source.kind, loaded.source.model_factory) == ("state_dict", spec)


def test_the_hash_does_not_depend_on_the_file_format_or_the_cast(factory, tmp_path):
    state, spec = Perceptron().state_dict(), factory(PERCEPTRON)
    first = load_model(_save(tmp_path / "a.pt", state), model_factory=spec)
    second = load_model(_save(tmp_path / "b.safetensors", state), model_factory=spec, dtype="bf16")
    assert second.module.up.weight.dtype is torch.bfloat16
    assert first.content_hash == second.content_hash


def test_a_changed_weight_is_another_hash(factory, tmp_path):
    state, spec = Perceptron().state_dict(), factory(PERCEPTRON)
    first = load_model(_save(tmp_path / "a.pt", state), model_factory=spec).content_hash
    state["down.bias"] = state["down.bias"] + 1e-3
    assert load_model(_save(tmp_path / "a.pt", state), model_factory=spec).content_hash != first


def test_a_state_dict_of_the_old_file_format_is_read(factory, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(Perceptron().state_dict(), path, _use_new_zipfile_serialization=False)
    assert load_model(path, model_factory=factory(PERCEPTRON)).kind == "module"


def test_a_state_dict_inside_a_training_checkpoint_is_found(factory, tmp_path):
    module = Perceptron()
    path = _save(tmp_path / "checkpoint.pt", {"epoch": 3, "state_dict": module.state_dict()})
    loaded = load_model(path, model_factory=factory(PERCEPTRON))
    assert torch.equal(loaded.module.up.weight, module.up.weight)


def test_weights_keep_their_stored_dtypes_with_auto(factory, tmp_path):
    state = {name: value.to(torch.bfloat16) for name, value in Perceptron().state_dict().items()}
    state["down.bias"] = state["down.bias"].float()
    loaded = load_model(_save(tmp_path / "a.pt", state), model_factory=factory(PERCEPTRON))
    assert (loaded.stored_dtype, loaded.dtype) == ("bfloat16", "bfloat16")
    assert loaded.module.down.bias.dtype is torch.float32


@pytest.mark.parametrize("stored", ["both", "one"])
def test_weights_that_the_factory_ties_stay_tied(factory, tmp_path, stored):
    weight = torch.randn(16, 8)
    state = (
        {"head.weight": weight}
        if stored == "one"
        else {"embedding.weight": weight, "head.weight": weight}
    )
    loaded = load_model(_save(tmp_path / "a.pt", state), model_factory=factory(TIED), dtype="bf16")
    assert loaded.module.head.weight is loaded.module.embedding.weight
    assert torch.equal(loaded.module.head.weight, weight.bfloat16())


def test_tied_weights_that_differ_in_the_file_are_refused(factory, tmp_path, refusal):
    state = {"embedding.weight": torch.zeros(16, 8), "head.weight": torch.ones(16, 8)}
    path = _save(tmp_path / "a.pt", state)
    message = refusal(ModelError, load_model, path, model_factory=factory(TIED))
    assert "embedding.weight" in message and "head.weight" in message


def test_values_that_the_factory_computes_and_the_file_lacks_are_there(factory, tmp_path):
    layer = nn.Linear(4, 4)
    state = {f"layer.{name}": value for name, value in layer.state_dict().items()}
    loaded = load_model(_save(tmp_path / "a.pt", state), model_factory=factory(BUFFERS))
    x = torch.randn(2, 4)
    torch.testing.assert_close(loaded.module(x), layer(x) * (torch.arange(4.0) + 1) + 1)


def test_buffers_that_are_not_stored_keep_the_dtype_that_the_factory_gives_them(factory, tmp_path):
    state = {"layer.weight": torch.ones(4, 4).bfloat16(), "layer.bias": torch.ones(4).bfloat16()}
    loaded = load_model(_save(tmp_path / "a.pt", state), model_factory=factory(BUFFERS))
    assert loaded.module.scale.dtype is torch.float32


def test_a_large_module_is_not_built_twice_in_memory(factory, tmp_path):
    """The factory runs under the meta device first, so that only the file's tensors take memory."""
    spec = factory(PERCEPTRON + RECORDED)
    load_model(_save(tmp_path / "a.pt", Perceptron().state_dict()), model_factory=spec)
    import sys

    assert sys.modules[spec.partition(":")[0]].devices == ["meta"]


def test_a_factory_that_cannot_run_on_meta_is_run_for_real(factory, tmp_path):
    spec = factory(
        PERCEPTRON + "\ndef build():\n    torch.ones(2).sum().item()\n    return Perceptron()\n"
    )
    module = Perceptron()
    loaded = load_model(_save(tmp_path / "a.pt", module.state_dict()), model_factory=spec)
    assert torch.equal(loaded.module.up.weight, module.up.weight)


def test_a_factory_module_on_token_ids_is_a_token_lm(factory, tmp_path):
    path = _save(tmp_path / "a.pt", {"embedding.weight": torch.randn(16, 8)})
    assert load_model(path, model_factory=factory(TIED)).kind == "token_lm"


def test_a_factory_module_that_gives_an_object_with_logits_is_a_token_lm(factory, tmp_path):
    source = TIED.replace(
        "return self.head(",
        "from types import SimpleNamespace\n        return SimpleNamespace(logits=self.head(",
    ).replace("self.embedding(ids))", "self.embedding(ids)))")
    path = _save(tmp_path / "a.pt", {"embedding.weight": torch.randn(16, 8)})
    assert load_model(path, model_factory=factory(source)).kind == "token_lm"


def test_a_tokenizer_file_goes_with_a_factory(factory, tmp_path, save_llama):
    folder, _ = save_llama()
    path = _save(tmp_path / "a.pt", {"embedding.weight": torch.randn(16, 8)})
    loaded = load_model(path, model_factory=factory(TIED), tokenizer=str(folder / "tokenizer.json"))
    assert loaded.tokenizer("w3 w4").input_ids == [3, 4]


def test_a_tokenizer_that_is_not_there_is_refused(factory, tmp_path, refusal):
    path = _save(tmp_path / "a.pt", {"embedding.weight": torch.randn(16, 8)})
    spec = factory(TIED)
    assert "nowhere" in refusal(
        ModelError, load_model, path, model_factory=spec, tokenizer="nowhere"
    )


def test_a_hugging_face_model_made_by_a_factory_is_a_causal_lm(factory, tmp_path):
    from tiny_models import tiny_llama

    model = tiny_llama(dtype=torch.float32, tied=True)
    spec = factory(
        "def build():\n    from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"    return LlamaForCausalLM(LlamaConfig.from_dict({model.config.to_dict()!r}))\n"
    )
    loaded = load_model(_save(tmp_path / "a.pt", model.state_dict()), model_factory=spec)
    assert (loaded.kind, loaded.max_positions) == ("causal_lm", 128)
    assert loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded.module(ids).logits, model(ids).logits)


@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_a_state_dict_without_a_factory_is_refused_with_advice(tmp_path, refusal, file):
    path = _save(tmp_path / file, Perceptron().state_dict())
    assert "--model-factory" in refusal(ModelError, load_model, path)


def test_keys_that_do_not_fit_are_named_the_first_few(factory, tmp_path, refusal):
    state = Perceptron().state_dict()
    lacking = {name: value for name, value in state.items() if name != "up.weight"}
    spec = factory(PERCEPTRON)
    message = refusal(ModelError, load_model, _save(tmp_path / "a.pt", lacking), model_factory=spec)
    assert "lacks up.weight" in message
    more = state | {f"extra.{number}": torch.ones(1) for number in range(5)}
    message = refusal(ModelError, load_model, _save(tmp_path / "b.pt", more), model_factory=spec)
    assert "extra.0" in message and "and 2 more" in message and "extra.4" not in message


def test_a_weight_of_another_shape_is_named(factory, tmp_path, refusal):
    state = Perceptron().state_dict() | {"up.weight": torch.ones(16, 9)}
    message = refusal(
        ModelError, load_model, _save(tmp_path / "a.pt", state), model_factory=factory(PERCEPTRON)
    )
    assert "up.weight" in message and "[16, 9]" in message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("build = 3", "cannot be called"),
        ("def build(): return 3", "returned a int"),
        ("def build(): raise ValueError('no such\\nsize')", "ValueError: no such"),
        ("raise RuntimeError('broken import')", "broken import"),
        ("raise SystemExit('left')", "left"),
        ("other = 1", "has no build"),
        ("def build(): return nn.Linear(8, 16, device='meta')", "meta device"),
    ],
)
def test_a_factory_that_does_not_work_is_refused_with_its_reason(
    factory, tmp_path, refusal, source, expected
):
    path = _save(tmp_path / "a.pt", {"weight": torch.ones(16, 8), "bias": torch.ones(16)})
    if "meta" in source:
        source = source.replace("nn.Linear(8, 16, device='meta')", "Held()") + (
            "\nclass Held(nn.Linear):\n    def __init__(self):\n        super().__init__(8, 16)\n"
            "        self.kept = torch.ones(1, device='meta')\n"
        )
    assert expected in refusal(ModelError, load_model, path, model_factory=factory(source))


@pytest.mark.parametrize("spec", ["no_colon", ":build", "module:", "no.such.module:build"])
def test_a_factory_that_cannot_be_found_is_refused(factory, tmp_path, refusal, spec):
    path = _save(tmp_path / "a.pt", Perceptron().state_dict())
    assert "--model-factory" in refusal(ModelError, load_model, path, model_factory=spec)


@pytest.mark.parametrize("form", ["zip", "old", "raw pickle", "beside tensors"])
def test_pickled_code_is_refused_and_not_run(tmp_path, refusal, form):
    mark, path = tmp_path / "ran", tmp_path / "model.pt"
    value = {"w": torch.ones(2), "p": Payload(mark)} if form == "beside tensors" else Payload(mark)
    if form == "raw pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form != "old")
    message = refusal(ModelError, load_model, path)
    assert "pickled code" in message and "--trust-pickle" in message
    assert not mark.exists()
    with pytest.raises(ModelError):
        load_model(path, trust_pickle=True)
    assert mark.exists(), "the payload is a live one"


def test_a_pickled_module_is_refused_unless_trusted(tmp_path, refusal):
    module, path = Perceptron().train(), tmp_path / "model.pt"
    torch.save(module, path)
    assert "--trust-pickle" in refusal(ModelError, load_model, path)
    loaded = load_model(path, trust_pickle=True, dtype="bf16")
    assert (loaded.source.kind, loaded.source.trust_pickle, loaded.kind) == (
        "pickle",
        True,
        "module",
    )
    assert not loaded.module.training and loaded.module.up.weight.dtype is torch.bfloat16
    assert loaded.content_hash == load_model(path, trust_pickle=True).content_hash


def test_a_trusted_pickle_whose_class_is_gone_is_refused_with_its_reason(
    tmp_path, refusal, factory
):
    import importlib
    import sys

    spec = factory(PERCEPTRON)
    name = spec.partition(":")[0]
    sys.path.insert(0, str(tmp_path))
    torch.save(importlib.import_module(name).build(), tmp_path / "model.pt")
    sys.path.remove(str(tmp_path))
    assert load_model(tmp_path / "model.pt", trust_pickle=True).kind == "module"
    (tmp_path / f"{name}.py").unlink()
    sys.modules.pop(name)
    assert name in refusal(ModelError, load_model, tmp_path / "model.pt", trust_pickle=True)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    "content", [b"hello world\n", b"\x00" * 64, b"\x80\x02 not a pickle", b"GGUF" + b"\x01" * 40]
)
def test_a_file_that_is_no_torch_file_is_refused(tmp_path, refusal, content, trust):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert "not a file that torch.save wrote" in refusal(
        ModelError, load_model, path, trust_pickle=trust
    )


@pytest.mark.parametrize("old", [False, True])
def test_a_truncated_file_is_not_taken_for_code(tmp_path, refusal, old):
    path = tmp_path / "model.pt"
    torch.save(Perceptron().state_dict(), path, _use_new_zipfile_serialization=not old)
    path.write_bytes(path.read_bytes()[:-300])
    message = refusal(ModelError, load_model, path)
    assert "truncated or damaged" in message and "--trust-pickle" not in message


@pytest.mark.parametrize("trust", [False, True])
def test_torchscript_is_refused_with_advice(tmp_path, refusal, trust):
    path = tmp_path / "model.pt"
    torch.jit.trace(Perceptron().eval(), torch.ones(1, 8)).save(path)
    assert "TorchScript" in refusal(ModelError, load_model, path, trust_pickle=trust)


def test_a_file_of_another_kind_or_without_content_is_refused(tmp_path, refusal):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert ".safetensors" in refusal(ModelError, load_model, tmp_path / "model.gguf")
    (tmp_path / "model.pt").touch()
    assert "is empty" in refusal(ModelError, load_model, tmp_path / "model.pt")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 30)
    assert "truncated" in refusal(
        ModelError, load_model, tmp_path / "model.safetensors", model_factory="a:b"
    )


def test_a_torch_file_that_holds_no_state_dict_is_refused(tmp_path, refusal):
    torch.save([torch.ones(2)], tmp_path / "model.pt")
    assert "holds a list" in refusal(
        ModelError, load_model, tmp_path / "model.pt", model_factory="a:b"
    )


def test_the_search_path_for_modules_is_left_as_it_was(factory, tmp_path):
    import sys

    before = list(sys.path)
    load_model(
        _save(tmp_path / "a.pt", Perceptron().state_dict()), model_factory=factory(PERCEPTRON)
    )
    assert sys.path == before
