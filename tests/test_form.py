"""The script that measures the form of code, held against a package small enough to count."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "studies" / "form" / "form.py"

ONE = '''"""One."""

import os

# a comment

WORDS = [a + b for a in "ab" for b in "ab"]


def public(self, x: int, *rest: int, word: str = "") -> int:
    """Add.

    Two more lines of docstring.
    """
    import json  # not a line of its own

    return x


class Thing:
    def _private(self, x):
        return [y for y in [z for z in x]]
'''
TWO = '"""Two."""\n\nfrom made import one\nfrom . import three\n'
THREE = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from made.two import x\n"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("form_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their own module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    files = {"__init__": "", "one": ONE, "two": TWO, "three": THREE}
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def one(script, package):
    (source,) = [s for s in script.read_package(package) if s.module == "made.one"]
    return source


def test_a_functions_lines_leave_its_docstring_out_and_parameters_leave_self_out(script, one):
    public, private = script.functions(one.tree)
    assert (public.lines, public.parameters, public.typed, public.imports) == (4, 3, True, True)
    assert (private.lines, private.parameters, private.typed, private.imports) == (
        2,
        1,
        False,
        False,
    )


def test_syntax_nodes_are_divided_by_all_lines_of_a_function(script, tmp_path):
    (tmp_path / "f.py").write_text("def f(x):\n    return x\n")
    (source,) = script.read_package(tmp_path)
    (function,) = script.functions(source.tree)
    # FunctionDef, arguments, arg, Return, Name, Load
    assert function.nodes_per_line == 6 / 2


def test_a_comment_behind_code_or_inside_a_string_is_no_comment_line(script, one):
    assert script.comment_lines(one.text) == 1
    assert script.comment_lines('x = """\n# text\n"""\n') == 0


def test_comprehensions_with_two_loops_or_inside_another_are_nested(script, one):
    assert sorted(script.comprehensions(one.tree)) == [False, True, True]


def test_public_functions_and_classes_are_asked_for_a_docstring(script, one):
    assert list(script.public_docstrings(one.tree)) == [True, False]


def test_imports_for_type_checkers_and_inside_functions_make_no_cycle(script, package):
    assert script.modules_in_cycles(script.read_package(package)) == 0


@pytest.mark.parametrize("line", ["import made.two", "from made import two", "from .two import y"])
def test_modules_that_import_each_other_are_counted(script, package, line):
    (package / "three.py").write_text(line)
    assert script.modules_in_cycles(script.read_package(package)) == 2


def test_files_that_match_a_glob_are_left_out(script, package):
    modules = [s.module for s in script.read_package(package, ["*/made/t*"])]
    assert modules == ["made", "made.one"]


def test_the_table_has_a_column_for_each_package(script, package, capsys):
    script.main([f"made={package}", f"again={package}"])
    head, _, first, *rest = capsys.readouterr().out.splitlines()
    assert head == "|  | made | again |"
    assert first == "| files / lines | 4 / 30 | 4 / 30 |"
    values = {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in rest)}
    assert values["function lines, median / p90 / max"] == "3 / 4 / 4"
    assert values["comprehensions per 100 statements (nested)"] == "18.8 (12.50)"
    assert values["fully typed functions"] == "50.0%"


def test_a_folder_without_python_is_refused_in_one_line(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([f"made={tmp_path}"])
    assert "no Python files in" in capsys.readouterr().err
