"""The `autoquant` command: every error is one line on stderr, with a traceback only for --debug.

Exit codes: 0 done, 1 an unexpected error, 2 an error that the user can fix, 130 interrupted,
141 the reader of a pipe left.
"""

from __future__ import annotations

import codecs
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from autoquant import logs
from autoquant.cli.apply import apply
from autoquant.cli.bench import bench
from autoquant.cli.candidates import candidates
from autoquant.cli.diff import diff
from autoquant.cli.doctor import doctor
from autoquant.cli.eval import evaluate
from autoquant.cli.export import export
from autoquant.cli.export_timings import export_timings
from autoquant.cli.generate import generate
from autoquant.cli.merge import merge
from autoquant.cli.output import echo
from autoquant.cli.pareto import pareto
from autoquant.cli.profile import profile
from autoquant.cli.recipes import recipes
from autoquant.cli.repair import repair
from autoquant.cli.report import report
from autoquant.cli.rm import rm
from autoquant.cli.search import search
from autoquant.cli.serve import serve
from autoquant.cli.show import show
from autoquant.cli.solve import solve
from autoquant.cli.studies import studies
from autoquant.errors import AutoquantError, DiskFullError
from autoquant.files import raise_if_full
from autoquant.report.visible import visible

DEBUG_VARIABLE = "AUTOQUANT_DEBUG"
_SPELLED = "autoquant.spelled"
_SPELLINGS = {
    "µ": "u",
    "\u00d7": "x",
    "≤": "<=",
    "≥": ">=",
    "±": "+-",
    "→": "->",
    "\u2013": "-",
    "…": "...",
}
_READER_LEFT = 141
_DEBUG_OPTION = "--debug"
_VERBOSE_OPTION = "--verbose"


class OneLineErrors(TyperGroup):
    """A group that reports every error in one line.

    It accepts --debug and --verbose anywhere on the command line.
    """

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        debug = wants_debug(given)
        logging_or_not = logs.on_stderr(visible) if _VERBOSE_OPTION in given else nullcontext()
        given = [argument for argument in given if argument not in (_DEBUG_OPTION, _VERBOSE_OPTION)]
        options["standalone_mode"] = False
        try:
            with logging_or_not:
                result = super().main(given, *positional, **options)
            sys.stdout.flush()
        except BrokenPipeError:
            _drop_output()
            sys.exit(_READER_LEFT)
        except SystemExit as ended:  # typer ends with 1 where a pipe broke
            if isinstance(ended.__context__, BrokenPipeError):
                _drop_output()
                sys.exit(_READER_LEFT)
            raise
        except (KeyboardInterrupt, typer.Abort):
            sys.exit(130)
        except Exception as error:  # noqa: BLE001 - the outermost boundary: nothing may end in a raw traceback
            if debug:
                echo("".join(traceback.format_exception(error)), err=True, nl=False)
            message, code = describe(error)
            with suppress(OSError):  # a log on a full disk
                echo(f"error: {message}", err=True)
            try:
                sys.stdout.flush()
            except OSError:
                _drop_output()
            sys.exit(code)
        sys.exit(result if isinstance(result, int) else 0)


def wants_debug(arguments: Sequence[str]) -> bool:
    """Check whether the user asks for tracebacks and for warnings of libraries."""
    return _DEBUG_OPTION in arguments or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def _open_what_is_closed() -> None:
    """Give a process that was started without a standard stream one that leads nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - to the end


def describe(error: Exception) -> tuple[str, int]:
    """Return one line for the user, and the exit code."""
    try:
        raise_if_full(error)
    except DiskFullError as full:
        error = full
    if isinstance(error, AutoquantError):
        return _one_line(str(error)), 2
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)
        return f"a name is too long for the file system: {name[:60]}... ({len(name)} characters)", 2
    # click's errors, in whichever package typer keeps click
    usage = getattr(error, "format_message", None)
    if usage is not None:
        command = getattr(getattr(error, "ctx", None), "command_path", "autoquant")
        return f"{_one_line(usage()).rstrip('.')}; see `{command} --help`", 2
    first = next(iter(str(error).splitlines()), "").strip() or "no message"
    return (
        f"unexpected {type(error).__name__}: {first}; run again with --debug for the traceback",
        1,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _drop_output() -> None:
    """Discard what is still buffered, so that the interpreter can flush at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    cls=OneLineErrors,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(short_help="Search for the fastest plans of a model.")(search)
app.command(short_help="Solve a finished search for other limits, at once.")(solve)
app.command(short_help="Show the measured front of a search.")(pareto)
app.command(short_help="Show one plan layer by layer, with why.")(show)
app.command(short_help="Write everything about a search as one HTML page.")(report)
app.command(short_help="Show what changes between two plans, and what it buys.")(diff)
app.command(short_help="Write the quantized model to disk.")(apply)
app.command(short_help="Write the quantized model for an inference engine.")(export)
app.command(short_help="Write text with a model, and say how fast it came.")(generate)
app.command(short_help="Serve a model to OpenAI's clients.")(serve)
app.command(short_help="Time plans in the whole model, in turn.")(bench)
app.command("eval", short_help="Score plans on tasks of lm-evaluation-harness.")(evaluate)
app.command(short_help="List formats and kernels for a device.")(candidates)
app.command(short_help="Say what this machine can use, and what is wrong.")(doctor)
app.command(short_help="Time linears by every candidate, without a search.")(profile)
app.command(short_help="List the recipes that a search can take options from.")(recipes)
app.command(short_help="List the studies of a database.")(studies)
app.command(short_help="Remove a study; what was measured stays.")(rm)
app.command(short_help="Copy timings and losses of another database.")(merge)
app.command(short_help="Save what is whole of a damaged database.")(repair)
app.command(short_help="Print every timing of a database as CSV or JSON.")(export_timings)


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"autoquant {metadata.version('autoquant')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def autoquant(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    _debug: Annotated[
        bool, typer.Option(_DEBUG_OPTION, help=f"Show tracebacks (also with {DEBUG_VARIABLE}=1).")
    ] = False,
    _verbose: Annotated[
        bool, typer.Option(_VERBOSE_OPTION, help="Log each step on stderr.")
    ] = False,
) -> None:
    """Find how best to quantize each layer of a PyTorch model on this device.

    Speed and quality are measured.
    """
    if context.invoked_subcommand is None:
        echo(context.get_help())


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Spell characters that the terminal's encoding lacks: `?s` would not be read as `us`."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(_SPELLINGS.get(each, "?") for each in lacking), error.end


codecs.register_error(_SPELLED, _spelled)


def run() -> None:
    """Run the `autoquant` command."""
    _open_what_is_closed()
    if not wants_debug(sys.argv):
        logs.hide_warnings()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors=_SPELLED)  # type: ignore[union-attr]
    app(prog_name="autoquant")


if __name__ == "__main__":
    run()
