"""Recipes: options of a search under a name, in TOML, with a line that says what they are for.

A recipe is a file of options as they are called on the command line, without the dashes in front, and `about`:

    about = "Chat on an H200: one user, prompts of 2,048 tokens, answers of 256"
    workload = "prefill=2048,decode=256"
    max-ppl-increase = "1%"

Those in this folder come with the package; those in `user_folder()` are the user's own, and win where both have a name.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autoquant.errors import RecipeError
from autoquant.hints import did_you_mean

Value = str | int | float | bool | list[str]

FOLDER_VARIABLE = "AUTOQUANT_RECIPES"
SUFFIX = ".toml"
_SHIPPED = Path(__file__).parent
_ABOUT = "about"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What one file says.

    Attributes:
        about: What it is for, in one line; empty where the file does not say.
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
    """Where the user's own recipes lie: `$AUTOQUANT_RECIPES`, or `autoquant/recipes` under the user's configuration folder."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    return (
        Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "autoquant" / "recipes"
    )


def recipe_files() -> dict[str, Path]:
    """The files of all recipes that have a name, by name: the shipped ones, then the user's."""
    folders = (_SHIPPED, user_folder())
    return {path.stem: path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}"))}


def find_recipe(asked: str) -> Recipe:
    """The recipe of that name, or of the file at that path (what has a folder or ends in `.toml` is a path).

    Raises:
        RecipeError: There is none, or the file is not a recipe.
    """
    if Path(asked).suffix == SUFFIX or Path(asked).name != asked:
        return read_recipe(Path(asked))
    files = recipe_files()
    if asked not in files:
        raise RecipeError(
            f"no recipe {asked!r}{did_you_mean(asked, files)}: take one of {', '.join(files)}, or give the path of a .toml file"
        )
    return read_recipe(files[asked])


def read_recipe(path: Path) -> Recipe:
    """Read a file. Whether a search has such options is for the command line to say.

    Raises:
        RecipeError: It cannot be read, is not TOML, or has a value that no option takes.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise RecipeError(f"the recipe {path} is not TOML: {error}") from error
    about = content.pop(_ABOUT, "")
    if not isinstance(about, str):
        raise RecipeError(f"{path}: {_ABOUT} must be a line of text")
    for key, value in content.items():
        texts = value if isinstance(value, list) else [value]
        if not all(
            isinstance(text, str if isinstance(value, list) else str | int | float)
            for text in texts
        ):
            raise RecipeError(
                f"{path}: {key} must be a text, a number, true, false or a list of texts"
            )
    return Recipe(path=path, about=" ".join(about.split()), options=content)


def written(about: str, options: Mapping[str, Value]) -> str:
    """A recipe as TOML, which `read_recipe` reads back as it was."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in {_ABOUT: about, **options}.items())


def _toml(value: Value) -> str:
    """Of these types JSON is TOML, but for the one control character that JSON does not escape."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
