"""The blocks of the pages: what is typed, what is a file, and what is marked as not run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
SHELL = ("bash", "console")
_FENCE = re.compile(r"```(\w*)(.*)")
_TITLE = re.compile(r'title="([^"]+)"')
_MARK = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        title: The file that it is, where it is one.
        mark: Why it is not run, where it is not.
    """

    page: str
    line: int
    language: str
    text: str
    title: str | None
    mark: str | None

    def commands(self) -> list[str]:
        """What is typed, a line each: of a transcript only what follows `$ `."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    fence, before = None, ""
    for number, line in enumerate(PAGES[page].read_text().splitlines(), start=1):
        if fence is None:
            fence = _FENCE.fullmatch(line)
            mark = _MARK.fullmatch(before.strip())
            start, content, before = number, [], line
        elif line == "```":
            title = _TITLE.search(fence[2])
            yield Block(
                page, start, fence[1], "\n".join(content), title and title[1], mark and mark[1]
            )
            fence = None
        else:
            content.append(line)
    assert fence is None, f"{page}: the block of line {start} is not closed"


def loose_commands(page: str) -> list[str]:
    """Lines that look like commands of ours and stand in no fenced block."""
    outside = re.sub(r"^```.*?^```$", "", PAGES[page].read_text(), flags=re.DOTALL | re.MULTILINE)
    return [line for line in outside.splitlines() if re.match(r"\s{4,}(\$ )?autoquant ", line)]
