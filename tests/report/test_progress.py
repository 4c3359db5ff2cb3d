import io

from rich.console import Console

from autoquant.events import Ending, Notice, StageFinished, StageProgress, StageStarted
from autoquant.report.progress import LiveListener, TimeLeft, listening

EVENTS = (
    StageStarted("timing", 3),
    StageProgress("timing", 0, "int8-row [256x256] at m=1"),
    Notice("layer [x] was left alone"),
    StageProgress("timing", 2, "int4-g32 [256x256] at m=512"),
    StageFinished("timing", "3 timings, 1 failed"),
)


def test_without_a_terminal_only_results_and_notices_are_written(capsys):
    stream = io.StringIO()
    with listening(stream) as listener:
        for event in EVENTS:
            listener(event)
    assert stream.getvalue() == "note: layer [x] was left alone\ntiming: 3 timings, 1 failed\n"
    assert capsys.readouterr().out == ""


def live_text(width=100):
    ticks = iter(range(0, 1000, 10))
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, highlight=False, color_system=None
    )
    with LiveListener(console, now=lambda: float(next(ticks))) as listener:
        for event in EVENTS:
            listener(event)
    return console.file.getvalue()


def test_a_terminal_shows_stage_item_count_and_time_left():
    text = live_text()
    assert "int4-g32 [256x256] at m=512" in text
    assert "2/3" in text
    assert "5s left" in text
    assert "note: layer [x] was left alone" in text
    assert "timing: 3 timings, 1 failed" in text


def test_a_terminal_shows_when_all_of_the_work_is_expected_to_end():
    ticks = iter([0.0, 0.0, *[100.0] * 9])
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with LiveListener(console, now=lambda: next(ticks)) as listener:
        listener(Ending(400.0))
        listener(StageStarted("prove", 3))
        listener(StageProgress("prove", 1, "front 1"))
    assert "of 5m 00s in all" in console.file.getvalue()


def test_a_terminal_keeps_stdout_clean(capsys):
    live_text()
    assert capsys.readouterr().out == ""


def test_a_long_item_does_not_break_the_line():
    text = live_text(width=60)
    assert all(len(line) <= 60 or "\x1b" in line for line in text.splitlines())


def test_progress_of_a_stage_that_never_started_is_ignored():
    console = Console(file=io.StringIO(), force_terminal=True)
    with LiveListener(console) as listener:
        listener(StageProgress("timing", 1, "x"))


def test_time_left_does_not_count_what_was_there_already():
    estimate = TimeLeft(100, 0.0)
    assert estimate.left_s(90, 1.0) is None
    assert estimate.left_s(92, 5.0) == 16.0
