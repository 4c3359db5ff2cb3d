"""`autoquant recipes`: list what `autoquant search --recipe` knows by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from autoquant.cli.output import JsonFlag, echo, print_json, print_table
from autoquant.cli.recipe_option import recipe_defaults

if TYPE_CHECKING:
    from autoquant.report.tables.recipes import RecipeRow


def recipes(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List the recipes that come with autoquant, and your own.

    Yours are in ~/.config/autoquant/recipes, or in $AUTOQUANT_RECIPES.
    """
    from autoquant.report.tables.recipes import recipes_objects, recipes_table

    rows = _rows(context)
    if as_json:
        print_json(recipes_objects(rows))
        return
    print_table(lambda _width: recipes_table(rows))
    echo("\nUse one with `autoquant search MODEL --recipe NAME`; options given beside it win.")


def _rows(context: typer.Context) -> list[RecipeRow]:
    from autoquant.errors import RecipeError
    from autoquant.recipes import read_recipe, recipe_files
    from autoquant.report.tables.recipes import RecipeRow

    assert context.parent is not None  # the group that this command is of
    group: Any = context.parent.command
    rows = []
    for name, path in recipe_files().items():
        try:
            recipe = read_recipe(path)
            recipe_defaults(recipe, group.commands["search"], context)
            rows.append(RecipeRow(name=name, path=path, recipe=recipe))
        except RecipeError as error:
            rows.append(RecipeRow(name=name, path=path, problem=str(error)))
    return rows
