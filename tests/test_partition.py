"""Laws of every partition: each row to one client, no client empty, the seed decides; then what sets them apart."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spryfl.partition import PARTITIONS, dirichlet, hold_out, iid, natural, statistics

LABELS = tuple(row % 4 for row in range(2000))
GROUPS = tuple(f"user {row % 130}" for row in range(2000))


def uneven(rows: int, classes: int, seed: int) -> list[int]:
    """Labels of very different frequencies."""
    return random.Random(seed).choices(range(classes), weights=[4.0**-k for k in range(classes)], k=rows)


@pytest.mark.parametrize("name", PARTITIONS)
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 300), classes=st.integers(1, 6), share=st.floats(0, 1), seed=st.integers(0, 2**40))
def test_every_row_goes_to_one_client_and_none_is_empty(
    name: str, rows: int, classes: int, share: float, seed: int
) -> None:
    clients = max(1, round(share * rows))
    groups = [f"g{row}" if row < clients else f"g{row % 7 % clients}" for row in range(rows)]
    parts = PARTITIONS[name]()(uneven(rows, classes, seed), groups, clients, seed)
    assert len(parts) == clients
    assert all(parts)
    assert sorted(row for part in parts for row in part) == list(range(rows))
    assert all(list(part) == sorted(part) for part in parts)


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_seed_decides_and_the_global_generator_stays(name: str) -> None:
    before = random.getstate()
    deal = PARTITIONS[name]()
    assert deal(LABELS, GROUPS, 20, 5) == deal(LABELS, GROUPS, 20, 5)
    assert deal(LABELS, GROUPS, 20, 5) != deal(LABELS, GROUPS, 20, 6)
    assert random.getstate() == before


@pytest.mark.parametrize("name", ["iid", "dirichlet"])
def test_sizes_are_equal_up_to_one(name: str) -> None:
    sizes = {len(part) for part in PARTITIONS[name]()(LABELS[:1993], None, 100, 0)}
    assert sizes == {19, 20}


@pytest.mark.parametrize("alpha", [1e-320, 1e-9, 1e-3, 0.1, 1.0, 1e6])
@pytest.mark.parametrize("labels", [LABELS, uneven(2000, 6, 1)], ids=["balanced", "uneven"])
def test_dirichlet_works_for_every_alpha(alpha: float, labels: tuple[int, ...]) -> None:
    parts = dirichlet(alpha)(labels, None, 100, 3)
    assert sorted(row for part in parts for row in part) == list(range(2000))
    assert {len(part) for part in parts} == {20}


def test_a_small_alpha_is_further_from_iid() -> None:
    distances = [statistics(dirichlet(a)(LABELS, None, 50, 0), LABELS, 4).distance for a in (0.01, 0.1, 1.0, 10.0, 1e6)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.6
    even = statistics(iid()(LABELS, None, 50, 0), LABELS, 4).distance
    assert abs(distances[-1] - even) < 0.05


def test_first_clients_draw_around_the_prior_with_the_variance_of_the_dirichlet() -> None:
    """Of many clients each draws nearly freely: its share q has mean p and variance p (1 - p) / (alpha + 1)."""
    labels = [0] * 14_000 + [1] * 6_000
    alpha, rows = 2.0, 50
    shares = [
        sum(1 for row in part if labels[row] == 0) / rows
        for seed in range(12)
        for part in dirichlet(alpha)(labels, None, 400, seed)
    ]
    mean = sum(shares) / len(shares)
    variance = sum((share - mean) ** 2 for share in shares) / len(shares)
    p = 0.7
    of_q = p * (1 - p) / (alpha + 1)
    assert mean == pytest.approx(p, abs=1e-9)  # every row is dealt
    assert variance == pytest.approx(of_q + (p * (1 - p) - of_q) / rows, rel=0.15)


def test_a_class_that_is_used_up_leaves_the_draw() -> None:
    labels = [0] * 990 + [1] * 10
    for seed in range(20):
        parts = dirichlet(0.001)(labels, None, 10, seed)
        assert Counter(labels[row] for part in parts for row in part) == {0: 990, 1: 10}


def test_natural_keeps_groups_whole_and_even() -> None:
    parts = natural()(LABELS, GROUPS, 40, 0)
    owner = {GROUPS[row]: client for client, part in enumerate(parts) for row in part}
    assert all(owner[GROUPS[row]] == client for client, part in enumerate(parts) for row in part)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= max(Counter(GROUPS).values())


def test_natural_deals_the_largest_first() -> None:
    groups = [*"aaaaaa", *"bbbbb", *"cccc", *"dd", *"e"]
    parts = natural()([0] * 18, groups, 2, 0)
    assert sorted(len(part) for part in parts) == [9, 9]  # 6 + 2 + 1 and 5 + 4


@pytest.mark.parametrize(("rows", "share", "held"), [(10, 0.2, 2), (10, 0.0, 0), (1, 0.9, 0), (2, 0.9, 1), (0, 0.5, 0)])
def test_hold_out(rows: int, share: float, held: int) -> None:
    indices = tuple(range(100, 100 + rows))
    train, out = hold_out(indices, share, 7)
    assert len(out) == held
    assert sorted(train + out) == list(indices)
    assert hold_out(indices, share, 7) == (train, out)


def test_hold_out_changes_with_the_seed() -> None:
    assert len({hold_out(range(50), 0.3, seed)[1] for seed in range(5)}) == 5


def test_statistics() -> None:
    found = statistics(((0, 1), (2,), (3, 4, 5)), [0, 0, 1, 0, 1, 1], 2)
    assert found.counts == ((2, 0), (0, 1), (1, 2))
    assert (found.smallest, found.median, found.largest) == (1, 2, 3)
    assert found.distance == pytest.approx((0.5 + 0.5 + 1 / 6) / 3)


@pytest.mark.parametrize("name", PARTITIONS)
def test_impossible_numbers_of_clients(name: str) -> None:
    with pytest.raises(ValueError, match="3 clients, but only 2 examples"):
        PARTITIONS[name]()([0, 1], ["a", "b"], 3, 0)
    with pytest.raises(ValueError, match="clients = 0; at least 1"):
        PARTITIONS[name]()([0, 1], ["a", "b"], 0, 0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha = {alpha} must be"):
        dirichlet(alpha)


def test_natural_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"only 2 groups.\n    Use at most 2 clients"):
        natural()([0, 1, 0, 1], ["a", "a", "b", "b"], 3, 0)
    with pytest.raises(ValueError, match="no group column"):
        natural()([0, 1], None, 1, 0)
    with pytest.raises(ValueError, match="1 groups for 2 examples"):
        natural()([0, 1], ["a"], 1, 0)


def test_an_impossible_share() -> None:
    with pytest.raises(ValueError, match="share = 1"):
        hold_out([1, 2], 1.0, 0)
