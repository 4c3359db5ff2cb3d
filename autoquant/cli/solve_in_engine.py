"""`autoquant solve --engine`: solve for the speed of an inference engine, and prove it there."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from autoquant.cli.options import Embedding
from autoquant.cli.output import echo, print_json, print_table
from autoquant.cli.plans import source_path

if TYPE_CHECKING:
    from autoquant.solver.limits import Limits
    from autoquant.study.study import Study


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """The options that `--engine` takes."""

    engine: str | None
    engine_path: Path | None
    again: bool
    model: str | None
    eval_text: str | None
    eval_data: str | None
    quality: str | None
    embedding: Embedding | None

    def check(self, made_for: str | None) -> None:
        """Refuse options without --engine, and a --for of another engine.

        Raises:
            BadParameter: There are some.
        """
        needing = [each.name for each in fields(self)[1:-1] if getattr(self, each.name)]
        if self.engine is None and needing:
            names = " and ".join(f"--{name.replace('_', '-')}" for name in needing)
            raise typer.BadParameter("needs --engine", param_hint=names)
        if self.engine is not None and made_for not in (None, self.engine):
            raise typer.BadParameter(
                f"--engine {self.engine} is for {self.engine}: leave it out", param_hint="--for"
            )
        if self.engine_path is not None and not self.engine_path.is_dir():
            raise typer.BadParameter(
                f"there is no folder {self.engine_path}", param_hint="--engine-path"
            )


def solve_and_show(
    study: Study, limits: Limits, request: EngineRequest, database: str, *, as_json: bool
) -> None:
    """Solve for an engine's speed, and print what was predicted and measured."""
    from autoquant.tuner.engine_bench import timed_engine
    from autoquant.tuner.engine_solve import check_solvable, solve_in_engine
    from autoquant.tuner.judge import Asked

    assert request.engine is not None
    check_solvable(request.engine)
    program = timed_engine(request.engine, study.facts.workload, request.engine_path)
    from autoquant.report.progress import listening

    with listening() as listener:
        found = solve_in_engine(
            study,
            limits,
            request.model or source_path(study),
            program,
            listener,
            asked=Asked.of(request.eval_text, request.eval_data, request.quality),
            embedding="head" if request.embedding is Embedding.HEAD else None,
            again=request.again,
        )
    from autoquant.report.tables.bench import loop_table
    from autoquant.report.tables.in_engine import in_engine_lines, in_engine_object
    from autoquant.report.tables.predicted import predicted_table
    from autoquant.store.addresses import shown_address

    for note in found.solved.notes:
        echo(note, err=True)
    if as_json:
        print_json({"limits": limits.as_object(), **in_engine_object(found, study.facts.workload)})
        return
    plan = found.solved.plan
    print_table(lambda _width: predicted_table(found.solved.around, plan))
    echo()
    print_table(lambda width: loop_table(found.rows, study.facts.workload, width))
    echo()
    for line in in_engine_lines(found, limits, study.facts.workload):
        echo(line)
    head = " --embedding head" if request.embedding is Embedding.HEAD else ""
    where = f"{shlex.quote(shown_address(database))} --plan {plan.plan_id}{head}"
    echo(f"  autoquant export {where} --to gguf --out DIR")
