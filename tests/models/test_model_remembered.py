"""Digests of files that have not changed are remembered; any change is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_torchfile import PERCEPTRON
from tiny_models import Perceptron

from autoquant.models import load_model, remembered


@pytest.fixture
def digested(monkeypatch):
    """The names of the tensors that were read and hashed."""
    names = []
    digest = remembered.tensor_digest
    monkeypatch.setattr(
        remembered, "tensor_digest", lambda *args: names.append(args[0]) or digest(*args)
    )
    return names


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once: tests do not wait for two seconds."""
    monkeypatch.setattr(remembered, "_SETTLED_NS", 0)


@pytest.fixture
def folder(save_llama, settled):
    return save_llama()[0]


def entries(cache):
    return sorted(path for path in (cache / remembered.KIND).glob("*") if path.is_file())


def as_bins(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def beside(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "weights.pt")
    return folder / "weights.pt"


@pytest.mark.parametrize(
    "place", [lambda folder: folder, as_bins, beside, lambda folder: folder / "model.safetensors"]
)
def test_what_was_hashed_once_is_not_read_again(folder, place, cache, digested):
    path = place(folder)
    first = load_model(path).content_hash
    assert digested and len(entries(cache)) == 1
    digested.clear()
    again = load_model(path, dtype="fp32")
    assert (again.content_hash, again.dtype, digested) == (first, "float32", [])


def test_the_files_of_a_large_model_are_remembered_together(save_llama, settled, cache, digested):
    folder, _ = save_llama(max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    first = load_model(folder).content_hash
    digested.clear()
    assert (load_model(folder).content_hash, digested, len(entries(cache))) == (first, [], 1)


def test_weights_of_a_factory_are_remembered_under_the_names_of_the_file(
    factory, tmp_path, settled, digested
):
    state = {f"module.{name}": value for name, value in Perceptron().state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    first = load_model(tmp_path / "weights.pt", model_factory=factory(PERCEPTRON)).content_hash
    digested.clear()
    again = load_model(tmp_path / "weights.pt", model_factory=factory(PERCEPTRON + "again = 1\n"))
    assert digested == []
    assert again.content_hash != first, "its module is another class"


def test_a_moved_folder_is_known(folder, digested):
    first = load_model(folder).content_hash
    digested.clear()
    moved = folder.rename(folder.with_name("moved"))
    assert (load_model(moved).content_hash, digested) == (first, [])


def overwrite(path, changed):
    path.write_bytes(changed)


def put_another_in_its_place(path, changed):
    other = path.with_name("other")
    other.write_bytes(changed)
    os.replace(other, path)


@pytest.mark.parametrize("write", [overwrite, put_another_in_its_place])
def test_other_content_of_the_same_length_and_time_is_noticed(folder, write, digested):
    path = folder / "model.safetensors"
    first, before = load_model(folder).content_hash, path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    write(path, bytes(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    digested.clear()
    assert load_model(folder).content_hash != first
    assert digested


def test_another_configuration_is_another_model_though_its_weights_are_known(folder, digested):
    first = load_model(folder).content_hash
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    digested.clear()
    assert load_model(folder).content_hash != first
    assert digested == []


def test_a_file_that_was_just_written_is_not_remembered(save_llama, cache, digested):
    """It may be written once more at the same time, as its file system tells time."""
    folder, _ = save_llama()
    load_model(folder)
    assert entries(cache) == []
    digested.clear()
    load_model(folder)
    assert digested


def test_a_file_that_is_written_while_it_is_read_is_not_remembered(folder, cache, monkeypatch):
    digest = remembered.tensor_digest

    def touch(*args):
        os.utime(folder / "model.safetensors")
        return digest(*args)

    monkeypatch.setattr(remembered, "tensor_digest", touch)
    load_model(folder)
    assert entries(cache) == []


def emptied(_content):
    return b""


def cut(content):
    return content[:-1]


def flipped(content):
    return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]


def signed(content):
    return hashlib.sha256(content).digest() + content


def of_another_file(content):
    entry = json.loads(content[32:])
    entry["files"][0][1] += 1
    entry["digests"] = dict.fromkeys(entry["digests"], "0" * 64)
    return signed(json.dumps(entry).encode())


@pytest.mark.parametrize(
    "damage",
    [
        emptied,
        cut,
        flipped,
        of_another_file,
        lambda _: signed(b"no JSON"),
        lambda _: signed(b"[]"),
        lambda content: signed(content[32:].replace(b'"digests"', b'"others"')),
    ],
)
def test_a_damaged_memory_is_hashed_anew_and_mended(folder, cache, digested, damage):
    first = load_model(folder).content_hash
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    digested.clear()
    assert load_model(folder).content_hash == first
    assert digested
    assert entry.read_bytes() == whole


def test_digests_of_an_earlier_version_are_not_used(folder, digested, monkeypatch):
    load_model(folder)
    digested.clear()
    monkeypatch.setattr(remembered, "DIGEST_VERSION", remembered.DIGEST_VERSION + 1)
    load_model(folder)
    assert digested


@pytest.mark.parametrize("name", ["", remembered.KIND])
def test_a_folder_that_others_may_write_into_is_neither_believed_nor_used(
    folder, cache, digested, name
):
    load_model(folder)
    (entry,) = entries(cache)
    (cache / name).chmod(0o777)
    digested.clear()
    load_model(folder)
    assert digested, "what lies there may be another user's"
    entry.unlink()
    load_model(folder)
    assert entries(cache) == []


def test_a_model_loads_where_nothing_can_be_remembered(folder, cache):
    first = load_model(folder).content_hash
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    assert load_model(folder).content_hash == first


def test_the_memory_stays_small_and_forgets_what_was_used_longest_ago(
    save_llama, settled, cache, monkeypatch
):
    folders = [save_llama(name, seed=seed)[0] for seed, name in enumerate("abc")]
    load_model(folders[0])
    (first,) = entries(cache)
    monkeypatch.setattr(remembered, "_MOST_BYTES", int(2.5 * first.stat().st_size))
    load_model(folders[1])
    (second,) = set(entries(cache)) - {first}
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    load_model(folders[0])  # and is the one that was used last
    load_model(folders[2])
    assert len(entries(cache)) == 2
    assert first in entries(cache) and second not in entries(cache)


def test_an_entry_is_not_kept_if_it_alone_is_too_large(folder, cache, monkeypatch):
    monkeypatch.setattr(remembered, "_MOST_BYTES_EACH", 100)
    load_model(folder)
    assert entries(cache) == []


def test_what_code_in_a_file_made_is_never_remembered(folder, cache, digested):
    path = beside(folder)
    for _ in range(2):
        digested.clear()
        load_model(path, trust_pickle=True)
        assert digested
    assert entries(cache) == []


def test_tensors_that_two_files_have_under_one_name_are_hashed_each_time(tmp_path, settled, cache):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for number, path in enumerate(paths):
        save_file({"w": torch.full((3,), float(number))}, path)
    hashes = [_hash_of(paths) for _ in range(2)]
    save_file({"w": torch.full((3,), 5.0)}, paths[1])
    assert hashes[0] == hashes[1] != _hash_of(paths)
    assert entries(cache) == []


def test_a_file_put_in_place_before_the_known_one_is_opened_is_hashed(tmp_path, settled):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"w": torch.zeros(3)}, path)
    save_file({"w": torch.ones(3)}, other)
    known, wanted = _hash_of([path]), _hash_of([other])
    digests = remembered.FileDigests([path])
    os.replace(other, path)
    found = digests.content_hash(digests.watch(load_file(path).items()), "")
    assert found == wanted != known


def _hash_of(paths: list[Path]) -> str:
    digests = remembered.FileDigests(paths)
    tensors = digests.watch(item for path in paths for item in load_file(path).items())
    return digests.content_hash(tensors, "")
