"""Where the model is while another process loads a plan."""

import pytest
from torch import nn

from autoquant.devices.cpu import CpuBackend
from autoquant.tuner.deliver import _moved_off_gpu


class Moving(nn.Linear):
    """Notes where it is moved to."""

    def to(self, device):
        self.places.append(device)
        return self


@pytest.mark.parametrize(
    ("free_bytes", "places"),
    [(None, []), (3 * 4 * 110, []), (3 * 4 * 110 - 1, ["cpu", "cpu:0"])],
)
def test_a_model_leaves_a_device_that_has_no_room_for_another_process(
    free_bytes, places, monkeypatch
):
    monkeypatch.setattr(CpuBackend, "free_bytes", lambda _backend: free_bytes)
    module = Moving(10, 10)
    module.places = []
    with _moved_off_gpu(module, "cpu:0"):
        assert module.places == places[:1]
    assert module.places == places
