"""Measure the form of Python packages: how long, how dense and how well explained their code is.

    python studies/form/form.py autoquant=autoquant httpx=/tmp/httpx/httpx --exclude '*/versions/*'

prints a Markdown table with one column a package. The numbers show where reading is hard; they are
no goals. `studies/form/README.md` says what was measured and when.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import io
import statistics
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LONG_FUNCTION_LINES = 60
MANY_PARAMETERS = 6
WIDE_LINE_COLUMNS = 100

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Source:
    """One parsed file.

    Attributes:
        module: Its dotted name, such as `package.folder.file`.
    """

    module: str
    is_package: bool
    text: str
    tree: ast.Module

    @property
    def lines(self) -> list[str]:
        """Its lines that are not blank."""
        return [line for line in self.text.splitlines() if line.strip()]


@dataclass(frozen=True, slots=True)
class Function:
    """One function or method, with the functions inside it.

    Attributes:
        lines: From `def` to the last line, without the docstring.
        nodes_per_line: Syntax nodes divided by lines, docstring lines included.
        parameters: How many it takes, without `self` and `cls`.
        typed: Every parameter and the result have an annotation.
        imports: It imports something itself.
    """

    lines: int
    nodes_per_line: float
    parameters: int
    typed: bool
    imports: bool


def read_package(folder: Path, exclude: Sequence[str] = ()) -> list[Source]:
    """Parse every Python file under a folder, except those whose path matches a glob."""
    sources = []
    for path in sorted(folder.rglob("*.py")):
        if any(fnmatch.fnmatch(path.as_posix(), glob) for glob in exclude):
            continue
        text = path.read_text(encoding="utf-8")
        parts = path.relative_to(folder.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        sources.append(Source(module, is_package, text, ast.parse(text)))
    return sources


def functions(tree: ast.Module) -> Iterator[Function]:
    """Yield every function of a file, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, FunctionNode):
            yield _function(node)


def _function(node: FunctionNode) -> Function:
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    parameters = [p for p in _parameters(node.args) if p.arg not in ("self", "cls")]
    inside = list(ast.walk(node))
    return Function(
        lines=lines - _docstring_lines(node),
        nodes_per_line=len(inside) / lines,
        parameters=len(parameters),
        typed=node.returns is not None and all(p.annotation is not None for p in parameters),
        imports=any(isinstance(child, ast.Import | ast.ImportFrom) for child in inside),
    )


def _parameters(arguments: ast.arguments) -> list[ast.arg]:
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return named + [p for p in (arguments.vararg, arguments.kwarg) if p is not None]


def _docstring_lines(node: FunctionNode) -> int:
    if ast.get_docstring(node, clean=False) is None:
        return 0
    first = node.body[0]
    assert first.end_lineno is not None
    return first.end_lineno - first.lineno + 1


def comment_lines(text: str) -> int:
    """Count the lines that hold nothing but a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    return sum(token.line.lstrip().startswith("#") for token in comments)


def comprehensions(tree: ast.AST, inside: bool = False) -> Iterator[bool]:
    """Yield, for every comprehension, whether it is nested.

    A nested one stands inside another or has more than one `for`.
    """
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, COMPREHENSIONS):
            yield inside or len(child.generators) > 1
            yield from comprehensions(child, inside=True)
        else:
            yield from comprehensions(child, inside)


def public_docstrings(tree: ast.Module) -> Iterator[bool]:
    """Yield, for every public function and class, whether it has a docstring."""
    for node in ast.walk(tree):
        if isinstance(node, FunctionNode | ast.ClassDef) and not node.name.startswith("_"):
            yield ast.get_docstring(node) is not None


def imported_modules(source: Source, known: Iterable[str]) -> set[str]:
    """Return the package's own modules that a file imports when it is itself imported."""
    known = set(known)
    found = set()
    for name in _imported_names(source):
        while name and name not in known:
            name = name.rpartition(".")[0]
        if name and name != source.module:
            found.add(name)
    return found


def _imported_names(source: Source) -> Iterator[str]:
    """Yield dotted names; for `from a import b` that is `a.b`, which may be a module or not."""
    for node in _run_on_import(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(source, node)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _run_on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when a module is imported: no function bodies, nothing for type checkers."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, FunctionNode | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _run_on_import(child)


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    up = node.level - source.is_package
    parts = source.module.split(".")
    base = parts[: len(parts) - up]
    return ".".join([*base, node.module] if node.module else base)


def modules_in_cycles(sources: Sequence[Source]) -> int:
    """Count the modules that import themselves through others."""
    names = {source.module for source in sources}
    graph = {source.module: imported_modules(source, names) for source in sources}
    return sum(_reaches(graph, start) for start in graph)


def _reaches(graph: dict[str, set[str]], start: str) -> bool:
    """Check whether a module can be reached from what it imports."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph[name]
    return start in seen


def form(sources: Sequence[Source]) -> dict[str, str]:
    """Return the rows of the table for one package: what is measured, and its value."""
    found = [function for source in sources for function in functions(source.tree)]
    cycle = modules_in_cycles(sources)
    documented = [has for source in sources for has in public_docstrings(source.tree)]
    return {
        **_sizes(sources, found),
        **_density(sources, found),
        "public docstrings": _share(documented),
        "fully typed functions": _share(f.typed for f in found),
        "functions with imports inside": _share(f.imports for f in found),
        "import cycle": f"{cycle} modules" if cycle else "none",
    }


def _sizes(sources: Sequence[Source], found: Sequence[Function]) -> dict[str, str]:
    file_lines = [len(source.text.splitlines()) for source in sources]
    median_lines = statistics.median(file_lines)
    lengths = [function.lines for function in found]
    long = _share(n > LONG_FUNCTION_LINES for n in lengths)
    parameters = [function.parameters for function in found]
    most = f"{quantile(parameters, 0.9)} / {max(parameters)}"
    many = _share(n > MANY_PARAMETERS for n in parameters)
    return {
        "files / lines": f"{len(sources)} / {sum(file_lines):,}",
        "lines per file, median / max": f"{median_lines:.0f} / {max(file_lines):,}",
        "function lines, median / p90 / max": _spread(lengths),
        f"functions > {LONG_FUNCTION_LINES} lines": long,
        f"parameters, p90 / max; share > {MANY_PARAMETERS}": f"{most}; {many}",
    }


def _density(sources: Sequence[Source], found: Sequence[Function]) -> dict[str, str]:
    widths = [len(line) for source in sources for line in source.lines]
    mean_width, wide = statistics.mean(widths), _share(n > WIDE_LINE_COLUMNS for n in widths)
    statements = sum(isinstance(n, ast.stmt) for s in sources for n in ast.walk(s.tree))
    nested = [is_nested for source in sources for is_nested in comprehensions(source.tree)]
    per_100, nested_per_100 = 100 * len(nested) / statements, 100 * sum(nested) / statements
    comments = sum(comment_lines(source.text) for source in sources)
    nodes = statistics.median(function.nodes_per_line for function in found)
    return {
        "syntax nodes per line (median function)": f"{nodes:.1f}",
        f"mean line width; lines > {WIDE_LINE_COLUMNS} columns": f"{mean_width:.0f}; {wide}",
        "comprehensions per 100 statements (nested)": f"{per_100:.1f} ({nested_per_100:.2f})",
        "comment lines": f"{comments / len(widths):.1%}",
    }


def quantile(values: Sequence[int], share: float) -> int:
    """Return the smallest value that at least this share of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _spread(values: Sequence[int]) -> str:
    return f"{statistics.median(values):.0f} / {quantile(values, 0.9)} / {max(values)}"


def _share(values: Iterable[bool]) -> str:
    counted = list(values)
    return f"{sum(counted) / max(1, len(counted)):.1%}"


def table(forms: dict[str, dict[str, str]]) -> str:
    """Return a Markdown table of packages (columns) and what was measured (rows)."""
    head = ["", *forms]
    rows = [[row, *(form[row] for form in forms.values())] for row in next(iter(forms.values()))]
    body = [head, ["---"] * len(head), *rows]
    lines = [f"| {' | '.join(cells)} |" for cells in body]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the packages that are named and print their table."""
    parser = argparse.ArgumentParser(description="Print the form of Python packages as a table.")
    parser.add_argument("packages", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB")
    options = parser.parse_args(arguments)
    forms = {}
    for package in options.packages:
        name, _, folder = package.rpartition("=")
        sources = read_package(Path(folder).resolve(), options.exclude)
        if not sources:
            parser.error(f"no Python files in {folder!r}; give NAME=FOLDER of a package")
        forms[name or Path(folder).name] = form(sources)
    print(table(forms))


if __name__ == "__main__":
    main()
