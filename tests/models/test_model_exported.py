import json
import shutil
import zipfile

import pytest
import torch
from tiny_models import Payload, Perceptron
from torch import nn

from autoquant.errors import ModelError
from autoquant.models import load_model
from autoquant.models.exported_check import is_plain_expression


class TiedTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


class Shaped(nn.Module):
    """Shape arithmetic, a buffer, a constant and a structured output, as real exports have them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("offset", torch.ones(8))
        self.constant = torch.arange(8.0)

    def forward(self, x, more):
        y = self.layer(x) + self.offset + self.constant + torch.arange(8, device=x.device)
        return {"flat": y.reshape(x.shape[0] * 2, -1), "half": y[:, : y.shape[1] // 2] + more["a"]}


def _export(path, module, *inputs, **kwargs):
    torch.export.save(torch.export.export(module.eval(), inputs, **kwargs), path)
    return path


def _rewrite(path, name, change):
    """Replace one entry of the archive by `change` of its bytes, stored uncompressed as torch stores it."""
    copy = path.with_suffix(".copy")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        assert any(entry.endswith(name) for entry in old.namelist())
        for entry in old.namelist():
            new.writestr(
                entry, change(old.read(entry)) if entry.endswith(name) else old.read(entry)
            )
    shutil.move(copy, path)


def test_an_exported_program_is_loaded_with_the_inputs_it_was_exported_on(tmp_path):
    module, x = Perceptron(), torch.randn(3, 8)
    loaded = load_model(_export(tmp_path / "model.pt2", module, x))
    assert (loaded.kind, loaded.source.kind, loaded.stored_dtype) == (
        "module",
        "exported",
        "float32",
    )
    assert len(loaded.example_inputs) == 1 and torch.equal(loaded.example_inputs[0], x)
    torch.testing.assert_close(loaded.module(*loaded.example_inputs), module(x))
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_eval_can_be_called_on_the_loaded_module(tmp_path):
    loaded = load_model(_export(tmp_path / "model.pt2", Perceptron(), torch.randn(3, 8)))
    assert loaded.module.eval() is loaded.module and not loaded.module.training


def test_the_hash_is_that_of_the_program_not_of_the_file(tmp_path):
    module, x = Perceptron(), torch.randn(3, 8)
    first = load_model(_export(tmp_path / "a.pt2", module, x)).content_hash
    assert load_model(_export(tmp_path / "b.pt2", module, x)).content_hash == first
    with torch.no_grad():
        module.up.weight[0, 0] += 1
    assert load_model(_export(tmp_path / "c.pt2", module, x)).content_hash != first


def test_a_cast_program_runs_in_the_dtype_with_its_inputs_and_keeps_its_hash(tmp_path):
    path = _export(tmp_path / "model.pt2", Perceptron(), torch.randn(3, 8))
    loaded = load_model(path, dtype="bf16")
    assert loaded.module(*loaded.example_inputs).dtype is torch.bfloat16
    assert (loaded.stored_dtype, loaded.content_hash) == ("float32", load_model(path).content_hash)


def test_a_program_with_its_dtype_burnt_in_is_refused_in_another(tmp_path, refusal):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x.to(torch.float32))

    path = _export(tmp_path / "model.pt2", Fixed(), torch.randn(3, 8).double())
    assert "--dtype auto" in refusal(ModelError, load_model, path, dtype="bf16")


def test_weights_that_share_memory_stay_shared_through_a_cast(tmp_path):
    path = _export(tmp_path / "model.pt2", TiedTokens(), torch.ones(1, 4, dtype=torch.long))
    loaded = load_model(path, dtype="bf16")
    assert loaded.module.head.weight is loaded.module.embedding.weight


def test_a_program_on_token_ids_is_a_token_lm_where_a_tokenizer_is_given(tmp_path, save_llama):
    folder, _ = save_llama()
    ids = torch.ones(2, 4, dtype=torch.long)
    auto = torch.export.Dim.AUTO
    path = _export(tmp_path / "model.pt2", TiedTokens(), ids, dynamic_shapes=({0: auto, 1: auto},))
    assert load_model(path).kind == "module"
    static = _export(tmp_path / "static.pt2", TiedTokens(), torch.ones(1, 2, dtype=torch.long))
    assert load_model(static, tokenizer=str(folder)).kind == "token_lm"


def test_an_export_with_shape_arithmetic_and_structured_values_needs_no_trust(tmp_path):
    auto = torch.export.Dim.AUTO
    inputs = (torch.randn(4, 6, 8), {"a": torch.ones(8)})
    path = _export(
        tmp_path / "model.pt2", Shaped(), *inputs, dynamic_shapes=({0: auto, 1: auto}, {"a": {}})
    )
    loaded = load_model(path)
    torch.testing.assert_close(
        loaded.module(*loaded.example_inputs)["flat"].shape, torch.Size([8, 24])
    )
    assert loaded.module(torch.randn(5, 10, 8), inputs[1])["half"].shape == (5, 5, 8)


def test_a_program_under_another_suffix_is_recognised(tmp_path):
    path = _export(tmp_path / "model.pt2", Perceptron(), torch.randn(3, 8))
    assert load_model(shutil.copy(path, tmp_path / "model.pt")).source.kind == "exported"


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_a_program_with_keyword_inputs_is_loaded_with_them_by_name(tmp_path, dtype):
    module, x = Perceptron(), torch.randn(3, 8)
    torch.export.save(torch.export.export(module.eval(), (), {"x": x}), tmp_path / "model.pt2")
    loaded = load_model(tmp_path / "model.pt2", dtype=dtype)
    assert list(loaded.example_inputs) == ["x"]
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == "bf16" else {}
    torch.testing.assert_close(
        loaded.module(**loaded.example_inputs).float(), module(x), **tolerance
    )


def test_a_program_with_positional_and_keyword_inputs_is_refused(tmp_path, refusal):
    program = torch.export.export(
        Shaped().eval(), (torch.ones(2, 4, 8),), {"more": {"a": torch.ones(8)}}
    )
    torch.export.save(program, tmp_path / "model.pt2")
    assert "keyword inputs (more)" in refusal(ModelError, load_model, tmp_path / "model.pt2")


def test_pickled_example_inputs_are_refused_and_not_run(tmp_path, refusal):
    import io

    path, mark = _export(tmp_path / "model.pt2", Perceptron(), torch.randn(3, 8)), tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(((Payload(mark),), {}), buffer)
    _rewrite(path, "sample_inputs/model.pt", lambda _: buffer.getvalue())
    assert "--trust-pickle" in refusal(ModelError, load_model, path)
    assert not mark.exists()
    load_model(path, trust_pickle=True)
    assert mark.exists(), "the payload is a live one"


def test_a_pickled_weight_is_refused_and_not_run(tmp_path, refusal):
    import io

    path, mark = _export(tmp_path / "model.pt2", Perceptron(), torch.randn(3, 8)), tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(Payload(mark), buffer)
    _rewrite(path, "weights/weight_0", lambda _: buffer.getvalue())
    _rewrite(
        path,
        "weights_config.json",
        lambda data: data.replace(b'"use_pickle": false', b'"use_pickle": true', 1),
    )
    assert "--trust-pickle" in refusal(ModelError, load_model, path)
    assert not mark.exists()
    refusal(ModelError, load_model, path, trust_pickle=True)
    assert mark.exists(), "the payload is a live one"


def test_code_in_a_shape_expression_is_refused_and_not_run(tmp_path, refusal):
    auto = torch.export.Dim.AUTO
    path = _export(
        tmp_path / "model.pt2", Perceptron(), torch.randn(3, 8), dynamic_shapes=({0: auto},)
    )
    mark = tmp_path / "ran"

    def poison(data):
        program = json.loads(data)

        def walk(value):
            if isinstance(value, dict):
                if "expr_str" in value:
                    value["expr_str"] = f"__import__('os').mkdir({str(mark)!r})"
                for inner in value.values():
                    walk(inner)
            elif isinstance(value, list):
                for inner in value:
                    walk(inner)

        walk(program)
        return json.dumps(program).encode()

    _rewrite(path, "models/model.json", poison)
    assert "expr_str" in refusal(ModelError, load_model, path)
    assert not mark.exists()
    refusal(ModelError, load_model, path, trust_pickle=True)
    assert mark.exists(), "the payload is a live one"


@pytest.mark.parametrize(
    "target", ["torch.load", "torch.ops.load_library", "torch.hub.load", "_operator.methodcaller"]
)
def test_a_graph_that_calls_anything_but_tensor_operations_is_refused(tmp_path, refusal, target):
    path = _export(tmp_path / "model.pt2", Perceptron(), torch.randn(3, 8))
    _rewrite(
        path,
        "models/model.json",
        lambda data: data.replace(b"torch.ops.aten.relu.default", target.encode()),
    )
    assert target in refusal(ModelError, load_model, path)


def test_a_name_that_would_become_source_code_is_refused(tmp_path, refusal):
    path = _export(tmp_path / "model.pt2", Perceptron(), torch.randn(3, 8))
    _rewrite(
        path,
        "models/model.json",
        lambda data: data.replace(b'"up.weight"', b'"up.weight\\"+exit()+\\""'),
    )
    assert "--trust-pickle" in refusal(ModelError, load_model, path)


def test_a_compiled_library_in_the_archive_is_refused(tmp_path, refusal):
    path = _export(tmp_path / "model.pt2", Perceptron(), torch.randn(3, 8))
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/data/aotinductor/model/code.so", b"\x7fELF")
    assert "code.so" in refusal(ModelError, load_model, path)


@pytest.mark.parametrize(
    "text", ["s77", "2*s0 + 1", "Symbol('s77', positive=True, integer=True)", "Max(1, s0//2) >= 3"]
)
def test_shape_arithmetic_is_plain(text):
    assert is_plain_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "exec('x')",
        "().__class__",
        "s0.__class__",
        "lambda: 1",
        "Symbol('a b')",
        "chr(95)",
        "exec",
        "S('x')",
        "[s0]",
        "(",
    ],
)
def test_anything_else_than_shape_arithmetic_is_not_plain(text):
    assert not is_plain_expression(text)


def test_a_damaged_program_is_refused(tmp_path, refusal):
    path = _export(tmp_path / "model.pt2", Perceptron(), torch.randn(3, 8))
    path.write_bytes(path.read_bytes()[:-200])
    assert "torch.export.save" in refusal(ModelError, load_model, path)
    path.write_bytes(b"hello")
    assert "torch.export.save" in refusal(ModelError, load_model, path)
    torch.save(Perceptron().state_dict(), path)
    assert "torch.export.save" in refusal(ModelError, load_model, path)


def test_reading_a_program_prints_nothing(tmp_path, capfd):
    path = _export(tmp_path / "model.pt2", Perceptron(), torch.randn(3, 8))
    capfd.readouterr()
    load_model(path)
    assert capfd.readouterr() == ("", "")


def test_a_factory_for_a_program_is_refused(tmp_path, refusal):
    path = _export(tmp_path / "model.pt2", Perceptron(), torch.randn(3, 8))
    assert "--model-factory" in refusal(ModelError, load_model, path, model_factory="a:b")
