"""The request of a search, and what loading the model settles."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autoquant.candidates import Candidate
from autoquant.devices import backend
from autoquant.errors import WorkloadError
from autoquant.evaluators.outputs import AnyQuality, DivergenceQuality
from autoquant.evaluators.sensitivity import Sensitivity
from autoquant.events import Listener
from autoquant.models import LoadedModel, ModelRequest
from autoquant.profiler.measure import with_original
from autoquant.profiler.record import record_model
from autoquant.profiler.timing import PROTOCOL
from autoquant.records import KV_CACHE_OFF, KV_CACHES, Device, Recording, Workload, content_key
from autoquant.runtime.generate.kv_codes import keeps_other, kv_cache_unsupported
from autoquant.runtime.inputs import default_workload
from autoquant.runtime.phases import check_room, check_workload
from autoquant.solver.constraints import Constraints
from autoquant.solver.limits import Limits
from autoquant.store.connect import check_address
from autoquant.tuner.judge import Asked, Judge, method_of
from autoquant.tuner.workers.asked import Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """The arguments of `autoquant.search`, read and checked.

    Attributes:
        asked: What is to judge quality.
        candidates: Those to consider, without the unquantized weight.
        not_held: What was asked for and the engine cannot hold, with the reason.
        workload: None for the one that suits the model, with `batch` sequences.
        limits: Of the recommended plan. The quality settles what the first of them measures.
        sensitivity: None for the method that suits the quality.
        fuse: None for what pays on the device.
        workers: Those that share the jobs, or None for the one that suits.
        kv_cache: Formats of keys and values to try: one, `auto` for all, or `off`.
        embeddings: Tables whose rows are looked up are searched, too.

    Raises:
        AutoquantError: The database cannot be used, or the arguments contradict one another.
    """

    model: ModelRequest
    asked: Asked
    candidates: Sequence[Candidate]
    workload: Workload | None
    batch: int
    limits: Limits
    constraints: Constraints
    sensitivity: str | None
    fuse: bool | None
    embeddings: bool = False
    time_budget_s: float
    seed: int
    db: str | os.PathLike[str]
    not_held: Mapping[str, str] = field(default_factory=dict)
    workers: Workers | None = None
    kv_cache: str = KV_CACHE_OFF

    def __post_init__(self) -> None:
        check_address(self.db)
        self.asked.check(self.sensitivity, self.limits.max_kl)


@dataclass(frozen=True, slots=True, kw_only=True)
class SettledRequest:
    """A request with all that was open, filled in once the model is loaded.

    Attributes:
        candidates: What the request names and quality can judge, and the unquantized weight.
        method: How the loss of each change is found.
    """

    request: SearchRequest
    loaded: LoadedModel
    judge: Judge
    candidates: list[Candidate]
    method: Sensitivity
    workload: Workload
    limits: Limits
    hardware: Device

    @classmethod
    def of(cls, request: SearchRequest, loaded: LoadedModel, judge: Judge) -> SettledRequest:
        """Fill in what the user left open.

        Raises:
            QualityError: The method, or a limit, needs a text.
            WorkloadError: The workload, or the cache of keys and values, does not fit the model.
        """
        method = method_of(request.sensitivity, request.limits.max_kl, judge.quality)
        workload = request.workload or default_workload(loaded, request.batch)
        check_workload(loaded, workload)
        check_room(loaded, workload)
        _check_kv_cache(request.kv_cache, loaded)
        by_outputs = isinstance(judge.quality, DivergenceQuality)
        return cls(
            request=request,
            loaded=loaded,
            judge=judge,
            candidates=with_original(judge.candidates, loaded.dtype),
            method=method,
            workload=workload,
            limits=replace(
                request.limits,
                measure="divergence" if by_outputs else "increase",
                max_memory_bytes=_most_bytes(request.limits.max_memory_bytes, loaded),
            ),
            hardware=backend(loaded.device).fingerprint(),
        )

    @property
    def quality(self) -> AnyQuality:
        """The measure of quality."""
        return self.judge.quality

    @property
    def fuse(self) -> bool:
        """Linears that read the same input are also tried as one."""
        asked = self.request.fuse
        return backend(self.loaded.device).fuses if asked is None else asked

    def record(self, listener: Listener) -> Recording:
        """Record the model at work, and report what is covered and what is left alone.

        Raises what `record_model` raises.
        """
        tables = self.request.embeddings
        return record_model(self.loaded, self.workload, listener, tables=tables)

    @property
    def study_id(self) -> str:
        """Eight hex digits; searches that may share their results have the same."""
        return content_key(self.identity(), 8)

    def identity(self) -> dict[str, Any]:
        """Return what a study's id is made of. A changed key or value loses users their studies."""
        identity = {
            "model_hash": self.loaded.content_hash,
            "device": self.hardware.key,
            "workload": str(self.workload),
            "dtype": self.loaded.dtype,
            "quality": self.quality.key,
            "candidates": [candidate.id for candidate in self.judge.candidates],
            "seed": self.request.seed,
            "protocol": PROTOCOL,
            "method": self.method.version,
        }
        if self.fuse:
            identity["fuse"] = True
        if self.request.kv_cache != KV_CACHE_OFF:
            identity["kv_cache"] = self.request.kv_cache
        if self.request.embeddings:
            identity["embeddings"] = True
        if constraints := self.request.constraints.as_object():
            identity["constraints"] = constraints
        return identity


def _check_kv_cache(asked: str, loaded: LoadedModel) -> None:
    """Refuse formats of keys and values that a model cannot have.

    Raises:
        WorkloadError: It cannot.
    """
    if asked == KV_CACHE_OFF:
        return
    reason = keeps_other(loaded.module)
    for kind in KV_CACHES:
        if kind == asked and not reason:
            reason = kv_cache_unsupported(loaded.device, kind)
    if reason:
        raise WorkloadError(f"--kv-cache {asked} cannot be searched: {reason}")


def _most_bytes(asked: int | None, loaded: LoadedModel) -> int | None:
    """Return what a plan may take: what was asked for, and what the device has room for."""
    known = [each for each in (asked, room_bytes(loaded)) if each is not None]
    return min(known, default=None)


def room_bytes(loaded: LoadedModel) -> int | None:
    """Return what a plan may take to fit the device, if the unquantized model does not."""
    return None if loaded.stream is None else loaded.stream.most_plan_bytes
