"""The search: record, profile, score, solve, prove, refine. Every stage starts from what the store holds already."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from autoquant.candidates import Format, Kernel, get_format, select
from autoquant.candidates.floats import original_format
from autoquant.errors import CandidateError, TextError, WorkloadError
from autoquant.evaluators.quality import FunctionQuality, QualityFunction, TextQuality
from autoquant.evaluators.sensitivity import METHOD, Change, isolated_losses
from autoquant.evaluators.text import read_text
from autoquant.events import Listener, Notice, StageFinished, StageProgress, StageStarted, ignore
from autoquant.models import LoadedModel, from_module, load_model, resolve_device
from autoquant.profiler.device import compile_failure, fingerprint, release_memory
from autoquant.profiler.measure import profile, working_set_bytes
from autoquant.profiler.phases import make_phases
from autoquant.profiler.record import record
from autoquant.profiler.timing import PROTOCOL, first_line
from autoquant.records import (
    Device,
    LayerChoice,
    Plan,
    Proof,
    Recording,
    Site,
    Workload,
    content_key,
    route_kernel,
)
from autoquant.store import Store, open_store
from autoquant.store.connect import check_address
from autoquant.tuner.calibrate import fit, predicted
from autoquant.tuner.choices import SiteChoices, format_facts, scored, site_choices
from autoquant.tuner.planning import PlanContext, front_plans, original_plan, uniform_plans
from autoquant.tuner.prove import Prover
from autoquant.tuner.refine import proposals
from autoquant.tuner.study import Study

DEFAULT_LM_WORKLOAD = "prefill=512,decode=128"
DEFAULT_TOKEN_WORKLOAD = "prefill=512"
FRONT_PLANS = 6


def search(
    model: str | os.PathLike[str] | nn.Module,
    *,
    eval_text: str | os.PathLike[str] | None = None,
    db: str | os.PathLike[str] = "plan.db",
    device: str = "auto",
    dtype: str = "auto",
    workload: str | Workload | None = None,
    batch: int = 1,
    max_ppl_increase: float | None = 0.01,
    max_memory_bytes: int | None = None,
    candidates: Sequence[str] = ("*",),
    time_budget_s: float = 600.0,
    seed: int = 0,
    model_factory: str | None = None,
    tokenizer: Any | None = None,
    trust_pickle: bool = False,
    sample_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    quality: QualityFunction | None = None,
    listener: Listener = ignore,
) -> Study:
    """Find how to store and compute each linear of a model, and prove it.

    Args:
        model: A path (see `autoquant.models.load_model`) or a live module.
        eval_text: A UTF-8 text file that quality is measured on; needed unless `quality` is given.
        db: Path of the SQLite store, or an SQLAlchemy URL.
        workload: `prefill=TOKENS,decode=STEPS` or a `Workload`; for a module with sample inputs, one forward pass.
        max_ppl_increase: Limit of the recommended plan, a fraction (None: no limit).
        max_memory_bytes: Limit on the bytes of all parameters.
        candidates: Globs over `FORMAT/KERNEL`.
        time_budget_s: What refinement may fill up, counted over all runs of the same search.
        sample_inputs: Arguments (or keyword arguments) of one forward pass, for a module that is no language model.
        quality: The user's own loss, see `autoquant.evaluators.quality.QualityFunction`; named in the store by its qualified
            name, so give a changed function another name.
        listener: Told what is going on.

    Returns:
        The study. The same call on the same store goes on where an earlier one stopped, or re-solves at once.

    Raises:
        AutoquantError: Something the user can mend; the message says what.
    """
    started = time.monotonic()
    place = resolve_device(device)
    check_address(db)
    pairs = select(candidates)
    if isinstance(workload, str):
        workload = Workload.parse(workload, batch)
    if quality is None:
        _check_text(eval_text)
    loaded = _load(model, dtype, place, model_factory, tokenizer, trust_pickle)
    measure = _quality(loaded, eval_text, quality, place)
    workload = workload or _default_workload(loaded, batch)
    inputs = sample_inputs if sample_inputs is not None else loaded.example_inputs
    make_phases(
        loaded.module, loaded.kind, workload, device=place, sample_inputs=inputs, max_positions=loaded.max_positions
    )
    hardware = fingerprint(place)
    identity = {
        "model_hash": loaded.content_hash,
        "device": hardware.key,
        "workload": str(workload),
        "dtype": loaded.dtype,
        "quality": measure.key,
        "candidates": [f"{fmt.id}/{kernel.id}" for fmt, kernel in pairs],
        "seed": seed,
        "protocol": PROTOCOL,
        "method": METHOD,
    }
    store = open_store(db)
    study_id = content_key(identity, 8)
    store.put_device(hardware)
    store.put_model(loaded.content_hash, asdict(loaded.source))
    limits = {"max_ppl_increase": max_ppl_increase, "max_memory_bytes": max_memory_bytes}
    store.put_study(
        study_id,
        model_hash=loaded.content_hash,
        device=hardware,
        identity=identity,
        workload=workload,
        limits=limits,
    )
    run = _Search(
        store=store,
        study_id=study_id,
        loaded=loaded,
        quality=measure,
        workload=workload,
        device=place,
        hardware=hardware,
        candidates=_with_original(pairs, loaded.dtype),
        sample_inputs=inputs,
        max_ppl_increase=max_ppl_increase,
        max_memory_bytes=max_memory_bytes,
        time_budget_s=time_budget_s,
        seed=seed,
        listener=listener,
        started=started,
        spent_before_s=store.study(study_id).spent_s,
    )
    run.go()
    return Study(store, study_id)


@dataclass(slots=True, kw_only=True)
class _Search:
    """One run of a search."""

    store: Store
    study_id: str
    loaded: LoadedModel
    quality: TextQuality | FunctionQuality
    workload: Workload
    device: str
    hardware: Device
    candidates: list[tuple[Format, Kernel]]
    sample_inputs: Any
    max_ppl_increase: float | None
    max_memory_bytes: int | None
    time_budget_s: float
    seed: int
    listener: Listener
    started: float
    spent_before_s: float
    plans: dict[str, Plan] = field(default_factory=dict)
    proofs: dict[str, Proof] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def go(self) -> None:
        facts = self.store.study(self.study_id)
        if facts.complete and facts.spent_s >= self.time_budget_s:
            self.listener(Notice(f"study {self.study_id} is complete: solved again for the limits, nothing measured"))
            return self._recommend()
        if reason := compile_failure() if self.hardware.type == "cpu" else None:
            self.listener(Notice(f"running eagerly, since torch.compile does not work here: {reason}"))
        recording = facts.recording or self._record()
        options, originals = self._options(recording)
        self._prove_all(options, originals, recording)
        self._spend(complete=True)
        return self._recommend()

    # -- stages ----------------------------------------------------------------------------------------------------

    def _record(self) -> Recording:
        self.listener(StageStarted("record", len(self.workload.phases)))
        phases = make_phases(
            self.loaded.module,
            self.loaded.kind,
            self.workload,
            device=self.device,
            sample_inputs=self.sample_inputs,
            max_positions=self.loaded.max_positions,
        )
        recording = record(self.loaded.module, phases)
        if not recording.sites:
            raise WorkloadError("the model has no linear layer that this workload runs: nothing to search")
        flops = ", ".join(f"{share:.1%} of {phase}" for phase, share in recording.flops_share.items())
        shapes = len({site.shape for site in recording.sites})
        self.listener(
            StageFinished(
                "record",
                f"{len(recording.sites)} linears of {shapes} shapes: {recording.weights_share:.1%} of weights; FLOPs: {flops}",
            )
        )
        for skipped in recording.skipped:
            self.listener(Notice(f"left alone: {skipped.name} ({skipped.share:.1%} of weights): {skipped.reason}"))
        self.store.update_study(self.study_id, recording=recording)
        return recording

    def _options(self, recording: Recording) -> tuple[list[list[LayerChoice]], list[LayerChoice]]:
        """Scored choices per site, and the unquantized choice per site."""
        sites = recording.sites
        element_bytes = max(1, recording.parameter_bytes // max(1, _elements(self.loaded.module)))
        working_set = working_set_bytes(sites, self.hardware, element_bytes)
        timings = profile(
            sites,
            self.candidates,
            device=self.hardware,
            device_name=self.device,
            working_set=working_set,
            store=self.store,
            listener=self.listener,
        )
        self._spend()
        formats = list({fmt.id: fmt for fmt, _ in self.candidates}.values())
        facts = format_facts(formats, list(dict.fromkeys(site.shape for site in sites)), self.hardware.type)
        choices = [site_choices(site, self.candidates, timings, facts, self.workload, working_set) for site in sites]
        self._tell_dropped(choices)
        losses = self._score(choices)
        filled = [scored(choice, losses) for choice in choices]
        return [list(choice.choices) for choice in filled], [choice.original for choice in filled]

    def _tell_dropped(self, choices: Sequence[SiteChoices]) -> None:
        counts: dict[tuple[str, str], int] = {}
        for choice in choices:
            for format_id, reason in choice.dropped.items():
                counts[format_id, reason] = counts.get((format_id, reason), 0) + 1
        for (format_id, reason), count in counts.items():
            self.listener(Notice(f"{format_id} not considered for {count} of {len(choices)} layers: {reason}"))

    def _score(self, choices: Sequence[SiteChoices]) -> dict[tuple[str, str], float]:
        """Isolated losses of every numerics that a remaining choice uses, from the store or measured now."""
        key = (self.loaded.content_hash, f"{self.quality.key}-{self.loaded.dtype}", METHOD)
        known = self.store.losses(*key)
        changes = [
            change
            for choice in choices
            for change in _changes(choice)
            if (change.site.name, change.numerics) not in known
        ]
        sites = len({change.site.name for change in changes})
        self.listener(StageStarted("score", sites))
        done = 0

        def on_site(site: Site, losses: Mapping[tuple[str, str], float]) -> None:
            nonlocal done
            done += 1
            self.store.put_losses(*key, losses)
            self.listener(StageProgress("score", done, site.name))

        isolated_losses(self.loaded.module, changes, self.quality, on_site)
        self.listener(
            StageFinished("score", f"{len(changes)} changes of {sites} layers scored now, {len(known)} known")
        )
        self._spend()
        return self.store.losses(*key)

    def _prove_all(self, options: list[list[LayerChoice]], originals: list[LayerChoice], recording: Recording) -> None:
        self.plans = {plan.plan_id: plan for plan in self.store.plans(self.study_id)}
        self.proofs = self.store.proofs(self.study_id)
        self.failed = self.store.failed_proofs(self.study_id)
        context = PlanContext(
            study_id=self.study_id,
            model_hash=self.loaded.content_hash,
            dtype=self.loaded.dtype,
            workload=self.workload,
            other_bytes=recording.parameter_bytes - sum(choice.memory_bytes for choice in originals),
        )
        prover = Prover(
            loaded=self.loaded,
            workload=self.workload,
            quality=self.quality,
            device=self.device,
            execution="eager" if self.hardware.versions.get("compiler") == "none" else "compiled",
            sample_inputs=self.sample_inputs,
        )
        original = original_plan(originals, context)
        self.listener(StageStarted("prove", 1 + FRONT_PLANS))
        self._prove(prover, original)
        if original.plan_id not in self.proofs:
            raise CandidateError(f"the unquantized model cannot be run: {self.failed[original.plan_id]}")
        sites = recording.sites
        calibration = fit([original], self.proofs, sites)
        self.store.put_plan(predicted(original, calibration, sites, context))
        uniform = uniform_plans(options, originals, context)
        self.listener(StageStarted("prove", 1 + len(uniform) + FRONT_PLANS))
        for plan in uniform:
            self._prove(prover, predicted(plan, calibration, sites, context))
        calibration = fit([original, *uniform], self.proofs, sites)
        context = replace(context, rest_ms=calibration.rest_request_ms(self.workload.calls()))
        options = [
            [calibration.choice(choice, site) for choice in layer] for layer, site in zip(options, sites, strict=True)
        ]
        plans = front_plans(
            options,
            context,
            count=FRONT_PLANS,
            max_loss=self._expected_loss(),
            max_memory_bytes=self.max_memory_bytes,
        )
        for plan in plans:
            self._prove(prover, plan)
        self.listener(StageFinished("prove", f"{len(self.proofs)} plans proven, {len(self.failed)} failed"))
        self._refine(prover, options, context)

    def _prove(self, prover: Prover, plan: Plan) -> Proof | None:
        """Prove `plan` unless the store knows how that ends."""
        if plan.plan_id in self.proofs or plan.plan_id in self.failed:
            return self.proofs.get(plan.plan_id)
        self.listener(StageProgress("prove", len(self.proofs), plan.label))
        self.store.put_plan(plan)
        self.plans[plan.plan_id] = plan
        try:
            proof = prover.prove(plan)
        except Exception as error:  # noqa: BLE001 - a plan that cannot run is a fact about it, kept with its reason
            reason = first_line(error)
            self.failed[plan.plan_id] = reason
            self.store.put_proof(plan.plan_id, None, reason)
            self.listener(Notice(f"plan {plan.label} could not be proven: {reason}"))
            return None
        self.store.put_proof(plan.plan_id, proof)
        self.proofs[plan.plan_id] = proof
        self._spend()
        return proof

    def _expected_loss(self) -> float | None:
        """The summed loss that the limit is expected to allow, from how the proven plans' increase compares with theirs."""
        if self.max_ppl_increase is None:
            return None
        allowed = math.log1p(self.max_ppl_increase) if self.quality.logarithmic else self.max_ppl_increase
        ratios = []
        for plan_id, proof in self.proofs.items():
            loss = self.plans[plan_id].prediction.loss
            high = proof.selection_increase.high
            if self.plans[plan_id].kind == "uniform" and loss > allowed / 4 and math.isfinite(high) and high > 0:
                ratios.append((math.log1p(high) if self.quality.logarithmic else high) / loss)
        return allowed / (statistics.median(ratios) if ratios else 1.0)

    def _refine(self, prover: Prover, options: list[list[LayerChoice]], context: PlanContext) -> None:
        """Spend what is left of the time on plans that Optuna proposes."""
        known = {
            plan_id: (self.plans[plan_id], proof) for plan_id, proof in self.proofs.items() if plan_id in self.plans
        }
        self.listener(StageStarted("refine", 0))
        slowest_s, count = 0.0, 0
        for plan, tell in proposals(
            options,
            context,
            storage_url=self.store.engine.url.render_as_string(hide_password=False),
            seed=self.seed,
            known=known,
            max_memory_bytes=self.max_memory_bytes,
        ):
            if self._left_s() < max(slowest_s, _SHORTEST_PROOF_S):
                tell(None)
                break
            began = time.monotonic()
            self.listener(StageProgress("refine", count, f"{plan.label}, {self._left_s():.0f} s left"))
            tell(self._prove(prover, plan))
            slowest_s = max(slowest_s, time.monotonic() - began)
            count += 1
        self.listener(StageFinished("refine", f"{count} further plans proven"))

    # -- accounts --------------------------------------------------------------------------------------------------

    def _elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def _left_s(self) -> float:
        return self.time_budget_s - self.spent_before_s - self._elapsed_s()

    def _spend(self, *, complete: bool = False) -> None:
        spent = self.spent_before_s + self._elapsed_s()
        if complete:
            self.store.update_study(self.study_id, complete=True, spent_s=max(spent, self.time_budget_s))
        else:
            self.store.update_study(self.study_id, spent_s=spent)
        release_memory()

    def _recommend(self) -> None:
        best = Study(self.store, self.study_id).recommended()
        self.store.update_study(self.study_id, recommended=best.plan_id if best else None)


_SHORTEST_PROOF_S = 5.0


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in {id(p): p for p in module.parameters()}.values())


def _changes(choices: SiteChoices) -> list[Change]:
    """Every numerics that a choice of the site uses."""
    found: dict[str, Change] = {}
    for choice in choices.choices:
        fmt = get_format(choice.format)
        for use in choices.site.uses:
            kernel = fmt.kernel(route_kernel(choice.route, use.m))
            key = f"{fmt.values}+{kernel.numerics}"
            found.setdefault(key, Change(choices.site, key, fmt, kernel.numerics))
    return list(found.values())


def _with_original(pairs: Sequence[tuple[Format, Kernel]], dtype: str) -> list[tuple[Format, Kernel]]:
    """The candidates, and leaving the weight alone, which no glob can exclude."""
    original = get_format(original_format(dtype))
    rest = [(fmt, kernel) for fmt, kernel in pairs if fmt.id != original.id]
    return [*((original, kernel) for kernel in original.kernels), *rest]


def _load(
    model: str | os.PathLike[str] | nn.Module,
    dtype: str,
    device: str,
    model_factory: str | None,
    tokenizer: Any,
    trust_pickle: bool,
) -> LoadedModel:
    if isinstance(model, nn.Module):
        return from_module(model, device=device, dtype=None if dtype == "auto" else dtype, tokenizer=tokenizer)
    return load_model(
        model, dtype=dtype, device=device, model_factory=model_factory, tokenizer=tokenizer, trust_pickle=trust_pickle
    )


def _check_text(eval_text: str | os.PathLike[str] | None) -> None:
    if eval_text is None:
        raise TextError("no evaluation text: give --eval-text FILE (a plain UTF-8 text like what the model will read)")
    if not Path(eval_text).is_file():
        raise TextError(f"there is no text file at {eval_text}")


def _quality(
    loaded: LoadedModel, eval_text: str | os.PathLike[str] | None, quality: QualityFunction | None, device: str
) -> TextQuality | FunctionQuality:
    if quality is not None:
        return FunctionQuality(quality, f"{quality.__module__}.{quality.__qualname__}")
    if loaded.kind == "module":
        raise TextError(
            "this model takes no token ids, so text cannot judge it: call autoquant.search(..., quality=...)"
        )
    if loaded.tokenizer is None:
        raise TextError("this model has no tokenizer: give one with --tokenizer FOLDER")
    assert eval_text is not None  # _check_text saw to it
    return TextQuality(read_text(Path(eval_text), loaded.tokenizer, max_positions=loaded.max_positions), device)


def _default_workload(loaded: LoadedModel, batch: int) -> Workload:
    if loaded.kind == "causal_lm":
        return Workload.parse(DEFAULT_LM_WORKLOAD, batch)
    if loaded.kind == "token_lm":
        return Workload.parse(DEFAULT_TOKEN_WORKLOAD, batch)
    return Workload.single()
