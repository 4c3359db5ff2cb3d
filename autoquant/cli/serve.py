"""`autoquant serve`: run transformers' OpenAI-compatible server with one model."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import time
import urllib.error
import urllib.request
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoquant.cli.options import FolderArgument, FolderDeviceOption, TrustRemoteCodeOption
from autoquant.cli.output import echo
from autoquant.cli.trust import trusting

if TYPE_CHECKING:
    from autoquant.events import Listener

_NEEDED = ("accelerate", "fastapi", "openai", "pydantic", "uvicorn")
_STARTING_S = 60.0
_WARMING_TOKENS = 8  # enough for compiling, for capturing, and for replaying what was captured
_POLL_S = 0.05


def serve(
    folder: FolderArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=65535, metavar="N", help="Port to listen at.")
    ] = 8000,
    device: FolderDeviceOption = "auto",
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Serve the model of DIR to OpenAI's clients with transformers' own server, until Ctrl-C.

    It answers /v1/chat/completions, /v1/completions and /v1/responses, with this model only. The
    model's name is DIR as typed here.
    """
    from autoquant.errors import AutoquantError, ModelError

    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise AutoquantError(
            f"serving needs {', '.join(missing)}: install with pip install 'autoquant[serve]'"
        )
    _check_free(host, port)
    from autoquant import prompting
    from autoquant.report.progress import listening

    if problems := prompting.problems_of(folder):
        raise ModelError("; ".join(problems))
    if "@" in str(folder):
        raise ModelError(
            f"transformers takes what follows @ in {folder} for a revision: give another path to it"
        )
    place = prompting.device_of(folder, device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.perf_counter()
    server: Any = None
    try:
        with listening() as listener:
            server, talks = trusting(
                partial(_load, folder, place, host, port, listener),
                trust_remote_code=trust_remote_code,
            )
            _warm_up(server, _url(host, port), listener)
        echo(
            f"ready at {_url(host, port)} after {time.perf_counter() - started:.1f} s;"
            " Ctrl-C stops it"
        )
        echo(f"try: {_example(_url(host, port), folder, talks)}")
        while not server.server.should_exit:
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        echo("stopping", err=True)
    finally:
        if server is not None:
            server.kill_server()


def _check_free(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before anything is loaded."""
    from autoquant.errors import AutoquantError

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except OSError as error:
        raise AutoquantError(
            f"cannot listen at {host}:{port} ({error.strerror}): choose another --port or --host"
        ) from error


def _load(
    folder: Path, device: str, host: str, port: int, listener: Listener, *, trust_remote_code: bool
) -> tuple[Any, bool]:
    """Return transformers' server, listening, with this model as its only one.

    Also return whether the model has a chat template.
    """
    from transformers.cli.serve import Serve

    from autoquant import prompting
    from autoquant.errors import ModelError, first_line
    from autoquant.events import StageFinished, StageStarted
    from autoquant.models.code import refuse_needed_code
    from autoquant.models.pretrained import check_served
    from autoquant.models.quiet import no_progress_bars, quiet

    check_served(folder, trust_remote_code=trust_remote_code)
    tokenizer = prompting.tokenizer_of(folder, trust_remote_code=trust_remote_code)
    listener(StageStarted("load", 1))
    before = time.perf_counter()
    try:
        with quiet(), no_progress_bars():
            server = Serve(
                force_model=str(folder),
                device=device,
                host=host,
                port=port,
                log_level="error",
                non_blocking=True,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:
        refuse_needed_code(folder, error, trust_remote_code)
        raise ModelError(f"transformers cannot serve {folder}: {first_line(error)}") from error
    _serve_only(server, folder)
    kind = "quantized" if prompting.is_quantized(folder) else "unquantized"
    listener(
        StageFinished("load", f"{kind} model on {device} in {time.perf_counter() - before:.1f} s")
    )
    return server, bool(tokenizer.chat_template)


def _serve_only(server: Any, folder: Path) -> None:
    """Make this model the only one, which cannot be dropped.

    An unquantized model is prepared, too.
    """
    from autoquant.runtime.prepare import prepare

    manager = server._model_manager
    for loaded in manager.loaded_models.values():
        prepare(loaded.model)
    listed = {
        "id": str(folder),
        "object": "model",
        "owned_by": "",
        "created": int(folder.stat().st_mtime),
    }
    manager.get_gen_models = lambda: [listed]
    routes = server.server.config.app.router.routes
    routes[:] = [route for route in routes if route.path not in ("/load_model", "/reset")]


def _warm_up(server: Any, url: str, listener: Listener) -> None:
    """Wait until the server has answered a request: the first may compile and tune."""
    from autoquant.errors import AutoquantError
    from autoquant.events import StageFinished, StageStarted
    from autoquant.models.quiet import quiet

    listener(StageStarted("prepare", 1))
    before = time.perf_counter()
    with quiet():
        while not server.server.started:
            if time.perf_counter() - before > _STARTING_S:
                raise AutoquantError(
                    f"the server did not start at {url} within {_STARTING_S:.0f} s; try another"
                    " --port"
                )
            time.sleep(_POLL_S)
        body = json.dumps({"prompt": "Hello", "max_tokens": _WARMING_TOKENS}).encode()
        request = urllib.request.Request(
            f"{url}/completions", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                request
            ) as answer:
                answer.read()
        except urllib.error.URLError as error:
            raise AutoquantError(f"the server does not answer at {url}: {error.reason}") from error
    listener(
        StageFinished("prepare", f"the first answer took {time.perf_counter() - before:.1f} s")
    )


def _url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{port}/v1"


def _example(url: str, folder: Path, talks: bool) -> str:
    """Return a request that this model can answer."""
    model = {"model": str(folder), "max_tokens": 64}
    kind, body = "completions", {**model, "prompt": "Once upon a time"}
    if talks:
        kind, body = (
            "chat/completions",
            {**model, "messages": [{"role": "user", "content": "Hello"}]},
        )
    return (
        f"curl {url}/{kind} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )
