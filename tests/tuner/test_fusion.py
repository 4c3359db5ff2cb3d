"""Siblings computed as one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoquant.candidates import get_format
from autoquant.records import LinearShape, Measurement, RouteStep, SiteUse, TimingSubject, layer_from, to_json
from autoquant.tuner.fusion import fusion_subjects, make_fusion, sibling_sites
from autoquant.tuner.planning import make_plan

from .made_up import CONTEXT, WORKING_SET, WORKLOAD, make_site

FORMAT = get_format("int8-row/plain")
CANDIDATES = [(FORMAT, FORMAT.kernel("int8pack-mm")), (FORMAT, FORMAT.kernel("int-mm"))]
Q, K, OTHER = "attn.q", "attn.k", "mlp.up"


def sites():
    shapes = {Q: 64, K: 32, OTHER: 128}
    siblings = {Q: (Q, K), K: (Q, K), OTHER: (OTHER,)}
    return [
        replace(make_site(name), shape=LinearShape(n=n, k=64, bias=False, dtype="bfloat16"), siblings=siblings[name])
        for name, n in shapes.items()
    ]


def choice(site, us, numerics="int8-row+a16", kernels=("int8pack-mm",), fmt="int8-row/plain"):
    from autoquant.records import LayerChoice

    route = tuple(
        RouteStep(upper_m=None if last else 4, kernel=kernel)
        for kernel, last in zip(kernels, [False] * (len(kernels) - 1) + [True], strict=True)
    )
    return LayerChoice(
        name=site.name,
        parameters=site.parameters,
        shape=site.shape,
        format=fmt,
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
    return make_fusion(sites(), CANDIDATES, timings, WORKLOAD, WORKING_SET)


def test_siblings_are_timed_at_the_shape_of_all_of_them():
    [(names, site)] = sibling_sites(sites())
    assert names == (Q, K) and (site.shape.n, site.shape.k) == (96, 64) and site.uses == sites()[0].uses
    subjects = fusion_subjects(sites(), CANDIDATES, WORKING_SET)
    assert {(subject.shape.n, subject.m) for subject in subjects} == {(96, 8), (96, 1)}
    assert isinstance(subjects[0], TimingSubject) and len(subjects) == 4


def test_only_sites_of_one_width_and_the_same_uses_are_siblings():
    q, k, other = sites()
    once = replace(k, uses=(SiteUse(phase="decode", m=1, calls=1),))
    assert sibling_sites([q, once, other]) == []


def test_formats_that_cannot_be_joined_are_not_timed_together():
    packed = get_format("int4-g32/cpu-packed")
    assert fusion_subjects(sites(), [(packed, packed.kernels[0])], WORKING_SET) == []


def test_siblings_of_one_format_are_joined_where_that_is_faster():
    q, k, other = sites()
    joined = fusion(weight_only_us=9.0).join([choice(q, 6.0), choice(k, 4.0), choice(other, 7.0)])
    assert [layer.joined for layer in joined] == [(Q, K), (Q, K), ()]
    assert joined[0].latency_us == {"prefill": 6.0, "decode": 6.0} and joined[1].latency_us["decode"] == pytest.approx(
        3.0
    )
    assert joined[0].loss == 0.5 and joined[0].memory_bytes == 64 * 64 and joined[2] == choice(other, 7.0)


@pytest.mark.parametrize("reason", ["slower", "another format", "less exact"])
def test_siblings_are_left_alone_where(reason):
    q, k, other = sites()
    first, second, us = choice(q, 6.0), choice(k, 4.0), (9.0, 99.0)
    if reason == "slower":
        us = (10.5, 99.0)
    elif reason == "another format":
        second = choice(k, 4.0, fmt="bfloat16/plain", numerics="bfloat16+a16", kernels=("matmul",))
    else:
        us = (99.0, 1.0)  # only the kernel that rounds activations is faster, which neither does now
    layers = [first, second, choice(other, 7.0)]
    assert fusion(*us).join(layers) == layers


def test_a_kernel_that_rounds_activations_is_used_where_every_member_rounds_them_already():
    q, k, other = sites()
    both = ("int8pack-mm", "int-mm")
    members = [choice(site, 6.0, "int8-row+a8-row", both) for site in (q, k)]
    joined = fusion(99.0, 1.0).join([*members, choice(other, 7.0)])
    assert joined[0].joined == (Q, K) and [step.kernel for step in joined[0].route] == ["int-mm"]


def test_changed_latencies_decide():
    q, k, other = sites()
    layers = [choice(q, 6.0), choice(k, 4.0), choice(other, 7.0)]
    twice = fusion(9.0).changed(
        lambda one, site: replace(one, latency_us={phase: 2 * us for phase, us in one.latency_us.items()})
    )
    assert twice.join(layers) == layers


def test_a_plan_is_another_one_when_its_layers_are_joined_and_is_predicted_so():
    layers = [choice(site, us) for site, us in zip(sites(), (6.0, 4.0, 7.0), strict=True)]
    alone = make_plan(layers, "plan", "front", CONTEXT)
    together = make_plan(layers, "plan", "front", replace(CONTEXT, fusion=fusion(9.0)))
    assert together.plan_id != alone.plan_id
    saved_ms = alone.prediction.request_ms - together.prediction.request_ms
    assert saved_ms == pytest.approx((1 + 4) * 1.0 / 1e3)
    assert make_plan(layers, "plan", "front", replace(CONTEXT, fusion=fusion(99.0))).plan_id == alone.plan_id


def test_a_joined_layer_comes_back_from_json():
    import json

    q, k, other = sites()
    joined = fusion(9.0).join([choice(q, 6.0), choice(k, 4.0), choice(other, 7.0)])[0]
    assert layer_from(json.loads(to_json(joined))) == joined
    old = {key: value for key, value in json.loads(to_json(joined)).items() if key != "joined"}
    assert layer_from(old).joined == ()
