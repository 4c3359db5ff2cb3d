"""What users are told of errors that are not autoquant's own."""

import pytest
import torch

from autoquant.errors import first_line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("\n  first\nsecond", "first"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("", "ValueError"),
        (400 * "x", None),
    ],
)
def test_the_first_line_that_says_something_is_told(message, line):
    found = first_line(ValueError(message))
    assert found == line if line else len(found) < 350
    assert first_line(ValueError("no"), with_type=True) == "ValueError: no"


def test_of_an_error_in_a_compiler_backend_the_reason_is_told():
    torch._dynamo.reset()

    def backend(graph, inputs):
        raise ArithmeticError("too hard")

    with pytest.raises(Exception) as caught:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert "raised" in str(caught.value).splitlines()[0]
    assert first_line(caught.value, with_type=True) == "ArithmeticError: too hard"
