"""Damage files: flipped bits, cuts, and values replaced inside JSON, databases and archives.

Each function changes a file in place, by a seeded `random.Random`, and says what it did.
"""

from __future__ import annotations

import json
import sqlite3
import struct
import zipfile
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**12, 10**40, 0.5, -1e308, float("inf"), float("nan"), "", "x", "\0",
    "é" * 50, "../../etc", "2026-13-45", [], [[]], {}, {"a": {}}, [None], [1, "b"],
)  # fmt: skip


def flip_bits(path: Path, draw: Random) -> str:
    data = bytearray(path.read_bytes())
    count = draw.choice([1, 1, 2, 16])
    for _ in range(count if data else 0):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return f"{count} bits flipped"


def cut(path: Path, draw: Random) -> str:
    data = path.read_bytes()
    size = draw.choice([0, 1, len(data) - 1, draw.randrange(len(data) + 1)])
    path.write_bytes(data[: max(size, 0)])
    return f"cut to {size} of {len(data)} bytes"


def overwrite(path: Path, draw: Random) -> str:
    data = bytearray(path.read_bytes())
    size = min(draw.choice([4, 64, 512, 4096]), len(data))
    start = draw.randrange(len(data) - size + 1)
    new = draw.choice([b"\0" * size, b"\xff" * size, draw.randbytes(size)])
    data[start : start + size] = new
    path.write_bytes(data)
    return f"{size} bytes at {start} overwritten"


def insert(path: Path, draw: Random) -> str:
    data = path.read_bytes()
    place, new = draw.randrange(len(data) + 1), draw.randbytes(draw.choice([1, 16, 600]))
    path.write_bytes(data[:place] + new + data[place:])
    return f"{len(new)} bytes inserted at {place}"


BYTES: tuple[Callable[[Path, Random], str], ...] = (flip_bits, cut, overwrite, insert)


def odd_json(value: Any, draw: Random) -> Any:
    """Return a JSON value with one value inside replaced, removed, or added."""
    places = list(_places(value))
    if not places:
        return draw.choice(ODD_VALUES)
    owner, key = draw.choice(places)
    action = draw.randrange(8)
    if action == 0:
        del owner[key]
    elif action == 1 and isinstance(owner, dict):
        owner[f"{key}x"] = owner.pop(key)
    elif action == 2 and isinstance(owner, list):
        owner.append(owner[key])
    elif action == 3 and isinstance(owner[key], int | float):
        owner[key] = owner[key] * draw.choice([-1, 1000, 10**9])
    else:
        owner[key] = draw.choice(ODD_VALUES)
    return value


def _places(value: Any) -> Any:
    if not isinstance(value, dict | list):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        yield from _places(inner)


def odd_json_text(text: str, draw: Random) -> str:
    """Return a JSON text with an odd value, too deep, or no JSON at all."""
    action = draw.randrange(12)
    if action == 0:
        return "[" * 100_000 + "]" * 100_000
    if action == 1:
        return text[: draw.randrange(len(text) + 1)]
    if action == 2:
        return json.dumps(draw.choice(ODD_VALUES))
    with suppress(ValueError):
        return json.dumps(odd_json(json.loads(text), draw))
    return "{"


def damage_json(path: Path, draw: Random) -> str:
    path.write_text(odd_json_text(path.read_text(encoding="utf-8"), draw), encoding="utf-8")
    return "odd JSON"


def damage_cell(path: Path, draw: Random) -> str:
    """Replace one value of a SQLite database, or the JSON in it, or remove a row or a table."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        tables = [
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]
        ]
        ours = [n for n in tables if n in ("study", "plan", "proof", "delivery", "model", "device")]
        table = draw.choice(ours if draw.random() < 0.7 else tables)
        if draw.random() < 0.05:
            connection.execute(f'DROP TABLE "{table}"')
            return f"table {table} dropped"
        row, *values = draw.choice(connection.execute(f'SELECT rowid, * FROM "{table}"').fetchall())
        if draw.random() < 0.1:
            connection.execute(f'DELETE FROM "{table}" WHERE rowid = ?', (row,))
            return f"row {row} of {table} removed"
        columns = [column[1] for column in connection.execute(f'PRAGMA table_info("{table}")')]
        column, value = draw.choice(list(zip(columns, values, strict=True)))
        new = _odd_cell(value, draw)
        try:
            connection.execute(f'UPDATE "{table}" SET "{column}" = ? WHERE rowid = ?', (new, row))
        except sqlite3.Error as error:
            return f"nothing ({error})"
        return f"{table}.{column} of row {row} is {str(new)[:200]!r}"


def _odd_cell(value: Any, draw: Random) -> Any:
    if isinstance(value, str) and value[:1] in ("{", "[") and draw.random() < 0.8:
        return odd_json_text(value, draw)
    if isinstance(value, int | float) and draw.random() < 0.3:
        return min(value * draw.choice([-1, 10**6, 0]), 2**62)
    return draw.choice(
        [None, -1, 0, 2**62, 0.5, float("inf"), "", "x", "2026-13-45", b"\xff\xfe", "null", "1"]
    )


def damage_safetensors(path: Path, draw: Random) -> str:
    """Change the header of a safetensors file: what it says of tensors, or its own length."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if draw.random() < 0.15:
        length = draw.choice([0, 1, 2**31, 2**40, 2**63])
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        return f"a header of {length} bytes claimed"
    header = json.loads(data[8 : 8 + length])
    tensor = header[draw.choice([name for name in header if name != "__metadata__"])]
    action = draw.randrange(6)
    if action == 0:
        tensor["shape"] = [draw.choice([2**40, 2**62, 0, -1, 3])] * len(tensor["shape"])
    elif action == 1:
        tensor["data_offsets"] = [0, 2**40]
    elif action == 2:
        tensor["data_offsets"] = draw.choice(list(header.values())).get("data_offsets", [5, 1])
    elif action == 3:
        tensor["dtype"] = draw.choice(["F64", "I8", "BOOL", "F4", "X"])
    else:
        header = odd_json(header, draw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return "odd safetensors header"


def damage_archive(path: Path, draw: Random) -> str:
    """Change, remove, add or blow up an entry of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(list(entries))
    action = draw.randrange(6)
    compression = zipfile.ZIP_STORED
    if action == 0:
        del entries[name]
    elif action == 1:
        entries[name] = entries[name][: draw.randrange(len(entries[name]) + 1)]
    elif action == 2:
        entries[name], compression = b"\0" * 300_000_000, zipfile.ZIP_DEFLATED
    elif action == 3 and name.endswith((".json", ".pkl")):
        old = bytearray(entries[name])
        if old and name.endswith(".pkl"):
            old[draw.randrange(len(old))] ^= 1 << draw.randrange(8)
            entries[name] = bytes(old)
        else:
            entries[name] = odd_json_text(entries[name].decode(), draw).encode()
    elif action == 4:
        other = draw.choice(list(entries))
        entries[name], entries[other] = entries[other], entries[name]
    else:
        entries[name] = draw.randbytes(draw.choice([0, 8, 5000]))
    with zipfile.ZipFile(path, "w", compression) as archive:
        for each, content in entries.items():
            archive.writestr(each, content)
    return f"entry {name} changed (way {action})"


def damage_toml(path: Path, draw: Random) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    odd = ["[[x", "a = " + "[" * 5000, 'batch = "x"', "seed = nan", "= 1", "a.b = 1", "[table]",
           "about = 1979-05-27", 'candidates = [1, "a"]', "x = 1e999", 'model = "\\u0000"']  # fmt: skip
    lines.insert(draw.randrange(len(lines) + 1), draw.choice(odd))
    path.write_text("\n".join(lines), encoding="utf-8")
    return "an odd line of TOML"


def structured(path: Path) -> Callable[[Path, Random], str] | None:
    """Return what damages a file of this kind from within, or None for plain bytes."""
    suffix = path.suffix
    if suffix in (".db", ".sqlite"):
        return damage_cell
    if suffix == ".json":
        return damage_json
    if suffix == ".safetensors":
        return damage_safetensors
    if suffix == ".toml":
        return damage_toml
    return damage_archive if zipfile.is_zipfile(path) else None


def damage(path: Path, draw: Random) -> str:
    """Damage a file in one of the ways that suit its kind."""
    inside = structured(path)
    if inside is not None and draw.random() < 0.65:
        return inside(path, draw)
    return draw.choice(BYTES)(path, draw)
