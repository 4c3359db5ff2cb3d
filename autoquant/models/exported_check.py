"""Check before torch reads an exported program that nothing in it can run code.

`torch.export.load` unpickles tensors of unusual types and custom objects. It loads libraries of the
archive into the process, evaluates shape expressions as Python, and writes names from the file into
source that it executes. Only what ordinary exports hold is allowed here. Anything else needs the
user's trust.
"""

from __future__ import annotations

import ast
import builtins
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from autoquant.files import check_stored

_ENTRIES = re.compile(
    r"models/[\w.-]+\.json|data/weights/(weight_\d+|[\w.-]+_weights_config\.json)"
    r"|data/constants/(tensor_\d+|[\w.-]+_constants_config\.json)|data/sample_inputs/[\w.-]+\.pt"
    r"|extra/.*|archive_format|archive_version|byteorder|version|\.data/.*"
)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
_NAME = re.compile(r"[\w.:+-]*")
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed|torchao|torchvision)"
    r"\.((?!__)\w+|__i?(and|or|xor|lshift|rshift)__)(\.(?!__)\w+)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|map_impl|associative_scan|flex_attention"
    r"|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|getitem|lt|le|gt|ge|eq|ne|and_|or_|xor|not_"
    r"|lshift|rshift|invert)"
    r"|math\.[a-z]\w*|torch\.sym_\w+"
)
# Strings for people or for tracing, which are never evaluated or are quoted before use.
_FREE = {
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "torch_fn",
    "from_node",
    "custom",
    "as_string",
    "as_strings",
    "guards_code",  # Python source, which `ExportedProgram.module(check_guards=False)` leaves alone
}
_FUNCTIONS = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|floor|ceiling|FloorDiv"
    r"|ModularIndexing|Where|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow"
    r"|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal"
    r"|ToFloat|Identity"
)
_SYNTAX = (
    ast.Expression,
    ast.Call,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.keyword,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
)


def needs_trust(path: Path) -> str:
    """Return the first thing in the archive that is not known to be harmless; empty if none.

    Torch's own reader reads the archive, so that both see the same entries. Nothing is run.
    """
    from torch.export.pt2_archive import PT2ArchiveReader

    try:
        reader = PT2ArchiveReader(str(path))
        return next(
            (reason for name in reader.get_file_names() for reason in _entry(reader, name)), ""
        )
    except Exception as error:  # noqa: BLE001 - what cannot be checked is not harmless
        return f"its contents cannot be checked: {type(error).__name__}"


def lost_tensor(path: Path) -> str:
    """Return a tensor whose values are not in the archive; empty if none.

    Torch would fill it with zeros, however large it is said to be.
    """
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if re.search(r"/data/(weights|constants)/[^/]*_config\.json$", name):
                folder = name.rpartition("/")[0]
                for tensor, payload in json.loads(archive.read(name))["config"].items():
                    entry = archive.getinfo(f"{folder}/{payload['path_name']}")
                    sizes = (payload.get("tensor_meta") or {}).get("sizes", ())
                    if not entry.file_size and all(size.get("as_int") != 0 for size in sizes):
                        return str(tensor)
    return ""


def _entry(reader: Any, name: str) -> Iterator[str]:
    if _ENTRIES.fullmatch(name) is None:
        yield f"the entry {name}"
    elif name.startswith("models/"):
        yield from _strings(json.loads(reader.read_bytes(name)), "")
    elif name.endswith("_config.json"):
        yield from _payloads(json.loads(reader.read_bytes(name)))
    elif name.startswith("data/sample_inputs/"):
        yield from _sample_inputs(reader.read_bytes(name))


def _payloads(config: Any) -> Iterator[str]:
    for name, payload in config["config"].items():
        if _NAME.fullmatch(name) is None:
            yield f"the name {name!r}"
        if payload["use_pickle"] or _PAYLOAD.fullmatch(payload["path_name"]) is None:
            yield f"a pickle for {name}"


def _sample_inputs(data: bytes) -> Iterator[str]:
    try:
        if data:
            check_stored(io.BytesIO(data))
            torch.load(io.BytesIO(data), map_location="meta", weights_only=True)
    except Exception:  # noqa: BLE001 - after any error, torch would go on to unpickle it freely
        yield "pickled example inputs"


def _strings(value: Any, key: str) -> Iterator[str]:
    """Yield what is wrong with the strings in the JSON value of `key`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if _NAME.fullmatch(name) is None:
                yield f"the name {name[:80]!r}"
            yield from _strings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
    elif isinstance(value, str) and key not in _FREE and not _harmless(value, key):
        yield f"{key} {value[:80]!r}"


def _harmless(text: str, key: str) -> bool:
    if key in ("in_spec", "out_spec"):
        return "__enum__" not in text and "default_factory" not in text and "\\u" not in text
    if key == "expr_str":
        return is_plain_expression(text)
    if key in ("target", "as_operator"):
        return _TARGET.fullmatch(text) is not None
    return _NAME.fullmatch(text) is not None


def is_plain_expression(text: str) -> bool:
    """Check whether a shape expression is arithmetic that calls only known functions."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return all(_plain_node(node, called=id(node) in called) for node in ast.walk(tree))


def _plain_node(node: ast.AST, *, called: bool) -> bool:
    if not isinstance(node, _SYNTAX):
        return False
    if isinstance(node, ast.Name):
        if called:
            return _FUNCTIONS.fullmatch(node.id) is not None
        return not hasattr(builtins, node.id) and "__" not in node.id
    if called:
        return False
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
        return isinstance(node.value, str) and re.fullmatch(r"\w+", node.value) is not None
    return True
