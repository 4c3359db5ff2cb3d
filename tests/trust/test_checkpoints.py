"""A folder that `autoquant apply` wrote names code and files, for `load` and for `from_pretrained`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import autoquant
from autoquant.errors import CandidateError, CheckpointError, TrustError

from .conftest import Payload, change, refused

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoint"


@pytest.fixture
def saved(tmp_path):
    """A saved model that a test may change."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "saved"))


def named_source(saved, **fields):
    source = json.loads((saved / "autoquant.json").read_text())["source"]
    change(saved / "autoquant.json", source=source | fields)


def test_the_factory_that_a_manifest_names_is_not_imported(saved, evil, marker):
    named_source(saved, kind="state_dict", model_factory=evil)
    with pytest.raises(TrustError, match="--model-factory evil:run") as caught:
        autoquant.load(saved)
    assert caught.value.options == {"model_factory": evil}
    assert "--model-factory evil:run" in refused("generate", saved, "--prompt", "w1")
    assert not marker.exists()


def test_named_in_the_call_the_factory_is_used(saved, evil, marker):
    named_source(saved, kind="state_dict", model_factory="another:one")
    with pytest.raises(CheckpointError, match="must return an nn"):
        autoquant.load(saved, model_factory=evil)
    assert marker.exists()


@pytest.mark.parametrize("load", ["load", "from_pretrained"])
def test_a_pickle_among_the_packed_weights_does_not_run(saved, load, marker):
    torch.save({"a.weight": Payload(marker)}, saved / "packed.pt")
    with pytest.raises(CheckpointError, match="cannot read"):
        if load == "load":
            autoquant.load(saved)
        else:
            from transformers import AutoModelForCausalLM

            AutoModelForCausalLM.from_pretrained(saved)
    assert not marker.exists()


def test_what_packed_weights_may_hold_are_tensors_and_their_settings():
    from autoquant.candidates.registry import known_formats

    known_formats()  # imports the classes of all formats
    allowed = torch.serialization.get_safe_globals()
    functions = [each for each in allowed if not isinstance(each, type)]
    assert [each.__name__ for each in functions] == ["_rebuild_njt"], (
        "torch's own, for nested tensors"
    )
    own = [each for each in allowed if each.__module__.startswith("autoquant")]
    assert own and all(issubclass(each, torch.Tensor) for each in own)


def test_a_source_is_ignored_by_from_pretrained(saved, evil, marker):
    from transformers import AutoModelForCausalLM

    named_source(saved, kind="state_dict", model_factory=evil)
    AutoModelForCausalLM.from_pretrained(saved)
    assert not marker.exists()


def test_code_that_a_folder_names_does_not_run_by_from_pretrained(saved, marker):
    from transformers import AutoModelForCausalLM

    (saved / "own.py").write_text(f"import os\nos.makedirs({str(marker)!r})\n")
    change(
        saved / "config.json",
        model_type="own_of_another_test",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=False)
    with pytest.raises(TrustError, match="--trust-remote-code"):
        autoquant.load(saved)
    assert not marker.exists()


def test_a_format_that_is_named_like_a_module_is_not_imported(saved, evil, marker):
    routed = json.loads((saved / "autoquant.json").read_text())["routed"]
    name = next(iter(routed))
    change(saved / "autoquant.json", routed=routed | {name: routed[name] | {"format": "evil"}})
    with pytest.raises(CandidateError, match="no format 'evil'"):
        autoquant.load(saved)
    assert not marker.exists()


@pytest.mark.parametrize("dtype", ["load", "os", "serialization"])
def test_a_dtype_that_is_none_is_refused(saved, dtype):
    change(saved / "autoquant.json", dtype=dtype)
    with pytest.raises(CheckpointError, match="dtype: input should be 'float64'"):
        autoquant.load(saved)


def test_weights_of_another_folder_are_refused_by_from_pretrained(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    other = Path(shutil.copytree(saved, tmp_path / "other"))
    (saved / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((CheckpointError, ValueError, OSError), match=r"folder|directory"):
        AutoModelForCausalLM.from_pretrained(saved)
    assert other.exists()


def test_the_class_of_a_flattened_tensor_is_not_looked_up_by_name(saved, evil, marker):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(saved / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        metadata = file.metadata()
    for name, text in metadata.items():
        if text.startswith("{") and "_tensor_data_names" in text:
            metadata[name] = json.dumps(json.loads(text) | {"_type": "evil.run"})
    save_file(tensors, saved / "model.safetensors", metadata=metadata)
    with pytest.raises(Exception, match=r"evil\.run"):
        autoquant.load(saved)
    assert not marker.exists()
