"""Addresses of databases, with passwords wherever a user may have put them."""

from types import SimpleNamespace

import pytest

from autoquant.cli.recipe_option import configuration
from autoquant.errors import StoreError
from autoquant.store import open_store
from autoquant.store.addresses import shown_address, without_passwords
from autoquant.store.connect import check_address

DEAD = "127.0.0.1:9"  # nothing listens on this port


def said_of(address):
    with pytest.raises(StoreError) as error:
        open_store(address)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "address",
    [
        f"postgresql://{DEAD}/db?user=me&password=s3cret",
        f"postgresql://me:s3cret@{DEAD}/db?sslpassword=s3cret",
        f"postgresql://me:a/s3cret@{DEAD}/db",
        f"postgresql://me:a%40s3cret@{DEAD}/db",
        f"postgresql://me:a#b?s3cret@{DEAD}/db",
        f"postgresql+nosuch://me:a/s3cret@{DEAD}/db",
        f"postgresql://me@work:s3cret@{DEAD}/db",
        f"postgresql://me:a@s3cret/b@{DEAD}/db",
        "postgresql://me:s3cret@localhost:port/db",
        "postgresql://me:s3cret",
        "postgresql:/me:s3cret@localhost/db",
        "host=localhost password=s3cret",
        "postgresql:///db?host=/nowhere&password=s3cret&nosuch=1",
    ],
)
def test_a_refused_address_shows_no_password(address):
    assert "s3cret" not in said_of(address)


@pytest.mark.parametrize("address", ["postgresql://me:a@b/c@host/db", "postgresql:/me@host/db"])
def test_an_address_that_nobody_can_tell_apart_is_refused_before_anything_connects(address):
    with pytest.raises(StoreError, match="the URL of a database, e"):
        check_address(address)


def test_what_is_shown_names_the_database_and_what_is_kept_connects_by_a_password_file():
    address = "postgresql://me:a/b@host:1/db?password=c&sslmode=require"
    assert shown_address(address) == "postgresql://me:***@host:1/db?password=***&sslmode=require"
    assert without_passwords("postgresql://me:a/b@host:1/db") == "postgresql://me@host:1/db"
    for plain in ("plans/plan.db", "postgresql://me@host:1/db", "sqlite:////a/plan.db"):
        assert shown_address(plain) == without_passwords(plain) == plain


def test_a_path_with_odd_characters_is_no_url(tmp_path):
    for name in ("a@b@c.db", "a=b.db", "postgres.db"):
        check_address(tmp_path / name)
        check_address(f"sqlite:///{tmp_path / name}")


def test_the_command_that_is_kept_holds_no_password():
    db = SimpleNamespace(name="db", opts=["--db"])
    context = SimpleNamespace(
        command=SimpleNamespace(params=[db]), params={"db": "postgresql://me:s3cret@host/db"}
    )
    assert configuration(context) == {"db": "postgresql://me@host/db"}
