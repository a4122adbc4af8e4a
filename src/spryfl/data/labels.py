"""Class labels as files hold them (names, numbers, booleans) into numbers 0..C-1 with names.

Names are numbered in sorted order, unless the table carries names of its own (ClassLabel), whose order stays. Numbers
must be 0..C-1 already: a gap or a start at 1 is nearly always a mistake, and a head of the wrong size would hide it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from spryfl.data.tables import Table

HIDDEN = -1  # what GLUE and others write where the answer is withheld
NUMBER = re.compile(r"[+-]?\d+(\.0*)?")


def names(table: Table, column: str) -> tuple[str, ...]:
    """The names of the classes of a training table, in the order of their numbers."""
    values = _values(table, column)
    different = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if not values:
        raise ValueError(f"{table.source} has no rows to train on.")
    if len(different) == 1:
        raise ValueError(
            f'{table.source}: every row has the label "{different[0]}" in "{column}"; two classes are the least.\n'
            f'    Name another column with label = "...". Columns: {", ".join(table.names)}.'
        )
    if table.classes.get(column):
        return table.classes[column]
    if isinstance(different[0], int):
        _check_dense(table.source, column, [value for value in different if isinstance(value, int)])
    return tuple(str(value) for value in different)


def numbers(table: Table, column: str, names: Sequence[str]) -> tuple[list[int], str]:
    """The labels of a table as numbers of classes whose names are known, and a note if numbers stood for names."""
    values = _values(table, column)
    if not values:
        raise ValueError(f"{table.source} has no rows.")
    trust = ""
    number: dict[str | int, int] = {name: i for i, name in enumerate(names)}
    if not set(values) <= set(number) and all(isinstance(value, int) for value in values):
        number = {i: i for i in range(len(names))}
        if list(names) != [str(i) for i in range(len(names))]:
            trust = f'{table.source}: the number 0 in "{column}" was read as "{names[0]}", 1 as "{names[1]}", and so on'
    unknown = sorted({str(value) for value in values if value not in number})
    if unknown:
        raise ValueError(
            f'{table.source}: column "{column}" has labels that are not among the classes: {_list(unknown)}.\n'
            f"    Classes: {_list(names)}. Remove those rows, or give them one of these labels."
        )
    return [number[value] for value in values], trust


def hidden(table: Table, column: str) -> bool:
    """Whether a table has no labels to measure against: no such column, or -1 throughout."""
    return column not in table.names or all(value in (HIDDEN, str(HIDDEN), None) for value in table.column(column))


def labelled(table: Table, column: str) -> tuple[Table, str]:
    """A table without the rows whose label is -1, and a note on them; one without labels at all stays as it is."""
    if hidden(table, column):
        return table, ""
    values = table.column(column)
    kept = [row for row, value in enumerate(values) if value not in (HIDDEN, str(HIDDEN))]
    if len(kept) == len(values):
        return table, ""
    note = f"{len(values) - len(kept)} of {len(values)} rows without a label were left out ({table.source})"

    def chosen(name: str) -> list[Any]:
        whole = table.column(name)
        return [whole[row] for row in kept]

    return table._replace(column=chosen), note


def some(rows: Sequence[int], total: int) -> str:
    """In words: 3 of 100 rows (rows 2, 17, 40)."""
    return f"{len(rows)} of {total} rows (rows {', '.join(map(str, rows[:5]))}{', ...' if len(rows) > 5 else ''})"


def _list(items: Iterable[str], most: int = 10) -> str:
    first = list(islice(items, most + 1))
    return ", ".join(f'"{item}"' for item in first[:most]) + (", ..." if len(first) > most else "")


def _values(table: Table, column: str) -> list[str | int]:
    """Names or whole numbers, none missing; class numbers become names where the table has names for them."""
    values = table.column(column)
    _check_present(table.source, column, values)
    if all(isinstance(value, str) and NUMBER.fullmatch(value.strip()) for value in values):
        values = [int(float(value)) for value in values]  # text files hold their numbers as text
    plain = [_plain(table.source, column, row, value) for row, value in enumerate(values, start=1)]
    if len({type(value) for value in plain}) > 1:
        raise ValueError(f'{table.source}: column "{column}" mixes numbers and names. Use one of them throughout.')
    withheld = [row for row, value in enumerate(plain, start=1) if value == HIDDEN]
    if withheld:
        raise ValueError(
            f'{table.source}: the label in "{column}" is -1 in {some(withheld, len(plain))}: answers withheld.\n'
            '    Use a split with labels (GLUE: validation), for example test = "validation".'
        )
    return _named(table, column, plain)


def _check_present(source: str, column: str, values: list[Any]) -> None:
    missing = [
        row
        for row, value in enumerate(values, start=1)
        if value is None or value != value or (isinstance(value, str) and not value.strip())
    ]
    if missing:
        raise ValueError(
            f'{source}: the label in "{column}" is empty in {some(missing, len(values))}.\n'
            "    Fill these rows in or remove them."
        )


def _plain(source: str, column: str, row: int, value: Any) -> str | int:
    if isinstance(value, bool | str):
        return str(value).strip()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise ValueError(
        f'{source}: the label in "{column}" is {value!r:.40} in row {row}; a class is a name or a whole number.\n'
        '    Cut a score into classes first, or name another column with label = "...".'
    )


def _named(table: Table, column: str, values: list[str | int]) -> list[str | int]:
    classes = table.classes.get(column)
    if not classes:
        return values
    outside = sorted({value for value in values if isinstance(value, int) and not 0 <= value < len(classes)})
    if outside:
        raise ValueError(
            f'{table.source}: column "{column}" names {len(classes)} classes and holds the number {outside[0]}.'
        )
    return [classes[value] if isinstance(value, int) else value for value in values]


def _check_dense(source: str, column: str, different: list[int]) -> None:
    if different == list(range(len(different))):
        return
    absent = list(islice((n for n in range(max(different) + 1) if n not in different), 5))
    raise ValueError(
        f'{source}: the labels in "{column}" are {_list(map(str, different))}; numbers must be 0 to C-1 without a gap'
        + (f", and {', '.join(map(str, absent))} is missing.\n" if absent else ".\n")
        + "    Renumber them from 0, or write names (they are numbered for you)."
    )
