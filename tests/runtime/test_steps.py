"""Accounts of one step."""

import pytest

from autoquant.runtime.steps import LINEAR, KernelTime, StepProfile, glue_kind, median_step


def kernel(name, start_us, duration_us, *layers, kind=None):
    return KernelTime(
        name=name,
        kind=kind or (LINEAR if layers else "norms"),
        layers=layers,
        start_us=start_us,
        duration_us=duration_us,
    )


STEP = StepProfile(
    phase="decode",
    step_us=100.0,
    kernels=(
        kernel("norm", 5.0, 10.0),
        kernel("mm", 15.0, 30.0, "q", "k"),
        kernel("softmax", 50.0, 20.0, kind="attention"),
        kernel("mm", 70.0, 25.0, "down"),
    ),
)


def test_kernels_and_gaps_add_up_to_the_step():
    assert STEP.gaps() == [(0.0, 5.0), (45.0, 5.0), (95.0, 5.0)]
    assert STEP.gaps_us() == pytest.approx(sum(duration for _, duration in STEP.gaps()))
    layers, glue = STEP.layer_us({}), STEP.glue_us()
    assert sum(layers.values()) + sum(glue.values()) + STEP.gaps_us() == pytest.approx(STEP.step_us)
    assert glue == {"attention": 20.0, "norms": 10.0}


def test_layers_computed_as_one_share_the_time_in_the_given_proportion():
    assert STEP.layer_us({"q": 20.0, "k": 10.0}) == {"q": 20.0, "k": 10.0, "down": 25.0}
    assert STEP.layer_us({}) == {"q": 15.0, "k": 15.0, "down": 25.0}


def test_a_disturbance_of_one_repetition_does_not_count():
    def repetition(gap_us, duration_us):
        first = kernel("mm", gap_us, duration_us, "q")
        last = kernel("norm", gap_us + duration_us + 1.0, 2.0)
        return StepProfile(
            phase="decode", step_us=gap_us + duration_us + 4.0, kernels=(first, last)
        )

    median = median_step([repetition(1.0, 10.0), repetition(1.0, 900.0), repetition(500.0, 11.0)])
    assert [(each.start_us, each.duration_us) for each in median.kernels] == [
        (1.0, 11.0),
        (13.0, 2.0),
    ]
    assert median.step_us == pytest.approx(16.0) and median.gaps_us() == pytest.approx(3.0)


def test_repetitions_that_ran_other_kernels_are_not_mixed():
    short = StepProfile(phase="decode", step_us=5.0, kernels=(kernel("a", 0.0, 5.0),))
    long = StepProfile(phase="decode", step_us=9.0, kernels=(kernel("b", 0.0, 9.0),))
    assert median_step([long, short, long]) is long


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        (
            "aten::_scaled_dot_product_cudnn_attention void cudnn::fusion::lean_reduction_kernel",
            "attention",
        ),
        ("aten::bmm", "attention"),
        ("cpp_fused__scaled_dot_product_flash_attention_for_cpu_clone_3", "copies and casts"),
        (
            "triton_red_fused__to_copy_abs_amax_arange_bmm_cat_clamp_mean_rsqrt_2",
            "activation rounding",
        ),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_14", "norms"),
        (
            "triton_poi_fused__to_copy__unsafe_view_add_arange_bmm_cat_clone_cos_embedding",
            "copies and casts",
        ),
        ("aten::copy_ Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("triton_poi_fused__to_copy_bmm_cat_cos_mul_silu_3", "other"),
        ("TorchDynamo Cache Lookup", "guards of compiled code"),
    ],
)
def test_what_belongs_to_no_layer_is_sorted_by_what_its_name_says(name, kind):
    assert glue_kind(name) == kind
