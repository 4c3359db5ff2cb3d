"""The weight that a plan puts into a model."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates import get_format, known_formats
from autoquant.candidates import routed as routed_module
from autoquant.candidates.flat import flatten_tensor, move_tensor, stored_bytes, unflatten_tensor
from autoquant.candidates.routed import RoutedWeight
from autoquant.errors import CandidateError
from autoquant.records import LinearShape, RouteStep

SHAPE = LinearShape(n=64, k=128, bias=True, dtype="bfloat16")
FORMATS = [
    fmt.id
    for fmt in known_formats().values()
    if not fmt.rounds and fmt.unsupported_reason(fmt.kernels[0], SHAPE, 4, "cpu") is None
]


def routed(format_id, *, seed=0):
    """A weight that uses the format's first kernel up to 4 rows and its last one that works here
    beyond.
    """
    fmt = get_format(format_id)
    usable = [
        kernel for kernel in fmt.kernels if fmt.unsupported_reason(kernel, SHAPE, 9, "cpu") is None
    ]
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
    route = (
        RouteStep(upper_m=4, kernel=usable[0].id),
        RouteStep(upper_m=None, kernel=usable[-1].id),
    )
    return RoutedWeight.wrap(fmt.sample(weight), format_id, route, torch.bfloat16)


def spy_weight(upper=4):
    route = (RouteStep(upper_m=upper, kernel="few"), RouteStep(upper_m=None, kernel="many"))
    return RoutedWeight.wrap(torch.eye(8), "spy/plain", route, torch.float32)


def bits(tensor):
    return [
        part.contiguous().reshape(-1).view(torch.uint8).clone()
        for part in flatten_tensor(tensor)[0]
    ]


def assert_same(weight, other):
    assert type(other) is RoutedWeight or isinstance(other, nn.Parameter)
    assert (other.shape, other.dtype) == (weight.shape, weight.dtype)
    assert (other.format_id, other.route, other.compute_dtype) == (
        weight.format_id,
        weight.route,
        weight.compute_dtype,
    )
    assert all(torch.equal(a, b) for a, b in zip(bits(weight), bits(other), strict=True))
    assert type(other.stored) is type(weight.stored)
    for m in (2, 9):
        x = torch.randn(m, 128, generator=torch.Generator().manual_seed(m)).bfloat16()
        assert torch.equal(F.linear(x, weight), F.linear(x, other))


@pytest.mark.parametrize(
    ("rows", "kernel"),
    [((1,), "few"), ((4,), "few"), ((5,), "many"), ((2, 2), "few"), ((2, 3), "many"), ((), "few")],
)
def test_the_kernel_is_picked_by_the_rows_of_the_activation(spy, rows, kernel):
    _, calls = spy
    x = torch.randn(*rows, 8)
    y = F.linear(x, spy_weight())
    assert calls == [kernel]
    torch.testing.assert_close(y, x * (1 if kernel == "few" else 2))


def test_the_bias_reaches_the_kernel(spy):
    x, bias = torch.randn(3, 8), torch.randn(8)
    weight = spy_weight()
    torch.testing.assert_close(F.linear(x, weight, bias), x + bias)
    torch.testing.assert_close(F.linear(x, weight, bias=bias), x + bias)


def test_a_linear_called_by_keywords_is_routed_too(spy):
    x = torch.randn(3, 8)
    torch.testing.assert_close(F.linear(x, weight=spy_weight()), x)
    torch.testing.assert_close(F.linear(input=x, weight=spy_weight(), bias=None), x)


def test_the_aten_operator_is_routed_too(spy):
    _, calls = spy
    torch.ops.aten.linear.default(torch.randn(9, 8), spy_weight())
    assert calls == ["many"]


def test_compiled_code_holds_the_kernel_of_its_own_rows(spy):
    torch._dynamo.reset()
    module = nn.Linear(8, 8, bias=False)
    module.weight = nn.Parameter(spy_weight(), requires_grad=False)
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")
    few, many = torch.randn(4, 8), torch.randn(5, 8)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(few), few)
            torch.testing.assert_close(compiled(many), 2 * many)


@pytest.mark.parametrize(
    ("format_id", "kernel"),
    [
        ("int8-row/plain", "int-mm"),
        ("int8-row/plain", "int8pack-mm"),
        ("int8-row/plain", "dynamic"),
        ("int4-g32/cpu-packed", "int4pack-mm"),
        ("nvfp4/swizzled", "emulated"),
        ("int3-g32/bit-planes", "dequantize-matmul"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_an_activation_is_that_of_the_numbers(format_id, kernel, dtype):
    chosen, plain = get_format(format_id), torch.randn(64, 64).bfloat16()
    stored = chosen.quantize(plain)
    route = (RouteStep(upper_m=None, kernel=kernel),)
    weight = RoutedWeight.wrap(stored, format_id, route, torch.bfloat16)
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    bias = torch.zeros(64, dtype=dtype, requires_grad=True)
    y = F.linear(x, weight, bias)
    of_y = torch.randn_like(y)
    y.backward(of_y)
    with torch.no_grad():
        assert torch.equal(F.linear(x, weight, bias), y)
    expected = of_y.float() @ chosen.dequantize(stored)
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.01, atol=0.05)
    torch.testing.assert_close(bias.grad, of_y.sum((0, 1)), rtol=0.02, atol=0.05)


def test_a_kernel_that_the_format_lacks_is_an_error(spy):
    weight = RoutedWeight.wrap(
        torch.eye(8), "spy/plain", (RouteStep(upper_m=None, kernel="none"),), torch.float32
    )
    with pytest.raises(CandidateError, match="no kernel 'none'"):
        F.linear(torch.randn(1, 8), weight)


def test_a_routed_weight_shows_the_models_dtype_and_no_gradient():
    weight = routed("float16/plain")
    assert (weight.dtype, weight.stored.dtype, weight.requires_grad) == (
        torch.bfloat16,
        torch.float16,
        False,
    )
    assert weight.shape == (64, 128) and weight.device.type == "cpu"


@pytest.mark.parametrize("format_id", ["int8-row/plain", "int4-g32/cpu-packed"])
def test_a_routed_weight_is_shown_in_a_line_without_its_numbers(format_id):
    weight = nn.Parameter(routed(format_id), requires_grad=False)
    shown = repr(weight)
    assert format_id in shown and weight.route[0][1] in shown
    assert len(shown) < 120 and "\n" not in shown


def test_a_routed_weight_gives_back_its_route_and_its_numbers():
    weight = routed("int8-row/plain")
    assert weight.steps() == (
        RouteStep(upper_m=4, kernel="cpu-rows"),
        RouteStep(upper_m=None, kernel="int-mm"),
    )
    assert torch.equal(weight.dequantize(), get_format("int8-row/plain").dequantize(weight.stored))


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_routed_weight_is_saved_and_loaded_without_pickled_code(format_id):
    weight = routed(format_id)
    file = io.BytesIO()
    torch.save({"weight": nn.Parameter(weight, requires_grad=False)}, file)
    file.seek(0)
    assert_same(weight, torch.load(file, weights_only=True)["weight"])


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_routed_weight_is_assigned_to_a_model_without_memory(format_id):
    weight = routed(format_id)
    bias = torch.randn(64).bfloat16()
    with torch.device("meta"):
        module = nn.Linear(128, 64, dtype=torch.bfloat16)
    module.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    assert_same(weight, module.weight)
    x = torch.randn(9, 128).bfloat16()
    with torch.no_grad():
        assert torch.equal(module(x), F.linear(x, weight, bias))


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_routed_weight_is_copied_with_its_model(format_id):
    module = nn.Linear(128, 64, bias=False)
    module.weight = nn.Parameter(routed(format_id), requires_grad=False)
    copied = copy.deepcopy(module)
    assert_same(module.weight, copied.weight)
    for part, other in zip(
        flatten_tensor(module.weight)[0], flatten_tensor(copied.weight)[0], strict=True
    ):
        assert part.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_model_with_a_routed_weight_moves_to_another_device(format_id):
    module = nn.Linear(128, 64, dtype=torch.bfloat16)
    module.weight = nn.Parameter(routed(format_id), requires_grad=False)
    module.to("meta")
    weight = module.weight.data
    assert type(weight) is RoutedWeight and weight.route == routed(format_id).route
    assert {part.device.type for part in (weight, weight.stored, *flatten_tensor(weight)[0])} == {
        "meta"
    }
    assert type(weight.stored) is get_format(format_id).tensor_type


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_moved_tensor_is_the_same_and_a_copy_has_its_own_memory(format_id):
    weight = routed(format_id)
    moved, copied = weight.to("cpu"), weight.to("cpu", copy=True)
    assert_same(weight, moved)
    assert_same(weight, copied)
    assert_same(weight, move_tensor(weight, "cpu"))
    for part, same, other in zip(
        *(flatten_tensor(t)[0] for t in (weight, moved, copied)), strict=True
    ):
        assert part.data_ptr() == same.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("format_id", FORMATS)
@torch.no_grad()
def test_a_cast_of_the_model_leaves_its_routed_weights_as_they_are(format_id, dtype):
    module = nn.Linear(128, 64, dtype=torch.bfloat16)
    module.weight = nn.Parameter(routed(format_id), requires_grad=False)
    x = torch.randn(9, 128).bfloat16()
    expected = module(x)
    before = [part.data_ptr() for part in flatten_tensor(module.weight)[0]]
    module.to(dtype)
    assert module.bias.dtype == dtype and module.weight.dtype == torch.bfloat16
    assert before == [part.data_ptr() for part in flatten_tensor(module.weight)[0]]
    y = module(x.to(dtype))
    assert y.dtype == dtype and torch.equal(y.bfloat16(), expected), (
        "computed in another dtype than planned"
    )


@pytest.mark.parametrize("format_id", FORMATS)
def test_detaching_shares_the_memory_and_cloning_does_not(format_id):
    weight = routed(format_id)
    detached, cloned = weight.detach(), weight.clone()
    assert_same(weight, detached)
    assert_same(weight, cloned)
    for part, same, other in zip(
        *(flatten_tensor(t)[0] for t in (weight, detached, cloned)), strict=True
    ):
        assert part.data_ptr() == same.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_routed_weight_is_taken_apart_into_plain_tensors_and_put_together(format_id):
    weight = routed(format_id)
    parts, rebuild = flatten_tensor(weight)
    assert parts and all(type(part) is torch.Tensor for part in parts)
    assert_same(weight, unflatten_tensor(rebuild, parts))
    other = routed(format_id, seed=1)
    assert_same(other, unflatten_tensor(rebuild, flatten_tensor(other)[0]))
    assert stored_bytes(weight) == stored_bytes(weight.stored) == sum(part.nbytes for part in parts)


def test_putting_together_with_too_many_tensors_is_an_error():
    parts, rebuild = flatten_tensor(routed("int8-row/plain"))
    with pytest.raises(ValueError, match="3 tensors given, 2 needed"):
        unflatten_tensor(rebuild, [*parts, parts[0]])


def test_a_plain_tensor_is_its_only_part():
    tensor = torch.randn(3, 5)
    parts, rebuild = flatten_tensor(tensor)
    assert parts == [tensor] and unflatten_tensor(rebuild, parts) is tensor
    assert stored_bytes(tensor) == 60


def test_the_compile_cache_tells_routes_and_formats_apart():
    weight, other = routed("int8-row/plain"), routed("float8-row/plain")
    rerouted = RoutedWeight(weight.stored, weight.format_id, weight.route[1:], weight.compute_dtype)
    keys = {each._stable_hash_for_caching() for each in (weight, other, rerouted)}
    assert len(keys) == 3
    assert (
        routed("int8-row/plain", seed=1)._stable_hash_for_caching()
        == weight._stable_hash_for_caching()
    )


def test_compiled_code_of_a_kernel_is_not_found_again_once_the_kernel_has_changed(
    spy, own_registry, tmp_path
):
    def key(source):
        path = tmp_path / "plug_in.py"
        path.write_text(source)
        namespace = {"__file__": str(path)}
        exec(compile(source, str(path), "exec"), namespace)
        routed_module._code_key.cache_clear()
        return routed_module._code_key(namespace["kernel"])

    first = key("def kernel(x, w, b):\n    return x\n")
    assert first == key("def kernel(x, w, b):\n    return x\n")
    assert first != key("def kernel(x, w, b):\n    return 2 * x\n")


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows_give_no_rows(shape):
    from autoquant.candidates.linears import take_apart

    linear = nn.Linear(64, 32).to(torch.bfloat16).requires_grad_(False)
    fmt = get_format("int8-row/plain")
    route = (RouteStep(upper_m=None, kernel="int-mm"),)
    weight = RoutedWeight.wrap(fmt.store(linear.weight.data), fmt.id, route, torch.bfloat16)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.empty(*shape, dtype=torch.bfloat16)
    assert linear(x).shape == (*shape[:-1], 32)
    assert take_apart(linear)(x).shape == (*shape[:-1], 32)
