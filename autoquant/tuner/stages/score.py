"""The score stage: what every choice of a layer is predicted to cost in quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autoquant.candidates.formats.floats import original_format
from autoquant.devices.memory import release_memory
from autoquant.engines import engine as find_engine
from autoquant.profiler.timing_table import TimingTable
from autoquant.records import LayerChoice, Recording, Site
from autoquant.solver.constraints import Bound, Constraints
from autoquant.solver.planning import PlanContext
from autoquant.solver.space import SearchSpace, complete
from autoquant.solver.tied import counted_once
from autoquant.tuner.choices import ChoiceMaker, Facts, SiteChoices, format_facts, scored
from autoquant.tuner.fusion import Fusion, make_fusion
from autoquant.tuner.notices import dropped_notices, fusion_notices
from autoquant.tuner.request import SettledRequest
from autoquant.tuner.scoring import Scores, score
from autoquant.tuner.serving import facts_for
from autoquant.tuner.setup import SearchSetup
from autoquant.tuner.tables import table_choices, table_notices
from autoquant.tuner.workers.in_process import Runner


def score_choices(
    setup: SearchSetup, recording: Recording, bound: Bound, timings: TimingTable, runner: Runner
) -> SearchSpace:
    """Make the choices of all layers from timings, score them, and return the search space.

    Raises:
        ConstraintError: Constraints leave a layer, or a group of layers, nothing that can be used.
    """
    settled, sites = setup.settled, recording.sites
    fusion = _make_fusion(setup, sites, timings)
    choices = _make_choices(setup, sites, bound, timings, fusion)
    choices += _make_table_choices(setup, recording.tables)
    scores = score(
        choices,
        method=settled.method,
        model_hash=settled.loaded.content_hash,
        quality_key=f"{settled.quality.key}-{settled.loaded.dtype}",
        device_type=settled.hardware.type,
        runner=runner,
        store=setup.store,
        listener=setup.listener,
    )
    release_memory()
    filled = [scored(each, scores.losses) for each in choices]
    options = bound.narrowed(complete([each.choices for each in filled]))
    originals = [each.original for each in filled]
    # Complete once more: narrowing may have left a joined choice in some of its layers only.
    return make_space(settled, recording, scores, bound, complete(options), originals, fusion)


def make_space(
    settled: SettledRequest,
    recording: Recording,
    scores: Scores,
    bound: Bound,
    options: Sequence[Sequence[LayerChoice]],
    originals: Sequence[LayerChoice],
    fusion: Fusion | None,
) -> SearchSpace:
    """Put scored options and what all plans have in common together."""
    searched_bytes = sum(choice.memory_bytes for choice in counted_once(originals))
    context = PlanContext(
        study_id=settled.study_id,
        model_hash=settled.loaded.content_hash,
        dtype=settled.loaded.dtype,
        workload=settled.workload,
        other_bytes=recording.parameter_bytes - searched_bytes,
        fusion=fusion.with_scores(options) if fusion else None,
        loss_map=scores.loss_map,
        bound=bound,
    )
    return SearchSpace(options, context, originals, logarithmic=settled.quality.logarithmic)


def _make_fusion(setup: SearchSetup, sites: Sequence[Site], timings: TimingTable) -> Fusion | None:
    if not setup.fuse:
        return None
    settled = setup.settled
    fusion = make_fusion(
        sites, settled.candidates, timings, settled.workload, settled.hardware.type
    )
    setup.tell(*fusion_notices(fusion))
    return fusion


def _make_choices(
    setup: SearchSetup,
    sites: Sequence[Site],
    bound: Bound,
    timings: TimingTable,
    fusion: Fusion | None,
) -> list[SiteChoices]:
    """Make the choices that constraints leave every site. They are not scored yet."""
    shapes = list(dict.fromkeys(site.shape for site in sites))
    settled, constraints = setup.settled, setup.settled.request.constraints
    measured: Facts = format_facts(setup.formats, shapes, setup.device)
    facts = facts_for(constraints.engine, measured)
    may_tie = constraints.engine is not None and find_engine(constraints.engine).target.ties
    maker = ChoiceMaker(
        settled.candidates, timings, facts, settled.workload, settled.hardware.type, may_tie
    )
    choices = [maker.constrained(site, constraints, bound) for site in sites]
    setup.tell(*dropped_notices(choices))
    if fusion is None:
        return choices
    return [_admitted(each, constraints, bound) for each in fusion.offered(choices, facts)]


def _make_table_choices(setup: SearchSetup, tables: Sequence[Site]) -> list[SiteChoices]:
    """Make the choices of tables. They are not scored yet."""
    constraints = setup.settled.request.constraints
    choices = [table_choices(each, setup.formats, constraints, setup.device) for each in tables]
    setup.tell(*table_notices(choices))
    return choices


def _admitted(choices: SiteChoices, constraints: Constraints, bound: Bound) -> SiteChoices:
    """Drop the choices that constraints or the engine bar a layer from."""
    original = original_format(choices.site.shape.dtype)

    def is_admitted(choice: LayerChoice) -> bool:
        candidates = [f"{choice.format}/{step.kernel}" for step in choice.route]
        return not any(bound.refuses(choice.name, each) for each in candidates) and all(
            constraints.admits(choice.name, each, original) for each in candidates
        )

    return replace(choices, choices=tuple(filter(is_admitted, choices.choices)))
