"""Assignment: Spry's rule for every relation of units and clients, and what of it must hold for any."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import spryfl
from spryfl.assign import ASSIGNMENTS, balanced, budget, contiguous, cyclic, everyone, nobody
from spryfl.types import Unit

OPTIONS = {
    "budget": {"values": (100, 30, 60)},
    "few": {"units": 5},
}  # enough for all the units below, where there are three clients
MADE = {name: make(**OPTIONS.get(name, {})) for name, make in ASSIGNMENTS.items()}
TRAINING = sorted(set(ASSIGNMENTS) - {"nobody"})
SPLIT = ["balanced", "contiguous", "cyclic"]  # each unit has one owner while there are units enough
COUNTS = [(3, 8), (8, 8), (8, 3), (7, 3), (1, 5), (5, 1), (9, 4), (5, 7)]
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=14)


def units(count, sizes=None):
    return [Unit(f"u{i}", (f"u{i}",), sizes[i] if sizes else 1) for i in range(count)]


def sized(sizes):
    return units(len(sizes), sizes)


def load(mine):
    return sum(unit.size for unit in mine)


def owners(dealt, all_units):
    return [sum(unit in mine for mine in dealt.values()) for unit in all_units]


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


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize(("n_units", "n_clients"), COUNTS)
def test_a_split_leaves_no_unit_out_and_no_client_idle(name, n_units, n_clients):
    dealt = MADE[name](units(n_units), list(range(n_clients)), 4)
    sizes = [len(mine) for mine in dealt.values()]
    owned = owners(dealt, units(n_units))
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert min(owned) >= 1
    assert max(owned) - min(owned) <= 1
    assert sum(owned) == max(n_units, n_clients)


@pytest.mark.parametrize("name", SPLIT)
def test_rotation_brings_every_block_to_every_slot(name):
    seen = {unit.name for round_ in range(4) for unit in MADE[name](units(4), [0, 1, 2, 3], round_)[0]}
    assert seen == {"u0", "u1", "u2", "u3"}
    fixed = ASSIGNMENTS[name](rotate=False)
    assert all(fixed(units(7), [5, 2, 9], round_) == fixed(units(7), [5, 2, 9], 0) for round_ in range(4))
    turned = [MADE[name](units(7), [5, 2, 9], round_) for round_ in range(4)]
    assert all(turned[r + 1][2] == turned[r][5] and turned[r + 1][5] == turned[r][9] for r in range(3))


def test_everyone_and_nobody():
    assert everyone()(units(2), [5, 6], 1) == {5: tuple(units(2)), 6: tuple(units(2))}
    assert nobody()(units(2), [5, 6], 1) == {5: (), 6: ()}


@pytest.mark.parametrize("name", ASSIGNMENTS)
class TestLaws:
    @pytest.mark.parametrize(("n_units", "n_clients"), [*COUNTS, (0, 3)])
    def test_every_client_of_the_cohort_has_an_entry_of_known_units(self, name, n_units, n_clients):
        cohort = [3 * i + 1 for i in range(n_clients)][::-1]
        dealt = MADE[name](units(n_units), cohort, 3)
        assert list(dealt) == cohort
        assert all(isinstance(mine, tuple) and set(mine) <= set(units(n_units)) for mine in dealt.values())

    @given(sizes=SIZES, n_clients=st.integers(1, 9), round_=st.integers(1, 40))
    def test_nobody_holds_a_unit_twice_and_all_are_in_model_order(self, name, sizes, n_clients, round_):
        for mine in MADE[name](sized(sizes), list(range(n_clients)), round_).values():
            places = [int(unit.name[1:]) for unit in mine]
            assert places == sorted(set(places))

    def test_it_is_a_function_of_its_arguments(self, name):
        again = ASSIGNMENTS[name](**OPTIONS.get(name, {}))
        for round_ in (7, 3, 7):
            given_ = (units(7, [5, 1, 9, 2, 2, 8, 1]), [4, 0, 6], round_)
            assert again(*given_) == MADE[name](*given_)

    def test_no_unit_at_all_is_legal(self, name):
        assert MADE[name]([], [0, 1], 1) == {0: (), 1: ()}


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize(("n_units", "n_clients"), COUNTS)
def test_every_unit_has_an_owner(name, n_units, n_clients):
    sizes = [1 + 7 * i % 12 for i in range(n_units)]
    dealt = MADE[name](sized(sizes), list(range(n_clients)), 5)
    assert min(owners(dealt, sized(sizes))) >= 1


class TestContiguous:
    @given(SIZES, st.integers(1, 9), st.integers(1, 30), st.booleans())
    def test_blocks_are_runs_of_neighbours_that_make_up_the_model(self, sizes, n_clients, round_, rotate):
        dealt = contiguous(rotate)(sized(sizes), list(range(n_clients)), round_)
        runs = {tuple(int(unit.name[1:]) for unit in mine) for mine in dealt.values()}
        assert all(run == tuple(range(run[0], run[-1] + 1)) for run in runs)
        assert sorted(i for run in runs for i in run) == list(range(len(sizes)))

    @given(SIZES, st.integers(1, 9))
    def test_no_run_exceeds_an_equal_share_and_the_largest_unit(self, sizes, n_clients):
        dealt = contiguous()(sized(sizes), list(range(n_clients)), 1)
        count = min(len(sizes), n_clients)
        assert max(map(load, dealt.values())) <= sum(sizes) / count + max(sizes)

    @given(SIZES, st.integers(2, 9))
    def test_cuts_are_nearest_to_equal_shares(self, sizes, n_clients):
        """Where no run would be empty: each cut, by trying all."""
        count = min(len(sizes), n_clients)
        sums = [0, *itertools.accumulate(sizes)]
        ideal = [sums[-1] * i / count for i in range(1, count)]
        nearest = [min(range(len(sums)), key=lambda j, at=at: (abs(sums[j] - at), j)) for at in ideal]
        assume([0, *nearest, len(sizes)] == sorted({0, len(sizes), *nearest}))
        dealt = contiguous(rotate=False)(sized(sizes), list(range(count)), 1)
        assert [int(mine[0].name[1:]) for mine in dealt.values()] == [0, *nearest]

    def test_slots_follow_the_model(self):
        dealt = contiguous(rotate=False)(sized([1, 1, 4, 2, 2]), [8, 3], 1)
        assert [[unit.name for unit in mine] for mine in dealt.values()] == [["u0", "u1", "u2"], ["u3", "u4"]]


def best_load(sizes, slots):
    """The smallest largest load, by trying every way to deal."""
    ways = itertools.product(range(slots), repeat=len(sizes))
    return min(
        max(sum(s for s, at in zip(sizes, way, strict=True) if at == slot) for slot in range(slots)) for way in ways
    )


class TestBalanced:
    @given(st.lists(st.integers(1, 30), min_size=3, max_size=7), st.integers(1, 3))
    def test_the_largest_load_is_within_four_thirds_of_the_best(self, sizes, slots):
        dealt = balanced()(sized(sizes), list(range(slots)), 2)
        assert max(map(load, dealt.values())) <= (4 / 3 - 1 / (3 * slots)) * best_load(sizes, slots) + 1e-9

    def test_it_is_the_greedy_rule(self):
        """9 to slot 0, 8 to 1, 5 to 1 (8 < 9), 5 to 0 (9 < 13), 3 to 1 (13 < 14), 1 to 0 (14 < 16)."""
        dealt = balanced(rotate=False)(sized([5, 9, 1, 8, 3, 5]), [7, 4], 1)
        assert {c: [unit.name for unit in mine] for c, mine in dealt.items()} == {
            7: ["u1", "u2", "u5"],
            4: ["u0", "u3", "u4"],
        }

    @pytest.mark.parametrize(("n_units", "n_clients"), COUNTS)
    def test_equal_units_fall_as_in_cyclic(self, n_units, n_clients):
        given_ = (units(n_units), list(range(n_clients)), 3)
        assert balanced()(*given_) == cyclic()(*given_)


BUDGETS = st.lists(st.integers(0, 60), min_size=1, max_size=5)


class TestBudget:
    @given(SIZES, BUDGETS, st.sets(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 50))
    def test_no_budget_is_exceeded_and_none_that_fits_a_unit_is_idle(self, sizes, values, cohort, round_):
        assume(min(sizes) <= max(values))
        dealt = budget(tuple(values))(sized(sizes), list(cohort), round_)
        for client, mine in dealt.items():
            own = values[client % len(values)]
            assert load(mine) <= own
            assert bool(mine) == (own >= min(sizes))

    @given(SIZES, BUDGETS, st.sets(st.integers(0, 30), min_size=1, max_size=8))
    def test_every_unit_that_fits_somebody_is_reached_within_as_many_rounds_as_units(self, sizes, values, cohort):
        assume(min(sizes) <= max(values))
        seen = set()
        for round_ in range(11, 11 + len(sizes)):
            for mine in budget(tuple(values))(sized(sizes), list(cohort), round_).values():
                seen.update(unit.name for unit in mine)
        largest = max(values[client % len(values)] for client in cohort)
        assert seen == {f"u{i}" for i, size in enumerate(sizes) if size <= largest}

    @given(SIZES, BUDGETS, st.sets(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 50))
    def test_it_is_its_rule(self, sizes, values, cohort, round_):
        """The rule in plain words, on lists of [room, client's units]."""
        assume(min(sizes) <= max(values))
        slots = [[values[client % len(values)], []] for client in cohort]
        in_line = [(round_ + i) % len(sizes) for i in range(len(sizes))]
        for i in in_line:
            able = [slot for slot in slots if slot[0] >= sizes[i]]
            if able:
                slot = next(s for s in able if s[0] == max(one[0] for one in able))
                slot[0] -= sizes[i]
                slot[1].append(i)
        for idle in [slot for slot in slots if not slot[1]]:
            held = [i for slot in slots for i in slot[1]]
            able = sorted((held.count(i), in_line.index(i), i) for i in in_line if sizes[i] <= idle[0])
            idle[1] += [able[0][2]] if able else []
        dealt = budget(tuple(values))(sized(sizes), list(cohort), round_)
        assert [[int(unit.name[1:]) for unit in mine] for mine in dealt.values()] == [sorted(s[1]) for s in slots]

    def test_a_unit_that_fits_nobody_stays_out(self):
        dealt = budget((5,))(sized([9, 2, 2]), [0, 1], 3)
        assert owners(dealt, sized([9, 2, 2])) == [0, 1, 1]

    def test_a_budget_is_the_clients_in_every_slot_and_round(self):
        for cohort in ([3, 4, 6], [6, 3, 4]):
            for round_ in range(5):
                dealt = budget((8, 0, 2))(sized([2, 4, 4]), cohort, round_)
                assert dealt[4] == ()
                assert load(dealt[3]) + load(dealt[6]) >= 10
                assert max(load(dealt[3]), load(dealt[6])) <= 8

    @pytest.mark.parametrize("values", [(), (-1,), (5, -2)])
    def test_budgets_that_cannot_be_are_refused(self, values):
        with pytest.raises(ValueError, match=r"values = \[.*each 0 or more"):
            budget(values)

    def test_units_larger_than_every_budget_are_an_error_that_names_the_sizes(self):
        with pytest.raises(ValueError, match=r"allows 30 values, the smallest of the 2 units has 64.*at least 64"):
            budget((10, 30))(sized([64, 80]), [0, 1], 1)

    def test_a_cohort_of_weak_clients_is_no_error(self):
        assert budget((0, 100))(sized([64, 80]), [0, 2], 1) == {0: (), 2: ()}


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_an_experiment_runs_with_it(name, tiny, reviews):
    """LoRA on 3 layers' query and value: 6 units; two of the four clients have room for one of them."""
    options = {"values": [64, 200]} if name == "budget" else {}
    history = spryfl.finetune(
        str(tiny),
        str(reviews),
        method={"name": "fedavg", "assignment": {"kind": name, **options}},
        reading={"text": "text", "label": "label", "train_rows": 40, "test_rows": 16},
        adapter={"kind": "lora", "r": 1},
        partition={"clients": 4, "split": "iid"},
        train={"rounds": 2, "cohort": 3, "steps": 1},
    )
    assert [record["round"] for record in history.records] == [0, 1, 2]
    assert not any(record.get("failed") for record in history.records)
    moved = [key for key, value in history.params.items() if "lora_B" in key and value.abs().max() > 0]
    assert bool(moved) == (name != "nobody")
