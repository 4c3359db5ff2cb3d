"""Opening of databases, and refusal of other files, which stay unchanged."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from builders.records import MODEL, STUDY
from builders.rich import DEVICE, delivery, fill, measurement, plan, proof
from sqlalchemy import create_engine, event, text

from autoquant.errors import StoreError
from autoquant.records import Roofline
from autoquant.store import Store, connect, open_store
from autoquant.store.connect import APPLICATION_ID, VERSION_TABLE
from autoquant.store.schema import Base
from autoquant.study.study import Study


def make_foreign(path, journal="DELETE"):
    """A database of another program, with tables and rows."""
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA journal_mode = {journal}")
    connection.execute("CREATE TABLE plan (id TEXT)")
    connection.execute("INSERT INTO plan VALUES ('holiday')")
    connection.commit()
    connection.close()


def make_ours(path, revision=None):
    """A database of ours with a study and 40 plans.

    Of another schema revision where one is given.
    """
    store = open_store(path)
    fill(store)
    for number in range(40):
        store.put_plan(plan(f"plan{number:04}"))
    if revision is not None:
        with store.engine.begin() as connection:
            connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '{revision}'"))
    store.close()


def make_first_schema(path):
    """A database as the first version of autoquant wrote it, with a fact in every table."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    engine = create_engine(f"sqlite:///{path}")
    config = Config()
    config.set_main_option("script_location", str(Path(connect.__file__).parent / "migrations"))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        # Today's code writes the rows, and knows a column more.
        connection.exec_driver_sql("ALTER TABLE plan ADD COLUMN kv_cache VARCHAR")
    store = Store(engine)
    fill(store)
    store.put_timings(DEVICE, "2", [measurement(), measurement(m=8)])
    store.put_losses(MODEL, "text", "isolated", {("head", "int8-row+a16"): 0.25})
    store.put_reference("5tudy001", "losses", {"value": [1.0]})
    store.put_plan(plan())
    store.put_proof("abcd0001", proof())
    with store.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE plan DROP COLUMN kv_cache")
    store.close()


def tables(path):
    """Every table with its rows, read past our own code."""
    connection = sqlite3.connect(path)
    try:
        names = [
            row[0]
            for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        return {
            name: connection.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall()
            for name in names
        }
    finally:
        connection.close()


def refusal(address, **options):
    """The message of a refusal, which must be one line."""
    with pytest.raises(StoreError) as caught:
        open_store(address, **options)
    assert str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_database_is_marked_as_ours(store, query):
    assert query("PRAGMA application_id") == [(APPLICATION_ID,)]


def test_a_new_database_has_a_write_ahead_log_and_checks_foreign_keys(store):
    with store.engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1


def test_every_connection_checks_foreign_keys(store):
    for _ in range(3):
        store.engine.dispose()
        with store.engine.connect() as connection:
            assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1


def test_a_row_that_refers_to_nothing_is_refused(store):
    with pytest.raises(StoreError, match="FOREIGN KEY"):
        store.put_plan(plan(study_id="nowhere"))


def test_the_migrated_schema_is_that_of_the_models(store):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with store.engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": VERSION_TABLE, "compare_type": True}
        )
        assert compare_metadata(context, Base.metadata) == []


def test_a_database_of_the_first_schema_is_migrated_without_loss(path):
    make_first_schema(path)
    before = tables(path)
    assert (
        before.pop(VERSION_TABLE) == [("0001",)]
        and all(before.values())
        and "roofline" not in before
    )
    store = open_store(path, create=False)
    store.put_roofline(DEVICE, Roofline(bandwidth_bytes_per_s=1.0, flops_per_s={}))
    store.close()
    after = tables(path)
    assert after.pop(VERSION_TABLE) == [("0005",)] and len(after.pop("roofline")) == 1
    assert after.pop("task_score") == after.pop("delivery") == []
    assert all(row[-1] is None for row in after["plan"])  # kept in the model's dtype
    after["plan"] = [row[:-1] for row in after["plan"]]
    assert after == before


def test_plans_of_an_older_schema_have_no_deliveries_and_get_some(path):
    make_first_schema(path)
    store = open_store(path, create=False)
    assert store.deliveries("5tudy001") == {} and set(store.proofs("5tudy001")) == {"abcd0001"}
    store.put_delivery(delivery())
    assert store.deliveries("5tudy001") == {"abcd0001": delivery()}
    store.close()


def test_closing_leaves_one_file(path):
    make_ours(path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_empty_file_becomes_a_database(path):
    path.touch()
    make_ours(path)
    assert len(open_store(path, create=False).plans("5tudy001")) == 40


def test_opening_again_keeps_everything_and_changes_no_byte(path, folder_print):
    make_ours(path)
    before = folder_print(path.parent)
    store = open_store(path)
    assert len(store.plans("5tudy001")) == 40
    store.close()
    assert folder_print(path.parent) == before


def journal_of(path):
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA journal_mode").fetchone()[0]


@pytest.fixture
def without_log(path):
    """A database of ours that another program has copied, so that SQLite keeps no log of it."""
    make_ours(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    return path


def test_a_database_without_a_log_gets_one_when_it_is_first_written_to(without_log, folder_print):
    before = folder_print(without_log.parent)
    store = open_store(without_log)
    assert len(store.plans("5tudy001")) == 40 and folder_print(without_log.parent) == before
    store.put_plan(plan("plan9999"))
    store.close()
    assert journal_of(without_log) == "wal"
    assert len(open_store(without_log).plans("5tudy001")) == 41


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE plan SET kind = 'fastest' WHERE id = 'plan0007'",
        "UPDATE study SET problem = '[]'",
        "UPDATE plan SET layers = replace(layers, 'prefill', 'elsewhere') WHERE id = 'plan0039'",
        "INSERT INTO proof VALUES ('plan0003', 'ok', '', null, '2026-01-01 00:00:00')",
    ],
)
def test_a_database_without_a_log_that_is_damaged_is_not_written_to(
    without_log, folder_print, damage
):
    with closing(sqlite3.connect(without_log, isolation_level=None)) as connection:
        assert connection.execute(damage).rowcount == 1
    before = folder_print(without_log.parent)
    store = open_store(without_log)
    with pytest.raises(StoreError, match="is damaged"):
        store.put_losses(MODEL, "text", "isolated", {("head", "int8-row+a16"): 0.25})
    store.close()
    assert folder_print(without_log.parent) == before


@pytest.mark.parametrize("loss", [f"DELETE FROM {VERSION_TABLE}", f"DROP TABLE {VERSION_TABLE}"])
def test_tables_of_a_schema_that_is_not_said_are_refused_and_left_alone(
    without_log, folder_print, loss
):
    with closing(sqlite3.connect(without_log, isolation_level=None)) as connection:
        connection.execute(loss)
    before = folder_print(without_log.parent)
    assert "does not say which schema" in refusal(without_log)
    assert folder_print(without_log.parent) == before


def test_an_older_database_without_a_log_is_migrated(path):
    make_first_schema(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    open_store(path).close()
    assert journal_of(path) == "wal" and tables(path)[VERSION_TABLE] == [("0005",)]


def test_the_plans_of_a_study_are_read_with_few_queries(path):
    make_ours(path)
    store, queries = open_store(path), []
    event.listen(store.engine, "before_cursor_execute", lambda *call: queries.append(call[2]))
    assert len(store.plans("5tudy001")) == 40
    assert sum(query.startswith("SELECT") for query in queries) == 2


def test_a_missing_database_stays_missing_where_none_is_to_be_made(path):
    assert "autoquant search" in refusal(path, create=False)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("journal", ["DELETE", "WAL"])
@pytest.mark.parametrize("create", [True, False])
def test_a_database_of_another_program_is_refused_and_left_alone(
    path, folder_print, journal, create
):
    make_foreign(path, journal)
    before = folder_print(path.parent)
    assert "another program" in refusal(path, create=create)
    assert folder_print(path.parent) == before


def test_a_database_that_another_program_has_open_is_left_alone(path, folder_print):
    make_foreign(path, "WAL")
    connection = sqlite3.connect(path)
    connection.execute("INSERT INTO plan VALUES ('open')")
    connection.commit()
    before = folder_print(path.parent)
    assert set(before) == {"plan.db", "plan.db-wal", "plan.db-shm"}
    refusal(path)
    after = folder_print(path.parent)
    assert (after["plan.db"], after["plan.db-wal"]) == (before["plan.db"], before["plan.db-wal"])
    assert connection.execute("SELECT count(*) FROM plan").fetchone() == (2,)
    connection.close()


def test_a_database_of_another_program_is_refused_by_url_too(path, folder_print):
    make_foreign(path)
    before = folder_print(path.parent)
    assert "another program" in refusal(f"sqlite:///{path}")
    assert folder_print(path.parent) == before


@pytest.mark.parametrize(
    "content", [b"not a database, only text\n" * 400, b"\0" * 8192, b"x", b"SQLite format 3\0"]
)
def test_a_file_that_is_no_database_is_refused_and_left_alone(path, folder_print, content):
    path.write_bytes(content)
    before = folder_print(path.parent)
    refusal(path)
    assert folder_print(path.parent) == before


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_truncated_database_is_refused_and_left_alone(path, folder_print, share):
    make_ours(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    before = folder_print(path.parent)
    refusal(path)
    assert folder_print(path.parent) == before


def test_a_database_of_a_newer_schema_is_refused_and_left_alone(path, folder_print):
    make_ours(path, revision="9999")
    before = folder_print(path.parent)
    message = refusal(path)
    assert "9999" in message and "upgrade autoquant" in message
    assert folder_print(path.parent) == before


def test_a_folder_is_refused(tmp_path):
    assert "is a folder" in refusal(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_whose_folder_is_missing_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "missing" / "plan.db")
    assert list(tmp_path.iterdir()) == []


def test_a_new_database_in_a_read_only_folder_is_refused(tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    folder.chmod(0o555)
    assert "cannot write" in refusal(folder / "plan.db")
    assert list(folder.iterdir()) == []


def test_a_database_in_a_read_only_folder_is_refused_and_left_alone(tmp_path, folder_print):
    folder = tmp_path / "read-only"
    folder.mkdir()
    make_ours(folder / "plan.db")
    folder.chmod(0o555)
    before = folder_print(folder)
    assert "read-only" in refusal(folder / "plan.db")
    assert folder_print(folder) == before
    folder.chmod(0o755)


def test_a_read_only_database_is_refused_and_left_alone(path, folder_print):
    make_ours(path)
    path.chmod(0o444)
    before = folder_print(path.parent)
    assert "read-only" in refusal(path)
    assert folder_print(path.parent) == before


def test_a_read_only_database_is_read_and_what_would_write_is_refused(path, folder_print):
    store = open_store(path)
    fill(store)
    store.close()
    path.chmod(0o444)
    before = folder_print(path.parent)
    study = Study.open(path)
    assert study.study_id == STUDY and study.plans() == []
    with pytest.raises(StoreError, match=r"cannot write to .* \(read-only\)"):
        study.store.put_reference(STUDY, "note", {})
    study.store.close()
    assert folder_print(path.parent) == before


def test_a_path_with_odd_characters_is_a_path(tmp_path):
    odd = tmp_path / "pl an?#%20ä.db"
    make_ours(odd)
    assert [entry.name for entry in tmp_path.iterdir()] == [odd.name]
    assert len(open_store(odd, create=False).plans("5tudy001")) == 40


def test_a_url_opens_the_same_database(path):
    make_ours(path)
    store = open_store(f"sqlite:///{path}", create=False)
    assert len(store.plans("5tudy001")) == 40
    store.close()


@pytest.mark.parametrize(
    "address",
    [
        "http://me:secret@example.com/plan.db",
        "://secret@",
        "sqlite+nosuch:///plan.db",
        "oracle+nosuch://me:secret@host/plans",
        "postgresql+asyncpg://me:secret@host:port/plans",
        "sqlite://[",
    ],
)
def test_a_url_that_no_driver_opens_is_refused_without_its_password(address):
    said = refusal(address)
    assert "give the path of a file, or the URL of a database" in said
    assert "secret" not in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "address", [":memory:", "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite+pysqlite://"]
)
def test_a_database_that_ends_with_the_command_is_refused(address):
    assert "plan.db" in refusal(address)
    assert "forgets" in refusal(address, create=False)


def test_a_missing_database_by_url_stays_missing_where_none_is_to_be_made(path):
    refusal(f"sqlite:///{path}", create=False)
    assert list(path.parent.iterdir()) == []


def test_a_schema_whose_names_are_no_text_is_damage(tmp_path):
    path = tmp_path / "plan.db"
    open_store(path).close()
    whole = path.read_bytes()
    broken = whole.replace(b"tabledevicedevice", b"table\xf4evicedevice")
    path.write_bytes(broken.replace(b"CREATE TABLE device", b"CREATE TABXE device"))
    with pytest.raises(StoreError, match="bytes that are no text"):
        open_store(path)
