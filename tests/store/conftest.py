"""A store in a file of its own, and prints of files that must stay as they are."""

from __future__ import annotations

import hashlib
import sqlite3

import pytest
from builders.rich import fill

from autoquant.store import open_store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "plan.db"


@pytest.fixture
def store(path):
    opened = open_store(path)
    yield opened
    opened.close()


@pytest.fixture
def filled(store):
    """A store with a device, a model and a study."""
    fill(store)
    return store


@pytest.fixture
def folder_print():
    """Every file below a folder with a hash of its bytes."""

    def take(folder):
        return {
            str(entry.relative_to(folder)): hashlib.sha256(entry.read_bytes()).hexdigest()
            if entry.is_file()
            else ""
            for entry in sorted(folder.rglob("*"))
        }

    return take


@pytest.fixture
def query(path):
    """The answer to one SQL statement, read past our own code."""

    def ask(statement):
        connection = sqlite3.connect(path)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()

    return ask
