"""`--recipe` and `--save-recipe`: read options from a file, and write them to one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoquant.cli.output import check_place, echo
from autoquant.cli.trust import FLAGS, NAMES, suggest, withdraw
from autoquant.errors import option_words
from autoquant.files import write_file

if TYPE_CHECKING:
    from autoquant.recipes import Recipe, Value

_NEVER_TAKEN = ("json", "recipe", "save-recipe", "trust-pickle", "trust-remote-code")
_PATHS = ("model", "eval-text", "tokenizer")
_INSTEAD = {"fusable": 'for = "vllm"'}
"""What to write in place of options that earlier versions had."""


def take_recipe(context: typer.Context, asked: str | None) -> str | None:
    """Make a recipe's options the defaults of this call, before other options are read.

    Raises:
        RecipeError: There is no such recipe, or the command does not take one of its options.
    """
    if asked is not None:
        from autoquant.recipes import find_recipe

        context.default_map = recipe_defaults(find_recipe(asked), context.command, context)
    return asked


RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="Take options from a recipe (see `autoquant recipes`); those given here win.",
        show_default=False,
        callback=take_recipe,
        is_eager=True,
    ),
]
SaveRecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--save-recipe",
        metavar="FILE",
        help="Write all options of this search into a recipe.",
        show_default=False,
    ),
]


def recipe_defaults(recipe: Recipe, command: Any, context: typer.Context) -> dict[str, Any]:
    """Return a recipe's values by parameter, as the command line would give them.

    Code that the recipe names is only a suggestion, see `check_suggested`.

    Raises:
        RecipeError: The command does not take an option or its value; the message names both.
    """
    known = {_key(parameter): parameter for parameter in command.params}
    defaults = {}
    for key, value in recipe.options.items():
        parameter = _parameter(recipe, key, known)
        checked = _checked(recipe, key, value, parameter, context)
        if parameter.name in NAMES:
            suggest(context, parameter.name, checked)
        else:
            defaults[parameter.name] = checked
    return defaults


def command_line_wins(context: typer.Context, *names: str) -> list[Any]:
    """Return the values of parameters that exclude one another.

    If the command line gives one of them, the recipe's are dropped.
    """
    given = [name for name in names if _is_given(context, name)]
    for name in names:
        if given and name not in given:
            context.params[name] = None
            withdraw(context, name)
    return [context.params[name] for name in names]


def check_save(path: Path | None) -> None:
    """Refuse a recipe that could not be written, before the search."""
    if path is None:
        return
    from autoquant.recipes import SUFFIX

    if path.suffix != SUFFIX:
        raise typer.BadParameter(f"{path} must end in {SUFFIX}", param_hint="--save-recipe")
    check_place(path)


def save_recipe(context: typer.Context, path: Path) -> None:
    """Write every option of this call that has a value, defaults included.

    `--recipe` replays it from any folder of the machine.
    """
    from autoquant.recipes import written

    options = configuration(context)
    write_file(path, written(f"Saved from a search of {options['model']}", options).encode())
    echo(f"wrote {path}", err=True)
    named = [(name, context.params[name]) for name in (*FLAGS, *NAMES) if context.params[name]]
    if named:
        again = " ".join(option_words(*each) for each in named)
        echo(f"note: {path} cannot allow code to run: say {again} again with each replay", err=True)


def configuration(context: typer.Context) -> dict[str, Value]:
    """Return every option of this call that has a value, by its name without dashes."""
    from autoquant.evaluators.data import DataName
    from autoquant.store.addresses import without_passwords

    found: dict[str, Value] = {}
    for parameter in context.command.params:
        key, value = _key(parameter), context.params.get(parameter.name or "")
        if value in (None, [], ()) or key in _NEVER_TAKEN:
            continue
        if key == "eval-data":
            value = DataName.parse(value).absolute()
        elif key == "db":
            value = without_passwords(value)
        elif key in _PATHS and Path(value).exists():
            value = str(Path(value).resolve())
        found[key] = [str(part) for part in value] if isinstance(value, (list, tuple)) else value
    return found


def _key(parameter: Any) -> str:
    """Return a parameter's name in a recipe: its option's name without dashes."""
    return str(parameter.opts[0]).removeprefix("--")


def _parameter(recipe: Recipe, key: str, known: Mapping[str, Any]) -> Any:
    from difflib import get_close_matches

    from autoquant.errors import RecipeError

    if key in _NEVER_TAKEN:
        raise RecipeError(
            f"{recipe.path}: {key} is not taken from a recipe, give --{key} on the command line"
        )
    if key in _INSTEAD:
        raise RecipeError(f"{recipe.path}: there is no {key} any more: write {_INSTEAD[key]}")
    if key not in known:
        close = [name for name in known if name.startswith(key)] or get_close_matches(key, known, 1)
        meant = f"did you mean {close[0]}?" if close else "`autoquant search --help` lists them"
        raise RecipeError(f"{recipe.path}: a search has no option {key!r}; {meant}")
    return known[key]


def _checked(recipe: Recipe, key: str, value: Value, parameter: Any, context: typer.Context) -> Any:
    """Return a value that the parameter takes.

    A flag needs a bool and a repeatable option a list; anything else is read like text.
    """
    from autoquant.errors import RecipeError

    flag, many = (
        bool(getattr(parameter, "is_flag", False)),
        bool(getattr(parameter, "multiple", False)),
    )
    wanted = "true or false" if flag else "a list of texts" if many else "one text or number"
    if isinstance(value, bool) != flag or isinstance(value, list) != many:
        raise RecipeError(f"{recipe.path}: {key} must be {wanted}")
    plain = value if flag or many else str(value)
    try:
        parameter.process_value(context, plain)
    except Exception as error:
        if (message := getattr(error, "message", None)) is None:
            raise
        raise RecipeError(f"{recipe.path}: {key}: {message}") from error
    return plain


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
