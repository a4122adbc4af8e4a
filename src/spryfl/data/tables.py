"""Files as columns: Parquet, CSV, TSV, JSON and JSON lines. What a column means is for data.py to say.

A column is read when it is asked for, so a Parquet file's pictures or vectors cost nothing. Text files are read whole,
as UTF-8 with or without a byte order mark. Class names that the `datasets` library left in a Parquet file are kept.
"""

from __future__ import annotations

import csv
import io
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq


class Table(NamedTuple):
    """Named columns of one length."""

    names: tuple[str, ...]
    column: Callable[[str], list[Any]]
    classes: dict[str, tuple[str, ...]]  # names of the classes, for the columns that carry them
    source: str


def read(path: Path) -> Table:
    """The table in a file; its extension says how it is written."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such file.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f'{path}: the extension "{path.suffix}" is not known. Possible: {", ".join(READERS)}.\n'
            "    Save the data as one of these and give it that extension."
        )
    return reader(path)


def joined(tables: Sequence[Table]) -> Table:
    """Tables of the same columns, one after the other: the shards of a set."""
    first = tables[0]
    for other in tables[1:]:
        if set(other.names) != set(first.names):
            raise ValueError(f"{first.source} and {other.source} have different columns: {first.names}, {other.names}.")
    if len(tables) == 1:
        return first
    return first._replace(column=lambda name: [value for table in tables for value in table.column(name)])


def _parquet(path: Path) -> Table:
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    return Table(
        tuple(schema.names),
        lambda name: pq.read_table(path, columns=[name]).column(name).to_pylist(),
        _class_names(schema.metadata or {}),
        str(path),
    )


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """ClassLabel names, from what `datasets` writes beside the schema."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return {name: tuple(f["names"]) for name, f in features.items() if isinstance(f, dict) and f.get("names")}


def _csv(path: Path) -> Table:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        lines = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num} is not well-formed CSV: {error}.") from error
    return _ruled(path, lines)


def _tsv(path: Path) -> Table:
    """Tab-separated; quotes are text, as in GLUE's files, unless they enclose a whole field."""
    rows = enumerate(_text(path).split("\n"), start=1)
    return _ruled(
        path, [(n, [_unquoted(f) for f in line.rstrip("\r").split("\t")]) for n, line in rows if line.strip()]
    )


def _unquoted(field: str) -> str:
    inner = field[1:-1].replace('""', "")
    if len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in inner:
        return field[1:-1].replace('""', '"')
    return field


def _ruled(path: Path, lines: list[tuple[int, list[str]]]) -> Table:
    """Rows of equal length below a row of column names."""
    if not lines:
        raise ValueError(f"{path} is empty. Its first line must hold the names of the columns.")
    header, rows = [name.strip() for name in lines[0][1]], lines[1:]
    if len(set(header)) < len(header):
        raise ValueError(f"{path}: two columns have the same name: {', '.join(header)}. Rename one.")
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{path}: line {number} has {len(row)} fields, the first line names {len(header)} columns.\n"
                "    Put texts that hold the separator or a line break in double quotes, or use .jsonl."
            )
    place = {name: i for i, name in enumerate(header)}
    return Table(tuple(header), lambda name: [row[place[name]] for _, row in rows], {}, str(path))


def _json(path: Path) -> Table:
    """A list of objects, or an object per line."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        return _json_lines(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno} is not JSON: {error.msg}.") from error
    return _objects(path, list(enumerate(rows, start=1)), "entry")


def _json_lines(path: Path) -> Table:
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}: line {number} is not JSON: {error.msg}. Each line must be one object."
                ) from error
    return _objects(path, rows, "line")


def _objects(path: Path, rows: list[tuple[int, Any]], where: str) -> Table:
    if not rows:
        raise ValueError(f"{path} is empty.")
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f'{path}: {where} {number} is not an object such as {{"text": "...", "label": 0}}.')
    names = tuple(dict.fromkeys(name for _, row in rows for name in row))
    return Table(names, lambda name: [row.get(name) for _, row in rows], {}, str(path))


def _text(path: Path) -> str:
    """The file as text, or where it stops being UTF-8."""
    raw = path.read_bytes().removeprefix(BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = error.start - raw.rfind(b"\n", 0, error.start)
        raise ValueError(
            f"{path} is not UTF-8: byte {byte} of line {line} is 0x{raw[error.start]:02x}.\n"
            "    Save it as UTF-8 (in a spreadsheet: CSV UTF-8; in a shell: iconv -f LATIN1 -t UTF-8)."
        ) from error


READERS: dict[str, Callable[[Path], Table]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json_lines,
    ".json": _json,
}
