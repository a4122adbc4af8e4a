"""Where examples come from: the embedded default, files, a folder, the hub, or data sets already in memory.

Every way ends in a `Corpus`: texts with class numbers 0..C-1 for training and, untouched by it, for the test. What was
guessed or changed on the way stands in `Corpus.notes`; what cannot be guessed safely is a ValueError that says what was
given, what is possible and what to do. A file without a test side is split class by class. All draws come from `seed`.

Reading is linear in the rows; 67,000 sentences take about a second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from spryfl.data import labels as labelling
from spryfl.data import sources, tables
from spryfl.data.columns import ALL, CLASSES, Columns, Needs, check, choose
from spryfl.data.examples import Examples, limited, rows, split, take
from spryfl.data.tables import Table

DOCSTRINGS = "docstrings"
_ROW = " row"  # a column of numbers, beside names of columns, none of which begins like this


class Corpus(NamedTuple):
    """What a run learns from and what it is measured on."""

    train: Examples
    test: Examples
    labels: tuple[str, ...]  # names of the classes, in the order of their numbers
    source: str
    notes: tuple[str, ...]  # what was guessed or changed, a sentence each
    fingerprint: str  # SHA-256 over all rows and names: equal contents, equal fingerprint, on any machine


def load(
    name: str,
    *,
    text: str = "",
    pair: str = "",
    label: str = "",
    group: str = "",
    test: str = "",
    test_share: float = 0.2,
    train_rows: int = 0,
    test_rows: int = 0,
    seed: int = 0,
    revision: str = "",
    drop_unlabelled: bool = False,
    needs: Needs = CLASSES,
) -> Corpus:
    """The corpus of that name: "docstrings", a file, a folder with train and test files, or a name on the hub.

    `test` names another file, or a split of a folder or hub set. Rows are limited class by class; 0 is all of them.
    With `drop_unlabelled` rows whose label is -1 are left out, as SNLI's that its annotators did not agree on.
    """
    asked = Columns(text, pair, label, group)
    if name == DOCSTRINGS:
        dropped = "true" if drop_unlabelled else ""
        _refuse(text=text, pair=pair, label=label, group=group, test=test, revision=revision, drop_unlabelled=dropped)
        _refuse_needs(needs)
        return _docstrings(train_rows, test_rows, seed)
    if sources.is_local(name):
        _refuse(revision=revision)
        path = Path(name).expanduser()
        sides = sources.folder(path, test) if path.is_dir() else sources.files(path, test)
    else:
        sides = sources.hub(name, test, revision)
    return _corpus(name, sides, asked, needs, test_share, (train_rows, test_rows), seed, drop_unlabelled)


def from_datasets(
    train: Any,
    test: Any = None,
    *,
    text: str = "",
    pair: str = "",
    label: str = "",
    group: str = "",
    test_share: float = 0.2,
    train_rows: int = 0,
    test_rows: int = 0,
    seed: int = 0,
    needs: Needs = CLASSES,
) -> Corpus:
    """The corpus in a datasets.Dataset (split by `test_share` unless `test` is given) or in a DatasetDict."""
    which = test if isinstance(test, str) else ""
    if hasattr(train, "keys"):  # a DatasetDict; then `test` may be the name of a split
        held = {key: sources.in_memory(value, f"split {key!r}") for key, value in train.items()}
        sides = sources.splits(held, which, "the data set")
    else:
        sides = {"train": sources.in_memory(train, "train")}
    if test is not None and not (which and hasattr(train, "keys")):
        sides = {"train": sides["train"], "test": sources.in_memory(test, "test")}
    asked = Columns(text, pair, label, group)
    return _corpus("a data set in memory", sides, asked, needs, test_share, (train_rows, test_rows), seed)


def held_out(corpus: Corpus, count: int, seed: int, whole: str = "") -> tuple[Corpus, tuple[int, ...]]:
    """The training rows alone: about `count` of them as test rows, the others to learn from; and which those are.

    The corpus's own test rows are gone. Class by class; with `whole` all rows of one value of that column together.
    """
    total = len(corpus.train.label)
    if not 0 < count < total:
        raise ValueError(f"{count} rows cannot be held out of {total} training rows. Hold out fewer.")
    numbered = corpus.train._replace(extra={**corpus.train.extra, _ROW: tuple(range(total))})
    train, test = split(numbered, count / total, seed, corpus.source, whole)
    which = tuple(test.extra[_ROW])
    train, test = (side._replace(extra={k: v for k, v in side.extra.items() if k != _ROW}) for side in (train, test))
    note = f"{len(which)} of {total} training rows are held out to choose by; the test rows are not looked at"
    fingerprint = _fingerprint(train, test, corpus.labels)
    return corpus._replace(train=train, test=test, notes=(*corpus.notes, note), fingerprint=fingerprint), which


def read_labelled(
    path: str | Path,
    labels: Sequence[str],
    *,
    text: str = "",
    pair: str = "",
    label: str = "",
    needs: Needs = CLASSES,
) -> Examples:
    """Any labelled file, in terms of class names that are already known."""
    table = tables.read(Path(path))
    columns, _ = choose(table, Columns(text, pair, label, ""), needs)
    return _examples(table, columns, tuple(labels))[0]


def _refuse(**options: str) -> None:
    for option, value in options.items():
        if value:
            where = "a hub name" if option == "revision" else "a file, a folder or a hub name"
            raise ValueError(f'data: {option} = "{value}" has no effect here; it belongs to {where}. Remove it.')


def _examples(table: Table, columns: Columns, names: tuple[str, ...]) -> tuple[Examples, list[str]]:
    """The rows of a table that have a text, and notes on what was left out or taken on trust."""
    check(table, columns)
    text = _texts(table, columns.text)
    pair = _texts(table, columns.pair) if columns.pair else None
    group = _group(table, columns.group) if columns.group else None
    ids, trusted = labelling.numbers(table, columns.label, names) if columns.label else ([0] * len(text), "")
    extra = {name: tuple(table.column(column)) for name, column in columns.extra.items() if column}
    filled = [i for i, t in enumerate(text) if t.strip() and (pair is None or pair[i].strip())]
    if not filled:
        raise ValueError(
            f'{table.source}: column "{columns.pair or columns.text}" has no text in any of {len(text)} rows.\n'
            f"    Name another column. Columns: {', '.join(table.names)}."
        )
    dropped = len(text) - len(filled)
    notes = [f"{dropped} of {len(text)} rows without a text were left out ({table.source})"] if dropped else []
    examples = Examples(tuple(text), tuple(pair) if pair else None, tuple(ids), tuple(group) if group else None, extra)
    return take(examples, filled), notes + ([trusted] if trusted else [])


def _refuse_needs(needs: Needs) -> None:
    if needs.extra or not needs.label:
        wanted = ", ".join(name for name in needs.extra if name not in needs.optional) or "other rows"
        raise ValueError(f"data: docstrings have texts with classes alone, and this task needs {wanted}. Name a file.")


def _texts(table: Table, column: str) -> list[str]:
    values = ["" if value is None else value for value in table.column(column)]
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise ValueError(
                f'{table.source}: column "{column}" holds {type(value).__name__}, no text (row {row}: {value!r:.40}).\n'
                f"    Name the column of the texts. Columns: {', '.join(table.names)}."
            )
    return values


def _group(table: Table, column: str) -> list[str]:
    values = table.column(column)
    empty = [row for row, value in enumerate(values, start=1) if value is None or value == ""]
    if empty:
        raise ValueError(
            f'{table.source}: the group in "{column}" is empty in {labelling.some(empty, len(values))}.\n'
            "    Fill these rows in, or name another column."
        )
    return [str(value) for value in values]


def _corpus(
    source: str,
    sides: dict[str, Table],
    asked: Columns,
    needs: Needs,
    test_share: float,
    limits: tuple[int, int],
    seed: int,
    drop: bool = False,
) -> Corpus:
    columns, notes = choose(sides["train"], asked, needs)
    if drop and columns.label:
        cut = {name: labelling.labelled(table, columns.label) for name, table in sides.items()}
        sides, more = {name: table for name, (table, _) in cut.items()}, [note for _, note in cut.values() if note]
        notes += more
    names = labelling.names(sides["train"], columns.label) if needs.label else (ALL,)
    train, more = _examples(sides["train"], columns, names)
    notes += more
    candidates = {name: table for name, table in sides.items() if name != "train"}
    if candidates:
        held, more = _test_side(candidates, columns, names)
        notes += more
    else:
        train, held = split(train, test_share, seed, source, needs.whole)
        notes.append(f"{len(held.label)} rows ({test_share:g} of them) were split off for the test, class by class")
    return _finished(train, held, names, source, notes, limits, seed, needs.whole)


def _test_side(candidates: dict[str, Table], columns: Columns, names: tuple[str, ...]) -> tuple[Examples, list[str]]:
    """The first candidate whose labels are not withheld; if all are, reading the first says so."""
    hidden = [n for n, table in candidates.items() if columns.label and labelling.hidden(table, columns.label)]
    chosen = next((name for name in candidates if name not in hidden), next(iter(candidates)))
    table = candidates[chosen]
    group = columns.group if columns.group in table.names else ""  # only training rows are dealt to clients
    held, notes = _examples(table, columns._replace(group=group), names)
    notes += [f"{name!r} has no labels and was passed over" for name in hidden]
    notes += [f"test split: {chosen!r} (guessed)"] if len(candidates) > 1 else []
    return held, notes


def _finished(
    train: Examples,
    test: Examples,
    names: tuple[str, ...],
    source: str,
    notes: list[str],
    limits: tuple[int, int],
    seed: int,
    whole: str = "",
) -> Corpus:
    train, on_train = limited(train, limits[0], seed, "train_rows", whole)
    test, on_test = limited(test, limits[1], seed, "test_rows", whole)
    notes = notes + on_train + on_test
    known = set(zip(train.text, train.pair or train.text, strict=True))
    if shared := sum(both in known for both in zip(test.text, test.pair or test.text, strict=True)):
        notes.append(f"{shared} of {len(test.text)} test texts are among the training texts too")
    absent = [name for number, name in enumerate(names) if number not in set(train.label)]
    notes += [f"no training row has the label {name!r}" for name in absent]
    return Corpus(train, test, names, source, tuple(notes), _fingerprint(train, test, names))


def _fingerprint(train: Examples, test: Examples, names: tuple[str, ...]) -> str:
    digest = hashlib.sha256(json.dumps(names).encode())
    for row in chain(rows(train), [None], rows(test)):
        digest.update(json.dumps(row).encode() + b"\n")  # ASCII: the same bytes on every machine
    return digest.hexdigest()


def _docstrings(train_rows: int, test_rows: int, seed: int) -> Corpus:
    from spryfl.data import docstrings  # parses a few hundred files when it is used, and imports nothing heavy

    train, test, read = docstrings.build()
    return _finished(
        _of_rows(train), _of_rows(test), docstrings.PACKAGES, DOCSTRINGS, [read], (train_rows, test_rows), seed
    )


def _of_rows(rows: Sequence[Any]) -> Examples:
    return Examples(tuple(r.text for r in rows), None, tuple(r.label for r in rows), tuple(r.group for r in rows))
