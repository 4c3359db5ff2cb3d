"""Recipes: named files of search options.

A recipe is a TOML file. It holds options of the command line, without the leading dashes, and
`about`, a line that says what they are for:

    about = "Chat on an H200: one user, prompts of 2,048 tokens, answers of 256"
    workload = "prefill=2048,decode=256"
    max-ppl-increase = "1%"

The recipes in this folder come with the package. Those in `user_folder()` are the user's own, and
win over shipped ones of the same name.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autoquant.errors import RecipeError, first_line
from autoquant.files import read_text
from autoquant.hints import did_you_mean

Value = str | int | float | bool | list[str]

FOLDER_VARIABLE = "AUTOQUANT_RECIPES"
SUFFIX = ".toml"
_SHIPPED = Path(__file__).parent
_ABOUT = "about"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The content of one file.

    Attributes:
        about: What the recipe is for, in one line, or an empty text.
        options: Values by the option's name on the command line, without its dashes.
    """

    path: Path
    about: str
    options: Mapping[str, Value]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def shipped(self) -> bool:
        """Whether it comes with the package."""
        return self.path.parent == _SHIPPED


def user_folder() -> Path:
    """Return the folder of the user's recipes.

    It is `$AUTOQUANT_RECIPES`, or `autoquant/recipes` in the user's configuration folder.
    """
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return configuration / "autoquant" / "recipes"


def recipe_files() -> dict[str, Path]:
    """Return the files of all recipes by name. The user's replace shipped ones."""
    folders = (_SHIPPED, user_folder())
    return {path.stem: path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}"))}


def find_recipe(asked: str) -> Recipe:
    """Return the recipe of a name, or the one in a file.

    Text with a folder, or with the ending `.toml`, is a path.

    Raises:
        RecipeError: The recipe does not exist, or the file is no recipe.
    """
    if Path(asked).suffix == SUFFIX or Path(asked).name != asked:
        return read_recipe(Path(asked))
    files = recipe_files()
    if asked not in files:
        raise RecipeError(
            f"no recipe {asked!r}{did_you_mean(asked, files)}: take one of {', '.join(files)}, or"
            " give the path of a .toml file"
        )
    return read_recipe(files[asked])


def read_recipe(path: Path) -> Recipe:
    """Read a file. The command line checks whether a search has such options.

    Raises:
        RecipeError: The file cannot be read, is not TOML, or has a value that no option takes.
    """
    try:
        content = tomllib.loads(read_text(path))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        raise RecipeError(f"the recipe {path} is not TOML: {first_line(error)}") from error
    about = content.pop(_ABOUT, "")
    if not isinstance(about, str):
        raise RecipeError(f"{path}: {_ABOUT} must be a line of text")
    for key, value in content.items():
        if not _is_value(value):
            raise RecipeError(
                f"{path}: {key} must be a text, a number, true, false or a list of texts"
            )
    return Recipe(path=path, about=" ".join(about.split()), options=content)


def _is_value(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(text, str) for text in value)
    return isinstance(value, str | int | float)


def written(about: str, options: Mapping[str, Value]) -> str:
    """Return a recipe as TOML that `read_recipe` can read."""
    content = {_ABOUT: about, **options}
    return "".join(f"{key} = {_toml(value)}\n" for key, value in content.items())


def _toml(value: Value) -> str:
    """Return a value as TOML. For these types that is JSON, except for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
