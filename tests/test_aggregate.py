"""Aggregators against the same thing in plain Python, and what a few liars can and cannot do to them."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
import torch

from spryfl.aggregate import AGGREGATORS, TooFewError, krum, mean, median, trimmed_mean

ROBUST = {
    "median": median(),
    "trimmed_mean": trimmed_mean(0.25),
    "krum": krum(byzantine=2),
    "multi-krum": krum(byzantine=2, keep=3),
}


def drawn(seed, count, names=("a", "b"), shift=0.0):
    """`count` clients with values of two shapes around `shift`."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (2, 3), "b": (4,), "scalars": (5, 7), "one": ()}
    return [{name: torch.randn(shapes[name], generator=g) + shift for name in names} for _ in range(count)]


def holders(clients, name):
    """(client's place, its values as a plain list) of those who hold a name."""
    return [(i, params[name].double().flatten().tolist()) for i, params in enumerate(clients) if name in params]


def by_hand(clients, name, reduce):
    """`reduce` on the holders' values of each coordinate, in plain Python."""
    return [reduce(list(column)) for column in zip(*(values for _, values in holders(clients, name)), strict=True)]


def trimmed_by_hand(values, share):
    drop = math.floor(share * len(values))
    return statistics.fmean(sorted(values)[drop : len(values) - drop])


def krum_by_hand(clients, byzantine, keep):
    """The places of the kept: squared distances, the m - f - 2 smallest of each, the `keep` smallest sums."""
    flat = [[v for name in params for v in params[name].double().flatten().tolist()] for params in clients]
    scores = []
    for i, mine in enumerate(flat):
        others = [sum((a - b) ** 2 for a, b in zip(mine, flat[j], strict=True)) for j in range(len(flat)) if j != i]
        scores.append(sum(sorted(others)[: len(flat) - byzantine - 2]))
    return sorted(sorted(range(len(flat)), key=scores.__getitem__)[:keep])


def is_close(got, expected):
    return torch.allclose(got.double().flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def uneven(seed, count):
    """Clients of which some lack `b` and one alone has `one`."""
    clients = drawn(seed, count, ("a", "b", "one"))
    return [
        {n: v for n, v in params.items() if n == "a" or (n == "b" and i % 3) or (n == "one" and i == 1)}
        for i, params in enumerate(clients)
    ]


@pytest.mark.parametrize("count", [2, 3, 8, 11])
class TestByHand:
    def test_mean(self, count):
        clients, weights = uneven(count, count), [random.Random(count).randint(1, 50) for _ in range(count)]
        got = mean()(clients, weights)
        assert set(got) == {"a", "b", "one"}
        for name in got:
            own = [weights[i] for i, _ in holders(clients, name)]
            expected = by_hand(
                clients, name, lambda v, own=own: sum(x * w for x, w in zip(v, own, strict=True)) / sum(own)
            )
            assert is_close(got[name], expected)

    def test_median(self, count):
        clients = uneven(count, count)
        got = median()(clients, [1.0] * count)
        assert set(got) == {"a", "b", "one"}
        assert all(is_close(value, by_hand(clients, name, statistics.median)) for name, value in got.items())

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.49])
    def test_trimmed_mean(self, count, share):
        clients = uneven(count, count)
        got = trimmed_mean(share)(clients, [1.0] * count)
        assert set(got) == {"a", "b", "one"}
        for name, value in got.items():
            assert is_close(value, by_hand(clients, name, lambda v: trimmed_by_hand(v, share)))


@pytest.mark.parametrize(("count", "byzantine", "keep"), [(3, 0, 1), (5, 1, 1), (7, 2, 1), (9, 2, 4), (12, 1, 6)])
@pytest.mark.parametrize("seed", range(5))
def test_krum_by_hand(count, byzantine, keep, seed):
    clients = drawn(seed, count)
    kept = [clients[i] for i in krum_by_hand(clients, byzantine, keep)]
    got = krum(byzantine, keep)(clients, [1.0] * count)
    assert all(is_close(got[name], by_hand(kept, name, statistics.fmean)) for name in ("a", "b"))


def test_krum_looks_at_all_names_at_once():
    """Client 0 is the middle one by `a` alone, client 1 by both."""
    a, b = (0.0, 0.4, -0.5, 1.0, -1.0), (9.0, 0.1, 0.0, 0.3, -0.3)
    clients = [{"a": torch.tensor([x]), "b": torch.tensor([y])} for x, y in zip(a, b, strict=True)]
    only_a = [{"a": params["a"]} for params in clients]
    assert krum()(only_a, [1.0] * 5)["a"] == 0.0
    assert krum()(clients, [1.0] * 5)["b"] == pytest.approx(b[krum_by_hand(clients, 1, 1)[0]])
    assert krum()(clients, [1.0] * 5)["a"] != 0.0


def test_trimming_counts_in_whole_clients():
    """0.29 of 100 are 29, though 0.29 * 100 is below 29 in floating point."""
    clients = [{"a": torch.tensor([float(v**3)])} for v in range(100)]
    assert trimmed_mean(0.29)(clients, [1.0] * 100)["a"] == pytest.approx(
        statistics.fmean(v**3 for v in range(29, 71)), rel=1e-6
    )


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum"])
def test_the_order_of_clients_does_not_matter(name):
    clients = drawn(3, 7, ("a", "scalars"))
    expected = ROBUST[name](clients, [1.0] * 7)
    for seed in range(10):
        got = ROBUST[name](random.Random(seed).sample(clients, 7), [1.0] * 7)
        assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", AGGREGATORS)
class TestLaws:
    def test_nobody_gives_nothing(self, name):
        assert AGGREGATORS[name]()([], []) == {}

    def test_equal_clients_give_what_they_all_say(self, name):
        client = drawn(1, 1, ("a", "one"))[0]
        got = AGGREGATORS[name]()([client] * 5, [3.0, 1.0, 2.0, 1.0, 1.0])
        assert all(torch.allclose(got[key], client[key], rtol=1e-6) for key in client)

    def test_shapes_types_and_inputs_stay(self, name):
        clients = drawn(2, 5, ("a", "scalars", "one"))
        before = [{key: value.clone() for key, value in params.items()} for params in clients]
        got = AGGREGATORS[name]()(clients, [1.0] * 5)
        assert {key: (value.shape, value.dtype) for key, value in got.items()} == {
            key: (value.shape, torch.float32) for key, value in clients[0].items()
        }
        assert all(
            torch.equal(params[key], old[key]) for params, old in zip(clients, before, strict=True) for key in old
        )

    def test_it_moves_with_its_inputs(self, name):
        """So the aggregate of differences from the old values is the difference of the aggregate."""
        clients = drawn(4, 7)
        shifted = [{key: value + 2.0 for key, value in params.items()} for params in clients]
        forth, back = (AGGREGATORS[name]()(given, [1.0] * 7) for given in (shifted, clients))
        assert all(torch.allclose(forth[key], back[key] + 2.0, atol=1e-5) for key in back)


@pytest.mark.parametrize("name", ["mean", "median", "trimmed_mean"])
def test_one_client_is_taken_at_its_word(name):
    client = drawn(5, 1)[0]
    got = AGGREGATORS[name]()([client], [7.0])
    assert all(torch.equal(got[key], client[key]) for key in client)


LIES = {
    "huge": lambda value: torch.full_like(value, 3e38),
    "hugely negative": lambda value: torch.full_like(value, -3e38),
    "flipped and enlarged": lambda value: -100.0 * value,
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("places", [(0, 1), (3, 7), (6, 7)])
class TestLiars:
    def world(self, lie, places):
        clients = drawn(6, 8, ("a", "scalars"), shift=5.0)
        honest = [params for i, params in enumerate(clients) if i not in places]
        for i in places:
            clients[i] = {key: LIES[lie](value) for key, value in clients[i].items()}
        return clients, honest

    def within(self, got, honest):
        rows = {key: torch.stack([params[key] for params in honest]) for key in got}
        return all(bool(((got[k] >= rows[k].amin(0)) & (got[k] <= rows[k].amax(0))).all()) for k in got)

    def test_two_of_eight_move_the_mean_far(self, lie, places):
        clients, honest = self.world(lie, places)
        assert not self.within(mean()(clients, [1.0] * 8), honest)
        assert float((mean()(clients, [1.0] * 8)["a"] - 5.0).abs().min()) > 50

    @pytest.mark.parametrize("name", ROBUST)
    def test_and_do_not_move_a_robust_one_beyond_the_honest(self, name, lie, places):
        clients, honest = self.world(lie, places)
        assert self.within(ROBUST[name](clients, [1.0] * 8), honest)

    def test_krum_takes_an_honest_client_whole(self, lie, places):
        clients, honest = self.world(lie, places)
        got = ROBUST["krum"](clients, [1.0] * 8)
        assert any(all(torch.equal(got[key], params[key]) for key in got) for params in honest)


def test_krum_picks_from_the_larger_cluster():
    honest, liars = drawn(7, 6), drawn(8, 3, shift=4.0)
    for order in itertools.islice(itertools.permutations(honest + liars), 0, None, 40_000):
        got = krum(byzantine=3)(order, [1.0] * 9)
        assert any(torch.equal(got["a"], params["a"]) for params in honest)


def test_weights_move_the_mean_alone():
    clients = drawn(9, 7)
    light, heavy = [1.0] * 7, [1.0] * 6 + [30.0]
    assert not torch.allclose(mean()(clients, light)["a"], mean()(clients, heavy)["a"])
    for aggregate in ROBUST.values():
        assert torch.equal(aggregate(clients, light)["a"], aggregate(clients, heavy)["a"])


def test_the_mean_wants_a_weight_for_each_client():
    with pytest.raises(ValueError, match="shorter"):
        mean()(drawn(1, 3), [1.0, 1.0])


@pytest.mark.parametrize(("byzantine", "keep", "fewest"), [(0, 1, 3), (1, 1, 5), (2, 1, 7), (2, 6, 8)])
def test_krum_says_how_many_it_needs(byzantine, keep, fewest):
    aggregate = krum(byzantine, keep)
    assert set(aggregate(drawn(1, fewest), [1.0] * fewest)) == {"a", "b"}
    with pytest.raises(TooFewError, match=rf"needs {fewest} clients, {fewest - 1} answered"):
        aggregate(drawn(1, fewest - 1), [1.0] * (fewest - 1))


@pytest.mark.parametrize("count", [2, 6])
def test_krum_refuses_clients_with_different_names(count):
    clients = drawn(1, count)
    del clients[1]["b"]
    with pytest.raises(ValueError, match="train the same values: assignment everyone"):
        krum()(clients, [1.0] * count)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: trimmed_mean(0.5), r"share = 0\.5"),
        (lambda: trimmed_mean(-0.1), r"share = -0\.1"),
        (lambda: trimmed_mean(math.nan), "share = nan"),
        (lambda: krum(byzantine=-1), "byzantine = -1"),
        (lambda: krum(keep=0), "keep = 0"),
    ],
)
def test_options_that_cannot_be_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
