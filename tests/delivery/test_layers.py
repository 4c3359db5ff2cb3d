"""A plan applied layer by layer, from files to files."""

import json

import pytest
import torch
from builders.records import make_plan
from end_to_end.conftest import python
from models.test_model_streaming import WINDOWS, WORKLOAD, bytes_of, save

import autoquant
from autoquant.candidates import get_format
from autoquant.candidates.flat import same_bits
from autoquant.delivery import checkpoint, shards
from autoquant.delivery.applier import applied, module_bytes
from autoquant.delivery.layers import write_layers
from autoquant.devices.memory import LIMIT_VARIABLE
from autoquant.errors import CheckpointError
from autoquant.evaluators.quality import next_token_logits
from autoquant.events import ignore
from autoquant.models import load_model
from autoquant.profiler.record import record_model
from autoquant.records import LayerChoice, RouteStep

KERNELS = {
    "int8-row/plain": "int8pack-mm",
    "int4-g32/cpu-packed": "int4pack-mm",
    "bfloat16/plain": "matmul",
}
"""Formats for safetensors, for a packing, and no format at all."""


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), tied=request.param)


def plan_for(loaded):
    """A plan with all kinds of formats, layer after layer."""
    layers = []
    for number, site in enumerate(record_model(loaded, WORKLOAD, ignore).sites):
        fmt = list(KERNELS)[number % len(KERNELS)]
        if get_format(fmt).unsupported(site.shape, 1, "cpu"):
            fmt = "int8-row/plain"
        layers.append(
            LayerChoice(
                name=site.name,
                parameters=site.parameters,
                shape=site.shape,
                format=fmt,
                route=(RouteStep(upper_m=None, kernel=KERNELS[fmt]),),
                numerics=f"{fmt.partition('/')[0]}+a16",
                latency_us={},
                memory_bytes=0,
                loss=0.0,
            )
        )
    assert {layer.format for layer in layers} == set(KERNELS)
    return make_plan("abcd", layers=tuple(layers), model_hash=loaded.content_hash)


@pytest.fixture
def streamed(folder, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "100kB")
    loaded = load_model(folder)
    monkeypatch.undo()
    assert loaded.stream is not None
    return loaded


def written(loaded, out):
    out.mkdir()
    plan = plan_for(loaded)
    return plan, write_layers(plan, loaded, out, calibration=None, listener=ignore)


def test_the_folder_is_the_same_as_if_the_model_were_quantized_as_a_whole(
    folder, streamed, tmp_path
):
    plan, size = written(streamed, tmp_path / "out")
    expected = applied(plan, load_model(folder).module, None)
    again = autoquant.load(tmp_path / "out")
    for (name, one), (other, two) in zip(
        again.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert name == other and same_bits(one.data, two.data), name
    assert torch.equal(
        next_token_logits(again, WINDOWS[:1]), next_token_logits(expected, WINDOWS[:1])
    )
    assert size == module_bytes(again)
    whole = tmp_path / "whole"
    whole.mkdir()
    loaded = load_model(folder)
    loaded.module = expected
    checkpoint.write(loaded, plan, whole)
    manifests = [
        json.loads((each / "autoquant.json").read_text()) for each in (whole, tmp_path / "out")
    ]
    assert manifests[0] == manifests[1]


def test_the_model_stays_as_it_was(streamed, tmp_path):
    before = bytes_of(streamed.module), next_token_logits(streamed.module, WINDOWS[:1])
    written(streamed, tmp_path / "out")
    assert bytes_of(streamed.module) == before[0]
    assert torch.equal(next_token_logits(streamed.module, WINDOWS[:1]), before[1])


def test_memory_holds_the_tensors_of_one_file(streamed, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 4096)
    held = []
    flush = shards._Files._flush
    monkeypatch.setattr(
        shards._Files, "_flush", lambda self: (held.append(self._held_bytes), flush(self))
    )
    written(streamed, tmp_path / "out")
    assert len(held) > 6 and max(held) <= 4096
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert any(name.startswith("packed-00002-of") for name in names), names
    assert any(name.startswith("model-00002-of") for name in names), names
    assert next_token_logits(autoquant.load(tmp_path / "out"), WINDOWS[:1]).isfinite().all()


def test_a_file_that_is_not_what_was_written_is_refused(streamed, tmp_path, monkeypatch):
    write = shards.write_safetensors

    def wrong(tensors, path):
        name = next(name for name, tensor in tensors.items() if type(tensor) is torch.Tensor)
        write({**tensors, name: tensors[name] + 1}, path)

    monkeypatch.setattr(shards, "write_safetensors", wrong)
    with pytest.raises(CheckpointError, match="is not what was read back"):
        written(streamed, tmp_path / "out")


def test_a_folder_larger_than_the_memory_is_refused_before_it_is_read(
    streamed, tmp_path, monkeypatch
):
    written(streamed, tmp_path / "out")
    monkeypatch.setenv(LIMIT_VARIABLE, "20kB")
    monkeypatch.setattr(shards, "read_safetensors", lambda *_: pytest.fail("it was read"))
    with pytest.raises(CheckpointError, match="apply a smaller plan"):
        autoquant.load(tmp_path / "out")


MEASURED = """
import os, sys
from autoquant.devices import peaks
from autoquant.devices.peaks import PeakMemory
from autoquant.delivery import shards
from autoquant.evaluators.quality import TextQuality, next_token_logits
from autoquant.events import ignore
from autoquant.delivery.layers import write_layers
from autoquant.models import load_model
from delivery.test_layers import plan_for
from models.test_model_streaming import WINDOWS
from autoquant.candidates.kernels.cpu_source import load_cpu_kernels
from pathlib import Path

load_cpu_kernels()  # a compiler takes as much for any model
peaks._LOOK_S = 0.005
shards.SHARD_BYTES = 4 << 20
os.environ["AUTOQUANT_DEVICE_MEMORY"] = sys.argv[2]
loaded = load_model(sys.argv[1])
assert loaded.stream is not None
plan = plan_for(loaded)
next_token_logits(loaded.module, WINDOWS[:1])
memory = PeakMemory("cpu")
before = memory.take()["host"]
with loaded.stream.in_float32():
    next_token_logits(loaded.module, WINDOWS[:1])
wide = memory.take()["host"] - before
out = Path(sys.argv[3])
out.mkdir()
write_layers(plan, loaded, out, calibration=None, listener=ignore)
print(wide, memory.take()["host"] - before)
"""


@pytest.mark.processes
def test_a_large_model_takes_the_memory_of_a_block_or_of_a_file(tmp_path):
    """80 MiB of weights in 40 blocks, measured without pages of files."""
    folder = save(tmp_path / "model", tied=False, hidden=256, layers=40)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    result = python("-c", MEASURED, folder, size // 2, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    wide, written = map(int, result.stdout.split())
    assert wide < size / 4 and written < size / 2, (wide, written, size)
