"""Timing linears without a search: those of a model, or a list of shapes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autoquant.candidates import Format, select, timed
from autoquant.candidates.flat import stored_bytes
from autoquant.devices import backend
from autoquant.errors import WorkloadError
from autoquant.events import Listener, Notice, ignore, logged
from autoquant.models import LoadedModel, dtype_name, resolve_device, resolve_dtype, take_model
from autoquant.profiler import measure
from autoquant.profiler.floor import ELEMENT_BYTES, floor_us
from autoquant.profiler.latencies import COLUMNS, Latencies
from autoquant.profiler.measure import Candidates
from autoquant.profiler.record import mean_element_bytes, record_model
from autoquant.profiler.roofline import undisturbed_roofline
from autoquant.profiler.shapes import ListedShapes, NamedShapes, parse_shapes, read_shapes
from autoquant.profiler.timing import PROTOCOL
from autoquant.records import Device, LinearShape, Measurement, Roofline, TimingSubject, Workload
from autoquant.runtime.phases import default_workload, make_phases
from autoquant.store import Store, open_store
from autoquant.store.connect import check_address

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_ROWS = (1, 16, 128, 2048)
_SAMPLE_ROWS = 256

Cell = tuple[LinearShape, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRequest:
    """A request to time linears; see `profile`."""

    model: str | os.PathLike[str] | nn.Module | None = None
    shapes: str | os.PathLike[str] | Sequence[str] | None = None
    rows: Sequence[int] | None = None
    workload: str | Workload | None = None
    batch: int = 1
    device: str = "auto"
    dtype: str = "auto"
    candidates: Sequence[str] = ("*",)
    db: str | os.PathLike[str] = "timings.db"
    model_factory: str | None = None
    tokenizer: Any | None = None
    trust_pickle: bool = False
    sample_inputs: Sequence[Any] | Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subjects:
    """The linears of a request: shapes with their names, each m, and how cold weights are."""

    names: NamedShapes
    cells: Sequence[Cell]
    working_set: int
    dtype: str
    source: str


def profile(
    model: str | os.PathLike[str] | nn.Module | None = None,
    *,
    shapes: str | os.PathLike[str] | Sequence[str] | None = None,
    rows: Sequence[int] | None = None,
    workload: str | Workload | None = None,
    batch: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    candidates: Sequence[str] = ("*",),
    db: str | os.PathLike[str] = "timings.db",
    model_factory: str | None = None,
    tokenizer: Any | None = None,
    trust_pickle: bool = False,
    sample_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    listener: Listener = ignore,
) -> pd.DataFrame:
    """Time linears by every candidate, without a search. What the store holds is not timed.

    Args:
        model: A path or a live module as for `search`: its linears are timed, at the m that the
            workload gives them.
        shapes: Instead of a model: a file of shapes, or its lines, such as `4096x4096+bias q_proj`
            (out features first).
        rows: The m to time every shape at; by default those of the workload, or 1, 16, 128 and 2048
            for shapes without one.
        workload: `prefill=TOKENS,decode=STEPS` or a `Workload`, for `batch` sequences at a time.
        dtype: auto (as stored; for shapes the better 16-bit float of the device), fp32, bf16, fp16
            or fast16.
        candidates: Globs over `FORMAT/KERNEL`. The unquantized weight is always timed too.
        db: Path of the SQLite store, or an SQLAlchemy URL; a search may use the same.
        sample_inputs: Arguments of one forward pass, for a module that is no language model.

    Returns:
        One row per shape, m and candidate with the columns of
        `autoquant.profiler.latencies.COLUMNS`; times in microseconds.

    Raises:
        AutoquantError: Something the user can mend; the message says what.
    """
    import pandas as pd

    request = ProfileRequest(
        model=model,
        shapes=shapes,
        rows=rows,
        workload=workload,
        batch=batch,
        device=device,
        dtype=dtype,
        candidates=candidates,
        db=db,
        model_factory=model_factory,
        tokenizer=tokenizer,
        trust_pickle=trust_pickle,
        sample_inputs=sample_inputs,
    )
    return pd.DataFrame(list(time_linears(request, listener).rows), columns=list(COLUMNS))


def time_linears(request: ProfileRequest, listener: Listener = ignore) -> Latencies:
    """Profile as `profile`, and return how the rows came about with them.

    Raises:
        AutoquantError: As for `profile`.
    """
    listener = logged(listener)
    _check(request)
    device_name = resolve_device(request.device)
    check_address(request.db)
    pairs = select(request.candidates, torch.device(device_name).type)
    workload = request.workload
    if isinstance(workload, str):
        workload = Workload.parse(workload, request.batch)
    if request.model is None:
        prepare = partial(_of_shapes, request, _listed_shapes(request, device_name), workload, device_name)
    else:
        loaded = _load(request, device_name)
        workload = workload or default_workload(loaded.kind, request.batch)
        _check_workload(request, loaded, workload, device_name)
        prepare = partial(_of_model, request, loaded, workload, device_name, listener)
    store = open_store(request.db)  # after everything that can be refused without it
    try:
        subjects = prepare()
        return _time(subjects, measure.with_original(pairs, subjects.dtype), device_name, store, listener)
    finally:
        store.close()


def _check(request: ProfileRequest) -> None:
    """Refuse options that contradict one another."""
    if (request.model is None) == (request.shapes is None):
        raise WorkloadError("give either a model or shapes (--shapes FILE): their linears are what is timed")
    if request.rows is not None and (not request.rows or min(request.rows) < 1):
        raise WorkloadError("rows must be numbers from 1 on, e.g. 1,16,2048")
    if request.shapes is not None and request.rows is not None and request.workload is not None:
        raise WorkloadError("give either rows or a workload: both say how many rows the shapes are timed at")
    if request.shapes is not None and request.workload is None and request.batch != 1:
        raise WorkloadError(
            "a batch needs a workload, e.g. --workload prefill=2048,decode=256: rows are timed as given"
        )


def _listed_shapes(request: ProfileRequest, device_name: str) -> ListedShapes:
    dtype = resolve_dtype("fast16" if request.dtype == "auto" else request.dtype, device_name, torch.float32)
    if isinstance(request.shapes, (str, os.PathLike)):
        return read_shapes(request.shapes, dtype_name(dtype))
    return parse_shapes(request.shapes or (), dtype_name(dtype))


def _of_shapes(request: ProfileRequest, listed: ListedShapes, workload: Workload | None, device_name: str) -> _Subjects:
    names = listed.names
    rows: Sequence[int] = request.rows or DEFAULT_ROWS
    if workload is not None:
        rows = sorted({phase.tokens * workload.batch for phase in workload.phases})
    dtype = next(iter(names)).dtype
    hardware = backend(device_name).fingerprint()
    # As cold as in a model that has as many of these linears as twice the cache holds.
    once = sum(shape.n * shape.k for shape in names) * ELEMENT_BYTES[dtype]
    repeated = list(names) * -(-2 * hardware.cache_bytes // once)
    from_file = isinstance(request.shapes, (str, os.PathLike))
    return _Subjects(
        names=names,
        cells=[(shape, m) for shape in names for m in listed.rows.get(shape, rows)],
        working_set=measure.working_set_bytes(repeated, hardware, ELEMENT_BYTES[dtype]),
        dtype=dtype,
        source=Path(str(request.shapes)).name if from_file else f"{len(names)} shapes",
    )


def _load(request: ProfileRequest, device_name: str) -> LoadedModel:
    assert request.model is not None  # _check saw to it
    return take_model(
        request.model,
        dtype=request.dtype,
        device=device_name,
        model_factory=request.model_factory,
        tokenizer=request.tokenizer,
        trust_pickle=request.trust_pickle,
        sample_inputs=request.sample_inputs,
    )


def _inputs(request: ProfileRequest, loaded: LoadedModel) -> Any:
    return request.sample_inputs if request.sample_inputs is not None else loaded.example_inputs


def _check_workload(request: ProfileRequest, loaded: LoadedModel, workload: Workload, device_name: str) -> None:
    """Refuse a workload that does not fit the model."""
    make_phases(
        loaded.module,
        loaded.kind,
        workload,
        device=device_name,
        sample_inputs=_inputs(request, loaded),
        max_positions=loaded.max_positions,
    )


def _of_model(
    request: ProfileRequest, loaded: LoadedModel, workload: Workload, device_name: str, listener: Listener
) -> _Subjects:
    inputs = _inputs(request, loaded)
    recording = record_model(loaded, workload, device=device_name, sample_inputs=inputs, listener=listener)
    names: NamedShapes = {}
    for site in recording.sites:
        names[site.shape] = (*names.get(site.shape, ()), site.name)
    return _Subjects(
        names=names,
        cells=[(shape, m) for shape in names for m in request.rows]
        if request.rows
        else measure.cells_of(recording.sites),
        working_set=measure.working_set_bytes(
            [site.shape for site in recording.sites],
            backend(device_name).fingerprint(),
            mean_element_bytes(loaded.module, recording),
        ),
        dtype=loaded.dtype,
        source=Path(loaded.source.path).name or type(loaded.module).__name__,
    )


def _time(subjects: _Subjects, candidates: Candidates, device_name: str, store: Store, listener: Listener) -> Latencies:
    place = backend(device_name)
    hardware = place.fingerprint()
    if reason := place.compile_failure():
        listener(Notice(f"running eagerly, since torch.compile does not work here: {reason}"))
    store.put_device(hardware)
    wanted = measure.subjects_of(subjects.cells, candidates, subjects.working_set)
    known = store.timings(hardware, PROTOCOL)
    missing = [subject for subject in wanted if subject not in known]

    def keep(measurements: Sequence[Measurement]) -> None:
        store.put_timings(hardware, PROTOCOL, measurements)
        known.update({measurement.subject: measurement for measurement in measurements})

    def roofline() -> Roofline:
        return store.roofline(hardware) or undisturbed_roofline(
            device_name,
            cache_bytes=hardware.cache_bytes,
            on_measured=partial(store.put_roofline, hardware),
            listener=listener,
        )

    started = time.monotonic()
    measure.measure(
        missing,
        candidates,
        measure.Place(device=device_name, hardware=hardware, roofline=roofline),
        on_measured=keep,
        listener=listener,
    )
    measured = {subject: known[subject] for subject in wanted}
    measure.summarize(measured, len(set(missing)), listener)
    elapsed_s = time.monotonic() - started
    limits = roofline()
    return Latencies(
        rows=_rows(measured, candidates, hardware, device_name, limits),
        names=subjects.names,
        source=subjects.source,
        device=hardware,
        roofline=limits,
        from_store=len(measured) - len(set(missing)),
        elapsed_s=elapsed_s,
    )


def _rows(
    measured: Mapping[TimingSubject, Measurement],
    candidates: Candidates,
    hardware: Device,
    device_name: str,
    roofline: Roofline,
) -> tuple[dict[str, Any], ...]:
    by_id = {candidate.id: candidate for candidate in timed(candidates)}
    weight_bytes: dict[tuple[str, LinearShape], float | None] = {}
    rows = []
    for subject, measurement in measured.items():
        candidate = by_id[subject.candidate]
        fmt, kernel = candidate.format, candidate.kernel
        key = (fmt.id, subject.shape)
        if key not in weight_bytes:
            weight_bytes[key] = _weight_bytes(fmt, subject.shape, hardware, device_name)
        stored = weight_bytes[key]
        arithmetic = kernel.arithmetic or subject.shape.dtype
        floor = None if stored is None else floor_us(roofline, subject.shape, subject.m, stored, arithmetic)
        rows.append(_row(subject, measurement, kernel.numerics, floor))
    return tuple(rows)


def _row(subject: TimingSubject, measurement: Measurement, numerics: str, floor: float | None) -> dict[str, Any]:
    timed = bool(measurement.samples_us)
    shape = subject.shape
    return {
        "n": shape.n,
        "k": shape.k,
        "bias": shape.bias,
        "dtype": shape.dtype,
        "m": subject.m,
        "format": subject.format,
        "kernel": subject.kernel,
        "numerics": numerics,
        "outcome": measurement.outcome,
        "latency_us": measurement.latency_us if timed else None,
        "spread_us": measurement.spread_us if timed else None,
        "relative_error": measurement.relative_error,
        "floor_us": floor,
        "reason": measurement.reason,
    }


def _weight_bytes(fmt: Format, shape: LinearShape, hardware: Device, device_name: str) -> float | None:
    """Return the bytes of a stored weight, or None if the format does not take the shape."""
    if fmt.unsupported(shape, 1, hardware.type):
        return None
    rows = min(shape.n, _SAMPLE_ROWS)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, shape.k, generator=generator).to(getattr(torch, shape.dtype)).to(device_name)
    try:
        return stored_bytes(fmt.store(weight)) * shape.n / rows
    except Exception:  # noqa: BLE001 - why it cannot be stored is the outcome of its timing; here it only has no floor
        return None
