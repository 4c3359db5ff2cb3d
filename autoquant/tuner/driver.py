"""The search: record, profile, score, solve, prove, refine. Every stage starts from what the store holds already."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from autoquant.candidates import select
from autoquant.evaluators.quality import QualityFunction, TextQuality
from autoquant.evaluators.text import ENOUGH_INPUT_WINDOWS
from autoquant.events import Listener, Notice, ignore, logged
from autoquant.models import ModelRequest, load
from autoquant.profiler.record import record_model
from autoquant.records import Objective, Recording, Workload
from autoquant.solver.constraints import Constraints, bind
from autoquant.solver.limits import Limits
from autoquant.solver.planning import check_memory, context_of
from autoquant.store import Store, open_store
from autoquant.study.study import Study
from autoquant.tuner.judge import Asked, make_judge
from autoquant.tuner.request import SearchRequest, SearchSetup
from autoquant.tuner.stages import Stages

_log = logging.getLogger(__name__)


def search(
    model: str | os.PathLike[str] | nn.Module,
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
    fusable: str | None = None,
    candidates: Sequence[str] = ("*",),
    time_budget_s: float = 600.0,
    seed: int = 0,
    model_factory: str | None = None,
    tokenizer: Any | None = None,
    trust_pickle: bool = False,
    sample_inputs: Sequence[Any] | Mapping[str, Any] | str | None = None,
    fuse: bool = False,
    quality: QualityFunction | str | None = None,
    sensitivity: str | None = None,
    listener: Listener = ignore,
) -> Study:
    """Find how to store and compute each linear of a model, and prove it.

    On Linux and a CPU, kernels run in processes of their own, which may crash and give memory back. A live module, a quality
    function of the caller's and formats registered in this process only stay in this process; a notice says so.

    Args:
        model: A path (see `autoquant.models.load_model`) or a live module.
        eval_text: A UTF-8 text file that quality is measured on. At most one of this, `eval_data` and `quality` is given; without
            any, a language model is judged on a text of autoquant's own, and any other module by the divergence of its outputs
            from the unquantized module's, see `autoquant.evaluators.outputs`.
        eval_data: Text out of what the `datasets` library loads, `NAME[:CONFIG][:SPLIT][:COLUMN]`, where NAME is a JSONL, JSON,
            CSV, Parquet or text file, a folder of them, or a name on the hub.
        db: Path of the SQLite store, or an SQLAlchemy URL.
        workload: `prefill=TOKENS,decode=STEPS` or a `Workload`; for a module with sample inputs, one forward pass.
        max_ppl_increase: Limit of the recommended plan, a fraction (None: no limit): of the increase of perplexity or of the
            user's own loss, or, where outputs are compared, of their divergence.
        max_kl: Limit of its mean divergence from the unquantized model, nats per token; needs a text.
        max_memory_bytes: Limit on the bytes of all parameters.
        minimize: What the recommended plan has least of within the limits: request time, or the bytes of all parameters.
        keep: Globs over the names of layers that stay unquantized.
        pin: `LAYERS=FORMATS`: the layers that the first glob matches get a candidate that the second one matches.
        fusable: `vllm`: layers that vLLM computes as one get the same format.
        candidates: Globs over `FORMAT/KERNEL`; `*` leaves out what `autoquant candidates` calls opt-in.
        time_budget_s: What refinement may fill up, counted over all runs of the same search.
        sample_inputs: Arguments (or keyword arguments) of one forward pass, for a module that is no language model; or
            `package.module:callable` of a function without arguments that returns them.
        fuse: Time linears that read the same input as one, too, and compute them so where that is faster.
        quality: The user's own loss, see `autoquant.evaluators.quality.QualityFunction`; named in the store by its qualified
            name, so give a changed function another name. A string `package.module:callable` is imported.
        sensitivity: How what each change costs is found out, a name of `autoquant.evaluators.sensitivity.SENSITIVITIES`. None:
            `path` on a text; without one it is `isolated` alone.
        listener: Told what is going on.

    Returns:
        The study. The same call on the same store goes on where an earlier one stopped, or re-solves at once.

    Raises:
        AutoquantError: Something the user can mend; the message says what.
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
    )
    limits = Limits(
        max_ppl_increase=max_ppl_increase,
        max_kl=max_kl,
        max_memory_bytes=max_memory_bytes,
        minimize=minimize,
    )
    request = SearchRequest(
        model=asked_model,
        asked=Asked.of(eval_text, eval_data, quality),
        candidates=select(candidates, asked_model.device.partition(":")[0]),
        workload=workload,
        batch=batch,
        limits=limits,
        constraints=Constraints.parse(keep, pin, fusable),
        sensitivity=sensitivity,
        fuse=fuse,
        time_budget_s=time_budget_s,
        seed=seed,
        db=db,
    )
    return run_search(request, listener)


def run_search(request: SearchRequest, listener: Listener = ignore) -> Study:
    """Do what `search` describes.

    Raises:
        AutoquantError: Something the user can fix; the message says what.
    """
    started = time.monotonic()
    listener = logged(listener)
    loaded = load(request.model)
    judge = make_judge(request.asked, loaded, request.candidates, request.seed, listener)
    setup = SearchSetup.of(request, loaded, judge)
    store = open_store(request.db)
    recording = _checked_recording(setup, store, listener)
    _put_study(setup, store, recording)
    _note_short_text(setup, listener)
    _log.info(
        "study %s in %s: %s candidates, workload %s",
        setup.study_id,
        request.db,
        len(judge.candidates),
        setup.workload,
    )
    _stages(setup, store, listener, started).go()
    return Study(store, setup.study_id)


def _checked_recording(setup: SearchSetup, store: Store, listener: Listener) -> Recording | None:
    """Return what is recorded of the study so far. Refuse limits and constraints that no plan meets.

    Constraints need a recording to be checked, so it is made now: nothing is written yet.
    """
    recording = _known_recording(setup, store)
    constraints = setup.request.constraints
    if recording is None and constraints.as_object():
        recording = record_model(setup.loaded, setup.workload, listener)
        ids = [(fmt.id, kernel.id) for fmt, kernel in setup.candidates]
        bind(constraints, recording.sites, ids, setup.candidates[0][0].id)
    return recording


def _known_recording(setup: SearchSetup, store: Store) -> Recording | None:
    """Return what the store has of the study, None if nothing. Check the memory limit if it can be."""
    study_id = setup.study_id
    if study_id not in store.studies():
        return None
    facts = store.study(study_id)
    options, about = store.options_and_about(study_id)
    if options and about:
        context = context_of(about, study_id=study_id, model_hash=facts.model_hash, workload=facts.workload)
        check_memory(list(options.values()), context, setup.limits.max_memory_bytes)
    return facts.recording


def _put_study(setup: SearchSetup, store: Store, recording: Recording | None) -> None:
    """Write what the study is about."""
    study_id, quality = setup.study_id, setup.quality
    store.put_device(setup.hardware)
    store.put_model(setup.loaded.content_hash, asdict(setup.loaded.source))
    store.put_study(
        study_id,
        model_hash=setup.loaded.content_hash,
        device=setup.hardware,
        identity=setup.identity(),
        workload=setup.workload,
        limits=setup.limits.as_object(),
    )
    store.put_reference(study_id, "judge", {"words": setup.judge.words})
    if isinstance(quality, TextQuality) and quality.parts.inputs is not None:
        store.put_calibration(study_id, quality.parts.inputs.tolist())
    if recording is not None:
        store.update_study(study_id, recording=recording)


def _note_short_text(setup: SearchSetup, listener: Listener) -> None:
    quality = setup.quality
    if not isinstance(quality, TextQuality) or quality.parts.inputs is None:
        return
    if (count := len(quality.parts.inputs)) < ENOUGH_INPUT_WINDOWS:
        listener(Notice(f"weights are rounded for {count} windows of text only: a longer text serves -gptq better"))


def _stages(setup: SearchSetup, store: Store, listener: Listener, started: float) -> Stages:
    request = setup.request
    return Stages(
        store=store,
        study_id=setup.study_id,
        loaded=setup.loaded,
        quality=setup.quality,
        workload=setup.workload,
        device=setup.loaded.device,
        hardware=setup.hardware,
        candidates=setup.candidates,
        fuse=request.fuse,
        sensitivity=setup.method,
        constraints=request.constraints,
        limits=setup.limits,
        time_budget_s=request.time_budget_s,
        seed=request.seed,
        listener=listener,
        started=started,
        spent_before_s=store.study(setup.study_id).spent_s,
    )
