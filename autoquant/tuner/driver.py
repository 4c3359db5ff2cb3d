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
from autoquant.devices import backend
from autoquant.evaluators.outputs import OutputQuality
from autoquant.evaluators.quality import QualityFunction, TextQuality
from autoquant.evaluators.text import ENOUGH_INPUT_WINDOWS
from autoquant.events import Listener, Notice, ignore, logged
from autoquant.models import resolve_device, take_model
from autoquant.profiler.measure import with_original
from autoquant.profiler.record import record_model
from autoquant.profiler.timing import PROTOCOL
from autoquant.records import Objective, Recording, Workload, content_key
from autoquant.runtime.phases import default_workload, make_phases
from autoquant.solver.constraints import Constraints, bind
from autoquant.solver.limits import Limits
from autoquant.store import Store, open_store
from autoquant.store.connect import check_address
from autoquant.study.study import Study
from autoquant.tuner.budget import Budget
from autoquant.tuner.flow import run_stages
from autoquant.tuner.judge import Asked, make_judge, method_of
from autoquant.tuner.setup import SearchSetup

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
    started = time.monotonic()
    listener = logged(listener)
    place = resolve_device(device)
    check_address(db)
    pairs = select(candidates, place.partition(":")[0])
    if isinstance(workload, str):
        workload = Workload.parse(workload, batch)
    constraints = Constraints.parse(keep, pin, fusable)
    asked = Asked.of(eval_text, eval_data, quality)
    asked.check(sensitivity, max_kl)
    loaded = take_model(
        model,
        dtype=dtype,
        device=place,
        model_factory=model_factory,
        tokenizer=tokenizer,
        trust_pickle=trust_pickle,
        sample_inputs=sample_inputs,
    )
    inputs = loaded.example_inputs if sample_inputs is None or isinstance(sample_inputs, str) else sample_inputs
    judge = make_judge(asked, loaded, pairs, device=place, sample_inputs=inputs, seed=seed, listener=listener)
    measure, pairs = judge.quality, judge.candidates
    method = method_of(sensitivity, max_kl, measure)
    limits = Limits(
        max_ppl_increase=max_ppl_increase,
        max_kl=max_kl,
        max_memory_bytes=max_memory_bytes,
        minimize=minimize,
        measure="divergence" if isinstance(measure, OutputQuality) else "increase",
    )
    workload = workload or default_workload(loaded.kind, batch)
    make_phases(
        loaded.module, loaded.kind, workload, device=place, sample_inputs=inputs, max_positions=loaded.max_positions
    )
    hardware = backend(place).fingerprint()
    identity = {
        "model_hash": loaded.content_hash,
        "device": hardware.key,
        "workload": str(workload),
        "dtype": loaded.dtype,
        "quality": measure.key,
        "candidates": [candidate.id for candidate in pairs],
        "seed": seed,
        "protocol": PROTOCOL,
        "method": method.version,
    } | ({"fuse": True} if fuse else {})
    identity |= {"constraints": constraints.as_object()} if constraints.as_object() else {}
    store = open_store(db)
    study_id = content_key(identity, 8)
    chosen = with_original(pairs, loaded.dtype)
    recording = _known_recording(store, study_id, limits)
    if recording is None and constraints.as_object():  # refused before anything is written
        recording = record_model(loaded, workload, device=place, sample_inputs=inputs, listener=listener)
        bind(constraints, recording.sites, [each.id for each in chosen], chosen[0].format.id)
    store.put_device(hardware)
    store.put_model(loaded.content_hash, asdict(loaded.source))
    store.put_study(
        study_id,
        model_hash=loaded.content_hash,
        device=hardware,
        identity=identity,
        workload=workload,
        limits=limits.as_object(),
    )
    store.put_reference(study_id, "judge", {"words": judge.words})
    if isinstance(measure, TextQuality) and measure.parts.inputs is not None:
        store.put_calibration(study_id, measure.parts.inputs.tolist())
        if (count := len(measure.parts.inputs)) < ENOUGH_INPUT_WINDOWS:
            listener(Notice(f"weights are rounded for {count} windows of text only: a longer one serves -gptq better"))
    if recording is not None:
        store.update_study(study_id, recording=recording)
    setup = SearchSetup(
        store=store,
        study_id=study_id,
        loaded=loaded,
        quality=measure,
        workload=workload,
        device=place,
        hardware=hardware,
        candidates=chosen,
        sample_inputs=inputs,
        fuse=fuse,
        sensitivity=method,
        constraints=constraints,
        limits=limits,
        seed=seed,
        listener=listener,
    )
    _log.info("study %s in %s: %s candidates, workload %s", study_id, db, len(pairs), workload)
    run_stages(setup, Budget.of(store, study_id, time_budget_s, started))
    return Study(store, study_id)


def _known_recording(store: Store, study_id: str, limits: Limits) -> Recording | None:
    """What the store has recorded of this study, if anything. Where it has come further, the memory limit is checked."""
    if study_id not in store.studies():
        return None
    study = Study(store, study_id)
    if (space := study.space()) is not None:
        space.check_memory(limits.max_memory_bytes)
    return study.facts.recording
