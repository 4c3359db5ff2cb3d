"""What the parts of a search are expected to take, before they begin.

A rough guess by the amount of work is corrected by what earlier searches on the same device took
against the guess for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from autoquant.candidates import candidate_of
from autoquant.candidates.formats.floats import original_format
from autoquant.devices import backend
from autoquant.devices.base import Paces
from autoquant.errors import PlanError, StoreError
from autoquant.profiler.timing import PROTOCOL
from autoquant.records import Recording, TimingSubject
from autoquant.store import Store
from autoquant.study.study import Study
from autoquant.tuner.request import SettledRequest

WORK = "work"
"""Name of the reference with what a study had to do."""
LEAST_PROOFS = 3
"""The unquantized model, the uniform plan that is predicted best, and the search's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a search has to do.

    Attributes:
        timings: Timings that the store does not know.
        scores: Billions of weights to be scored, counted once for each format that can be used.
        linears: Of a whole model.
    """

    timings: int
    scores: float
    linears: int

    def guess(self, paces: Paces) -> dict[str, float]:
        """Return the seconds of each part at the paces of a device."""
        return {
            "profile": paces.timing_s * self.timings,
            "score": paces.score_s * self.scores,
            "proof": paces.proof_s + paces.proof_linear_s * self.linears,
            "deliver": paces.deliver_s + paces.deliver_linear_s * self.linears,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Seconds of the parts of a search.

    Attributes:
        proof_s: Of one plan.
        deliver_s: Of running the best plan as its user will.
        learnt: Whether an earlier search on the device bears it out.
    """

    profile_s: float
    score_s: float
    proof_s: float
    deliver_s: float
    learnt: bool

    @property
    def least_s(self) -> float:
        """The least that a search can do."""
        proofs_s = LEAST_PROOFS * self.proof_s
        return self.profile_s + self.score_s + proofs_s + self.deliver_s

    def words(self) -> str:
        """Return the parts of the least search in words."""
        parts = {
            "profile": self.profile_s,
            "score": self.score_s,
            f"{LEAST_PROOFS} proofs": LEAST_PROOFS * self.proof_s,
            "deliver": self.deliver_s,
        }
        basis = "as searches here took" if self.learnt else "roughly, for want of searches here"
        return f"{', '.join(f'{name} {value:.0f} s' for name, value in parts.items())}; {basis}"


def work_of(
    settled: SettledRequest, store: Store, recording: Recording, subjects: Sequence[TimingSubject]
) -> Work:
    """Return what is left to do of a study."""
    known = store.timings(settled.hardware, PROTOCOL)
    device_type = settled.hardware.type
    possible = [
        each
        for each in dict.fromkeys(subjects)
        if candidate_of(each).unsupported_reason(each.shape, each.m, device_type) is None
    ]
    weights = sum(site.weights for site in recording.sites)
    formats = {each.format for each in possible} - {original_format(settled.loaded.dtype)}
    scored = store.options(settled.study_id) is not None
    return Work(
        timings=len([each for each in possible if each not in known]),
        scores=0.0 if scored else weights * len(formats) / 1e9,
        linears=len(recording.sites),
    )


def keep_work(store: Store, study_id: str, work: Work) -> None:
    """Keep what a run of a study has to do, added to that of its earlier runs."""
    timings, scores = _kept(store, study_id)
    kept = {"timings": timings + work.timings, "scores": scores + work.scores}
    store.put_reference(study_id, WORK, kept)


def _kept(store: Store, study_id: str) -> tuple[int, float]:
    """Return the timings and scores that all runs of a study had to do."""
    kept = store.references(study_id).get(WORK, {"timings": 0, "scores": 0.0})
    return kept["timings"], kept["scores"]


def expect(settled: SettledRequest, store: Store, work: Work) -> Expected:
    """Return what a study is expected to take. Nothing is measured for it."""
    paces = backend(settled.loaded.device).paces
    took: dict[str, float] = {}
    guessed: dict[str, float] = {}
    for guess, seconds_of in _earlier(settled, store, paces):
        for part, seconds in seconds_of.items():
            if guess[part] > 0:
                took[part] = took.get(part, 0.0) + seconds
                guessed[part] = guessed.get(part, 0.0) + guess[part]
    expected = {
        part: seconds * took[part] / guessed[part] if part in took else seconds
        for part, seconds in work.guess(paces).items()
    }
    return Expected(
        profile_s=expected["profile"],
        score_s=expected["score"],
        proof_s=expected["proof"],
        deliver_s=expected["deliver"],
        learnt="proof" in took,
    )


def _earlier(
    settled: SettledRequest, store: Store, paces: Paces
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Return what studies on this device were guessed to take, and took.

    If there are any of the same model, only these.
    """
    same: list[tuple[dict[str, float], dict[str, float]]] = []
    other: list[tuple[dict[str, float], dict[str, float]]] = []
    for study_id in store.studies():
        try:
            facts = store.study(study_id)
            if facts.device.key != settled.hardware.key:
                continue
            timings, scores = _kept(store, study_id)
            linears = len(facts.recording.sites) if facts.recording else 0
            work = Work(timings=timings, scores=scores, linears=linears)
            pair = work.guess(paces), _seconds(Study(store, study_id))
        except (PlanError, StoreError):
            continue  # removed meanwhile, or damaged: what needs it says so
        is_same = facts.model_hash == settled.loaded.content_hash and "proof" in pair[1]
        (same if is_same else other).append(pair)
    return same or other


def _seconds(study: Study) -> dict[str, float]:
    """Return the seconds of the parts of a study, as far as they are known."""
    stages = study.stage_seconds()
    found: dict[str, float] = {
        part: stages[part] for part in ("profile", "score") if part in stages
    }
    originals = {plan.plan_id for plan in study.plans() if plan.kind == "original"}
    proofs = study.proofs()
    for part, parts in (
        ("proof", [proofs[each].seconds for each in proofs if each not in originals]),
        ("deliver", [each.seconds for each in study.deliveries().values()]),
    ):
        if totals := [sum(each.values()) for each in parts if each]:
            found[part] = fmean(totals)
    return found
