"""The facts behind a study's numbers: model, device, versions, workload, text and limits."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from autoquant.records import Workload
from autoquant.report import units
from autoquant.report.words import (
    constraints_words,
    engine_lines,
    exception_lines,
    limits_words,
    memory_words,
)
from autoquant.store import StudyFacts
from autoquant.study.study import Study

Fact = tuple[str, str]
_PARTS = (
    "its windows are dealt to three disjoint parts: calibration scores single layers, selection "
    "checks the limits, and report gives the perplexities shown here"
)


def about(study: Study) -> list[Fact]:
    """Return the known facts as (term, words)."""
    facts = study.facts
    return [fact for fact in _facts(study, facts) if fact[1]]


def _facts(study: Study, facts: StudyFacts) -> Iterator[Fact]:
    device, identity = facts.device, facts.identity
    yield "Model", str(facts.source.get("path") or "a live module")
    yield "Content hash", facts.model_hash
    yield "Unquantized as", str(identity.get("dtype", ""))
    yield "Device", device.name
    yield "Capability", device.capability
    yield "Threads", str(device.threads or "")
    yield "Last-level cache", units.size(device.cache_bytes)
    yield "Versions", ", ".join(f"{name} {version}" for name, version in device.versions.items())
    yield "Workload", workload_words(facts.workload)
    yield "Quality", _quality(study, facts)
    yield "Sensitivity", str(identity.get("method", ""))
    yield "Limits", limits_words(facts.limits)
    yield "Constraints", constraints_words(facts.constraints)
    yield "Engine", " ".join(engine_lines(study.constraints.engine, "plan.db"))
    yield "Layers as one", "tried where layers read the same input" if identity.get("fuse") else ""
    yield (
        "Candidates",
        f"{len(identity.get('candidates', ()))} pairs of format and kernel, and unquantized",
    )
    yield "Seed", str(identity.get("seed", ""))
    yield "Timing protocol", str(identity.get("protocol", ""))
    yield "Time spent", units.clock_s(facts.spent_s)
    yield "Exceptions", " ".join(exception_lines(study.proofs().values()))
    yield "Most memory", memory_words(study.stage_memory())
    yield "Study", f"{facts.study_id}{'' if facts.complete else ', not finished'}"
    yield "Report made by", f"autoquant {metadata.version('autoquant')}"


def workload_words(workload: Workload) -> str:
    """Return one request in words."""
    phases = [
        f"{phase.calls} x {phase.name}{f' of {phase.tokens} tokens' if phase.tokens > 1 else ''}"
        for phase in workload.phases
    ]
    return f"{', '.join(phases)}; batch {workload.batch}"


def _quality(study: Study, facts: StudyFacts) -> str:
    key = str(facts.identity.get("quality", ""))
    is_text = _is_text(study)
    kept = study.store.references(study.study_id)
    words = kept.get("judge", {}).get("words")
    if words is None:
        # A study of an older version.
        path = kept.get("command", {}).get("options", {}).get("eval-text")
        text = f"the text {path or 'given to the search'}{f' (key {key})' if key else ''}"
        words = text if is_text else f"a loss of the user's own, {key}" if key else ""
    return f"{words}; {_PARTS}" if is_text else words


def _is_text(study: Study) -> bool:
    return any(proof.perplexity is not None for proof in study.proofs().values())
