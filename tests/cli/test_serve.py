"""`autoquant serve`: really started, asked on loopback, and stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from functools import partial
from importlib.util import find_spec

import pytest
from end_to_end.applied import save_both
from typer.testing import CliRunner

from autoquant.cli import serve
from autoquant.cli.main import app

pytestmark = pytest.mark.processes
ABSENT = [name for name in serve._NEEDED if find_spec(name) is None]
needs_server = pytest.mark.skipif(
    bool(ABSENT), reason=f"{', '.join(ABSENT)} not installed: pip install 'autoquant[serve]'"
)
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(folder of the unquantized model, folder of the quantized one)."""
    return save_both(tmp_path_factory.mktemp("both"))


@pytest.fixture
def port():
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


class Served:
    """A server in a process of its own, that has said that it is ready."""

    def __init__(self, folder, port, errors):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "AUTOQUANT_EAGER": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "autoquant.cli.main", "serve", str(folder), "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            # A runner in the background ignores Ctrl-C, and so would its children.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        self.url = f"http://127.0.0.1:{port}"
        self.ready, self.example = self.process.stdout.readline(), self.process.stdout.readline()

    def ask(self, path, **body):
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        with OPENER.open(request, timeout=60) as answer:
            return json.loads(answer.read())

    def stop(self, how=signal.SIGINT):
        self.process.send_signal(how)
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture(scope="module")
def served(both, tmp_path_factory):
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "stderr"
    with log.open("w") as errors:
        server = Served(both[1], port, errors)
        server.log = log
        yield server
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)


@needs_server
def test_it_says_when_it_answers_and_how_to_ask(served, both):
    assert served.ready.startswith(f"ready at {served.url}/v1 after "), served.log.read_text()
    assert (
        served.example.startswith(f"try: curl {served.url}/v1/chat/completions ")
        and str(both[1]) in served.example
    )
    said = served.log.read_text()
    assert "load: quantized model on cpu in" in said and "prepare: the first answer took" in said


@needs_server
def test_the_example_that_it_prints_is_answered(served):
    command = [
        "bash",
        "-c",
        "curl() { printf '%s' \"${!#}\"; }; " + served.example.removeprefix("try: "),
    ]
    body = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (
        served.ask("/v1/chat/completions", **body)["choices"][0]["message"]["role"] == "assistant"
    )


@needs_server
def test_it_answers_as_openai_does(served, both):
    name = str(both[1])
    answer = served.ask("/v1/completions", model=name, prompt="w1 w2", max_tokens=5, temperature=0)
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}
    assert len(answer["choices"][0]["text"].split()) == 5
    assert [model["id"] for model in served.ask("/v1/models")["data"]] == [name]


@needs_server
@pytest.mark.parametrize("path", ["/load_model", "/reset"])
def test_no_client_loads_another_model_or_drops_this_one(served, path):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        served.ask(path, model="somebody/else")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        served.ask("/v1/completions", model="somebody/else", prompt="w1")


@needs_server
def test_a_port_that_is_taken_is_said_before_anything_is_loaded(served, both):
    result = CliRunner().invoke(
        app, ["serve", str(both[1]), "--port", served.url.rpartition(":")[2]]
    )
    assert result.exit_code == 2
    assert (
        "cannot listen at 127.0.0.1:" in result.stderr and "choose another --port" in result.stderr
    )


@needs_server
def test_ctrl_c_stops_it_without_a_complaint(served):
    assert served.stop() == 0
    said = served.log.read_text()
    assert "stopping" in said and "Traceback" not in said
    with pytest.raises(urllib.error.URLError):
        served.ask("/health")


@pytest.mark.slow
@needs_server
def test_an_unquantized_model_is_served_and_prepared_too(both, port, tmp_path):
    with (tmp_path / "stderr").open("w") as errors:
        server = Served(both[0], port, errors)
    assert server.ready.startswith("ready at "), (tmp_path / "stderr").read_text()
    assert server.stop(signal.SIGTERM) == 0


def test_what_is_not_installed_is_one_line_with_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(
        serve, "find_spec", lambda name: None if name in ("fastapi", "uvicorn") else name
    )
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    assert (
        result.stderr
        == "error: serving needs fastapi, uvicorn: install with pip install 'autoquant[serve]'\n"
    )


@needs_server
def test_a_folder_without_a_model_is_refused(tmp_path, port):
    result = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", str(port)])
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path} holds no model (no config.json)\n"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80/v1"),
        ("0.0.0.0", "http://127.0.0.1:80/v1"),
        ("::1", "http://[::1]:80/v1"),
    ],
)
def test_the_address_that_is_shown_can_be_asked(host, url):
    assert serve._url(host, 80) == url
