"""Files kept in the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autoquant.cache import cache_folder, keep, keep_newest, kept, mark_used, read_kept


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made():
    return []


def get(made, key="key", content=b"code"):
    return kept("kind", key, lambda: made.append(key) or content)


def test_the_folder_is_the_users_choice_or_lies_under_that_of_the_system(monkeypatch):
    monkeypatch.delenv("AUTOQUANT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/autoquant")
    monkeypatch.setenv("AUTOQUANT_CACHE", "/chosen")
    assert cache_folder() == Path("/chosen")


def test_a_file_is_made_once_for_each_key(folder, made):
    assert get(made) == get(made) == b"code"
    assert get(made, "other", b"") == get(made, "other", b"") == b""
    assert made == ["key", "other"]
    assert sorted(path.name for path in (folder / "kind").iterdir()) == ["key", "other"], (
        "nothing half written"
    )


@pytest.mark.parametrize(
    "damage", [lambda old: old[:-1], lambda _: b"", lambda old: old[:-1] + b"?"]
)
def test_a_damaged_file_is_made_again(folder, made, damage):
    get(made)
    path = folder / "kind" / "key"
    path.write_bytes(damage(path.read_bytes()))
    assert get(made) == get(made) == b"code"
    assert made == ["key", "key"]


def test_a_folder_that_cannot_be_written_to_is_no_error(folder, made):
    folder.write_text("a file where the folder should be")
    assert get(made) == get(made) == b"code"
    assert made == ["key", "key"]


def test_what_cannot_be_read_is_made_again(folder, made):
    (folder / "kind" / "key").mkdir(parents=True)
    assert get(made) == b"code"
    assert [path.name for path in (folder / "kind").iterdir()] == ["key"], "no scratch file is left"


def test_what_fails_is_not_kept(folder):
    def fail():
        raise RuntimeError("does not compile")

    with pytest.raises(RuntimeError, match="does not compile"):
        kept("kind", "key", fail)
    assert not (folder / "kind").exists()


@pytest.mark.parametrize("name", ["", "kind"])
def test_a_folder_that_others_may_write_into_is_neither_read_nor_written(folder, made, name):
    get(made)
    (folder / name).chmod(0o777)
    assert get(made) == get(made, "other") == b"code"
    assert made == ["key", "key", "other"]
    assert [path.name for path in (folder / "kind").iterdir()] == ["key"]


def test_no_more_is_read_than_was_asked_for(folder):
    keep("kind", "key", b"12345")
    assert read_kept("kind", "key", most_bytes=5) == b"12345"
    assert read_kept("kind", "key", most_bytes=4) is None


def test_the_files_that_were_used_longest_ago_are_removed(folder):
    for age, key in enumerate("abcd"):
        keep("kind", key, b"1" * 68)  # 100 bytes with their checksum
        os.utime(folder / "kind" / key, (100 - age, 100 - age))
    mark_used("kind", "d")
    keep_newest("kind", 250)
    assert sorted(path.name for path in (folder / "kind").iterdir()) == ["a", "d"]
    keep_newest("another kind", 250)
