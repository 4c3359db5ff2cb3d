"""Makes, while the pages are built, the reference of the commands out of the commands themselves, so that it cannot go stale."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGE = "reference/commands.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs asks here for pages that are no files."""
    files.append(File.generated(config, PAGE, content=commands_page()))
    return files


def commands_page() -> str:
    """Every command with its arguments and options, as Markdown."""
    import typer

    from autoquant.cli.main import app

    group: Any = typer.main.get_command(app)
    parts = ["# Commands", group.help, *_parameters(group, "autoquant")]
    for name, command in sorted(group.commands.items()):
        parts += [f"## autoquant {name}", *_paragraphs(command.help), *_parameters(command, f"autoquant {name}")]
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        yield " ".join(paragraph.split())


def _parameters(command: Any, path: str) -> Iterator[str]:
    context = command.make_context(path, [], resilient_parsing=True)
    yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```"
    rows = [row for row in (parameter.get_help_record(context) for parameter in command.get_params(context)) if row]
    if rows:
        yield "\n".join(["| option | meaning |", "| --- | --- |", *(_row(*row) for row in rows)])


def _row(name: str, meaning: str) -> str:
    return f"| `{_cell(name)}` | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
