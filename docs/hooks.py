"""Make pages while the others are built, from what already says the same elsewhere.

The reference of the commands comes from the commands themselves. The contributing page and the
changelog are files in the repository's root, where readers of the repository look for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGE = "reference/commands.md"
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages, with the files of the repository's root that they show."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages that are not files of `docs/`; MkDocs calls this by its name."""
    files.append(File.generated(config, PAGE, content=commands_page()))
    for page, name in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=root_page(name)))
    return files


def root_page(name: str) -> str:
    """Return a file of the root, with links as they must be inside `docs/`."""
    text = (ROOT / name).read_text().replace("](docs/", "](")
    for page, file in ROOT_PAGES.items():
        text = text.replace(f"]({file}", f"]({page}")
    return text


def commands_page() -> str:
    """Every command with its arguments and options, as Markdown."""
    import typer

    from autoquant.cli.main import app

    group: Any = typer.main.get_command(app)
    parts = ["# Commands", group.help, *_parameters(group, "autoquant")]
    for name, command in sorted(group.commands.items()):
        parts += [
            f"## autoquant {name}",
            *_paragraphs(command.help),
            *_parameters(command, f"autoquant {name}"),
        ]
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        yield " ".join(paragraph.split())


def _parameters(command: Any, path: str) -> Iterator[str]:
    context = command.make_context(path, [], resilient_parsing=True)
    yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```"
    rows = [
        row
        for row in (parameter.get_help_record(context) for parameter in command.get_params(context))
        if row
    ]
    if rows:
        yield "\n".join(["| option | meaning |", "| --- | --- |", *(_row(*row) for row in rows)])


def _row(name: str, meaning: str) -> str:
    return f"| `{_cell(name)}` | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
