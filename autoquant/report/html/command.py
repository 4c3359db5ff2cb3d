"""The command that a study came from."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autoquant.store import StudyFacts
from autoquant.store.addresses import shown_address
from autoquant.study.study import Study

_FUNCTIONS = ("model_factory", "tokenizer", "sample_inputs")
_EITHER_WAY = ("fuse",)
"""Options whose default depends on the device."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command line with an option a line, and a note on it."""

    text: str
    note: str


def search_command(study: Study) -> Command:
    """Return the command of a study, or one rebuilt from the study if the database lacks it."""
    kept = study.store.references(study.study_id).get("command")
    if kept is not None:
        return Command(
            _written(kept["options"]), "With every option that has a value, defaults among them."
        )
    facts = study.facts
    own_quality = all(proof.perplexity is None for proof in study.proofs().values())
    if not facts.source.get("path"):
        return Command(
            "",
            "The search was started from Python with a live module: no command repeats it.",
        )
    return Command(
        _written(dict(_known_options(facts, own_quality=own_quality))),
        "The database does not hold the command itself. This one is rebuilt from the study's "
        "facts. FILE stands for the text, of which only a key is known.",
    )


def _known_options(facts: StudyFacts, *, own_quality: bool) -> Iterator[tuple[str, Any]]:
    identity, limits, source = facts.identity, facts.limits, facts.source
    yield "model", source["path"]
    if limits.get("measure") == "divergence":
        pass  # the default for modules that read no text
    elif own_quality:
        yield "quality", ":".join(str(identity.get("quality", "")).rsplit(".", 1))
    else:
        yield "eval-text", "FILE"
    for name in _FUNCTIONS:
        if source.get(name):
            yield name.replace("_", "-"), source[name]
    yield "device", facts.device.type
    workload = str(facts.workload).partition(" ")[0]
    if not workload.startswith("forward"):
        yield "workload", workload
    yield "batch", facts.workload.batch
    if limits.get("max_ppl_increase") is not None:
        yield "max-ppl-increase", limits["max_ppl_increase"]
    if limits.get("max_memory_bytes") is not None:
        yield "max-memory", limits["max_memory_bytes"]
    yield "minimize", limits.get("minimize", "time")
    for name, value in facts.constraints.items():
        yield "for" if name == "engine" else name, value
    yield "candidates", list(identity.get("candidates", ()))
    yield "fuse", bool(identity.get("fuse"))
    if "method" in identity:
        yield "sensitivity", str(identity["method"]).rpartition("-")[0]
    yield "seed", identity.get("seed", 0)


def _written(options: Mapping[str, Any]) -> str:
    lines = [f"autoquant search {shlex.quote(str(options['model']))}"]
    for name, value in options.items():
        if name in _EITHER_WAY and value is False:
            lines.append(f"--no-{name}")
        if name == "model" or value is False:
            continue
        values = (
            value if isinstance(value, list) else [shown_address(value) if name == "db" else value]
        )
        given = (
            f"--{name}" if each is True else f"--{name} {shlex.quote(str(each))}" for each in values
        )
        lines.append(" ".join(given))
    return " \\\n    ".join(lines)
