"""Commands of autoquant in processes that can be killed, for the drivers beside this file.

A process is forked from one that has imported everything, and runs the command as its user would.
Two things differ. What it measures is replaced by numbers that depend on the subject alone, where
it is saved, so that two searches can be compared. And once a fact is saved, which is the earliest
moment at which a user may be told, the process writes it down in a file of its own.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

MARK = "AUTOQUANT_STUDY_RUN"
WORKLOAD = "prefill=8,decode=4"
# One kernel of each format: times that a process has measured rule no other one out.
CANDIDATES = {
    "cpu": ("int8-row/plain/int8pack-mm", "int4-g32/cpu-packed/int4pack-mm"),
    "cuda": ("int8-row/plain/dequantize-matmul", "float8-row/plain/dequantize-matmul"),
}
_WORDS = 127


@dataclass(frozen=True, kw_only=True)
class Run:
    """One command and its surroundings.

    Attributes:
        arguments: Of the `autoquant` command.
        folder: Where it writes: the database, temporary files, its output.
        told: The file of facts that were saved.
        refine: Refinement is not left out.
    """

    arguments: tuple[str, ...]
    folder: Path
    told: Path
    in_process: bool = True
    compiled: bool = False
    refine: bool = False
    forked: bool = True

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    def environment(self) -> dict[str, str]:
        changed = {
            MARK: str(self.folder),
            "TMPDIR": str(self.temporary),
            "AUTOQUANT_CACHE": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "AUTOQUANT_IN_PROCESS": "1" if self.in_process else "",
            "AUTOQUANT_EAGER": "" if self.compiled else "1",
        }
        return {**os.environ, **changed}


def small_model(folder: Path) -> tuple[Path, Path]:
    """Save a language model of 50 thousand parameters and a text for it; return both."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(_WORDS)} | {"<unk>": _WORDS}
    rules = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=_WORDS + 1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = folder / "model"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>").save_pretrained(model)
    draw = random.Random(0)
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{draw.randrange(_WORDS)}" for _ in range(16 * 64)))
    return model, text


def search_command(
    model: Path, text: Path, db: Path, device: str = "cpu", more: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the arguments of a search, all of whose plans are proven."""
    globs = [part for glob in CANDIDATES[device] for part in ("--candidates", glob)]
    return (
        *("search", str(model), "--eval-text", str(text), "--db", str(db), "--device", device),
        *("--workload", WORKLOAD, "--time-budget", "10m", "--max-ppl-increase", "5%"),
        *globs,
        *more,
    )


def preload(run: Run) -> None:
    """Import what a run has imported, so that further ones need not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (run.folder / "modules").read_text().splitlines():
            if name not in sys.modules and not name.startswith(("torch", "__")):
                with suppress(Exception):
                    import_module(name)


def start(run: Run) -> int:
    """Start a run in a session of its own; return its process id."""
    run.temporary.mkdir(parents=True, exist_ok=True)
    if not run.forked:
        fields = json.dumps([*run.arguments])
        command = [sys.executable, __file__, fields, str(run.folder), str(run.told)]
        command += [str(int(run.refine))]
        with (run.folder / "output").open("ab") as output:
            process = subprocess.Popen(
                command,
                env=run.environment(),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return process.pid
    gc.freeze()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(run.environment())
        output = os.open(run.folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = _command(run.arguments, run.told, run.refine)
    except BaseException:  # noqa: BLE001 - a forked process must not go on as its parent
        traceback.print_exc()
    finally:
        os._exit(code)


def _command(arguments: Sequence[str], told: Path, refine: bool) -> int:
    """Run the command in this process; return its exit code."""
    import tempfile

    import torch

    from autoquant import logs
    from autoquant.cli.main import app

    tempfile.tempdir = None
    torch.set_num_threads(1)
    logs.hide_warnings()
    shorten(refine)
    tell_into(told)
    note_waits(told.with_name("waits"))
    try:
        app(list(arguments), prog_name="autoquant")
    except SystemExit as end:
        sys.stdout.flush()
        told.with_name("modules").write_text("\n".join(sys.modules))
        return end.code if isinstance(end.code, int) else 1
    return 0


def shorten(refine: bool) -> None:
    """Measure with the least effort, and without waiting for an idle machine."""
    from autoquant.devices import BACKENDS
    from autoquant.devices.base import Paces
    from autoquant.devices.effort import TimingEffort, use_timing_effort
    from autoquant.profiler import entrant
    from autoquant.solver import front
    from autoquant.tuner.stages import prove
    from autoquant.tuner.stages import refine as stage

    use_timing_effort(
        TimingEffort(
            highest_other_load=9.0,
            linear_rounds=2,
            sample_s=1e-4,
            request_rounds=1,
            fewest_request_rounds=1,
            request_calls=1,
            loop_rounds=3,
            loop_limit_s=0.1,
            largest_copy_bytes=1 << 20,
            largest_product=64,
        )
    )
    entrant.linears_a_call = lambda _rows: 1
    prove.LEAST_PLANS, prove.FRONT_PLANS = 3, 1
    front.LOSS_BUDGETS = 5
    for kind in BACKENDS:
        if os.environ.get("AUTOQUANT_EAGER"):  # nothing is compiled ahead, or for the delivery
            kind.prepares = kind.settles_routes = kind.replays_steps = False
        kind.paces = Paces(
            timing_s=0.01,
            score_s=1.0,
            proof_s=0.1,
            proof_linear_s=0.0,
            deliver_s=0.2,
            deliver_linear_s=0.0,
        )
    if not refine:
        stage.proposals = lambda *_arguments, **_options: iter(())


def tell_into(told: Path) -> None:
    """Save the same numbers in every search, and note what was saved in the file `told`."""
    from autoquant.store import Store

    number = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(table: str, put: Callable[..., Any]) -> Callable[..., Any]:
        def put_and_note(store: Store, *arguments: Any, **options: Any) -> Any:
            arguments = _same(table, store, arguments)
            result = put(store, *arguments, **options)
            for key in _keys(table, arguments):
                os.write(number, (json.dumps([table, *key]) + "\n").encode())
            return result

        return put_and_note

    for table in ("timings", "losses", "plan", "proof", "delivery", "roofline"):
        name = f"put_{table}"
        setattr(
            Store,
            name,
            noted(table.rstrip("s") if table != "losses" else "loss", getattr(Store, name)),
        )


def note_waits(file: Path) -> None:
    """Note in a file how long each transaction waited for the right to write, in seconds."""
    from autoquant.store import connect

    number = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    begin = connect._begin_sqlite

    def begin_and_note(connection: Any) -> None:
        started = time.monotonic()
        try:
            begin(connection)
        finally:
            if connection.get_execution_options().get("writes"):
                os.write(number, f"{time.monotonic() - started:.6f}\n".encode())

    connect._begin_sqlite = begin_and_note


def waits(run: Run) -> list[str]:
    """Return what `note_waits` noted of a worker's runs."""
    file = run.told.with_name("waits")
    return file.read_text().split() if file.exists() else []


def _same(table: str, store: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what to save, with measured times replaced by made-up ones."""
    from autoquant.records import Interval, Roofline, RunTimes

    if table == "timing":
        device, protocol, measurements = arguments
        return device, protocol, [_timed_alike(each) for each in measurements]
    if table == "roofline":
        limits = dict.fromkeys(arguments[1].flops_per_s, 1e11)
        return arguments[0], Roofline(bandwidth_bytes_per_s=1e10, flops_per_s=limits)
    if table == "proof" and arguments[1] is not None:
        plan_id, proof = arguments
        original = store.plan(plan_id).kind == "original"
        ratio = 1.0 if original else 0.3 + 0.5 * _draw(plan_id)
        before = dict.fromkeys(proof.original_phase_ms, 2.0)
        after = {name: ratio * ms for name, ms in before.items()}
        times = {"original_phase_ms": before, "phase_ms": after, "notes": ()}
        totals = {"original_request_ms": 10.0, "request_ms": 10.0 * ratio}
        interval = Interval(value=ratio, low=ratio, high=ratio)
        return plan_id, replace(proof, **times, **totals, time_ratio=interval), *arguments[2:]
    if table == "delivery" and arguments[0].times is not None:
        half = Interval(value=0.5, low=0.5, high=0.5)
        times = {"times": RunTimes(request_ms=5.0), "original_times": RunTimes(request_ms=10.0)}
        return (replace(arguments[0], **times, ratio=half, notes=()),)
    return arguments


def _timed_alike(measurement: Any) -> Any:
    if not measurement.samples_us:
        return measurement
    latency = 1.0 + 9.0 * _draw(repr(measurement.subject))
    return replace(measurement, samples_us=(latency, latency))


def _draw(text: str) -> float:
    """Return a number from 0 to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _keys(table: str, arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the key of each fact that was saved."""
    if table == "timing":
        for measurement in arguments[2]:
            of = measurement.subject
            yield of.shape.n, of.shape.k, of.m, of.format, of.kernel, of.working_set_bytes
    elif table == "loss":
        yield from (key for key in arguments[3])
    elif table == "roofline":
        yield (arguments[0].key,)
    elif table == "proof":
        yield (arguments[0],)
    else:
        yield (arguments[0].plan_id,)


def alive(folder: Path) -> dict[int, str]:
    """Return the processes of runs in a folder that have not ended, with their command lines."""
    wanted = f"{MARK}={folder}".encode()
    found = {}
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        with suppress(OSError):
            if wanted not in (place / "environ").read_bytes().split(b"\0"):
                continue
            state = (place / "stat").read_text().rpartition(")")[2].split()[0]
            line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if state != "Z":
                found[int(place.name)] = line
    return found


def kill(process: int) -> bool:
    """Send SIGKILL; return whether the process was there."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def ended(process: int, seconds: float = 0.0) -> int | None:
    """Wait for a run; return its exit code (negative: a signal), or None if it goes on."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.005)


def conclude(
    result: Mapping[str, Any], faults: Sequence[str], out: Path | None, place: Path
) -> int:
    """Print a study's result and keep it in `out`; return the exit code.

    `place` holds what the commands wrote. It is kept if there are faults.
    """
    text = json.dumps(result, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
    if not faults:
        shutil.rmtree(place)
    return 1 if faults else 0


if __name__ == "__main__":
    arguments, _folder, told, refine = sys.argv[1:]
    sys.exit(_command(json.loads(arguments), Path(told), bool(int(refine))))
