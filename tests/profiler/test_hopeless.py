"""Candidates that other shapes rule out; latencies are made up."""

import pytest

from autoquant.profiler.hopeless import Hopeless
from autoquant.records import LinearShape, Measurement, TimingSubject

INT8 = "int8-row/plain"
PACKED, UNPACKED, ROUNDED = "int8pack-mm", "dequantize-matmul", "int-mm"
HERE = (1024, 1024)
OTHERS = ((512, 1024), (2048, 1024))


def subject(size=HERE, kernel=UNPACKED, m=1, working_set=1 << 20, dtype="bfloat16"):
    n, k = size
    return TimingSubject(
        shape=LinearShape(n=n, k=k, bias=False, dtype=dtype),
        m=m,
        format=INT8,
        kernel=kernel,
        working_set_bytes=working_set,
    )


def timed(latency_us, size, kernel=UNPACKED, outcome="ok", **where):
    samples = (latency_us,) if outcome == "ok" else ()
    return Measurement(
        subject=subject(size, kernel, **where), outcome=outcome, reason="", samples_us=samples
    )


def history(slow_us=30.0, sizes=OTHERS, rival=PACKED, **where):
    return [
        each
        for size in sizes
        for each in (timed(slow_us, size, **where), timed(10.0, size, rival, **where))
    ]


def ruled_out(timings, asked=None):
    return list(Hopeless(timings).among([asked or subject()], "cpu").values())


def test_a_kernel_that_was_far_behind_for_two_other_shapes_is_ruled_out_and_says_why():
    (found,) = ruled_out(history())
    assert (found.outcome, found.subject) == ("beaten", subject())
    expected = "took 3.0 to 3.0 times as long as int8pack-mm for 2 other shapes"
    assert found.reason == expected


@pytest.mark.parametrize(
    "timings",
    [
        history(slow_us=20.0),
        history(sizes=OTHERS[:1]),
        [*history(), *history(slow_us=12.0, sizes=[(1024, 2048)])],
        history(sizes=[(128, 128), (256, 128)]),
        history(m=512),
        history(working_set=1 << 30),
        history(dtype="float32"),
        history(rival=ROUNDED),
        [timed(30.0, size, outcome="failed") for size in OTHERS],
    ],
    ids=[
        "not far behind",
        "one shape",
        "close for a third shape",
        "weights of another size",
        "other rows",
        "weights less cold",
        "another dtype",
        "the faster one rounds activations",
        "not timed",
    ],
)
def test_it_is_timed_where_less_is_known(timings):
    assert not ruled_out(timings)


def test_a_rival_that_cannot_take_the_shape_rules_nothing_out():
    odd = subject((1024, 1023), ROUNDED, m=32)  # torch's int8 products need k divisible by 8
    timings = [
        each
        for size in OTHERS
        for each in (timed(30.0, size, ROUNDED, m=32), timed(10.0, size, "dynamic", m=32))
    ]
    assert not Hopeless(timings).among([odd], "cuda")
    assert Hopeless(timings).among([subject((1024, 1024), ROUNDED, m=32)], "cuda")


def test_later_timings_count():
    hopeless = Hopeless(history(sizes=OTHERS[:1]))
    hopeless.learn(history(sizes=OTHERS[1:]))
    assert hopeless.among([subject()], "cpu")
