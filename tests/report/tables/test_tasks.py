import io
from dataclasses import dataclass

from rich.console import Console

from autoquant.records import TaskScore
from autoquant.report.tables.tasks import task_objects, task_table


@dataclass
class Row:
    plan_id: str | None
    label: str
    scores: tuple[TaskScore, ...]


def score(task="arc_easy", metric="acc", value=0.5, stderr=0.0125, samples=2376):
    return TaskScore(
        task=task,
        metric=metric,
        value=value,
        stderr=stderr,
        samples=samples,
        limit=None,
        lm_eval_version="0.4",
    )


ROWS = [
    Row(
        None,
        "original",
        (score(), score(metric="word_perplexity", value=123.456, stderr=None, samples=None)),
    ),
    Row("aaaa", "uniform int8-row/plain", (score(value=0.25),)),
    Row("bbbb", "front 1", (score(value=0.75),)),
]


def lines(rows, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(task_table(rows, width))
    return console.file.getvalue().splitlines()


def test_each_plan_stands_beside_the_unquantized_model():
    first = next(line for line in lines(ROWS) if "front" in line and "arc" in line)
    assert first.split()[:3] == ["arc_easy", "acc", "2376"]
    assert "0.5000 ± 0.0125" in first and "0.7500 ± 0.0125" in first


def test_what_a_model_has_no_score_for_is_a_dash():
    line = next(line for line in lines(ROWS) if "123.46" in line)
    assert line.split().count("-") == 2 and "±" not in line


def test_long_names_are_folded_within_80_columns():
    long = score(
        task="a_task_whose_name_is_as_long_as_those_of_some_groups",
        metric="exact_match,flexible-extract",
    )
    printed = lines(
        [Row(None, "original", (long,)), Row("aaaa", "uniform int8-row/plain", (long,))]
    )
    assert max(map(len, printed)) <= 80
    assert "".join(line[:20].split()[0] for line in printed[2:] if line[:1].strip()).startswith(
        "a_task_whose"
    )


def test_objects_hold_each_models_scores():
    objects = task_objects(ROWS)
    assert [(each["plan_id"], each["metric"], each["value"]) for each in objects] == [
        (None, "acc", 0.5), (None, "word_perplexity", 123.456), ("aaaa", "acc", 0.25), ("bbbb",
        "acc", 0.75),
    ]  # fmt: skip
