import weakref

import pytest
import torch

from autoquant.errors import ModelError
from autoquant.models import content, content_hash
from autoquant.models.content import DIGEST_VERSION, tensor_digest


def _tensors():
    torch.manual_seed(0)
    return {
        "a": torch.randn(5, 3),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.tensor(3),
        "d": torch.empty(0, 4),
    }


def test_the_hash_does_not_depend_on_the_order_of_the_tensors():
    tensors = _tensors()
    assert content_hash(tensors.items(), "x") == content_hash(reversed(tensors.items()), "x")


def test_the_hash_is_the_same_in_every_process():
    assert content_hash([("w", torch.arange(4.0))], {"layers": 2}) == "1ac22bb337caea1b"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (
            "one element",
            lambda t: (
                t | {"a": t["a"] + torch.nn.functional.one_hot(torch.tensor([2] * 5), 3) * 1e-6}
            ),
        ),
        ("dtype", lambda t: t | {"b": t["b"].view(torch.float16)}),
        ("shape", lambda t: t | {"a": t["a"].reshape(3, 5)}),
        ("name", lambda t: {("e" if key == "a" else key): value for key, value in t.items()}),
        ("an empty tensor more", lambda t: t | {"e": torch.empty(0)}),
    ],
)
def test_any_change_of_a_tensor_changes_the_hash(name, value):
    assert content_hash(_tensors().items(), "x") != content_hash(value(_tensors()).items(), "x"), (
        name
    )


def test_the_architecture_is_part_of_the_hash_but_not_the_order_of_its_keys():
    first = content_hash([], {"layers": 2, "heads": 4})
    assert first == content_hash([], {"heads": 4, "layers": 2})
    assert first != content_hash([], {"heads": 4, "layers": 3})


def test_layout_in_memory_does_not_change_the_hash():
    tensor = torch.randn(6, 4)
    strided = tensor.t().contiguous().t()
    assert not strided.is_contiguous()
    assert content_hash([("w", tensor)], "") == content_hash([("w", strided)], "")


def test_a_tensor_read_in_many_pieces_has_the_same_hash(monkeypatch):
    whole = content_hash(_tensors().items(), "")
    monkeypatch.setattr(content, "_CHUNK_BYTES", 3)
    assert content_hash(_tensors().items(), "") == whole


@pytest.fixture
def threads():
    """Set how many threads PyTorch uses."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_hash_does_not_depend_on_the_number_of_threads(threads):
    tensors = {f"w{number}": torch.full((number, 3), float(number)) for number in range(40)}
    hashes = set()
    for count in (1, 2, 5):
        threads(count)
        hashes.add(content_hash(tensors.items(), {"layers": 2}))
    assert hashes == {"b2f9192fb53aba6f"}


def test_few_tensors_are_taken_at_a_time(threads):
    alive = []

    def stream(most):
        for index in range(20):
            tensor = torch.full((8,), float(index))
            alive.append(weakref.ref(tensor))
            yield str(index), tensor
            del tensor
            assert sum(ref() is not None for ref in alive) <= most

    for count, most in ((1, 1), (3, 6)):
        threads(count)
        content_hash(stream(most), "")
    assert len(alive) == 40


def test_a_tensor_that_one_of_several_threads_cannot_read_is_refused_by_name(refusal, threads):
    threads(3)
    tensors = [*_tensors().items(), ("layer.weight", torch.empty(2, device="meta"))]
    assert "layer.weight" in refusal(ModelError, content_hash, tensors, "")


def test_a_digest_is_what_it_was_when_its_version_was_made():
    """Digests of this version are remembered on users' disks: another result needs another version."""
    digest = tensor_digest("w", torch.arange(6, dtype=torch.bfloat16).reshape(2, 3))
    assert (DIGEST_VERSION, digest[:16]) == (1, "906aa9f6cfc8a3b5")


@pytest.mark.parametrize(
    "tensor", [torch.empty(2, device="meta"), torch.eye(2).to_sparse()], ids=["meta", "sparse"]
)
def test_a_tensor_without_plain_values_is_refused_by_name(refusal, tensor):
    assert "layer.weight" in refusal(ModelError, content_hash, [("layer.weight", tensor)], "")
