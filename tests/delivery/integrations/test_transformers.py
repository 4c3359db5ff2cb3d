"""What apply wrote, loaded and saved by transformers' own functions."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from end_to_end.conftest import folder_print, python
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModel, AutoModelForCausalLM, TextStreamer, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import autoquant
from autoquant.candidates.joined import whole_of
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery import shards
from autoquant.delivery.integrations import on_import, quantizer, saving
from autoquant.errors import CheckpointError, DeviceError, DiskFullError

IDS = torch.arange(12).unsqueeze(0)

ELSEWHERE = """
import sys, warnings
warnings.simplefilter("error", UserWarning)
import autoquant
assert not {"torch", "transformers"} & set(sys.modules)
import torch
from transformers import AutoModelForCausalLM
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(report.values()), report
torch.save(model(torch.arange(12).unsqueeze(0)).logits, sys.argv[2])
"""


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def expected(quantized):
    return logits(autoquant.load(quantized))


@pytest.fixture
def model(quantized):
    return AutoModelForCausalLM.from_pretrained(quantized)


def same(model, expected):
    return torch.equal(logits(model), expected)


@pytest.mark.processes
def test_from_pretrained_in_a_new_process_gives_the_logits_of_load_without_a_warning(
    quantized, expected, tmp_path
):
    result = python("-c", ELSEWHERE, quantized, tmp_path / "logits.pt")
    assert result.returncode == 0, result.stderr
    assert "weights" not in result.stderr.replace("Loading weights", "").lower(), result.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_from_pretrained_gives_the_tensors_that_were_saved(quantized, model, expected):
    assert same(model, expected)
    loaded = autoquant.load(quantized)
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert type(ours.data) is type(theirs.data), name
        assert getattr(ours.data, "route", None) == getattr(theirs.data, "route", None)
        assert not ours.requires_grad and not ours.is_meta
    assert whole_of(model.model.layers[0].self_attn.k_proj.weight.data).start == 64, (
        "joined with q_proj"
    )
    assert type(model.model.embed_tokens.weight.data) is torch.Tensor
    assert isinstance(model.lm_head.weight.data, RoutedWeight), (
        "parted from the embedding, which it was tied to"
    )


def test_nothing_of_the_loading_is_left_on_the_model(model):
    assert "state_dict" not in vars(model) and "_keys_to_ignore_on_load_unexpected" not in vars(
        model
    )
    assert "lm_head.weight" in model.state_dict()
    assert not model.training and model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "place", ["cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}, torch.device("cpu")]
)
def test_a_device_map_of_one_device_is_followed(quantized, expected, place):
    pytest.importorskip("accelerate")
    assert same(AutoModelForCausalLM.from_pretrained(quantized, device_map=place), expected)


def test_the_best_device_is_one_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    made = quantizer.AutoquantQuantizer(quantizer.AutoquantConfig())
    assert made.update_device_map("auto") == {"": "cuda"}
    assert made.update_device_map({"": 1}) == {"": 1} and quantizer._device_name(1) == "cuda:1"
    assert made.update_device_map(None) is None


@pytest.mark.parametrize(
    "place", ["balanced", "sequential", {"model": "cpu", "lm_head": "disk"}, {"": "disk"}]
)
def test_several_devices_are_refused_in_one_line(quantized, place):
    pytest.importorskip("accelerate")
    with pytest.raises(
        DeviceError, match=r"^a model that autoquant quantized runs on one device: give [^\n]+$"
    ):
        AutoModelForCausalLM.from_pretrained(quantized, device_map=place)


def test_another_dtype_is_refused_and_the_plans_is_taken(quantized, expected):
    with pytest.raises(CheckpointError, match="quantized for bfloat16: leave out dtype"):
        AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float16)
    assert same(AutoModelForCausalLM.from_pretrained(quantized, dtype="bfloat16"), expected)


def test_a_plan_for_another_dtype_than_the_model_was_stored_in_needs_no_dtype(both, tmp_path):
    from end_to_end.applied import save_applied

    original = shutil.copytree(both[0], tmp_path / "original")
    config = json.loads((original / "config.json").read_text()) | {"torch_dtype": "float32"}
    del config["dtype"]
    (original / "config.json").write_text(json.dumps(config))
    assert (
        AutoModelForCausalLM.from_pretrained(save_applied(original, tmp_path / "out")).dtype
        == torch.bfloat16
    )


def test_another_architecture_is_refused(quantized):
    with pytest.raises(CheckpointError, match="another architecture"):
        AutoModel.from_pretrained(quantized)


def test_the_manifest_makes_nothing_be_imported(quantized, expected, tmp_path, monkeypatch):
    folder = shutil.copytree(quantized, tmp_path / "folder")
    manifest = json.loads((folder / "autoquant.json").read_text())
    manifest["source"] = {"kind": "state_dict", "path": "x.pt", "model_factory": "trap:make"}
    (folder / "autoquant.json").write_text(json.dumps(manifest))
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    assert same(AutoModelForCausalLM.from_pretrained(folder), expected)


def test_a_folder_written_before_config_json_named_autoquant_still_loads(
    quantized, expected, tmp_path
):
    folder = shutil.copytree(quantized, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "autoquant", "format_version": 1}
    (folder / "config.json").write_text(json.dumps(config))
    assert same(autoquant.load(folder), expected)


@pytest.mark.parametrize("first", ["load", "from_pretrained"])
def test_what_save_pretrained_writes_loads_by_both_ways(quantized, expected, tmp_path, first):
    model = (
        autoquant.load(quantized)
        if first == "load"
        else AutoModelForCausalLM.from_pretrained(quantized)
    )
    out = tmp_path / "deeper" / "out"
    model.save_pretrained(out)
    assert sorted(path.name for path in out.iterdir()) == [
        "autoquant.json", "config.json", "generation_config.json", "model.safetensors", "packed.pt",
    ]  # fmt: skip
    before, after = (
        json.loads((place / "autoquant.json").read_text()) for place in (quantized, out)
    )
    assert before == after
    for again in (AutoModelForCausalLM.from_pretrained(out), autoquant.load(out)):
        assert same(again, expected)
        assert whole_of(again.model.layers[1].self_attn.v_proj.weight.data) is not None


def test_a_folder_can_be_saved_onto_itself_and_loses_nothing(quantized, expected, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "folder")
    autoquant.load(folder).save_pretrained(folder)
    assert (folder / "tokenizer.json").exists()
    assert same(autoquant.load(folder), expected)


def test_a_saving_that_breaks_leaves_what_was_there(quantized, tmp_path, monkeypatch):
    folder = shutil.copytree(quantized, tmp_path / "folder")
    before = folder_print(folder)

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.checkpoint, "write_module", full)
    with pytest.raises(DiskFullError, match="the disk is full"):
        autoquant.load(quantized).save_pretrained(folder)
    assert folder_print(folder) == before


def test_an_option_that_saving_cannot_follow_is_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="with state_dict, variant: leave it out"):
        model.save_pretrained(tmp_path / "out", state_dict={}, variant="x")
    assert not (tmp_path / "out").exists()


def test_what_is_pushed_to_the_hub_is_what_save_pretrained_writes(
    model, expected, tmp_path, monkeypatch
):
    def upload(_self, folder, *_arguments, **_options):
        shutil.copytree(folder, tmp_path / "pushed")

    class Hub:
        def create_repo(self, repo_id, **_options):
            return type("Repo", (), {"repo_id": repo_id})

    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub, raising=False)
    monkeypatch.setattr("transformers.utils.hub.create_repo", Hub().create_repo, raising=False)
    card = huggingface_hub.ModelCard("---\ntags: []\n---\n")  # fetched from the hub otherwise
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    model.push_to_hub("somebody/model")
    assert same(autoquant.load(tmp_path / "pushed"), expected)


@pytest.mark.parametrize("packed", [True, False])
def test_of_a_model_on_the_hub_the_other_files_are_fetched_too(
    quantized, tmp_path, monkeypatch, packed
):
    snapshot = tmp_path / "0123abcd"
    fetched = []

    def download(name, file, revision):
        fetched.append((name, file, revision))
        if file == "autoquant.json":
            snapshot.mkdir()
            shutil.copy(quantized / file, snapshot)
        if file == "packed.pt" and not packed:
            raise EntryNotFoundError("no such file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert quantizer._whole_folder(snapshot / "model.safetensors", "somebody/model") == snapshot
    assert fetched == [
        ("somebody/model", file, "0123abcd") for file in ("autoquant.json", "packed.pt")
    ]


def test_a_copy_of_a_model_saves_itself(model, tmp_path):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.mul_(2)
    twin.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(autoquant.load(tmp_path / "out")), logits(twin))
    assert not torch.equal(logits(twin), logits(model))


def test_weights_that_are_computed_as_one_are_still_one_after_a_move(model, monkeypatch):
    prepared = []
    monkeypatch.setattr(saving, "prepare", prepared.append)
    moved = []
    monkeypatch.setattr(
        type(model), "device", property(lambda _self: torch.device("cpu", len(moved)))
    )

    def move(tensor):
        moved.append(1)
        return tensor.clone()

    model._apply(move)
    assert prepared == [model]
    assert whole_of(model.model.layers[0].self_attn.v_proj.weight.data).start == 96


def test_a_pipeline_writes_text_and_takes_a_conversation(quantized):
    write = pipeline("text-generation", model=str(quantized))
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert write("w1 w2", **greedy)[0]["generated_text"].startswith("w1 w2")
    answer = write([{"role": "user", "content": "w1 w2"}], **greedy)[0]["generated_text"][-1]
    assert answer["role"] == "assistant" and answer["content"]


def test_generate_samples_and_streams(quantized, model, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(quantized)
    torch.manual_seed(0)
    ids = model.generate(
        IDS, max_new_tokens=6, do_sample=True, streamer=TextStreamer(tokenizer, skip_prompt=True)
    )
    assert tokenizer.decode(ids[0, IDS.shape[1] :]).split() == capsys.readouterr().out.split()


def test_a_quantized_model_takes_adapters_and_is_not_quantized_while_loading(both, model):
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_serializable()
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(
            both[0], quantization_config=quantizer.AutoquantConfig()
        )


@pytest.mark.processes
@pytest.mark.parametrize("order", ["import autoquant; {}", "{}; import autoquant"])
def test_it_is_registered_whichever_is_imported_first(order):
    code = (
        order.format("from transformers.quantizers import auto")
        + "; assert 'autoquant' in auto.AUTO_QUANTIZER_MAPPING"
    )
    assert python("-c", code).returncode == 0


def test_registering_twice_changes_nothing():
    on_import.register()
    assert AUTO_QUANTIZER_MAPPING["autoquant"] is quantizer.AutoquantQuantizer
    code = (
        "import sys, autoquant; n = len(sys.meta_path); "
        "autoquant.on_import.register(); assert n == len(sys.meta_path)"
    )
    environment = {"PYTHONPATH": str(Path(autoquant.__file__).parents[1])}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


def test_load_takes_the_device_of_the_plan_unless_told_otherwise(quantized, expected, tmp_path):
    folder = tmp_path / "for-cuda"
    shutil.copytree(quantized, folder)
    manifest = json.loads((folder / "autoquant.json").read_text())
    assert manifest["device"] == "cpu"
    (folder / "autoquant.json").write_text(json.dumps(manifest | {"device": "cuda"}))
    assert same(autoquant.load(folder, device="cpu"), expected)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match=r"^PyTorch sees no CUDA device here"):
            autoquant.load(folder)


@pytest.fixture
def sharded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    model.save_pretrained(tmp_path / "sharded")
    monkeypatch.undo()
    return tmp_path / "sharded"


def test_tensors_that_take_much_are_kept_in_several_files_and_loaded_from_them(sharded, expected):
    names = {path.name for path in sharded.iterdir()}
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names
    assert len([name for name in names if name.startswith("model-")]) > 2
    assert same(autoquant.load(sharded), expected)
    assert same(AutoModelForCausalLM.from_pretrained(sharded), expected)


def test_an_earlier_version_is_told_that_it_cannot_read_several_files(sharded):
    manifest = json.loads((sharded / "autoquant.json").read_text())
    assert manifest["format_version"] == 2


def test_one_file_takes_the_place_of_several(sharded, model, expected):
    model.save_pretrained(sharded)
    names = {path.name for path in sharded.iterdir()}
    assert not [name for name in names if "-of-" in name or name.endswith("index.json")]
    assert same(autoquant.load(sharded), expected)


def test_a_missing_file_of_several_is_named(sharded):
    gone = sorted(sharded.glob("model-*"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        autoquant.load(sharded)
