"""Assignment: Spry's rule for every relation of units and clients, and what of it must hold for any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spryfl.assign import ASSIGNMENTS, cyclic, everyone, nobody
from spryfl.types import Unit


def units(count):
    return [Unit(f"u{i}", (f"u{i}",), 1) for i in range(count)]


def by_rule(n_units, cohort, offset):
    """The rule in plain words: unit i mod L to slot (i + offset) mod M."""
    dealt = {client: [] for client in cohort}
    if n_units:
        for i in range(max(n_units, len(cohort))):
            dealt[cohort[(i + offset) % len(cohort)]].append(f"u{i % n_units}")
    return dealt


@given(st.integers(0, 12), st.integers(1, 12), st.integers(1, 30), st.booleans())
def test_cyclic_is_its_rule(n_units, n_clients, round_, rotate):
    cohort = [3 * i + 1 for i in range(n_clients)][::-1]
    dealt = cyclic(rotate=rotate)(units(n_units), cohort, round_)
    names = {client: [unit.name for unit in mine] for client, mine in dealt.items()}
    assert names == by_rule(n_units, cohort, round_ if rotate else 0)


@pytest.mark.parametrize(("n_units", "n_clients"), [(3, 8), (8, 8), (8, 3), (7, 3), (1, 5), (5, 1)])
def test_cyclic_leaves_no_unit_out_and_no_client_idle(n_units, n_clients):
    dealt = cyclic()(units(n_units), list(range(n_clients)), 4)
    sizes = [len(mine) for mine in dealt.values()]
    owners = [sum(unit in mine for mine in dealt.values()) for unit in units(n_units)]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert min(owners) >= 1
    assert max(owners) - min(owners) <= 1
    assert sum(owners) == max(n_units, n_clients)


def test_no_unit_at_all_is_legal():
    assert cyclic()([], [0, 1], 1) == {0: (), 1: ()}


def test_rotation_brings_every_unit_to_every_slot():
    seen = {unit.name for round_ in range(4) for unit in cyclic()(units(4), [0, 1, 2, 3], round_)[0]}
    assert seen == {"u0", "u1", "u2", "u3"}
    fixed = {unit.name for round_ in range(4) for unit in cyclic(rotate=False)(units(4), [0, 1, 2, 3], round_)[0]}
    assert fixed == {"u0"}


def test_everyone_and_nobody():
    assert everyone()(units(2), [5, 6], 1) == {5: tuple(units(2)), 6: tuple(units(2))}
    assert nobody()(units(2), [5, 6], 1) == {5: (), 6: ()}


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_every_client_of_the_cohort_has_an_entry_of_known_units(name):
    dealt = ASSIGNMENTS[name]()(units(5), [9, 2, 4], 3)
    assert list(dealt) == [9, 2, 4]
    assert all(unit in units(5) for mine in dealt.values() for unit in mine)
    assert all(len(set(mine)) == len(mine) for mine in dealt.values())
