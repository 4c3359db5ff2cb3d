"""Files are there as a whole or not at all, and what killed processes left is removed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from autoquant.errors import AutoquantError, DiskFullError
from autoquant.files import move_whole, one_at_a_time, raise_if_full, scratch_folder, write_file

DYING = """
import os, signal, sys
from pathlib import Path
from autoquant.files import scratch_folder
with scratch_folder(Path(sys.argv[1])) as scratch:
    (scratch / "half").write_text("half")
    print(scratch, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def dying(tmp_path):
    """A process that is inside the scratch folder of `target`, and its folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", DYING, str(tmp_path / "target")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        yield process, process.stdout.readline().strip()
        process.kill()


def full(*_arguments, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced_with_its_permissions(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"old")
    path.chmod(0o600)
    write_file(path, b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)
    assert names(tmp_path) == ["file"]


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"


def test_what_is_no_file_is_written_to(tmp_path):
    write_file(os.devnull, b"anything")
    assert not os.path.isfile(os.devnull)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_is_said_with_the_place(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(DiskFullError, match="the disk is full") as caught:
        write_file(path, b"new")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_folder_that_is_missing_is_one_error(tmp_path):
    with pytest.raises(AutoquantError, match="cannot write"):
        write_file(tmp_path / "missing" / "file", b"new")


def test_all_that_is_moved_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    part = tmp_path / "part"
    part.mkdir()
    (part / "one").write_text("1")
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: done.append(os.readlink(f"/proc/self/fd/{number}"))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("moved"), replace(*paths)))
    move_whole(part, tmp_path / "whole")
    assert done == [str(part), str(part / "one"), "moved", str(tmp_path)]
    assert sync is not os.fsync


@pytest.mark.processes
def test_the_folder_of_a_living_process_stays_and_that_of_a_killed_one_goes(tmp_path, dying):
    process, left = dying
    with scratch_folder(tmp_path / "target"):
        assert os.path.exists(left)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.path.exists(left)
    with scratch_folder(tmp_path / "another"):
        assert os.path.exists(left), "it belongs to another target"
    with scratch_folder(tmp_path / "target") as scratch:
        assert names(tmp_path) == [scratch.name]
    assert names(tmp_path) == []


def test_a_users_own_hidden_file_is_no_leftover(tmp_path):
    (tmp_path / ".target.notes.unfinished").write_text("mine")
    (tmp_path / ".target.notes").mkdir()
    with scratch_folder(tmp_path / "target"):
        pass
    assert names(tmp_path) == [".target.notes", ".target.notes.unfinished"]


def test_a_full_disk_is_found_behind_other_errors():
    try:
        try:
            full()
        except OSError as error:
            raise RuntimeError("the compiler failed") from error
    except RuntimeError as error:
        with pytest.raises(DiskFullError):
            raise_if_full(error)
    for words in (
        "fatal error: error writing to /tmp/x.s: No space left on device",
        "(sqlite3.OperationalError) database or disk is full",
    ):
        with pytest.raises(DiskFullError):
            raise_if_full(RuntimeError(words))
    raise_if_full(OSError(errno.EACCES, "Permission denied"))
    raise_if_full(ValueError("no such kernel"))


def test_one_process_at_a_time_is_inside(tmp_path):
    """Seen from another process, which would have to wait."""
    waits = (
        "import fcntl, os, sys\nfcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    )
    command = [sys.executable, "-c", waits, str(tmp_path)]
    with one_at_a_time(tmp_path):
        assert subprocess.run(command, capture_output=True).returncode == 1
    assert subprocess.run(command, capture_output=True).returncode == 0
