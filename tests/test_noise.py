"""Directions: Philox against its reference, moments, independence of names, order and device, no global generator."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spryfl import noise
from spryfl.costs import peak_memory
from spryfl.types import Directional


def scalar_philox(counter, key):
    """The generator's definition in plain integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k0, q % 2**32, (p >> 32) ^ c[3] ^ k1, p % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


# Known answers of Philox4x32-10 from the Random123 distribution: counter, key, output.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, answer):
    out = noise.philox([torch.tensor([word]) for word in counter], key)
    assert [int(word) for word in out] == answer


@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_philox_equals_its_definition_in_plain_integers(numbers):
    out = noise.philox([torch.tensor([word]) for word in numbers[:4]], numbers[4:])
    assert [int(word) for word in out] == scalar_philox(numbers[:4], numbers[4:])


def test_normals_are_box_muller_of_the_words():
    word = noise.words([5], (("name", 0, 2),)).flatten().tolist()
    u = [((a >> 5) * 2**26 + (b >> 6)) for a, b in zip(word[::2], word[1::2], strict=True)]
    radius = math.sqrt(-2 * math.log((u[0] + 1) / 2**53))
    expected = [radius * math.cos(2 * math.pi * u[1] / 2**53), radius * math.sin(2 * math.pi * u[1] / 2**53)]
    assert noise.direction(5, {"name": torch.zeros(4)})["name"][:2].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_prefix_does_not_depend_on_the_length():
    short, long = (noise.direction(3, {"w": torch.zeros(n)})["w"] for n in (7, 1000))
    assert torch.equal(short, long[:7])


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_moments(distribution):
    x = noise.direction(11, {"w": torch.zeros(200_000)}, distribution)["w"].double()
    assert abs(x.mean()) < 0.01
    assert abs(x.square().mean() - 1) < 0.01
    assert abs((x[:-1] * x[1:]).mean()) < 0.01
    expected_fourth = 3.0 if distribution == "gaussian" else 1.0
    assert float(x.pow(4).mean()) == pytest.approx(expected_fourth, rel=0.03)


APART = [name for name in noise.DISTRIBUTIONS if name not in noise.JOINT]


@pytest.mark.parametrize("distribution", APART)
def test_covariance_is_the_identity(distribution):
    like = {"a": torch.zeros(2), "b": torch.zeros(1)}
    drawn = noise.stack(range(4000), like, distribution)
    v = torch.cat([drawn["a"], drawn["b"]], dim=1).double()
    assert torch.allclose(v.T @ v / len(v), torch.eye(3, dtype=torch.float64), atol=0.08)


def flat(drawn):
    return torch.cat([value.flatten(1) for value in drawn.values()], dim=1).double()


def test_orthogonal_directions_are_orthogonal_over_all_names_and_of_length_root_d():
    like = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
    v = flat(noise.stack(range(17), like, "orthogonal"))
    assert torch.allclose(v @ v.T, 17 * torch.eye(17, dtype=torch.float64), atol=1e-4)


def test_orthogonal_directions_are_what_gram_schmidt_makes_of_the_gaussian_ones():
    """Against the QR decomposition, whose columns are those vectors up to a sign."""
    like = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
    seeds = [5, 9, 2, 11]
    q, r = torch.linalg.qr(flat(noise.stack(seeds, like, "gaussian")).T)
    expected = (q * r.diagonal().sign()).T * math.sqrt(17)
    assert torch.allclose(flat(noise.stack(seeds, like, "orthogonal")), expected, atol=1e-5)


def test_each_orthogonal_direction_has_the_identity_as_its_covariance():
    like = {"a": torch.zeros(2), "b": torch.zeros(1)}
    draws = [flat(noise.stack([2 * i, 2 * i + 1], like, "orthogonal")) for i in range(1500)]
    for k in range(2):
        v = torch.stack([draw[k] for draw in draws])
        assert torch.allclose(v.T @ v / len(v), torch.eye(3, dtype=torch.float64), atol=0.12)


def test_more_orthogonal_directions_than_values_are_refused():
    with pytest.raises(ValueError, match="4 orthogonal directions do not fit into 3 values"):
        noise.stack(range(4), {"a": torch.zeros(3)}, "orthogonal")


def test_expand_draws_a_steps_orthogonal_directions_together():
    like = {"a": torch.zeros(3), "b": torch.zeros(4)}
    terms = [Directional(k, 0.5 + k, ("a", "b"), "orthogonal") for k in range(3)]
    terms += [Directional(k, 1.0, ("b",), "orthogonal") for k in (7, 8)]
    first = noise.stack(range(3), like, "orthogonal")
    second = noise.stack([7, 8], {"b": like["b"]}, "orthogonal")
    total = noise.expand(terms, like)
    assert torch.allclose(total["a"], sum((0.5 + k) * first["a"][k] for k in range(3)))
    assert torch.allclose(total["b"], sum((0.5 + k) * first["b"][k] for k in range(3)) + second["b"].sum(0))


def test_the_sphere_spans_the_whole_block():
    drawn = noise.direction(1, {"a": torch.zeros(3, 4), "b": torch.zeros(5)}, "sphere")
    squares = sum(float(v.double().square().sum()) for v in drawn.values())
    assert squares == pytest.approx(17.0, rel=1e-6)


@pytest.mark.parametrize("distribution", APART)
def test_a_stack_is_its_directions_one_by_one(distribution):
    like = {"a": torch.zeros(3, 5), "b": torch.zeros(2)}
    together = noise.stack([4, 8, 15], like, distribution)
    for k, seed in enumerate([4, 8, 15]):
        alone = noise.direction(seed, like, distribution)
        assert all(torch.equal(together[name][k], alone[name]) for name in like)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_a_name_draws_the_same_whatever_else_is_drawn(distribution):
    alone = noise.direction(9, {"b": torch.zeros(6)}, distribution)["b"]
    beside = noise.direction(9, {"z": torch.zeros(3), "b": torch.zeros(6), "a": torch.zeros(2)}, distribution)["b"]
    assert torch.equal(alone, beside)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("tile", [1, 5, 64])
def test_tiles_change_no_value(tile, distribution, monkeypatch):
    like = {"a": torch.zeros(3), "none": torch.zeros(0), "b": torch.zeros(29, 7), "c": torch.zeros(8)}
    whole = noise.stack([1, 2, 3], like, distribution)
    monkeypatch.setattr(noise, "TILE", tile)
    cut = noise.stack([1, 2, 3], like, distribution)
    assert all(torch.equal(cut[name], whole[name]) for name in like)
    assert cut["none"].shape == (3, 0)


def test_values_are_float32_whatever_torch_makes_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        made = noise.direction(7, {"w": torch.zeros(5)})["w"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.dtype is torch.float32


def test_large_directions_hold_little_beside_themselves():
    """63 bytes a value and direction without tiles, all directions of a step without parts."""
    like, tile = {"a": torch.zeros(700_000)}, 3_500_000
    terms = [Directional(k, 0.5, ("a",), "gaussian") for k in range(12)]
    with peak_memory() as drawn:
        noise.stack([1, 2], like)
    assert drawn() < 2 * 4 * 700_000 + tile
    with peak_memory() as expanded:
        noise.expand(terms, like)
    assert expanded() < 4 * 4 * 700_000 + tile


def test_names_and_seeds_draw_differently():
    like = {"a": torch.zeros(64), "b": torch.zeros(64)}
    one, two = noise.direction(1, like), noise.direction(2, like)
    assert not torch.equal(one["a"], one["b"])
    assert not torch.equal(one["a"], two["a"])


def test_no_global_generator_is_read_or_moved():
    before, python = torch.get_rng_state(), random.getstate()
    first = noise.direction(4, {"a": torch.zeros(9)})
    assert torch.equal(before, torch.get_rng_state())
    assert python == random.getstate()
    torch.manual_seed(123)
    assert torch.equal(first["a"], noise.direction(4, {"a": torch.zeros(9)})["a"])


def test_child_seeds_do_not_collide_where_a_sum_would():
    seeds = {noise.child_seed(r, "round", a, "client", b) for r in range(3) for a in range(40) for b in range(40)}
    assert len(seeds) == 3 * 40 * 40
    assert noise.child_seed(1, 23) != noise.child_seed(12, 3)
    assert noise.child_seed(1, "2") != noise.child_seed(1, 2)


def test_expand_is_the_sum_of_coefficient_times_direction():
    like = {"a": torch.zeros(3), "b": torch.zeros(2)}
    terms = (Directional(1, 0.5, ("a", "b"), "gaussian"), Directional(2, -2.0, ("b",), "rademacher"))
    one, two = noise.direction(1, like), noise.direction(2, {"b": like["b"]}, "rademacher")
    total = noise.expand(terms, like)
    assert torch.equal(total["a"], 0.5 * one["a"])
    assert torch.equal(total["b"], 0.5 * one["b"] + -2.0 * two["b"])
