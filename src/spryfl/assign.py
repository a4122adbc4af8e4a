"""Which units each client of a round may move. Costs next to nothing: names and sizes only.

    cyclic       unit i mod L goes to slot i mod M for i in 0 .. max(L, M) - 1      (Spry, arXiv 2405.15551)
    contiguous   neighbours in model order together, cut nearest to equal numbers of values
    balanced     the largest unit to the slot with the fewest values, and so on     (Graham 1969, longest first)
    budget       at most so many values a client; what fits nobody stays as it is this round
    few          at most so many units a client, in turn over the rounds; what is nobody's stays as it is this round

L units, M clients; a slot is a client's place in the round's cohort. The first three are ways to cut the units into
min(L, M) blocks. L > M: each client holds a block, each unit has one owner. M >= L: each client holds one unit, each
unit has about M/L owners. A head that is not split goes to every client besides, and is not counted here.

Where a federation has classes of clients, each class is dealt by its own assignment, one class after the other.
`budget` and `few`, which cannot give every unit an owner, then take the units with the fewest owners first.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

from spryfl.types import Unit

Assignment = Callable[..., dict[int, tuple[Unit, ...]]]  # (units, cohort, round), and owners where it looks at them
Owners = Mapping[Unit, int]  # how many clients of other classes hold a unit in this round
Blocks = list[tuple[Unit, ...]]


def everyone() -> Assignment:
    """All units to all clients, as FedAvg does."""
    return lambda units, cohort, round_: dict.fromkeys(cohort, tuple(units))


def no_unit(units: Sequence[Unit], cohort: Sequence[int], round_: int) -> dict[int, tuple[Unit, ...]]:
    """What `nobody` builds; by it the server knows that the adapters never move and need not travel.

    Args:
        units: not looked at.
        cohort: numbers of the clients of the round.
        round_: not looked at.
    """
    return dict.fromkeys(cohort, ())


def nobody() -> Assignment:
    """No unit to anyone: what is left to train is the head."""
    return no_unit


def cyclic(rotate: bool = True) -> Assignment:
    """Spry's split: unit i mod L to slot i mod M.

    Args:
        rotate: move the units on by one slot each round, so that no slot is bound to its units.

    >>> from spryfl.types import Unit
    >>> split = cyclic(rotate=False)([Unit("a", ("a",), 1), Unit("b", ("b",), 1)], [7, 9, 4], round_=1)
    >>> {client: [unit.name for unit in units] for client, units in split.items()}
    {7: ['a'], 9: ['b'], 4: ['a']}
    """
    return _by_blocks(lambda units, count: [tuple(units[slot::count]) for slot in range(count)], rotate)


def contiguous(rotate: bool = True) -> Assignment:
    """Neighbours together: each client holds a run of the model's units, with about the same number of values.

    The owners of late units need no tangents for the layers before them. No run has more values than an equal share
    and the largest unit together.

    Args:
        rotate: move the runs on by one slot each round.

    >>> from spryfl.types import Unit
    >>> split = contiguous(rotate=False)([Unit(n, (n,), 1) for n in "abcde"], [7, 9], round_=1)
    >>> {client: [unit.name for unit in units] for client, units in split.items()}
    {7: ['a', 'b'], 9: ['c', 'd', 'e']}
    """
    return _by_blocks(_runs, rotate)


def balanced(rotate: bool = True) -> Assignment:
    """Numbers of values as equal as a greedy choice makes them: the largest unit to the least laden slot, and so on.

    At most 4/3 of the best possible largest share. Equal units fall as in `cyclic`.

    Args:
        rotate: move the blocks on by one slot each round.

    >>> from spryfl.types import Unit
    >>> split = balanced(rotate=False)([Unit("a", ("a",), 2), Unit("b", ("b",), 5), Unit("c", ("c",), 2)], [7, 9], 1)
    >>> {client: [unit.name for unit in units] for client, units in split.items()}
    {7: ['b'], 9: ['a', 'c']}
    """
    return _by_blocks(_packed, rotate)


def budget(values: tuple[int, ...] = ()) -> Assignment:
    """By what each client can train: client c moves at most `values[c mod len(values)]` values a round.

    Units are dealt in model order, from another start each round, each to the slot with the most room left; one that
    fits nobody's room stays as it is this round, and is first in line within L rounds. A budget is a limit, not a
    goal: a second owner is found only for a client that would be idle, the unit with the fewest owners that fits it.
    A client whose budget fits no unit gets none.

    Args:
        values: numbers of values, the head's not among them unless it is split: (2048, 512) makes every second client
            a weak one. 0 is a client that trains no unit.

    Raises:
        ValueError: no budget or a negative one; when dealing, every unit is larger than every budget.

    >>> from spryfl.types import Unit
    >>> split = budget((4, 1))([Unit("a", ("a",), 2), Unit("b", ("b",), 2), Unit("c", ("c",), 1)], [6, 7], round_=3)
    >>> {client: [unit.name for unit in units] for client, units in split.items()}
    {6: ['a', 'b'], 7: ['c']}
    """
    if not values or min(values) < 0:
        raise ValueError(
            f"values = {list(values)} of budget: give how many values a client may train, each 0 or more, "
            f"for example [2048, 512]; client c has the entry c mod their number."
        )

    def assign(
        units: Sequence[Unit], cohort: Sequence[int], round_: int, owners: Owners | None = None
    ) -> dict[int, tuple[Unit, ...]]:
        _check_fit(units, values)
        before = [(owners or {}).get(unit, 0) for unit in units]
        order = sorted(range(len(units)), key=lambda i: (before[i], (i - round_) % len(units)))
        room = {client: values[client % len(values)] for client in cohort}
        dealt: dict[int, list[int]] = {client: [] for client in cohort}
        for i in order:
            roomiest = max(cohort, key=lambda client: room[client])
            if units[i].size <= room[roomiest]:
                dealt[roomiest].append(i)
                room[roomiest] -= units[i].size
        held = [before[i] + sum(i in mine for mine in dealt.values()) for i in range(len(units))]
        for client in [client for client, mine in dealt.items() if not mine]:
            fitting = [i for i in order if units[i].size <= room[client]]
            if fitting:
                rarest = min(fitting, key=lambda i: held[i])
                dealt[client].append(rarest)
                held[rarest] += 1
        return {client: tuple(units[i] for i in sorted(mine)) for client, mine in dealt.items()}

    return assign


def few(units: int = 1) -> Assignment:
    """At most so many units a client, those with the fewest owners first.

    Among units with equally many owners the turn decides: round r begins at unit r s mod L, with s the whole number
    nearest to 0.618 L that has no factor in common with L. So each unit is first in line once in L rounds, and a few
    rounds spread over the whole model.

    Args:
        units: of each client.

    Raises:
        ValueError: fewer than 1 unit.

    >>> from spryfl.types import Unit
    >>> split = few(1)([Unit(n, (n,), 1) for n in "abcde"], [7, 9], round_=1)
    >>> {client: [unit.name for unit in units] for client, units in split.items()}
    {7: ['d'], 9: ['e']}
    """
    if units < 1:
        raise ValueError(f'units = {units} of few: a client needs at least 1. For the head alone, use "nobody".')
    each = units

    def assign(
        units: Sequence[Unit], cohort: Sequence[int], round_: int, owners: Owners | None = None
    ) -> dict[int, tuple[Unit, ...]]:
        count = len(units)
        held = [(owners or {}).get(unit, 0) for unit in units]
        begin = round_ * _stride(count)
        dealt: dict[int, tuple[Unit, ...]] = {}
        for client in cohort:
            turn = sorted(range(count), key=lambda i: (held[i], (i - begin) % count))[:each]
            for i in turn:
                held[i] += 1
            dealt[client] = tuple(units[i] for i in sorted(turn))
        return dealt

    return assign


ASSIGNMENTS: dict[str, Callable[..., Assignment]] = {
    "everyone": everyone,
    "cyclic": cyclic,
    "contiguous": contiguous,
    "balanced": balanced,
    "budget": budget,
    "few": few,
    "nobody": nobody,
}


def dealt(
    assign: Assignment, units: Sequence[Unit], cohort: Sequence[int], round_: int, owners: Owners
) -> dict[int, tuple[Unit, ...]]:
    """What `assign` deals to one class of a cohort, told how many owners each unit has, if it looks at that.

    Args:
        assign: a way to deal units.
        units: those to be dealt.
        cohort: numbers of this class's clients in the round.
        round_: 1 is the first.
        owners: unit name -> how many clients of other classes have it already.
    """
    looks = owners and "owners" in inspect.signature(assign).parameters
    return assign(units, cohort, round_, **({"owners": owners} if looks else {}))


def _stride(count: int) -> int:
    """The whole number nearest to 0.618 of `count` without a common factor; 0 where there is nothing to count."""
    possible = [step for step in range(1, count + 1) if math.gcd(step, count) == 1]
    return min(possible, key=lambda step: abs(step - 0.618 * count), default=0)


def _by_blocks(cut: Callable[[Sequence[Unit], int], Blocks], rotate: bool) -> Assignment:
    """An assignment from a way to cut L units into min(L, M) blocks, which go round among the slots."""

    def assign(units: Sequence[Unit], cohort: Sequence[int], round_: int) -> dict[int, tuple[Unit, ...]]:
        dealt: dict[int, tuple[Unit, ...]] = dict.fromkeys(cohort, ())
        blocks = cut(units, min(len(units), len(cohort))) if units else [()]
        offset = round_ if rotate else 0
        for i in range(len(cohort)):
            dealt[cohort[(i + offset) % len(cohort)]] = blocks[i % len(blocks)]
        return dealt

    return assign


def _runs(units: Sequence[Unit], count: int) -> Blocks:
    """`count` runs of neighbours: each cut is the one nearest to an equal share that leaves no run empty."""
    sums = [0, *accumulate(unit.size for unit in units)]  # values before each possible cut
    cuts = [0]
    for i in range(1, count):
        possible = range(cuts[-1] + 1, len(units) - count + i + 1)
        cuts.append(min(possible, key=lambda at: abs(sums[at] * count - sums[-1] * i)))
    return [tuple(units[first:last]) for first, last in pairwise([*cuts, len(units)])]


def _packed(units: Sequence[Unit], count: int) -> Blocks:
    """`count` blocks, the largest unit first, each to the block with the fewest values so far."""
    blocks: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in sorted(range(len(units)), key=lambda i: -units[i].size):
        lightest = loads.index(min(loads))
        blocks[lightest].append(i)
        loads[lightest] += units[i].size
    return [tuple(units[i] for i in sorted(block)) for block in blocks]


def _check_fit(units: Sequence[Unit], values: Sequence[int]) -> None:
    """A ValueError if no client of any cohort could ever train any of the units."""
    smallest = min((unit.size for unit in units), default=0)
    if smallest > max(values):
        raise ValueError(
            f"values = {list(values)} of budget: the largest allows {max(values)} values, the smallest of the "
            f"{len(units)} units has {smallest}. Give a budget of at least {smallest}, or make the units smaller "
            f"(a lower r of the adapter)."
        )
