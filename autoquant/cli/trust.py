"""Options that name code to run, and the one question about code that no option names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from autoquant.cli.output import confirmed, echo
from autoquant.errors import TrustError, option_words

if TYPE_CHECKING:
    import typer

Result = TypeVar("Result")
FLAGS = ("trust_pickle", "trust_remote_code")
NAMES = ("model_factory", "sample_inputs", "quality")
_SUGGESTED = "autoquant.suggested code"


def trusting(run: Callable[..., Result], **given: Any) -> Result:
    """Call `run` with the options that name code.

    If it needs more than they name, and a person is there, ask once, and call it again.

    Raises:
        TrustError: Code is needed that the user neither named nor confirmed.
    """
    try:
        return run(**given)
    except TrustError as error:
        if not error.options or not _allowed(error):
            raise
        allowed = error.options
    return run(**{**given, **allowed})


def _allowed(error: TrustError) -> bool:
    """Ask the person at the terminal, if there is one."""
    if not at_terminal():
        return False
    echo("This command would run code that you did not name:", err=True)
    for line in error.runs:
        echo(f"  {line}", err=True)
    return confirmed("Run it?")


def at_terminal() -> bool:
    """Check whether a person can answer: input and output are a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def suggest(context: typer.Context, keyword: str, value: Any) -> None:
    """Note code that a recipe names, for the error that repeats it. It is never used silently."""
    context.meta.setdefault(_SUGGESTED, {})[keyword] = value


def withdraw(context: typer.Context, keyword: str) -> None:
    """Forget what a recipe suggests for an option that another one replaces."""
    context.meta.get(_SUGGESTED, {}).pop(keyword, None)


def check_suggested(context: typer.Context, **given: Any) -> None:
    """Refuse to go on if a recipe names code that the user did not name in this command.

    Raises:
        TrustError: It does. All of it is in the message.
    """
    missing = {
        name: value
        for name, value in context.meta.get(_SUGGESTED, {}).items()
        if given.get(name) is None
    }
    if missing:
        options = " ".join(option_words(name, value) for name, value in missing.items())
        raise TrustError(
            "the recipe names code, which runs only if you name it in this command: add"
            f" {options} if you trust its author, or leave the recipe out",
            options=missing,
            runs=[
                f"{option_words(name, value)}, which the recipe names"
                for name, value in missing.items()
            ],
        )


def options_again(source: Mapping[str, Any]) -> str:
    """Return what a command that loads this model again must be given, to follow it.

    Args:
        source: The source of a searched model, as the store keeps it.
    """
    kept = ("trust_pickle", "trust_remote_code", "model_factory", "sample_inputs")
    return "".join(f" {option_words(name, source[name])}" for name in kept if source.get(name))
