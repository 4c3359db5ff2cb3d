"""Siblings computed as one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders.records import WORKLOAD, make_choice, make_site
from builders.search import CONTEXT, WORKING_SET

from autoquant.candidates import Candidate, get_format
from autoquant.profiler.timing_table import TimingTable
from autoquant.records import (
    LayerChoice,
    LinearShape,
    Measurement,
    RouteStep,
    SiteUse,
    TimingSubject,
)
from autoquant.solver.front import front_plans
from autoquant.solver.planning import make_plan
from autoquant.solver.space import SearchSpace, complete
from autoquant.solver.uniform import uniform_plans
from autoquant.store.columns import to_json
from autoquant.tuner.choices import FormatFacts, SiteChoices, numerics_of, scored
from autoquant.tuner.fusion import fusion_subjects, make_fusion, sibling_sites
from autoquant.typed import read

FORMAT = get_format("int8-row/plain")
CANDIDATES = [Candidate(FORMAT, FORMAT.kernel(kernel)) for kernel in ("int8pack-mm", "int-mm")]
Q, K, OTHER = "attn.q", "attn.k", "mlp.up"


def sites():
    shapes = {Q: 64, K: 32, OTHER: 128}
    siblings = {Q: (Q, K), K: (Q, K), OTHER: (OTHER,)}
    return [
        replace(
            make_site(name),
            shape=LinearShape(n=n, k=64, bias=False, dtype="bfloat16"),
            siblings=siblings[name],
        )
        for name, n in shapes.items()
    ]


def choice(site, us, numerics="int8-row+a16", kernels=("int8pack-mm",), fmt="int8-row/plain"):
    route = tuple(
        RouteStep(upper_m=None if last else 4, kernel=kernel)
        for kernel, last in zip(kernels, [False] * (len(kernels) - 1) + [True], strict=True)
    )
    return make_choice(
        site.name,
        fmt,
        parameters=site.parameters,
        shape=site.shape,
        route=route,
        numerics=numerics,
        latency_us={"prefill": us, "decode": us},
        memory_bytes=site.shape.n * 64,
        loss=0.5,
    )


def fusion(weight_only_us=10.0, integer_us=99.0):
    """The whole of q and k takes these microseconds by one kernel and the other."""
    table = {"int8pack-mm": weight_only_us, "int-mm": integer_us}
    timings = {
        subject: Measurement(subject=subject, outcome="ok", samples_us=(table[subject.kernel],))
        for subject in fusion_subjects(sites(), CANDIDATES, WORKING_SET)
    }
    return make_fusion(sites(), CANDIDATES, TimingTable(WORKING_SET, timings), WORKLOAD, "cpu")


def test_siblings_are_timed_at_the_shape_of_all_of_them():
    [(names, site)] = sibling_sites(sites())
    assert (
        names == (Q, K)
        and (site.shape.n, site.shape.k) == (96, 64)
        and site.uses == sites()[0].uses
    )
    subjects = fusion_subjects(sites(), CANDIDATES, WORKING_SET)
    assert {(subject.shape.n, subject.m) for subject in subjects} == {(96, 8), (96, 1)}
    assert isinstance(subjects[0], TimingSubject) and len(subjects) == 4


def test_only_sites_of_one_width_and_the_same_uses_are_siblings():
    q, k, other = sites()
    once = replace(k, uses=(SiteUse(phase="decode", m=1, calls=1),))
    assert sibling_sites([q, once, other]) == []


def test_formats_that_cannot_be_joined_are_not_timed_together():
    packed = get_format("int4-g32/cpu-packed")
    assert fusion_subjects(sites(), [Candidate(packed, packed.kernels[0])], WORKING_SET) == []


def scored_fusion(*us, missing=()):
    whole = fusion(*us)
    return whole.with_scores(with_losses(offered(whole), missing))


def test_siblings_of_one_format_are_joined_where_that_is_faster():
    q, k, other = sites()
    joined = scored_fusion(9.0).join([choice(q, 6.0), choice(k, 4.0), choice(other, 7.0)])
    assert [layer.joined for layer in joined] == [(Q, K), (Q, K), ()]
    assert joined[0].latency_us == {"prefill": 6.0, "decode": 6.0} and joined[1].latency_us[
        "decode"
    ] == pytest.approx(3.0)
    assert (
        joined[0].loss == 0.25
        and joined[0].memory_bytes == 64 * 64
        and joined[2] == choice(other, 7.0)
    )


@pytest.mark.parametrize("reason", ["slower", "another format", "less exact"])
def test_siblings_are_left_alone_where(reason):
    q, k, other = sites()
    first, second, us = choice(q, 6.0), choice(k, 4.0), (9.0, 99.0)
    if reason == "slower":
        us = (10.5, 99.0)
    elif reason == "another format":
        second = choice(k, 4.0, fmt="bfloat16/plain", numerics="bfloat16+a16", kernels=("matmul",))
    else:
        us = (
            99.0,
            1.0,
        )  # only the kernel that rounds activations is faster, which neither does now
    layers = [first, second, choice(other, 7.0)]
    assert scored_fusion(*us).join(layers) == layers


def test_a_kernel_that_rounds_activations_is_used_where_every_member_rounds_them_already():
    q, k, other = sites()
    both = ("int8pack-mm", "int-mm")
    members = [choice(site, 6.0, "int8-row+a8-row", both) for site in (q, k)]
    joined = scored_fusion(99.0, 1.0).join([*members, choice(other, 7.0)])
    assert joined[0].joined == (Q, K) and [step.kernel for step in joined[0].route] == ["int-mm"]


def test_what_one_member_rounds_all_may_round_with_their_own_losses_for_it():
    q, k, other = sites()
    rounding = choice(q, 6.0, "int8-row+a8-row", ("int8pack-mm", "int-mm"))
    joined = scored_fusion(99.0, 1.0).join([rounding, choice(k, 6.0), choice(other, 7.0)])
    assert [layer.joined for layer in joined] == [(Q, K), (Q, K), ()]
    assert [(layer.numerics, layer.loss) for layer in joined[:2]] == [("int8-row+a8-row", 0.25)] * 2


def test_members_keep_their_numerics_true_where_they_are_joined_to_a_kernel_that_rounds_nothing():
    q, k, other = sites()
    rounding = choice(q, 6.0, "int8-row+a8-row", ("int8pack-mm", "int-mm"))
    joined = scored_fusion(1.0, 99.0).join([rounding, choice(k, 6.0), choice(other, 7.0)])
    assert [layer.numerics for layer in joined[:2]] == ["int8-row+a16"] * 2


def test_siblings_of_which_one_was_not_scored_as_one_are_left_alone():
    q, k, other = sites()
    layers = [choice(q, 6.0), choice(k, 4.0), choice(other, 7.0)]
    assert scored_fusion(9.0, missing=[(K, "int8-row+a16")]).join(layers) == layers


def unquantized(site, us=5.0):
    return choice(site, us, "bfloat16+a16", ("matmul",), "bfloat16/plain")


def offered(whole, memory=64 * 64):
    """Options of all sites: q is fastest unquantized, k by int8; both as one by int8 where they are members."""
    q, k, other = sites()
    alone = {
        Q: [unquantized(q), choice(q, 6.0)],
        K: [unquantized(k), choice(k, 4.0)],
        OTHER: [unquantized(other)],
    }
    facts = {("int8-row/plain", site.shape): FormatFacts(memory, 0.01) for site in (q, k)}
    return whole.offered(
        [SiteChoices(site, tuple(alone[site.name]), {}) for site in sites()], facts
    )


def with_losses(choices, missing=()):
    losses = {
        (site.name, key): 0.25 for site in sites() for key in ("int8-row+a16", "int8-row+a8-row")
    }
    losses |= {(site.name, "bfloat16+a16"): 0.0 for site in sites()}
    known = {key: loss for key, loss in losses.items() if key not in missing}
    return complete([scored(one, known).choices for one in choices])


def fastest_plan(options):
    return front_plans(
        SearchSpace(options, CONTEXT), count=1, max_loss=None, max_memory_bytes=None
    )[0]


def test_members_that_would_get_different_formats_alone_are_one_where_that_is_faster_than_both():
    plan = fastest_plan(with_losses(offered(fusion(8.5))))
    assert [(layer.format, layer.joined) for layer in plan.layers] == [
        ("int8-row/plain", (Q, K)),
        ("int8-row/plain", (Q, K)),
        ("bfloat16/plain", ()),
    ]
    assert sum(layer.latency_us["prefill"] for layer in plan.layers[:2]) == pytest.approx(8.5)
    assert [layer.loss for layer in plan.layers] == [0.25, 0.25, 0.0]
    apart = fastest_plan(with_losses(offered(fusion(9.5))))
    assert [(layer.format, layer.joined) for layer in apart.layers] == [
        ("bfloat16/plain", ()),
        ("int8-row/plain", ()),
        ("bfloat16/plain", ()),
    ]


def test_what_is_offered_as_one_names_all_numerics_so_that_each_member_is_scored_for_it():
    both = [one for one in offered(fusion(8.5, 1.0))[0].choices if one.joined]
    assert {str(key) for one in both for key in numerics_of(one)} == {
        "int8-row+a16",
        "int8-row+a8-row",
    }
    assert {one.memory_bytes for one in both} == {64 * 64}


def test_nothing_is_one_of_which_a_member_was_not_scored():
    options = with_losses(offered(fusion(1.0)), missing=[(K, "int8-row+a16")])
    assert not any(one.joined for layer in options for one in layer)


def test_a_format_that_a_member_cannot_have_is_not_offered_for_all():
    q, _, _ = sites()
    choices = [SiteChoices(site, (unquantized(site),), {}) for site in sites()]
    facts = {("int8-row/plain", q.shape): FormatFacts(1, 0.01)}
    assert fusion(1.0).offered(choices, facts) == choices


def test_uniform_plans_join_what_they_chose_layer_by_layer():
    options = with_losses(offered(fusion(9.0)))
    context = replace(CONTEXT, fusion=fusion(9.0).with_scores(options))
    [plan] = uniform_plans(SearchSpace(options, context, [layer[0] for layer in options]))
    assert [layer.joined for layer in plan.layers] == [(Q, K), (Q, K), ()]
    apart = uniform_plans(SearchSpace(options, CONTEXT, [layer[0] for layer in options]))[0]
    assert not any(layer.joined for layer in apart.layers)


def test_the_reason_of_a_choice_says_where_another_one_is_as_one_with_others():
    options = with_losses(offered(fusion(7.0)))
    exact = front_plans(
        SearchSpace(options, CONTEXT), count=1, max_loss=0.0, max_memory_bytes=None
    )[0]
    assert "faster int8-row/plain as one with others would take" in exact.layers[0].reason


def test_a_group_that_was_not_timed_says_why():
    failed = {
        subject: Measurement(subject=subject, outcome="unsupported", reason="too wide")
        for subject in fusion_subjects(sites(), CANDIDATES, WORKING_SET)
    }
    [group] = make_fusion(
        sites(), CANDIDATES, TimingTable(WORKING_SET, failed), WORKLOAD, "cpu"
    ).groups
    assert group.choices == () and list(group.reasons()) == ["int8-row/plain: too wide"]


def test_a_plan_is_another_one_when_its_layers_are_joined_and_is_predicted_so():
    layers = [choice(site, us) for site, us in zip(sites(), (6.0, 4.0, 7.0), strict=True)]
    alone = make_plan(layers, "plan", "front", CONTEXT)
    together = make_plan(layers, "plan", "front", replace(CONTEXT, fusion=scored_fusion(9.0)))
    assert together.plan_id != alone.plan_id
    saved_ms = alone.prediction.request_ms - together.prediction.request_ms
    assert saved_ms == pytest.approx((1 + 4) * 1.0 / 1e3)
    assert (
        make_plan(layers, "plan", "front", replace(CONTEXT, fusion=fusion(99.0))).plan_id
        == alone.plan_id
    )


def test_a_joined_layer_comes_back_from_json():
    import json

    q, k, other = sites()
    joined = fusion(9.0).join([choice(q, 6.0), choice(k, 4.0), choice(other, 7.0)])[0]
    assert read(LayerChoice, to_json(joined)) == joined
    old = {key: value for key, value in json.loads(to_json(joined)).items() if key != "joined"}
    assert read(LayerChoice, json.dumps(old)).joined == ()
