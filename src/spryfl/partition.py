"""Which client holds which examples. The standard library alone; every choice comes from the seed given.

`iid`        a shuffle, dealt in equal parts.
`dirichlet`  client i draws its shares of the classes, q_i ~ Dir(alpha * p), where p holds the shares of the classes
             in the whole set, and fills its equal part of the rows by them (Hsu, Qi, Brown 2019, arXiv:1909.06335).
             A class that is used up leaves the draw and the others share its weight, so the last clients are less
             free than the first. Small alpha: one class a client; large alpha: IID. (Programs that draw from
             Dir(alpha, ..., alpha) mean by their alpha what is alpha times the number of classes here.)
`natural`    whole groups (users, modules): the largest first, each to the client that holds least.

Every row goes to exactly one client and no client is empty. 100,000 rows take less than a second.
"""

from __future__ import annotations

import statistics as stats
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from heapq import heapify, heapreplace
from itertools import accumulate
from math import exp, isfinite, log
from random import Random
from typing import Any, NamedTuple

from spryfl import registry

Parts = tuple[tuple[int, ...], ...]  # rows by client, each ascending
Partition = Callable[[Sequence[int], Sequence[str] | None, int, int], Parts]  # (labels, groups, clients, seed)


class Statistics(NamedTuple):
    """How the classes fell to the clients."""

    counts: tuple[tuple[int, ...], ...]  # rows by client and class
    smallest: int  # rows of a client
    median: float
    largest: int
    distance: float  # mean total variation between a client's classes and all rows': 0 is IID, near 1 is one class each


def iid() -> Partition:
    """Equal parts of a shuffle."""

    def deal(labels: Sequence[int], groups: Sequence[str] | None, clients: int, seed: int) -> Parts:
        _check(len(labels), clients)
        rows = list(range(len(labels)))
        Random(f"iid {seed}").shuffle(rows)
        return tuple(tuple(sorted(rows[client::clients])) for client in range(clients))

    return deal


def dirichlet(alpha: float = 0.1) -> Partition:
    """Equal parts whose shares of the classes are drawn from a Dirichlet distribution around the whole set's.

    Args:
        alpha: concentration; small: a client has few classes, large: all as the whole set.

    Raises:
        ValueError: alpha is not above 0.
    """
    if not (isfinite(alpha) and alpha > 0):
        raise ValueError(
            f"dirichlet: alpha = {alpha} must be a finite number above 0 (0.1: very uneven; 100: nearly even)."
        )

    def deal(labels: Sequence[int], groups: Sequence[str] | None, clients: int, seed: int) -> Parts:
        _check(len(labels), clients)
        random = Random(f"dirichlet {seed}")
        pools = _shuffled_classes(labels, random)
        concentration = {label: alpha * len(rows) / len(labels) for label, rows in pools.items()}
        order = list(range(clients))  # late clients get what is left: who is late is drawn too
        random.shuffle(order)
        parts: list[tuple[int, ...]] = [()] * clients
        for position, client in enumerate(order):
            size = len(labels) // clients + (position < len(labels) % clients)
            parts[client] = tuple(sorted(_fill(pools, _log_shares(concentration, random), size, random)))
        return tuple(parts)

    return deal


def natural() -> Partition:
    """Whole groups; ties between groups of one size are broken by the seed."""

    def deal(labels: Sequence[int], groups: Sequence[str] | None, clients: int, seed: int) -> Parts:
        _check(len(labels), clients)
        members = _members(groups, len(labels))
        if len(members) < clients:
            raise ValueError(
                f'partition "natural": {clients} clients, but only {len(members)} groups.\n'
                f"    Use at most {len(members)} clients, a finer group column, or another partition: iid, dirichlet."
            )
        names = sorted(members)
        Random(f"natural {seed}").shuffle(names)
        names.sort(key=lambda name: -len(members[name]))
        held: list[list[int]] = [[] for _ in range(clients)]
        load = [(0, client) for client in range(clients)]
        heapify(load)
        for name in names:
            rows, client = load[0]
            held[client] += members[name]
            heapreplace(load, (rows + len(members[name]), client))
        return tuple(tuple(sorted(rows)) for rows in held)

    return deal


PARTITIONS: dict[str, Callable[..., Partition]] = {"iid": iid, "dirichlet": dirichlet, "natural": natural}


def build(choice: Mapping[str, Any]) -> Partition:
    """The partition that a choice names: {"kind": key or builder, option: value, ...}.

    Args:
        choice: {"kind": a key of PARTITIONS or a builder, and its options by name}.

    >>> build({"kind": "iid"})([0, 1, 0, 1], None, 2, 0)
    ((...), (...))
    """
    return registry.made("partition", PARTITIONS, choice)


def hold_out(indices: Sequence[int], share: float, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(train, held out) of one client: `share` of its rows, rounded, but always one row to train on.

    Args:
        indices: the client's rows.
        share: in [0, 1).
        seed: which rows.

    Raises:
        ValueError: the share is out of its range.

    >>> [len(side) for side in hold_out(range(10), 0.2, seed=0)]
    [8, 2]
    """
    if not 0 <= share < 1:
        raise ValueError(f"hold_out: share = {share} must be at least 0 and below 1 (0 holds nothing out).")
    rows = sorted(indices)
    Random(f"hold out {seed}").shuffle(rows)
    kept = max(len(rows) - round(share * len(rows)), min(1, len(rows)))
    return tuple(sorted(rows[:kept])), tuple(sorted(rows[kept:]))


def statistics(parts: Parts, labels: Sequence[int], n_classes: int) -> Statistics:
    """Counts by client and class, sizes, and how far the clients are from the whole.

    Args:
        parts: each client's rows.
        labels: class of every row of the set.
        n_classes: how many classes there are.
    """
    tallies = [Counter(labels[row] for row in rows) for rows in parts]
    counts = tuple(tuple(tally[label] for label in range(n_classes)) for tally in tallies)
    total = [sum(column) for column in zip(*counts, strict=True)]
    sizes = [len(rows) for rows in parts]
    distances = [_total_variation(row, total) for row in counts if sum(row)]
    return Statistics(counts, min(sizes), stats.median(sizes), max(sizes), stats.fmean(distances))


def written(parts: Parts, labels: Sequence[int], names: Sequence[str]) -> dict[str, list[str]]:
    """The counts as words, for a run's facts: a client a line, its rows of each class; all its rows without classes.

    Args:
        parts: each client's rows.
        labels: the class of each row, as a number.
        names: of the classes; empty where there are none.
    """
    counts = statistics(parts, labels, len(names)).counts if names else tuple((len(rows),) for rows in parts)
    return {"labels": list(names), "rows": [" ".join(map(str, one)) for one in counts]}


def _total_variation(one: Sequence[int], other: Sequence[int]) -> float:
    """Half the sum of |p - q| over the classes."""
    n, m = sum(one), sum(other)
    return sum(abs(a / n - b / m) for a, b in zip(one, other, strict=True)) / 2


def _check(rows: int, clients: int) -> None:
    if clients < 1:
        raise ValueError(f"partition: clients = {clients}; at least 1 is needed.")
    if clients > rows:
        raise ValueError(
            f"partition: {clients} clients, but only {rows} examples: a client without examples cannot train.\n"
            f"    Use at most {rows} clients, or more data."
        )


def _members(groups: Sequence[str] | None, rows: int) -> dict[str, list[int]]:
    """Rows by group."""
    if groups is None:
        raise ValueError(
            'partition "natural" needs to know which rows belong together, and these data have no group column.\n'
            "    Name one (a user, a source, a document), or use another partition: iid, dirichlet."
        )
    if len(groups) != rows:
        raise ValueError(f'partition "natural": {len(groups)} groups for {rows} examples; one for each is needed.')
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    return members


def _shuffled_classes(labels: Sequence[int], random: Random) -> dict[int, list[int]]:
    """Rows by class, in an order of chance: taking from the end takes at random."""
    pools: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for row, label in enumerate(labels):
        pools[label].append(row)
    for rows in pools.values():
        random.shuffle(rows)
    return pools


def _log_shares(concentration: dict[int, float], random: Random) -> dict[int, float]:
    """Logarithms of one Dirichlet draw, up to a constant: shares too small for a float still have an order.

    Gamma(a) is Gamma(a + 1) * U ** (1 / a), whose logarithm is finite for every a.
    """
    return {
        label: log(random.gammavariate(a + 1.0, 1.0)) + log(1.0 - random.random()) / max(a, 1e-300)
        for label, a in concentration.items()
    }


def _fill(pools: dict[int, list[int]], log_shares: dict[int, float], size: int, random: Random) -> list[int]:
    """`size` rows, each of a class drawn by its share among the classes that still have rows."""
    taken: list[int] = []
    while len(taken) < size:
        left = [label for label, rows in pools.items() if rows]
        largest = max(log_shares[label] for label in left)
        weights = [exp(log_shares[label] - largest) for label in left]  # one of them is 1: never 0 / 0
        taken += _draw(pools, left, weights, size - len(taken), random)
    return taken


def _draw(pools: dict[int, list[int]], left: list[int], weights: list[float], size: int, random: Random) -> list[int]:
    """Rows until `size` of them are drawn or a class runs out."""
    bounds = list(accumulate(weights))
    taken: list[int] = []
    while len(taken) < size:
        label = random.choices(left, cum_weights=bounds)[0]
        taken.append(pools[label].pop())
        if not pools[label]:
            break
    return taken
