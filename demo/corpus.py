"""Text that every Python installation has: the standard library's sources and its reference topics.

A document is one source file, or one topic of ``help()``. Where it belongs follows from its name
alone (a hash of it), so a file held out on one Python version is held out on every other: a model
trained on one version's training text has not seen the file of that name on another.

    python demo/corpus.py --held-out held-out.txt --max-characters 200000
    python demo/corpus.py --train train.txt
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

Part = Literal["train", "validation", "held-out"]

SEPARATOR = "<|endoftext|>"
"""The line that ends a document in a text of several."""

EXCERPT_CHARACTERS = 6_000
"""The most that one document gives to a text of limited length."""

PARTS: tuple[Part, ...] = ("held-out", "validation", "train")
TENTHS: dict[int, Part] = {0: "held-out", 1: "validation"}
TOPICS_FILE = "pydoc_data/topics.py"
MIN_CHARACTERS, MAX_CHARACTERS = 500, 300_000
SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test"),  # not installed everywhere
    *("site-packages", "dist-packages"),  # not the standard library
    "encodings",  # generated mapping tables, and codecs that differ in one line
}
SKIPPED_FILES = {"html/entities.py", "pydoc_data/topics.py", "stringprep.py"}  # tables
SKIPPED_PREFIXES = (
    "_sysconfigdata",
    "config-",
    "sitecustomize",
    "usercustomize",
)  # written per installation


@dataclass(frozen=True)
class Document:
    """A named piece of text; the text ends with a newline."""

    name: str
    text: str

    @property
    def part(self) -> Part:
        """The part of the corpus that the document belongs to."""
        return part_of(self.name)


def name_hash(name: str) -> int:
    """A number that depends on the name alone, on every machine and Python version."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def part_of(name: str) -> Part:
    """Return the part of the corpus for a document of this name.

    A tenth is held out, another tenth is for validation.
    """
    return TENTHS.get(name_hash(name) % 10, "train")


def standard_library() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def documents(library: Path | None = None) -> list[Document]:
    """All documents of a standard library (the running Python's unless told), in hash order."""
    folder = library or standard_library()
    found = [*source_documents(folder), *topic_documents(folder / TOPICS_FILE)]
    return sorted(found, key=lambda document: name_hash(document.name))


def source_documents(folder: Path) -> list[Document]:
    """The library's own source files that are text for a reader, neither tiny nor tables."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        text = read_text(path) if is_wanted(name) else None
        if text is not None and MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
            found.append(Document(name, text))
    return found


def is_wanted(name: str) -> bool:
    """Whether a file of this name, relative to the library's folder, may be a document."""
    if name in SKIPPED_FILES or name.startswith(SKIPPED_PREFIXES):
        return False
    return SKIPPED_FOLDERS.isdisjoint(PurePosixPath(name).parts[:-1])


def read_text(path: Path) -> str | None:
    """Return a file's text with one newline at its end.

    None if it is not UTF-8 or holds the separator.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if SEPARATOR in text else text.strip("\n") + "\n"


def topic_documents(path: Path) -> list[Document]:
    """The reference topics that ship with Python, none repeating a paragraph of another.

    Long topics contain short ones. A paragraph stays where it comes first, held-out topics before
    validation topics before training topics, so that nothing held out is seen in training.
    """
    topics = read_topics(path)
    names = {f"{TOPICS_FILE.removesuffix('.py')}/{key}": key for key in topics}
    found: list[Document] = []
    seen: set[str] = set()
    for name in sorted(names, key=lambda name: (PARTS.index(part_of(name)), name)):
        paragraphs = [
            p for p in topics[names[name]].split("\n\n") if p.strip() and p.strip() not in seen
        ]
        seen.update(p.strip() for p in paragraphs)
        text = "\n\n".join(paragraphs).strip("\n") + "\n"
        if len(text) >= MIN_CHARACTERS:
            found.append(Document(name, text))
    return found


def read_topics(path: Path) -> dict[str, str]:
    """Return the dictionary of topics, read without running the file.

    It is empty if the installation has none.
    """
    source = read_text(path) if path.exists() else None
    for statement in ast.parse(source or "").body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            return topics
    return {}


def text_of(part: Part, max_characters: int | None = None, library: Path | None = None) -> str:
    """One part of the corpus as text; a limited text mixes the starts of many documents."""
    return join(take((d for d in documents(library) if d.part == part), max_characters))


def take(chosen: Iterable[Document], max_characters: int | None) -> list[str]:
    """The documents' texts, or as many excerpts of them as fit with their separators."""
    if max_characters is None:
        return [document.text for document in chosen]
    texts: list[str] = []
    left = max_characters
    for document in chosen:
        text = excerpt(document.text, min(EXCERPT_CHARACTERS, left - len(SEPARATOR) - 1))
        if not text:
            break
        texts.append(text)
        left -= len(text) + len(SEPARATOR) + 1
    return texts


def excerpt(text: str, max_characters: int) -> str:
    """The text's first whole lines, as many as the limit allows."""
    if len(text) <= max_characters:
        return text
    return text[: text.rfind("\n", 0, max(0, max_characters)) + 1]


def join(texts: Iterable[str]) -> str:
    """Texts one after the other, each ended by the separator's line."""
    return "".join(f"{text}{SEPARATOR}\n" for text in texts)


def main() -> None:
    """Write the texts that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for part in reversed(PARTS):
        parser.add_argument(
            f"--{part}", type=Path, metavar="FILE", help=f"write the {part} text here"
        )
    parser.add_argument(
        "--max-characters", type=int, metavar="N", help="limit the length of each text"
    )
    parser.add_argument(
        "--library", type=Path, metavar="DIR", help="another standard library's folder"
    )
    arguments = parser.parse_args()
    for part in reversed(PARTS):
        path: Path | None = getattr(arguments, part.replace("-", "_"))
        if path is not None:
            text = text_of(part, arguments.max_characters, arguments.library)
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"{path}: {text.count(SEPARATOR):,} documents, {len(text):,} characters")


if __name__ == "__main__":
    main()
