"""Code that lies where Python or a compiler might look for it by itself."""

from __future__ import annotations

import os
import sys

import pytest

from autoquant import cache
from autoquant.candidates.kernels.caches import tuning_folder, use_kernel_caches
from autoquant.devices import backend
from autoquant.errors import CandidateError
from autoquant.tuner.workers.forking import end_process, receive, send, start_process


@pytest.fixture
def open_cache(tmp_path, monkeypatch):
    """A cache folder that everyone may write into."""
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("AUTOQUANT_CACHE", str(folder))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    return folder


def test_compiled_code_is_not_taken_from_a_folder_that_is_open_to_all(open_cache):
    for use in (use_kernel_caches, lambda: tuning_folder(backend("cpu").fingerprint())):
        with pytest.raises(CandidateError, match=r"others may write into .*AUTOQUANT_CACHE"):
            use()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    open_cache.chmod(0o755)
    assert tuning_folder(backend("cpu").fingerprint()).is_relative_to(open_cache)


def test_nothing_is_read_from_or_left_in_a_folder_that_is_open_to_all(open_cache):
    assert cache.kept("cubin", "key", lambda: b"mine") == b"mine"
    assert list(open_cache.iterdir()) == []


def test_a_folder_of_another_user_is_not_safe(tmp_path, monkeypatch):
    assert cache.is_safe(tmp_path)
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert cache.is_safe(tmp_path) is (owner == 0)
    if os.getuid() == 0:
        os.chown(tmp_path, 4243, -1)
        assert not cache.is_safe(tmp_path)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="workers run on Linux only")
def test_a_worker_takes_no_module_of_the_current_folder_for_a_library(
    tmp_path, monkeypatch, marker
):
    for name in ("torch", "pickle", "autoquant"):
        (tmp_path / f"{name}.py").write_text(f"import os\nos.makedirs({str(marker)!r})\n")
    monkeypatch.chdir(tmp_path)
    process, connection = start_process("autoquant.tuner.workers.delivery_worker")
    try:
        send(connection, sys.path)
        send(connection, None)  # no delivery: it answers with an error, after all its imports
        with pytest.raises((EOFError, ConnectionError)):
            receive(connection)
    finally:
        end_process(process, connection)
    assert not marker.exists()
