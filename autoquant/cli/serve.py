"""`autoquant serve`: transformers' own OpenAI-compatible server, with one model."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from autoquant.events import Listener

_NEEDED = ("accelerate", "fastapi", "openai", "pydantic", "uvicorn")
_STARTING_S = 60.0
_WARMING_TOKENS = 8  # enough for compiling, for capturing, and for replaying what was captured
_POLL_S = 0.05


def serve(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder that `autoquant apply` wrote, or an unquantized model.", show_default=False
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Port to listen at.")] = 8000,
    device: Annotated[str, typer.Option(help="auto (where the plan was made, else the best) or a device.")] = "auto",
) -> None:
    """Serve the model of DIR to OpenAI's clients with transformers' own server, until Ctrl-C.

    It answers /v1/chat/completions, /v1/completions and /v1/responses, by one model only; its name is DIR as typed here.
    """
    from autoquant.errors import AutoquantError, ModelError

    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise AutoquantError(f"serving needs {', '.join(missing)}: install with pip install 'autoquant[serve]'")
    _check_free(host, port)
    from autoquant import generation
    from autoquant.report.progress import listening

    if problems := generation.problems_of(folder):
        raise ModelError("; ".join(problems))
    if "@" in str(folder):
        raise ModelError(f"transformers takes what follows @ in {folder} for a revision: give another path to it")
    place = generation.device_of(folder, device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.perf_counter()
    server: Any = None
    try:
        with listening() as listener:
            server = _start(folder, place, host, port, listener)
        name, address = str(folder), _address(host, port)
        typer.echo(f"ready at {address} after {time.perf_counter() - started:.1f} s; Ctrl-C stops it")
        typer.echo(f"try: {_example(address, name, chat=bool(generation.tokenizer_of(folder).chat_template))}")
        while not server.server.should_exit:
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        typer.echo("stopping", err=True)
    finally:
        if server is not None:
            server.kill_server()
