"""The named recipes as a table and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from autoquant.recipes import Recipe, Value
from autoquant.report.tables.layout import plain_table


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeRow:
    """One file: its recipe, or the problem that keeps it from being used."""

    name: str
    path: Path
    recipe: Recipe | None = None
    problem: str = ""


def recipes_table(rows: Sequence[RecipeRow]) -> Table:
    """Return a table of recipes, their purpose and their options."""
    table = plain_table()
    table.add_column("Recipe", no_wrap=True)
    table.add_column("What it is for, and its options", overflow="fold", ratio=1)
    for row in rows:
        table.add_row(Text(row.name), _words(row), end_section=True)
    return table


def recipes_objects(rows: Sequence[RecipeRow]) -> list[dict[str, Any]]:
    """Return the recipes as JSON objects. `problem` is null if a recipe can be used."""
    return [
        {
            "name": row.name,
            "about": row.recipe.about if row.recipe else None,
            "options": dict(row.recipe.options) if row.recipe else None,
            "path": str(row.path),
            "shipped": row.recipe.shipped if row.recipe else False,
            "problem": row.problem or None,
        }
        for row in rows
    ]


def arguments(options: Mapping[str, Value]) -> list[str]:
    """Return options as arguments of the command line."""
    found = []
    for key, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool):
                found.append(f"--{'' if one else 'no-'}{key}")
            else:
                found += [str(one)] if key == "model" else [f"--{key}", str(one)]
    return found


def _words(row: RecipeRow) -> Text:
    if row.recipe is None:
        return Text(f"cannot be used: {row.problem}", style="dim")
    text = Text(row.recipe.about or "(does not say)")
    text.append(f"\n{shlex.join(arguments(row.recipe.options))}", style="dim")
    if not row.recipe.shipped:
        text.append(f"\n{row.path}", style="dim")
    return text
