import pkgutil
import subprocess
import sys

import pytest

import autoquant

IMPORTED = """
import importlib, pkgutil, sys

names = ["autoquant", "autoquant.records", "autoquant.errors", "autoquant.events"]
for package in ("autoquant.study", "autoquant.solver", "autoquant.store", "autoquant.report",
                "autoquant.report.front", "autoquant.report.html", "autoquant.report.tables"):
    names.append(package)
    path = importlib.import_module(package).__path__
    names += [module.name for module in pkgutil.iter_modules(path, package + ".")]
for name in names:
    if not name.endswith(".migrations"):
        importlib.import_module(name)
    for heavy in ("torch", "torchao", "transformers"):
        if heavy in sys.modules:
            sys.exit(f"{name} imports {heavy}")
print(len(names))
"""


@pytest.mark.parametrize("name", autoquant.__all__)
def test_every_public_name_can_be_imported(name):
    value = getattr(autoquant, name)
    assert value.__name__ == name
    assert value.__doc__


def test_public_names_are_listed_in_order():
    assert dir(autoquant) == sorted(autoquant.__all__)
    assert len(set(autoquant.__all__)) == len(autoquant.__all__)
    assert set(autoquant.__all__) >= {
        "search",
        "profile",
        "apply",
        "load",
        "Study",
        "Plan",
        "register",
        "Format",
        "Kernel",
    }


def test_no_module_hides_a_public_name():
    assert not {module.name for module in pkgutil.iter_modules(autoquant.__path__)} & set(
        autoquant.__all__
    )


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        autoquant.serach  # noqa: B018


def test_words_store_solver_and_report_are_imported_without_torch():
    result = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 10
