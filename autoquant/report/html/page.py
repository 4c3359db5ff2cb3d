"""One page that holds plotly, data, style and script, and fetches nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autoquant.errors import PlanError
from autoquant.report.html.data import page_data
from autoquant.report.json_output import finite
from autoquant.study.study import Study

_FOLDER = Path(__file__).parent
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def render_report(study: Study, database: str) -> bytes:
    """Return the report of a study as an HTML file.

    Args:
        database: The database, written as in a command.

    Raises:
        PlanError: No plan has been proven yet.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    if not study.proofs():
        raise PlanError(
            "there is nothing to report: no plan has been proven yet, "
            "run `autoquant search` to the end"
        )
    context, data = page_data(study, database)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("template.html").render(
        **context,
        style=_own("style.css"),
        script=_own("page.js"),
        plotly=_as_is(get_plotlyjs()),
        data=_as_is(embedded(data)),
    )
    return page.encode()


def embedded(data: Any) -> str:
    """Return JSON for a script element: nothing in it can end the element or begin another."""
    text = json.dumps(finite(data), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return "".join(_UNSAFE.get(character, character) for character in text)


def _own(name: str) -> Any:
    return _as_is((_FOLDER / name).read_text(encoding="utf-8"))


def _as_is(text: str) -> Any:
    """Mark text as safe: the project's own, plotly's, or made safe by `embedded`."""
    import markupsafe

    return markupsafe.Markup(text)
