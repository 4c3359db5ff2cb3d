import json
import math

from autoquant.report.json_output import dumps


def test_numbers_that_json_does_not_have_become_null():
    assert json.loads(dumps({"a": [math.nan, math.inf, 1.5], "b": {"c": -math.inf}})) == {
        "a": [None, None, 1.5],
        "b": {"c": None},
    }
