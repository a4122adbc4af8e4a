"""How the classes fall to the clients: a matrix of discs, area by rows of a class, and the same as a table.

    radius = cell / 2 sqrt(n / most)        in STEPS sizes, so that a size is one path of the picture

Cost: a few bytes a client and class; above MOST of them the first clients are drawn, and of many classes the largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spryfl.page.parts import Table
from spryfl.report import Groups, Run

MOST = 3000  # discs of a picture
CLASSES = 40  # rows of a picture
STEPS = 14  # sizes of a disc
PICTURES = 4  # different partitions that are drawn


class Dealt(NamedTuple):
    """One way in which rows fell to clients, and the runs that had it."""

    runs: str
    labels: Sequence[str]
    totals: Sequence[str]  # rows of each class, over the clients that are drawn
    cell: int  # pixels
    width: int
    height: int
    paths: Sequence[tuple[str, str]]  # stroke width, points
    table: Table
    words: str


def dealt(groups: Groups) -> tuple[list[Dealt], int]:
    """The partitions that the runs recorded, each once; and how many more there are than are drawn."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for label, runs in groups.items():
        for run in runs:
            if key := _counts(run):
                found.setdefault(key, []).append(run.name if len(groups) > 1 or len(runs) > 1 else label)
    shown = [_dealt(key, names) for key, names in list(found.items())[:PICTURES]]
    return shown, len(found) - len(shown)


def _counts(run: Run) -> tuple[Any, ...]:
    """(labels, rows of each class a client) as the run recorded them; empty where it did not."""
    told = run.facts.get("clients")
    if not isinstance(told, Mapping) or not told.get("rows"):
        return ()
    counts = tuple(tuple(int(word) for word in str(line).split()) for line in told["rows"])
    labels = tuple(str(one) for one in told.get("labels", ())) or ("rows",)
    return (labels, counts) if all(len(one) == len(labels) for one in counts) else ()


def _dealt(key: tuple[Any, ...], names: Sequence[str]) -> Dealt:
    labels, counts = key
    order = sorted(range(len(labels)), key=lambda i: -sum(one[i] for one in counts))[:CLASSES]
    kept = sorted(order)
    clients = min(len(counts), max(1, MOST // len(kept)))
    shown = [[one[i] for i in kept] for one in counts[:clients]]
    cell = max(9, min(24, 760 // clients))
    names_ = [labels[i] for i in kept]
    sizes = sorted(sum(one) for one in counts)
    rows = [(str(i), *(f"{n:,}" for n in one), f"{sum(counts[i]):,}") for i, one in enumerate(shown)]
    return Dealt(
        _listed(names),
        names_,
        [f"{sum(one[i] for one in counts):,}" for i in kept],
        cell,
        cell * clients,
        cell * len(kept),
        _discs(shown, cell),
        Table(("client", *names_, "together"), rows),
        _words(labels, counts, kept, clients, sizes),
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _words(labels: Sequence[str], counts: Sequence[Any], kept: Sequence[int], clients: int, sizes: list[int]) -> str:
    """The picture in a sentence or two."""
    middle = sizes[len(sizes) // 2]
    said = f"{len(counts)} clients hold {sizes[0]:,} to {sizes[-1]:,} rows each, {middle:,} in the middle."
    if len(labels) > 1:
        said += f" Their classes are {distance(counts):.2f} from those of all rows (0: alike, near 1: one class each)."
    if clients < len(counts):
        said += f" The first {clients} are drawn."
    if len(kept) < len(labels):
        said += f" Of {len(labels)} classes the {len(kept)} largest are drawn."
    return said


def distance(counts: Sequence[Sequence[int]]) -> float:
    """Half the sum of |p - q| between a client's classes and all rows', mean over the clients with rows."""
    whole = [sum(column) for column in zip(*counts, strict=True)]
    total = sum(whole)
    own = [
        sum(abs(n / sum(one) - all_ / total) for n, all_ in zip(one, whole, strict=True)) / 2
        for one in counts
        if sum(one)
    ]
    return sum(own) / len(own) if own else 0.0


def _discs(shown: Sequence[Sequence[int]], cell: int) -> list[tuple[str, str]]:
    """(width of the stroke, its points) for each size: a point of a round stroke is a disc."""
    most = max((n for one in shown for n in one), default=0) or 1
    sizes: dict[int, list[str]] = {}
    for client, one in enumerate(shown):
        for row, n in enumerate(one):
            if n:
                step = max(1, round(STEPS * math.sqrt(n / most)))
                sizes.setdefault(step, []).append(f"M{_place(client, cell)} {_place(row, cell)}h0")
    return [(f"{(cell - 1) * step / STEPS:.1f}", "".join(points)) for step, points in sorted(sizes.items())]


def _place(index: int, cell: int) -> str:
    return f"{cell * (index + 0.5):g}"
