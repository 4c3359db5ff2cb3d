"""The pages are built without a warning and without a network, and the reference has what the code
has.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import typer

import autoquant
from autoquant.cli.main import app

from .pages import ROOT

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
pytestmark = pytest.mark.processes
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that the pages were built into."""
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "http_proxy": NOWHERE, "https_proxy": NOWHERE},
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_every_command_and_option_is_in_the_reference(site):
    page = (site / "reference/commands.html").read_text()
    for name, command in typer.main.get_command(app).commands.items():
        assert f'id="autoquant-{name}"' in page
        options = [each.opts[0] for each in command.params if each.param_type_name == "option"]
        assert [option for option in options if option not in page] == []


def test_every_public_name_is_in_the_reference(site):
    page = (site / "reference/python.html").read_text()
    assert [
        name for name in autoquant.__all__ if not re.search(rf'id="autoquant[\w.]*\.{name}"', page)
    ] == []


def test_pages_load_nothing_from_elsewhere(site):
    loading = re.compile(
        r'<(?:script|img|iframe)[^>]+src="https?://'
        r'|<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+https?://'
    )
    assert [page.name for page in site.rglob("*.html") if loading.search(page.read_text())] == []
