"""Seconds of named parts."""

import pytest

from autoquant.stopwatch import Stopwatch, seconds_words


def test_parts_add_up_also_those_that_end_with_an_error():
    clock = [0.0]
    watch = Stopwatch(lambda: clock[0])
    with watch.part("check"):
        clock[0] += 2
    with pytest.raises(ValueError, match="wrong"), watch.part("compile"):
        clock[0] += 3
        raise ValueError("wrong")
    with watch.part("check"):
        clock[0] += 0.5
    assert watch.seconds == {"check": 2.5, "compile": 3}


def test_words_leave_out_what_takes_no_time():
    assert seconds_words({"check": 2.54, "apply": 0.01, "compile": 67.2}) == (
        "check 2.5 s, compile 67 s"
    )
