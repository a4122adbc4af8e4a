"""Texts with their classes as columns, and what can be drawn from them: a test share, a smaller set. Class by class.

The order of the rows stays as it was; what is drawn depends on the labels and the seed alone. Linear in the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heapreplace
from random import Random
from typing import Any, NamedTuple


class Examples(NamedTuple):
    """Columns of equal length."""

    text: tuple[str, ...]
    pair: tuple[str, ...] | None
    label: tuple[int, ...]  # 0..C-1
    group: tuple[str, ...] | None  # the natural client: a user, a module
    extra: Mapping[str, tuple[Any, ...]] = {}  # what else a task reads, by name


def rows(examples: Examples) -> Iterable[tuple[Any, ...]]:
    nothing = [None] * len(examples.label)
    columns = (examples.text, examples.pair or nothing, examples.label, examples.group or nothing)
    return zip(*columns, *examples.extra.values(), strict=True)


def take(examples: Examples, rows: Sequence[int]) -> Examples:
    text, pair, label, group, extra = examples
    return Examples(
        tuple(text[row] for row in rows),
        tuple(pair[row] for row in rows) if pair else None,
        tuple(label[row] for row in rows),
        tuple(group[row] for row in rows) if group else None,
        {name: tuple(values[row] for row in rows) for name, values in extra.items()},
    )


def split(examples: Examples, share: float, seed: int, source: str, whole: str = "") -> tuple[Examples, Examples]:
    """A share of each class for the test; a class with a single row stays in training.

    With `whole`, a share of that column's values instead: all rows of one value go to one side.
    """
    if not 0 < share < 1:
        raise ValueError(
            f"data: test_share = {share} must be between 0 and 1 (0.2: a fifth of the rows), or name a test file."
        )
    test: set[int] = set()
    for label, own in (_by_class(examples.label) if not whole else {0: examples.extra[whole]}).items():
        pieces = _pieces(own) if whole else [[row] for row in own]
        Random(f"test split {seed} {label}").shuffle(pieces)
        count = min(max(1, round(share * len(pieces))), len(pieces) - 1)
        test.update(row for piece in pieces[:count] for row in piece)
    if not test:
        raise ValueError(
            f"{source}: every class has a single row, so nothing can be split off for the test. Name a test file."
        )
    train = [row for row in range(len(examples.label)) if row not in test]
    return take(examples, train), take(examples, sorted(test))


def _pieces(values: Sequence[Any]) -> list[list[int]]:
    """Rows by value, in the order of their first row."""
    pieces: dict[Any, list[int]] = {}
    for row, value in enumerate(values):
        pieces.setdefault(value, []).append(row)
    return list(pieces.values())


def _by_class(labels: Sequence[int]) -> dict[int, list[int]]:
    classes: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for row, label in enumerate(labels):
        classes[label].append(row)
    return classes


def limited(examples: Examples, rows: int, seed: int, option: str, whole: str = "") -> tuple[Examples, list[str]]:
    """`rows` of the examples, in the classes' own proportions but one of each class at least.

    With `whole`, all rows of as many of that column's values as fit into `rows`, and of one at least.
    """
    total, classes = len(examples.label), _by_class(examples.label)
    if rows == 0:
        return examples, []
    if rows < len(classes):
        raise ValueError(
            f"data: {option} = {rows} is less than one row for each of {len(classes)} classes.\n"
            f"    Use at least {len(classes)}, or 0 for all {total} rows."
        )
    if rows >= total:
        return examples, [f"{option} = {rows} changes nothing: there are {total} rows"]
    if whole:
        kept = _fitting(_pieces(examples.extra[whole]), rows, f"{option} {seed}")
        return take(examples, kept), [f"{option}: {len(kept)} of {total} rows, each {whole} whole"]
    chosen: list[int] = []
    for label, quota in _quotas({label: len(own) for label, own in classes.items()}, rows).items():
        Random(f"{option} {seed} {label}").shuffle(classes[label])
        chosen += classes[label][:quota]
    return take(examples, sorted(chosen)), [f"{option}: {rows} of {total} rows, class by class"]


def _fitting(pieces: list[list[int]], rows: int, seed: str) -> list[int]:
    """Rows of whole pieces, drawn until no further one fits."""
    Random(seed).shuffle(pieces)
    kept = list(pieces[0])
    for piece in pieces[1:]:
        kept += piece if len(kept) + len(piece) <= rows else []
    return sorted(kept)


def _quotas(sizes: dict[int, int], rows: int) -> dict[int, int]:
    """Rows by class: each in turn goes to the class that is furthest below its share, after one for each."""
    quotas = dict.fromkeys(sizes, 1)
    heap = [(quotas[label] / size, label) for label, size in sizes.items()]
    heapify(heap)
    for _ in range(rows - len(sizes)):
        label = heap[0][1]
        quotas[label] += 1
        heapreplace(heap, (quotas[label] / sizes[label], label))
    return quotas
