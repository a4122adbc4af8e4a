"""Which units each client of a round may move. Costs nothing: names only.

    cyclic   unit i mod L goes to slot i mod M for i in 0 .. max(L, M) - 1      (Spry, arXiv 2405.15551)

L > M: each client holds about L/M units, each unit has one owner. M >= L: each client holds one unit, each unit has
about M/L owners. A slot is a client's place in the round's cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spryfl.types import Unit

Assignment = Callable[[Sequence[Unit], Sequence[int], int], dict[int, tuple[Unit, ...]]]


def everyone() -> Assignment:
    """All units to all clients, as FedAvg does."""
    return lambda units, cohort, round_: dict.fromkeys(cohort, tuple(units))


def nobody() -> Assignment:
    """No unit to anyone: what is left to train is the head."""
    return lambda units, cohort, round_: dict.fromkeys(cohort, ())


def cyclic(rotate: bool = True) -> Assignment:
    """Spry's split: unit i mod L to slot i mod M.

    Args:
        rotate: move the units on by one slot each round, so that no slot is bound to its units.

    >>> from spryfl.types import Unit
    >>> split = cyclic(rotate=False)([Unit("a", ("a",), 1), Unit("b", ("b",), 1)], [7, 9, 4], round_=1)
    >>> {client: [unit.name for unit in units] for client, units in split.items()}
    {7: ['a'], 9: ['b'], 4: ['a']}
    """

    def assign(units: Sequence[Unit], cohort: Sequence[int], round_: int) -> dict[int, tuple[Unit, ...]]:
        dealt: dict[int, tuple[Unit, ...]] = dict.fromkeys(cohort, ())
        offset = round_ if rotate else 0
        for i in range(max(len(units), len(cohort)) if units else 0):
            client = cohort[(i + offset) % len(cohort)]
            dealt[client] += (units[i % len(units)],)
        return dealt

    return assign


ASSIGNMENTS: dict[str, Callable[..., Assignment]] = {"everyone": everyone, "cyclic": cyclic, "nobody": nobody}
