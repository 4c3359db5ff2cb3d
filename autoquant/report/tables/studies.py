"""The studies of a database as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from autoquant.report import units
from autoquant.report.tables.layout import plain_table
from autoquant.report.words import constraints_words, device_words, limits_words, source_name


def studies_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the rows of `autoquant.study.overview.study_rows`."""
    table = plain_table()
    table.add_column("Study", no_wrap=True)
    table.add_column("Model, device,\nworkload", overflow="fold", ratio=3)
    table.add_column("Limits", no_wrap=True)
    table.add_column("Proven\nplans", justify="right", no_wrap=True)
    table.add_column("Com-\nplete", no_wrap=True)
    table.add_column("Recommended", no_wrap=True)
    for row in rows:
        about = (source_name(row["source"]), device_words(row["device"]), str(row["workload"]))
        cells = [
            row["study_id"],
            "\n".join(filter(None, (*about, constraints_words(row["constraints"])))),
            limits_words(row["limits"]).replace(" at most ", " <= ").replace(", ", "\n"),
            str(row["proven"]),
            "yes" if row["complete"] else "no",
            row["recommended"] or units.MISSING,
        ]
        table.add_row(*map(Text, cells), end_section=True)
    return table


def studies_objects(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the studies as JSON objects."""
    return [
        {
            "study_id": row["study_id"],
            "model": source_name(row["source"]),
            "model_path": row["source"].get("path") or None,
            "model_hash": row["model_hash"],
            "device": row["device"].name,
            "workload": str(row["workload"]),
            "limits": row["limits"],
            "constraints": row["constraints"],
            "proven_plans": row["proven"],
            "complete": row["complete"],
            "recommended_plan_id": row["recommended"],
        }
        for row in rows
    ]
