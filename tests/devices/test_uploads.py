"""Copies to a device, piece by piece."""

from __future__ import annotations

import pytest
import torch

from autoquant.devices import uploads
from autoquant.devices.cpu import CpuBackend
from autoquant.devices.uploads import in_pieces, is_plain


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 7),
        torch.randn(3, 4).to(torch.bfloat16),
        torch.randn(2, dtype=torch.complex64),
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.arange(20, dtype=torch.int8)[3:],
    ],
)
def test_a_tensor_is_copied_whole_whatever_its_pieces(tensor, monkeypatch):
    staged = []
    for piece_bytes in (1, 6, 1000):
        monkeypatch.setattr(uploads, "_PIECE_BYTES", piece_bytes)
        staged.clear()
        copy = in_pieces(tensor, "cpu", lambda piece: staged.append(piece.nbytes) or piece.clone())
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor)
        assert copy.data_ptr() != tensor.data_ptr()
        assert max(staged) <= piece_bytes and sum(staged) == tensor.nbytes


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0, 3),
        torch.randn(3, 4).t(),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
        torch.nn.Parameter(torch.ones(2)),
    ],
)
def test_what_is_more_than_its_bytes_is_left_to_pytorch(tensor):
    assert not is_plain(tensor)
    assert is_plain(torch.randn(3, 4))


def test_a_cpu_copies_what_it_is_given():
    tensor = torch.randn(3, 4).t()
    copy = CpuBackend("cpu").upload(tensor)
    assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()
