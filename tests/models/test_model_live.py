import pytest
import torch
from tiny_models import Perceptron, tiny_llama, tiny_tokenizer
from torch import nn
from torch.nn.utils import prune

from autoquant.errors import DeviceError, ModelError, WorkloadError
from autoquant.models import from_module


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16)

    def forward(self, ids):
        return self.head(self.embedding(ids))


def test_a_live_module_is_used_as_a_copy_in_eval_mode_with_the_same_weights():
    module = Perceptron().to(torch.bfloat16).train()
    loaded = from_module(module)
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert loaded.module.up.weight.data_ptr() == module.up.weight.data_ptr()
    assert module.training and all(parameter.requires_grad for parameter in module.parameters())
    assert (loaded.kind, loaded.source.kind, loaded.stored_dtype) == ("module", "live", "bfloat16")
    assert module.up.weight.dtype is torch.bfloat16


def test_a_live_module_is_cast_only_where_asked():
    module = Perceptron()
    assert from_module(module, dtype="auto", device="cpu").dtype == "float32"
    loaded = from_module(module, dtype="bf16")
    assert (loaded.dtype, loaded.stored_dtype) == ("bfloat16", "float32")


def test_the_hash_of_a_live_module_is_that_of_its_weights_and_class():
    torch.manual_seed(0)
    first = Perceptron()
    torch.manual_seed(0)
    same = Perceptron()
    digest = from_module(first).content_hash
    assert from_module(same, dtype="bf16").content_hash == digest

    class Other(Perceptron):
        pass

    other = Other()
    other.load_state_dict(first.state_dict())
    assert from_module(other).content_hash != digest
    with torch.no_grad():
        first.up.bias[0] += 1
    assert from_module(first).content_hash != digest


def test_a_live_hugging_face_model_is_a_causal_lm():
    loaded = from_module(tiny_llama(), tokenizer=tiny_tokenizer())
    assert (loaded.kind, loaded.max_positions) == ("causal_lm", 128)
    assert loaded.tokenizer("w1").input_ids == [1]


@pytest.mark.parametrize(("tokenizer", "kind"), [(object(), "token_lm"), (None, "module")])
def test_a_live_module_on_token_ids_is_a_token_lm_where_a_tokenizer_is_given(tokenizer, kind):
    assert from_module(Tokens(), tokenizer=tokenizer).kind == kind


def test_a_live_module_with_a_tokenizer_that_takes_no_ids_is_a_module():
    assert from_module(Perceptron(), tokenizer=object()).kind == "module"


def test_a_tokenizer_for_a_live_module_may_be_a_path(save_llama):
    folder, _ = save_llama()
    loaded = from_module(Tokens(), tokenizer=str(folder))
    assert loaded.tokenizer("w7").input_ids == [7] and loaded.source.tokenizer == str(folder)


def test_a_live_exported_module_is_settled_too():
    module = torch.export.export(Perceptron().eval(), (torch.ones(2, 8),)).module()
    loaded = from_module(module)
    assert loaded.kind == "module" and loaded.module.eval() is loaded.module


def test_a_module_without_parameters_has_a_kind_and_a_hash():
    loaded = from_module(nn.ReLU())
    assert (loaded.kind, loaded.dtype, loaded.device, len(loaded.content_hash)) == (
        "module",
        "float32",
        "cpu",
        16,
    )


def test_a_wrong_device_or_dtype_leaves_the_module_untouched(refusal):
    module = Perceptron().train()
    refusal(DeviceError, from_module, module, device="tpu")
    refusal(WorkloadError, from_module, module, dtype="int3")
    assert module.training


def test_a_traced_module_is_refused(refusal):
    traced = torch.jit.trace(Perceptron(), torch.zeros(2, 8))
    assert "the module that it was made of" in refusal(ModelError, from_module, traced)


@pytest.mark.parametrize("form", ["last token only", "hidden first", "one score"])
def test_token_ids_that_do_not_give_logits_of_every_token_make_a_module(form):
    class Otherwise(Tokens):
        def forward(self, ids):
            logits = super().forward(ids)
            last = logits[:, -1:]
            return {
                "last token only": last,
                "hidden first": (logits, last),
                "one score": logits.mean(),
            }[form]

    assert from_module(Otherwise(), tokenizer=object()).kind == "module"


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.random_unstructured(layer, "bias", 1),
        nn.utils.weight_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_model_in_training_whose_weights_are_made_anew_in_each_call_is_copied(change):
    module = Perceptron()
    change(module.down)
    x = torch.randn(3, 8)
    assert not vars(module.down).get("weight", vars(module.down).get("bias")).is_leaf
    copied = from_module(module).module
    assert torch.allclose(copied(x), module.eval()(x), atol=1e-6)
    assert isinstance(copied.down._parameters["weight"], nn.Parameter)
