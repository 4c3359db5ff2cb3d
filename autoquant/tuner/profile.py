"""Time linears without a search: those of a model, or listed shapes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autoquant.candidates import Format, select, timed
from autoquant.candidates.flat import stored_bytes
from autoquant.devices import backend
from autoquant.events import Listener, Notice, ignore, logged
from autoquant.models import LoadedModel, ModelRequest, load_request
from autoquant.models.quiet import left_as_found
from autoquant.models.request import ModelPath, SampleInputs
from autoquant.profiler import measure
from autoquant.profiler.floor import ELEMENT_BYTES, floor_us
from autoquant.profiler.latencies import COLUMNS, Latencies, Row, row_of
from autoquant.profiler.measure import Candidates
from autoquant.profiler.record import mean_element_bytes, record_model
from autoquant.profiler.roofline import undisturbed_roofline
from autoquant.profiler.shapes import ListedShapes, NamedShapes
from autoquant.profiler.timing import PROTOCOL
from autoquant.records import Device, LinearShape, Measurement, Roofline, TimingSubject, Workload
from autoquant.runtime.inputs import default_workload
from autoquant.runtime.phases import check_room, check_workload
from autoquant.store import Store, open_store
from autoquant.tuner.profile_request import (
    DEFAULT_ROWS,
    ProfileRequest,
    Shapes,
    ShapesRequest,
    linears_of,
)
from autoquant.tuner.profiling import keeper

if TYPE_CHECKING:
    import pandas as pd

_SAMPLE_ROWS = 256

Cell = tuple[LinearShape, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subjects:
    """What to time.

    Attributes:
        names: What each shape is called.
        cells: Shapes, each with an m.
        working_set: Bytes of weights that a call must not find in a cache.
        source: Model or file, for titles.
    """

    names: NamedShapes
    cells: Sequence[Cell]
    working_set: int
    dtype: str
    source: str


@left_as_found()
def profile(  # noqa: PLR0913 - the keywords of a public function
    model: ModelPath | nn.Module | None = None,
    *,
    shapes: Shapes | None = None,
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
    sample_inputs: SampleInputs = None,
    trust_remote_code: bool = False,
    listener: Listener = ignore,
) -> pd.DataFrame:
    """Time linears by every candidate, without a search.

    Timings that the store holds already are not made again.

    Args:
        model: As for `autoquant.search`, like `dtype`, `device`, `model_factory`, `tokenizer`,
            `trust_pickle`, `sample_inputs` and `trust_remote_code`. Its linears are timed at the m
            of the workload.
        shapes: Instead of a model: a file of shapes, or its lines, such as
            `4096x4096+bias q_proj` (out features first). Then `dtype` auto is the better 16-bit
            float of the device.
        rows: The m to time every shape at. None for those of the workload, or for 1, 16, 128 and
            2048 if there is neither a workload nor a model.
        workload: `prefill=TOKENS,decode=STEPS` or a `Workload`.
        batch: Sequences at a time, for a workload that is a string or None.
        candidates: Globs over `FORMAT/KERNEL`. The unquantized weight is always timed, too.
        db: Path of the SQLite store, or an SQLAlchemy URL. A search may use the same.
        listener: Receives what is going on.

    Returns:
        One row per shape, m and candidate, with the columns of
        `autoquant.profiler.latencies.COLUMNS`. Times are in microseconds.

    Raises:
        AutoquantError: Something the user can fix; the message says what.
    """
    import pandas as pd

    if isinstance(workload, str):
        workload = Workload.parse(workload, batch)
    asked_model = asked_shapes = None
    if model is not None:
        asked_model = ModelRequest(
            model=model,
            dtype=dtype,
            device=device,
            model_factory=model_factory,
            tokenizer=tokenizer,
            trust_pickle=trust_pickle,
            sample_inputs=sample_inputs,
            trust_remote_code=trust_remote_code,
        )
    if shapes is not None:
        asked_shapes = ShapesRequest(shapes=shapes, dtype=dtype, device=device)
    request = ProfileRequest(
        linears=linears_of(asked_model, asked_shapes),
        rows=rows,
        workload=workload,
        batch=batch,
        candidates=candidates,
        db=db,
    )
    return pd.DataFrame(list(time_linears(request, listener).rows), columns=list(COLUMNS))


def time_linears(request: ProfileRequest, listener: Listener = ignore) -> Latencies:
    """Time what `profile` describes. The result also says how its rows came about.

    Raises:
        AutoquantError: As for `profile`.
    """
    listener = logged(listener)
    pairs = select(request.candidates, torch.device(request.device).type)
    make: Callable[[], _Subjects]
    if isinstance(request.linears, ShapesRequest):
        make = partial(_of_shapes, request, request.linears, request.linears.read())
    else:
        make = _of_model(request, load_request(request.linears), listener)
    store = open_store(request.db)  # after everything that can be refused without it
    try:
        subjects = make()
        pairs = measure.with_original(pairs, subjects.dtype)
        return _time(subjects, pairs, request.device, store, listener)
    finally:
        store.close()


def _of_shapes(request: ProfileRequest, linears: ShapesRequest, listed: ListedShapes) -> _Subjects:
    names = listed.names
    rows: Sequence[int] = request.rows or DEFAULT_ROWS
    if request.workload is not None:
        batch = request.workload.batch
        rows = sorted({phase.tokens * batch for phase in request.workload.phases})
    dtype = next(iter(names)).dtype
    hardware = backend(request.device).fingerprint()
    # As cold as in a model that has as many of these linears as twice the cache holds.
    once = sum(shape.n * shape.k for shape in names) * ELEMENT_BYTES[dtype]
    repeated = list(names) * -(-2 * hardware.cache_bytes // once)
    from_file = isinstance(linears.shapes, (str, os.PathLike))
    return _Subjects(
        names=names,
        cells=[(shape, m) for shape in names for m in listed.rows.get(shape, rows)],
        working_set=measure.working_set_bytes(repeated, hardware, ELEMENT_BYTES[dtype]),
        dtype=dtype,
        source=Path(str(linears.shapes)).name if from_file else f"{len(names)} shapes",
    )


def _of_model(
    request: ProfileRequest, loaded: LoadedModel, listener: Listener
) -> Callable[[], _Subjects]:
    """Check the workload now, and return what records it.

    Raises:
        WorkloadError: The workload does not fit the model.
    """
    workload = request.workload or default_workload(loaded, request.batch)
    check_workload(loaded, workload)
    check_room(loaded, workload)
    return partial(_recorded, loaded, workload, request.rows, listener)


def _recorded(
    loaded: LoadedModel, workload: Workload, rows: Sequence[int] | None, listener: Listener
) -> _Subjects:
    recording = record_model(loaded, workload, listener)
    shapes = [site.shape for site in recording.sites]
    names: NamedShapes = {}
    for site in recording.sites:
        names[site.shape] = (*names.get(site.shape, ()), site.name)
    cells = measure.cells_of(recording.sites)
    if rows:
        cells = [(shape, m) for shape in names for m in rows]
    element_bytes = mean_element_bytes(loaded.module, recording)
    return _Subjects(
        names=names,
        cells=cells,
        working_set=measure.working_set_bytes(
            shapes, backend(loaded.device).fingerprint(), element_bytes
        ),
        dtype=loaded.dtype,
        source=Path(loaded.source.path).name or type(loaded.module).__name__,
    )


def _time(
    subjects: _Subjects, candidates: Candidates, device_name: str, store: Store, listener: Listener
) -> Latencies:
    place = backend(device_name)
    hardware = place.fingerprint()
    if reason := place.compile_failure():
        listener(Notice(f"running eagerly, since torch.compile does not work here: {reason}"))
    store.put_device(hardware)
    wanted = measure.subjects_of(subjects.cells, candidates, subjects.working_set)
    known = store.timings(hardware, PROTOCOL)
    missing = [subject for subject in wanted if subject not in known]

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
        measure.TimingDevice(device=device_name, hardware=hardware, roofline=roofline),
        on_measured=keeper(store, hardware, known),
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
) -> tuple[Row, ...]:
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
        floor = (
            None
            if stored is None
            else floor_us(roofline, subject.shape, subject.m, stored, arithmetic)
        )
        rows.append(row_of(measurement, kernel.numerics, floor))
    return tuple(rows)


def _weight_bytes(
    fmt: Format, shape: LinearShape, hardware: Device, device_name: str
) -> float | None:
    """Estimate the bytes of a stored weight from some rows; None if it cannot be stored."""
    if fmt.unsupported(shape, 1, hardware.type):
        return None
    rows = min(shape.n, _SAMPLE_ROWS)
    generator = torch.Generator().manual_seed(0)
    weight = (
        torch.randn(rows, shape.k, generator=generator)
        .to(getattr(torch, shape.dtype))
        .to(device_name)
    )
    try:
        return stored_bytes(fmt.sample(weight)) * shape.n / rows
    except Exception:  # noqa: BLE001 - why it cannot be stored is the outcome of its timing; here it only has no floor
        return None
