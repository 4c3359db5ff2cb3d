"""Run a search: load the model, choose what judges it, open the study, do the stages."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from autoquant.cache import unusable
from autoquant.candidates import select
from autoquant.devices import backend
from autoquant.devices.memory import quick_collections
from autoquant.devices.peaks import PeakMemory
from autoquant.errors import ConstraintError, StoreError
from autoquant.evaluators.quality import QualityFunction, ReferenceLosses, TextQuality
from autoquant.evaluators.text import ENOUGH_INPUT_WINDOWS
from autoquant.events import Listener, Notice, ignore, logged
from autoquant.models import ModelRequest, load_request
from autoquant.models.quiet import left_as_found
from autoquant.models.request import ModelPath, SampleInputs
from autoquant.records import KV_CACHE_OFF, Objective, Recording, Workload
from autoquant.solver.constraints import Constraints
from autoquant.solver.limits import Limits
from autoquant.store import Store, open_store
from autoquant.store.addresses import shown_address
from autoquant.study.study import Study
from autoquant.tuner.baseline import check_baseline
from autoquant.tuner.budget import Budget
from autoquant.tuner.flow import run_stages
from autoquant.tuner.judge import Asked, make_judge
from autoquant.tuner.large import streaming_notice
from autoquant.tuner.request import SearchRequest, SettledRequest
from autoquant.tuner.serving import bind_sites, check_model, served_candidates
from autoquant.tuner.setup import SearchSetup
from autoquant.tuner.workers.asked import Workers
from autoquant.tuner.workers.start import places_for

_log = logging.getLogger(__name__)


@left_as_found()
def search(  # noqa: PLR0913 - the keywords of a public function
    model: ModelPath | nn.Module,
    *,
    eval_text: str | os.PathLike[str] | None = None,
    eval_data: str | None = None,
    db: str | os.PathLike[str] = "plan.db",
    device: str = "auto",
    dtype: str = "auto",
    workload: str | Workload | None = None,
    batch: int = 1,
    max_ppl_increase: float | None = 0.01,
    max_kl: float | None = None,
    max_memory_bytes: int | None = None,
    minimize: Objective = "time",
    keep: Sequence[str] = (),
    pin: Sequence[str] = (),
    engine: str | None = None,
    candidates: Sequence[str] = ("*",),
    time_budget_s: float = 600.0,
    seed: int = 0,
    model_factory: str | None = None,
    tokenizer: Any | None = None,
    trust_pickle: bool = False,
    sample_inputs: SampleInputs = None,
    trust_remote_code: bool = False,
    fuse: bool | None = None,
    embeddings: bool = False,
    quality: QualityFunction | str | None = None,
    sensitivity: str | None = None,
    workers: str | int | None = None,
    kv_cache: str = KV_CACHE_OFF,
    listener: Listener = ignore,
) -> Study:
    """Find how to store and compute each linear of a model, and prove it.

    On Linux and a CPU, kernels run in processes of their own: a crash does not end the search, and
    memory is given back. A live module, a quality function and formats registered in this process
    stay in this process. A notice says so. A live module stays as it is: a copy with its weights is
    searched.

    Args:
        model: A path, a name on the hub or a live module; see
            `autoquant.models.request.ModelRequest`, which also describes `dtype`, `device`,
            `model_factory`, `tokenizer`, `trust_pickle`, `sample_inputs` and `trust_remote_code`.
        eval_text: A UTF-8 text file that quality is measured on. Give at most one of this,
            `eval_data` and `quality`. Without any, a language model is judged on a text that
            autoquant ships. Another module is judged by how far its outputs diverge from the
            unquantized module's, see `autoquant.evaluators.outputs`.
        eval_data: `NAME[:CONFIG][:SPLIT][:COLUMN]` of text that the `datasets` library loads. NAME
            is a JSONL, JSON, CSV, Parquet or text file, a folder of them, or a name on the hub.
        db: Path of the SQLite store, or an SQLAlchemy URL.
        workload: `prefill=TOKENS,decode=STEPS` or a `Workload`. None for the one that suits the
            model; a module with sample inputs does one forward pass.
        batch: Sequences at a time, for a workload that is a string or None.
        max_ppl_increase: Limit of the recommended plan, a fraction; None for no limit. It limits
            the increase of perplexity or of the user's own loss, or the divergence of outputs.
        max_kl: Limit of the mean divergence from the unquantized model, nats per token. It needs
            a text.
        max_memory_bytes: Limit on the bytes of all parameters.
        minimize: What the recommended plan has least of within the limits: request time, or the
            bytes of all parameters.
        keep: Globs over the names of layers that stay unquantized.
        pin: `LAYERS=FORMATS`, two globs. Layers that match the first get a candidate that matches
            the second.
        engine: The inference engine that plans are for: `vllm`, `sglang`, `llama.cpp` or
            `transformers`. Layers get only what it holds exactly, and those that it computes as
            one get one scheme.
        candidates: Globs over `FORMAT/KERNEL`. `*` leaves out the opt-in ones, see
            `autoquant candidates`.
        time_budget_s: What the search may take, counted over all its runs. Three plans are proven
            in any case.
        seed: Of everything drawn at random.
        fuse: Also time linears that read the same input as one, and compute them so if that is
            faster. None to do so on a GPU.
        embeddings: Also search the formats of embeddings whose rows are looked up. A head that is
            tied to one stays tied where both get the same format. It saves memory and no time.
        quality: The user's own loss, see `autoquant.evaluators.quality.QualityFunction`, or
            `package.module:callable`. The store knows it by its qualified name, so give a changed
            function another name.
        sensitivity: How the loss of each change is found, a name of
            `autoquant.evaluators.sensitivity.SENSITIVITIES`. None for `path` on a text and
            `isolated` without one.
        workers: How many processes on this host share the work, each with a device of its own;
            `ray`, or `ray://ADDRESS` of a cluster. None for one.
        kv_cache: Also prove the best plan with keys and values in 8 bits, as `generate` keeps
            them then: `int8`, `float8`, or `auto` for both.
        listener: Receives what is going on.

    Returns:
        The study. The same call on the same store continues it, or re-solves it at once.

    Raises:
        AutoquantError: Something the user can fix; the message says what.
    """
    if isinstance(workload, str):
        workload = Workload.parse(workload, batch)
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
    limits = Limits(
        max_ppl_increase=max_ppl_increase,
        max_kl=max_kl,
        max_memory_bytes=max_memory_bytes,
        minimize=minimize,
    )
    device_type = asked_model.device.partition(":")[0]
    not_held: Mapping[str, str] = {}
    if embeddings and engine is not None:
        raise ConstraintError(
            f"--embeddings and --for {engine}: engines are given embeddings unquantized; leave out"
            " one of them"
        )
    if engine is None:
        chosen = select(candidates, device_type)
    else:
        chosen, not_held = served_candidates(engine, candidates, device_type)
    request = SearchRequest(
        model=asked_model,
        asked=Asked.of(eval_text, eval_data, quality),
        candidates=chosen,
        not_held=not_held,
        workload=workload,
        batch=batch,
        limits=limits,
        constraints=Constraints.parse(keep, pin, engine),
        sensitivity=sensitivity,
        fuse=fuse,
        embeddings=embeddings,
        time_budget_s=time_budget_s,
        seed=seed,
        db=db,
        workers=None if workers is None else Workers.parse(str(workers)),
        kv_cache=kv_cache,
    )
    return run_search(request, listener)


def run_search(request: SearchRequest, listener: Listener = ignore) -> Study:
    """Do what `search` describes.

    Raises:
        AutoquantError: Something the user can fix; the message says what.
    """
    memory = PeakMemory(request.model.device)
    try:
        return _run_search(request, logged(listener), memory)
    finally:
        memory.stop()


def _run_search(request: SearchRequest, listener: Listener, memory: PeakMemory) -> Study:
    started = time.monotonic()
    if request.workers is not None and request.workers.count is not None:
        places_for(request.workers.count, request.model.device)
    loaded = load_request(request.model)
    if request.constraints.engine is not None:
        check_model(request.constraints.engine, loaded)
    if text := streaming_notice(loaded):
        listener(Notice(text))
    judge = make_judge(request.asked, loaded, request.candidates, request.seed, listener)
    settled = SettledRequest.of(request, loaded, judge)
    reference: ReferenceLosses = {}
    if not _is_known(settled):
        reference = check_baseline(request.model, loaded, judge.quality, listener)
    store = open_store(request.db)
    recording = _checked_recording(settled, store, listener)
    _put_study(settled, store, recording)
    _note_short_text(settled, listener)
    _log.info(
        "study %s in %s: %s candidates, workload %s",
        settled.study_id,
        shown_address(str(request.db)),
        len(judge.candidates),
        settled.workload,
    )
    if backend(settled.loaded.device).prepares and (reason := unusable()):
        listener(Notice(f"{reason}: kernels are compiled and tuned again in each run"))
    budget = Budget.of(store, settled.study_id, request.time_budget_s, started, memory)
    with quick_collections():
        run_stages(SearchSetup.of(settled, store, listener, reference), budget)
    return Study(store, settled.study_id)


def _is_known(settled: SettledRequest) -> bool:
    """Check whether an earlier run began the study. No database is made."""
    try:
        store = open_store(settled.request.db, create=False)
    except StoreError:
        return False
    known = settled.study_id in store.studies()
    store.engine.dispose()
    return known


def _checked_recording(
    settled: SettledRequest, store: Store, listener: Listener
) -> Recording | None:
    """Return what is recorded so far; refuse limits and constraints that no plan meets.

    Constraints can only be checked against a recording. If there is none, it is made now: a
    refused search must leave no study.
    """
    recording = _known_recording(settled, store)
    if recording is None and settled.request.constraints.as_object():
        recording = settled.record(listener)
        bind_sites(settled, recording.layers)
    return recording


def _known_recording(settled: SettledRequest, store: Store) -> Recording | None:
    """Return the store's recording of the study, or None.

    Raises:
        PlanError: An earlier run found that no plan meets the memory limit.
    """
    study_id = settled.study_id
    if study_id not in store.studies():
        return None
    study = Study(store, study_id)
    if (space := study.space()) is not None:
        space.check_memory(settled.limits.max_memory_bytes)
    return study.facts.recording


def _put_study(settled: SettledRequest, store: Store, recording: Recording | None) -> None:
    """Write what the study is about, and its recording if there is one."""
    study_id, quality = settled.study_id, settled.quality
    store.put_device(settled.hardware)
    store.put_model(settled.loaded.content_hash, asdict(settled.loaded.source))
    store.put_study(
        study_id,
        model_hash=settled.loaded.content_hash,
        device=settled.hardware,
        identity=settled.identity(),
        workload=settled.workload,
        limits=settled.limits.as_object(),
    )
    store.put_reference(study_id, "judge", {"words": settled.judge.words})
    if isinstance(quality, TextQuality) and quality.parts.inputs is not None:
        store.put_calibration(study_id, quality.parts.inputs.tolist())
    if recording is not None:
        store.update_study(study_id, recording=recording)


def _note_short_text(settled: SettledRequest, listener: Listener) -> None:
    """Say if a text is too short to round weights for it well."""
    quality = settled.quality
    if not isinstance(quality, TextQuality) or quality.parts.inputs is None:
        return
    if (count := len(quality.parts.inputs)) < ENOUGH_INPUT_WINDOWS:
        listener(
            Notice(
                f"weights are rounded for {count} windows of text only: a longer text serves"
                " -gptq better"
            )
        )
