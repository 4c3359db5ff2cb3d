"""Plans for a whole model from single-layer timings: the fastest of some formats, and many of
different make.

No quality is asked for: weights are random. Every layer gets the fastest of what its make allows,
by its own timing; with `fused` layers that read the same input may be computed as one, which the
search's solver decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from autoquant.candidates import Candidate, get_format, select
from autoquant.candidates.formats.floats import original_format
from autoquant.devices import backend
from autoquant.models import LoadedModel, ModelSource
from autoquant.profiler.measure import cells_of, subjects_of, with_original
from autoquant.profiler.record import record
from autoquant.profiler.timing import PROTOCOL
from autoquant.profiler.timing_table import TimingTable
from autoquant.records import (
    LayerChoice,
    LinearShape,
    Measurement,
    Plan,
    Site,
    TimingSubject,
    Workload,
)
from autoquant.runtime.phases import make_phases
from autoquant.solver.planning import PlanContext, make_plan
from autoquant.solver.solve import fastest
from autoquant.solver.space import SearchSpace
from autoquant.store import open_store
from autoquant.tuner.choices import ChoiceMaker, FormatFacts, SiteChoices, format_facts
from autoquant.tuner.fusion import complete, fusion_subjects, make_fusion

DTYPE = "bfloat16"
EIGHT_BITS = ("float8*", "int8*")
FOUR_BITS = ("int4-g128*",)
ROWS = ("float8-row*",)
MLP, ATTENTION, EVEN_BLOCKS = r"\.mlp\.", r"\.self_attn\.", r"\.layers\.\d*[02468]\."


@dataclass(frozen=True, slots=True)
class Make:
    """What layers may get.

    Attributes: rules: (Pattern, globs over candidates), the first whose pattern is found in a
        layer's name; none: it stays as it is. forced: Leave a layer unquantized only where no
        allowed format works, not where none is faster.
    """

    rules: tuple[tuple[str, tuple[str, ...]], ...]
    fused: bool = False
    forced: bool = True


def every(*globs: str, fused: bool = False, forced: bool = True) -> Make:
    """The same for every layer."""
    return Make((("", globs),), fused, forced)


FASTEST = {
    "8 bits": every(*EIGHT_BITS, forced=False),
    "any bits": every(*EIGHT_BITS, *FOUR_BITS, forced=False),
    "4 bits": every(*FOUR_BITS),
    "float8 rows": every(*ROWS, forced=False),
}
FASTEST_FUSED = {
    "8 bits, fused": every(*EIGHT_BITS, fused=True, forced=False),
    "any bits, fused": every(*EIGHT_BITS, *FOUR_BITS, fused=True, forced=False),
    "4 bits, fused": every(*FOUR_BITS, fused=True),
}
DIFFERENT = {
    "float8 rows": every(*ROWS),
    "float8 rows, fused": every(*ROWS, fused=True),
    "int8 rows": every("int8-row*"),
    "int8 rows, fused": every("int8-row*", fused=True),
    "float8 tensor": every("float8-tensor*"),
    "4 bits": every(*FOUR_BITS),
    "attention 8 bits, fused": Make(((ATTENTION, ROWS),), fused=True),
    "mlp 8 bits, fused": Make(((MLP, ROWS),), fused=True),
    "mlp 8 bits": Make(((MLP, ROWS),)),
    "mlp 4 bits, the rest 8": Make(((MLP, FOUR_BITS), ("", ROWS))),
    "attention int8, the rest float8, fused": Make(
        ((ATTENTION, ("int8-row*",)), ("", ROWS)), fused=True
    ),
    "every second block 8 bits, fused": Make(((EVEN_BLOCKS, ROWS),), fused=True),
    "every second block 4 bits, others 8": Make(((EVEN_BLOCKS, FOUR_BITS), ("", ROWS))),
    "head alone 8 bits": Make(((r"lm_head", ROWS),)),
}


class TimingsMissing(Exception):
    """The database lacks timings; the message says how to make them."""


@dataclass(slots=True)
class Planner:
    """Makes plans for one model out of a database of timings."""

    sites: Sequence[Site]
    workload: Workload
    device: str
    timings: Mapping[TimingSubject, Measurement]
    working_set: int
    facts: dict[tuple[str, LinearShape], FormatFacts] = field(default_factory=dict)

    def plan(self, label: str, make: Make) -> Plan:
        """The fastest plan of that make."""
        options = {
            choices.site.name: _allowed(choices, make)
            for globs, sites in self._by_globs(make).items()
            for choices in self._choices(globs, sites, make.fused)
        }
        layers = complete([options[site.name] for site in self.sites])
        context = PlanContext(
            study_id="whole-model",
            model_hash="random",
            dtype=DTYPE,
            workload=self.workload,
            other_bytes=0,
        )
        space = SearchSpace(layers, context)
        picks = fastest(space.problem)
        assert picks is not None  # there are no budgets
        return make_plan(space.chosen(picks), label, "front", context)

    def linear_ms(self, plan: Plan | None) -> dict[str, float]:
        """Milliseconds of all linears in one run of each phase, by their own timings.

        Of the unquantized ones for None.
        """
        layers = plan.layers if plan else self.plan("original", Make(())).layers
        return {
            phase.name: sum(layer.latency_us.get(phase.name, 0.0) for layer in layers) / 1e3
            for phase in self.workload.phases
        }

    def check(self, makes: Sequence[Make], database: str, shapes: Path) -> None:
        """Refuse makes that the database lacks timings for.

        Args:
            shapes: Where to write what `autoquant profile` is to be given then.

        Raises:
            TimingsMissing: It does.
        """
        missing = [
            subject
            for make in makes
            for subject in self._subjects(make)
            if subject not in self.timings
        ]
        if not missing:
            return
        rows: dict[LinearShape, set[int]] = {}
        for subject in missing:
            rows.setdefault(subject.shape, set()).add(subject.m)
        lines = [
            f"{shape.n}x{shape.k} rows={','.join(map(str, sorted(all_m)))}\n"
            for shape, all_m in rows.items()
        ]
        shapes.write_text("".join(lines))
        globs = dict.fromkeys(subject.candidate for subject in missing)
        candidates = " ".join(f"--candidates '{glob}'" for glob in globs)
        raise TimingsMissing(
            f"{database} lacks {len(set(missing))} timings of {self.device}; make them by: "
            f"autoquant profile --shapes {shapes}"
            f" --device {self.device} --dtype bf16 --db {database} {candidates}"
        )

    def _by_globs(self, make: Make) -> dict[tuple[str, ...], list[Site]]:
        """The sites by what they may get."""
        found: dict[tuple[str, ...], list[Site]] = {}
        for site in self.sites:
            globs = next(
                (globs for pattern, globs in make.rules if re.search(pattern, site.name)), ()
            )
            found.setdefault(globs, []).append(site)
        return found

    def _candidates(self, globs: Sequence[str]) -> list[Candidate]:
        return with_original(select(globs, torch.device(self.device).type), DTYPE)

    def _subjects(self, make: Make) -> list[TimingSubject]:
        """Every timing that the make wants, less those of what does not work on the device."""
        wanted: list[TimingSubject] = []
        for globs, sites in self._by_globs(make).items():
            candidates = self._candidates(globs)
            wanted += subjects_of(cells_of(sites), candidates, self.working_set)
            if make.fused:
                wanted += fusion_subjects(sites, candidates, self.working_set)
        kind = torch.device(self.device).type
        return [
            subject
            for subject in wanted
            if not (fmt := get_format(subject.format)).unsupported_reason(
                fmt.kernel(subject.kernel), subject.shape, subject.m, kind
            )
        ]

    def _choices(
        self, globs: Sequence[str], sites: Sequence[Site], fused: bool
    ) -> list[SiteChoices]:
        candidates = self._candidates(globs)
        formats = {each.format.id: each.format for each in candidates}
        for shape in dict.fromkeys(site.shape for site in sites):
            new = [fmt for fmt in formats.values() if (fmt.id, shape) not in self.facts]
            self.facts |= format_facts(new, [shape], self.device)
        timings = TimingTable(self.working_set, self.timings)
        maker = ChoiceMaker(candidates, timings, self.facts, self.workload)
        choices = [maker.choices(site) for site in sites]
        if not fused:
            return choices
        fusion = make_fusion(sites, candidates, timings, self.workload)
        return fusion.offered(choices, self.facts)


def _allowed(choices: SiteChoices, make: Make) -> list[LayerChoice]:
    """What a site may get by a make."""
    quantized = [choice for choice in choices.choices if choice.format != original_format(DTYPE)]
    return quantized if make.forced and quantized else list(choices.choices)


def as_loaded(module: nn.Module) -> LoadedModel:
    """A causal language model built here, whose content nobody asks for."""
    return LoadedModel(
        module=module,
        content_hash="",
        source=ModelSource(kind="live"),
        tokenizer=None,
        kind="causal_lm",
        example_inputs=None,
        max_positions=None,
        stored_dtype=DTYPE,
    )


def make_planner(module: nn.Module, workload: Workload, device: str, database: str) -> Planner:
    """A planner for a causal language model on this machine's device."""
    exists = Path(database).exists()
    timings = (
        open_store(database, create=False).timings(backend(device).fingerprint(), PROTOCOL)
        if exists
        else {}
    )
    recording = record(module, make_phases(as_loaded(module), workload))
    working_set = max((subject.working_set_bytes for subject in timings), default=0)
    return Planner(recording.sites, workload, device, timings, working_set)
