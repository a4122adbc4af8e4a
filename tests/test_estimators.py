"""Laws that every estimator keeps, and each one's formula against autograd or by hand, on the toy loss."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from toy import Toy, problem, true_gradient

from spryfl import noise, tree
from spryfl.costs import peak_memory
from spryfl.estimators import ESTIMATORS, backprop, central_difference, forward, forward_difference, two_block
from spryfl.estimators.terms import guarded
from spryfl.estimators.twoblock import dealt
from spryfl.jvp import jvp
from spryfl.noise import child_seed, expand
from spryfl.testing import check_estimator
from spryfl.types import Estimate, Passes, Scalars

BLOCKS = {0: ("a", "b"), 1: ("a",), 2: ()}  # below a cut under the last .. blocks; the head is above


def factor(d, options):
    """E|g_hat - g|^2 / |g|^2 in d dimensions."""
    k = options.get("directions", 1)
    if options.get("distribution") in ("orthogonal", "basis"):
        return d / k - 1
    return (d + (1 if options.get("distribution", "gaussian") == "gaussian" else -1)) / k


def claim(**options):
    """The variance that the theorem gives for these options; only what lies below the cut is random."""
    exact = options.get("exact_head") or options.get("exact_top")

    def variance(truth):
        below = tree.select(truth, BLOCKS[options.get("exact_top", 0) % 3]) if exact else truth
        return factor(tree.size(below), options) * tree.norm(below) ** 2

    return variance


def apart(p1, p2, top=1):
    """Blocks with directions of their own: the error adds."""

    def variance(truth):
        below = tree.select(truth, BLOCKS[top])
        pairs = ((below, p1), (tree.without(truth, below), p2))
        return sum((tree.size(block) + 1) / p * tree.norm(block) ** 2 for block, p in pairs)

    return variance


CENTRAL = {"loss_error": 1e-3, "bias": 2e-3}  # O(mu^2)
ONE_SIDED = {"bias": 0.03}  # O(mu)
NEAR = {"central": CENTRAL, "forward": ONE_SIDED, "jvp": {}}

# Every registered estimator stands here with the settings it is tested at; a new one fails the first test until then.
CASES = [
    ("backprop", {}, {"variance": lambda truth: 0.0}),
    ("backprop", {"checkpoint": True}, {"variance": lambda truth: 0.0}),
    *(
        ("forward", options, {"variance": claim(**options)})
        for options in (
            {},
            {"directions": 4, "distribution": "rademacher", "chunk": 3},
            {"directions": 4, "distribution": "sphere", "exact_head": True},
            {"directions": 8, "distribution": "orthogonal"},
            {"directions": 2, "exact_top": 1},
            {"directions": 2, "exact_top": 1, "exact_head": True, "checkpoint": True},
            {"exact_top": -1},
        )
    ),
    *(
        ("central_difference", options, {"variance": claim(**options), **CENTRAL})
        for options in (
            {},
            {"directions": 3, "distribution": "orthogonal", "length": "direction"},
            {"exact_head": True},
        )
    ),
    *(
        ("forward_difference", options, {"variance": claim(**options), **ONE_SIDED})
        for options in ({}, {"directions": 3, "distribution": "rademacher"}, {"exact_head": True})
    ),
    *(
        ("two_block", {"scheme": scheme, **options}, {**claims, **NEAR[scheme]})
        for scheme in NEAR
        for options, claims in (
            ({"p2": 1}, {"variance": claim()}),
            ({"p1": 2, "p2": 2}, {}),
            ({"pairing": "decoupled", "p1": 2, "p2": 3}, {"variance": apart(2, 3)}),
            ({"pairing": "decoupled", "p1": 1, "p2": 1, "budget": 8.0}, {}),
        )
    ),
]
GRID = [
    (name, {"directions": k, "distribution": d}, {"variance": claim(directions=k, distribution=d), **near})
    for name, near in (("forward", {}), ("central_difference", CENTRAL), ("forward_difference", ONE_SIDED))
    for k in (1, 4, 8)
    for d in noise.DISTRIBUTIONS
]


def cases(table):
    return [pytest.param(*case, id=f"{case[0]} {case[1]}") for case in table]


def test_every_estimator_is_tested():
    assert {name for name, _, _ in CASES} == set(ESTIMATORS)


@pytest.mark.parametrize(("name", "options", "claims"), cases(CASES))
def test_the_laws(name, options, claims):
    check_estimator(ESTIMATORS[name](**options), seeds=10 if name == "backprop" else 60, **claims)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "claims"), cases(CASES + GRID))
def test_the_laws_over_many_seeds(name, options, claims):
    check_estimator(ESTIMATORS[name](**options), seeds=400, **claims)


# What breaks a law must be found, and said.


def changed(change):
    """Forward mode with something wrong about its answer."""

    def estimate(loss_fn, params, batch, seed):
        return change(forward(directions=2)(loss_fn, params, batch, seed), params, seed)

    return estimate


def first_term(estimate, **changes):
    return estimate._replace(terms=(estimate.terms[0]._replace(**changes), *estimate.terms[1:]))


def nudged(estimate, params, seed):
    params["a"].add_(1e-6)
    return estimate


def moving(estimate, params, seed):
    torch.rand(1)
    return estimate


def graphed(estimate, params, seed):
    dense = {name: torch.zeros_like(value).requires_grad_() for name, value in params.items()}
    return estimate._replace(terms=(), dense=dense)


COUNT = iter(range(10**6))
BROKEN = {
    "must not move the values": nudged,
    "must not move PyTorch's global generator": moving,
    "same seed must give": lambda e, p, s: e._replace(loss=e.loss + 1e-9 * next(COUNT)),
    "covered once": lambda e, p, s: e._replace(dense={"a": p["a"]}),
    "every value is covered": lambda e, p, s: e._replace(terms=tuple(t._replace(block=("a",)) for t in e.terms)),
    "values' shapes": lambda e, p, s: e._replace(terms=(), dense={n: v.sum() for n, v in p.items()}),
    "must be a float32": lambda e, p, s: first_term(e, coefficient=0.1),
    "reported loss must be": lambda e, p, s: e._replace(loss=e.loss * 1.001),
    "must not be negative": lambda e, p, s: e._replace(passes=Passes(1, -1, 0)),
    "value pass must be counted": lambda e, p, s: e._replace(passes=Passes()),
    "must not need a gradient": graphed,
    "no direction may come twice": lambda e, p, s: e._replace(terms=(e.terms[0], e.terms[0])),
    "mean over seeds must be": lambda e, p, s: e._replace(
        terms=tuple(t._replace(coefficient=2 * t.coefficient) for t in e.terms)
    ),
    "must be what is claimed": lambda e, p, s: e._replace(
        terms=(e.terms[0]._replace(coefficient=2 * e.terms[0].coefficient),)
    ),
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_law_is_named(text):
    with pytest.raises(AssertionError, match=text):
        check_estimator(changed(BROKEN[text]), seeds=100, variance=claim(directions=2))


def test_the_check_passes_what_it_breaks_above():
    check_estimator(changed(lambda e, p, s: e), seeds=100, variance=claim(directions=2))


# Directional derivatives.


def slopes_of(estimate, truth, kept=None):
    """(coefficient, <gradient, direction> / K) of each term."""
    k = kept or len(estimate.terms)
    for term in estimate.terms:
        along = noise.direction(term.seed, {name: truth[name] for name in term.block}, term.distribution)
        yield term.coefficient, sum(float((truth[n] * v.double()).sum()) for n, v in along.items()) / k


def test_basis_directions_give_the_exact_gradient():
    params, batch = problem()
    truth = true_gradient(params, batch)
    for name, value in params.items():
        basis = torch.eye(value.numel(), dtype=value.dtype).reshape(-1, *value.shape)
        _, slopes = jvp(lambda p: Toy()(p, batch), params, {name: basis})
        assert torch.allclose(slopes, truth[name].flatten(), atol=1e-12)


def test_the_coefficient_is_the_jvp_over_k_in_float32():
    params, batch = problem()
    estimate = forward(directions=3)(Toy(), params, batch, 2)
    for got, expected in slopes_of(estimate, true_gradient(params, batch)):
        assert got == pytest.approx(expected, rel=1e-5)


def test_the_kth_seed_is_known_to_who_knows_the_steps_seed():
    params, batch = problem()
    for estimator in (
        forward(directions=4),
        central_difference(directions=4),
        two_block(p1=2, p2=1),
        two_block(p1=1, p2=1, pairing="decoupled", budget=9.0),
    ):
        seeds = [term.seed for term in estimator(Toy(), params, batch, 9).terms]
        assert seeds == [child_seed(9, "direction", k) for k in range(len(seeds))]
        assert len(seeds) >= 4


@pytest.mark.parametrize(("builder", "order"), [(central_difference, 2), (forward_difference, 1)])
def test_differences_approach_the_jvp_with_their_order(builder, order):
    params, batch = problem()
    truth = true_gradient(params, batch)
    sizes, errors = (0.04, 0.02, 0.01), []
    for mu in sizes:
        pairs = slopes_of(builder(mu=mu, directions=6)(Toy(), params, batch, 3), truth)
        errors.append(math.sqrt(sum((got - expected) ** 2 for got, expected in pairs)))
    slope, _ = statistics.linear_regression([math.log(mu) for mu in sizes], [math.log(e) for e in errors])
    assert slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("scheme", ["central", "forward", "jvp"])
@pytest.mark.parametrize("builder", [central_difference, forward_difference, two_block])
def test_both_sides_of_a_difference_share_the_dropout_masks(builder, scheme):
    """Under other masks a difference of 1e-4 would be masks alone."""
    params, batch = problem()
    options = {"p2": 1, "scheme": scheme} if builder is two_block else {}
    if scheme != "central" and not options:
        pytest.skip("a builder of one scheme")
    loss_fn = Toy(dropout=0.4)
    for seed in range(4):
        truth = true_gradient(params, batch, loss_fn, seed)
        estimate = builder(mu=1e-4, **options)(loss_fn, params, batch, seed)
        along = {}
        for term in estimate.terms:
            along |= noise.direction(term.seed, {name: params[name] for name in term.block})
        slope = sum(float((truth[n] * v.double()).sum()) for n, v in along.items())
        assert estimate.terms[0].coefficient == pytest.approx(slope, rel=0.01, abs=1e-3)
    assert true_gradient(params, batch, loss_fn, 0)["a"].ne(true_gradient(params, batch)["a"]).any()


def value(params, batch, moved=None, step=0.0):
    at = {name: p + step * moved[name].double() if moved else p for name, p in params.items()}
    return float(Toy()(at, batch))


def test_central_differences_are_mezos():
    params, batch = problem()
    estimate = central_difference(mu=1e-2)(Toy(), params, batch, 4)
    z = noise.direction(child_seed(4, "direction", 0), params)
    c = (value(params, batch, z, 1e-2) - value(params, batch, z, -1e-2)) / 2e-2
    assert estimate.terms[0].coefficient == pytest.approx(c, rel=1e-6)
    assert estimate.loss == pytest.approx((value(params, batch, z, 1e-2) + value(params, batch, z, -1e-2)) / 2)
    assert estimate.scalars == Scalars(1, 0, 0, pytest.approx(c * c, rel=1e-6), pytest.approx(abs(c), rel=1e-6))


def test_forward_differences_on_the_sphere_are_fedzos():
    """g_hat = (d / (mu P)) sum_k [loss(w + mu u_k) - loss(w)] u_k with |u_k| = 1, written out."""
    params, batch = problem()
    d, mu, count, base = tree.size(params), 1e-2, 5, value(params, batch)
    options = {"directions": count, "mu": mu, "distribution": "sphere", "length": "direction"}
    estimate = forward_difference(**options)(Toy(), params, batch, 4)
    expected = tree.zeros(params)
    for k in range(count):
        u = tree.scale(noise.direction(child_seed(4, "direction", k), params, "sphere"), 1 / math.sqrt(d))
        assert tree.norm(u) == pytest.approx(1, rel=1e-6)
        weight = d / (mu * count) * (value(params, batch, u, mu) - base)
        expected = tree.add(expected, tree.scale(u, weight))
    got = expand(estimate.terms, params)
    assert all(torch.allclose(got[n].double(), expected[n], rtol=1e-5, atol=1e-6) for n in params)


def test_normalized_forward_differences_are_fzoos():
    """g_hat = (1 / (mu N)) sum_k [l_k - l_0] u_k / std(l_1 .. l_N), u_k random signs, written out."""
    params, batch = problem()
    mu, count, base = 1e-2, 6, value(params, batch)
    options = {"directions": count, "mu": mu, "distribution": "rademacher", "normalize": True}
    estimate = forward_difference(**options)(Toy(), params, batch, 4)
    signs = [noise.direction(child_seed(4, "direction", k), params, "rademacher") for k in range(count)]
    losses = [value(params, batch, u, mu) for u in signs]
    deviation = math.sqrt(sum((loss - sum(losses) / count) ** 2 for loss in losses) / (count - 1))
    for term, loss in zip(estimate.terms, losses, strict=True):
        assert term.coefficient == pytest.approx((loss - base) / (mu * count * deviation), rel=1e-5)
    assert estimate.scalars.largest == pytest.approx(max(abs(loss - base) for loss in losses) / mu, rel=1e-5)


def test_losses_that_do_not_differ_give_no_direction():
    params, batch = problem()
    flat = {name: torch.zeros_like(p) for name, p in params.items()}
    still = forward_difference(directions=3, mu=1e-30, normalize=True)(Toy(), flat, batch, 0)
    assert [term.coefficient for term in still.terms] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("builder", [forward, central_difference, forward_difference])
def test_an_exact_head_is_exact_and_leaves_the_rest_as_it_is(builder):
    params, batch = problem()
    truth = true_gradient(params, batch)
    trunk = tree.without(params, Toy.head)
    cut = builder(directions=4, exact_head=True)(Toy(), params, batch, 3)
    whole = builder(directions=4)(Toy(tree.select(params, Toy.head)), trunk, batch, 3)
    assert all(torch.allclose(cut.dense[n], truth[n], rtol=1e-12) for n in Toy.head)
    assert [t.coefficient for t in cut.terms] == pytest.approx([t.coefficient for t in whole.terms], rel=1e-6)
    assert [t.block for t in cut.terms] == [t.block for t in whole.terms]
    assert cut.loss == float(Toy()(params, batch))


@pytest.mark.parametrize("builder", [forward, central_difference, forward_difference])
def test_an_exact_head_alone_needs_no_direction(builder):
    params, batch = problem()
    only = tree.select(params, Toy.head)
    estimate = builder(exact_head=True)(Toy(tree.without(params, Toy.head)), only, batch, 0)
    assert estimate.terms == ()
    assert estimate.scalars == Scalars()
    assert set(estimate.dense) == set(Toy.head)


@pytest.mark.parametrize("top", [0, 1, 2, -1])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_an_exact_top_is_exact_and_the_scalars_are_the_whole_jvps(top, checkpoint):
    params, batch = problem()
    truth = true_gradient(params, batch)
    estimate = forward(directions=3, exact_head=True, exact_top=top, checkpoint=checkpoint and bool(top))(
        Toy(), params, batch, 3
    )
    below = BLOCKS[top % 3]
    assert set(estimate.dense) == set(params) - set(below)
    assert all(torch.allclose(g, truth[n], rtol=1e-12) for n, g in estimate.dense.items())
    for got, expected in slopes_of(estimate, truth):
        assert got == pytest.approx(expected, rel=1e-5)
    assert len(estimate.terms) == (3 if below else 0)


def test_checkpointed_backprop_is_backprop():
    params, batch = problem()
    plain, again = (backprop(checkpoint=c)(Toy(), params, batch, 0) for c in (False, True))
    assert all(torch.equal(plain.dense[n], again.dense[n]) for n in params)


@pytest.mark.parametrize(
    ("estimator", "passes"),
    [
        (backprop(), (1, 0, 1)),
        (backprop(checkpoint=True), (2, 0, 1)),
        (forward(directions=8), (1, 8, 0)),
        (forward(directions=8, chunk=3), (3, 8, 0)),
        (forward(directions=8, exact_head=True), (1, 8, 0)),
        (forward(directions=8, exact_top=1), (1, 4, 0.5)),
        (forward(directions=8, exact_top=1, chunk=2), (2.5, 4, 0.5)),
        (forward(directions=8, exact_top=1, checkpoint=True), (1.5, 4, 0.5)),
        (forward(directions=8, exact_top=-1), (1, 0, 1)),
        (central_difference(directions=3), (6, 0, 0)),
        (central_difference(directions=3, exact_head=True), (7, 0, 0)),
        (forward_difference(directions=3), (4, 0, 0)),
        (forward_difference(directions=3, exact_head=True), (4, 0, 0)),
        (two_block(p1=2, p2=3), (2 * 2 * (0.5 + 3 * 0.5), 0, 0)),
        (two_block(p1=2, p2=3, scheme="forward"), (1 + 2 * (0.5 + 3 * 0.5), 0, 0)),
        (two_block(p1=2, p2=3, scheme="jvp"), (1, 2 * 0.5 + 2 * 3 * 0.5, 0)),
        (two_block(p1=2, p2=3, pairing="decoupled"), (0.5 + 2 * 2 + 2 * 3 * 0.5, 0, 0)),
        (two_block(p1=2, p2=3, pairing="decoupled", scheme="forward"), (1 + 2 + 3 * 0.5, 0, 0)),
        (two_block(p1=2, p2=3, pairing="decoupled", scheme="jvp"), (1, 2 + 3 * 0.5, 0)),
    ],
)
def test_passes_are_the_formulas(estimator, passes):
    params, batch = problem()
    counted = estimator(Toy(), params, batch, 0).passes
    assert tuple(counted) == pytest.approx(passes)
    assert all(isinstance(n, int) for n in counted if n == int(n))


@pytest.mark.parametrize("exact", [{}, {"exact_head": True}, {"exact_top": 1}])
def test_chunks_change_nothing_but_the_passes(exact):
    params, batch = problem()
    whole, parts = (forward(directions=8, chunk=c, **exact)(Toy(), params, batch, 0) for c in (0, 3))
    assert [t.coefficient for t in parts.terms] == pytest.approx([t.coefficient for t in whole.terms], rel=1e-6)
    assert [t.seed for t in parts.terms] == [t.seed for t in whole.terms]


class Wide(Toy):
    """A loss of many values that nothing but the directions are as large as."""

    def __call__(self, params, batch, seed=0):
        return (params["w"] * 1e-3).sum()


def test_a_chunk_holds_its_own_directions_alone():
    params, (_, batch) = {"w": torch.zeros(400_000)}, problem()
    with peak_memory() as held:
        forward(directions=12, chunk=1)(Wide(), params, batch, 0)
    assert held() < 6 * params["w"].nbytes + 3.5e6  # twelve directions are twelve times its bytes


# Guards and guided choice.


class Spiky(Toy):
    """The toy where the loss is not finite on one side of where it starts."""

    def __init__(self, start):
        super().__init__()
        self.start = float(start["a"][0, 0])

    def _through(self, params, h, blocks, seed):
        h = super()._through(params, h, blocks, seed)
        return h * math.nan if "a" in blocks and float(params["a"][0, 0]) > self.start else h


def test_what_a_float32_cannot_carry_is_refused():
    kept = guarded([2.0, math.inf, -math.inf, math.nan, 1e39, -4.0])
    assert kept.values == (2.0, 0.0, 0.0, 0.0, 0.0, -4.0)
    assert kept.mean(3.0) == [3.0, 0.0, 0.0, 0.0, 0.0, -6.0]
    assert kept.scalars == Scalars(6, 4, 0, 20.0, 4.0)


def test_a_scalar_that_is_not_finite_is_refused_and_the_mean_is_over_the_others():
    params, batch = problem()
    spiky = Spiky(params)
    some = forward_difference(directions=8, mu=1e-3)(spiky, params, batch, 1)
    plain = forward_difference(directions=8, mu=1e-3)(Toy(), params, batch, 1)
    up = [float(noise.direction(term.seed, params)["a"][0, 0]) > 0 for term in plain.terms]
    kept = 8 - sum(up)
    assert 0 < kept < 8
    for refused, got, whole in zip(up, some.terms, plain.terms, strict=True):
        assert got.seed == whole.seed
        assert got.coefficient == (0.0 if refused else pytest.approx(whole.coefficient * 8 / kept, rel=1e-6))
    assert some.scalars[:3] == (8, 8 - kept, 0)
    assert math.isfinite(some.loss)


@pytest.mark.parametrize("pairing", ["joint", "decoupled"])
def test_two_blocks_refuse_scalars_too(pairing):
    params, batch = problem()
    spiky, seed = Spiky(params), 3
    estimator = two_block(p1=4, p2=2, pairing=pairing, scheme="forward")
    plain, some = (estimator(fn, params, batch, seed) for fn in (Toy(), spiky))
    up = [t.block == ("a",) and float(noise.direction(t.seed, {"a": params["a"]})["a"][0, 0]) > 0 for t in plain.terms]
    assert 0 < sum(up) < 4
    joint = pairing == "joint"
    for k, refused in enumerate(up):
        first = plain.terms[k].block == ("a",)
        lost = refused or (joint and not first and up[k - 1 - (k - 1) % 3])
        more = 4 / (4 - sum(up)) if joint or first else 1.0
        expected = 0.0 if lost else pytest.approx(plain.terms[k].coefficient * more, rel=1e-5)
        assert some.terms[k].coefficient == expected
    assert some.scalars.refused == sum(up) * (2 if joint else 1)
    assert math.isfinite(some.loss)


def test_if_all_are_refused_the_estimate_is_zero():
    params, batch = problem()
    estimate = central_difference(directions=3)(Spiky(params), params, batch, 0)
    assert [term.coefficient for term in estimate.terms] == [0.0] * 3
    assert estimate.scalars == Scalars(3, 3, 0, 0.0, 0.0)


@pytest.mark.parametrize("builder", [forward, central_difference, forward_difference])
def test_a_clip_cuts_and_counts_and_the_statistics_are_of_the_raw_scalars(builder):
    params, batch = problem()
    free = builder(directions=8)(Toy(), params, batch, 1)
    raw = [8 * term.coefficient for term in free.terms]
    limit = statistics.median(map(abs, raw))
    cut = builder(directions=8, clip=limit)(Toy(), params, batch, 1)
    expected = [max(-limit, min(limit, c)) / 8 for c in raw]
    assert [term.coefficient for term in cut.terms] == pytest.approx(expected, rel=1e-6)
    assert cut.scalars.clipped == sum(abs(c) > limit for c in raw) == 4
    assert cut.scalars._replace(clipped=0) == free.scalars
    assert free.scalars.count == 8
    assert free.scalars.squares == pytest.approx(sum(c * c for c in raw), rel=1e-5)
    assert free.scalars.largest == pytest.approx(max(map(abs, raw)), rel=1e-6)


def test_scalars_of_two_steps_add():
    assert Scalars(2, 1, 0, 3.0, 1.5) + Scalars(4, 0, 2, 1.0, 2.5) == Scalars(6, 1, 2, 4.0, 2.5)


@pytest.mark.parametrize("builder", [forward, central_difference, forward_difference])
def test_guided_choice_keeps_the_candidates_nearest_to_the_guide(builder):
    params, batch = problem()
    guide = {"a": torch.ones(3, 4), "head.bias": torch.tensor([1.0, -2.0, 0.5])}
    toward = {name: guide.get(name, torch.zeros_like(p)) for name, p in params.items()}
    estimate = builder(directions=3, candidates=5)(Toy(guide=guide), params, batch, 2)

    def cosine(k):
        v = noise.direction(child_seed(2, "direction", k), params)
        product = sum(float((v[n] * toward[n]).sum()) for n in params)
        return product / (tree.norm(v) * tree.norm(toward))

    best = sorted(sorted(range(15), key=cosine)[-3:])
    assert [term.seed for term in estimate.terms] == [child_seed(2, "direction", k) for k in best]
    assert best != [0, 1, 2]


def test_without_a_guide_the_first_are_kept():
    params, batch = problem()
    for guide in ({}, {"elsewhere": torch.ones(2)}, {"a": torch.zeros(3, 4)}):
        estimate = forward(directions=3, candidates=5)(Toy(guide=guide), params, batch, 2)
        assert estimate.terms == forward(directions=3)(Toy(), params, batch, 2).terms


def test_guided_directions_never_come_twice():
    guide = problem(seed=8)[0]
    params, batch = problem()
    estimator = forward(directions=4, candidates=3)
    seeds = [t.seed for step in range(5) for t in estimator(Toy(guide=guide), params, batch, child_seed(0, step)).terms]
    assert len(set(seeds)) == 20
    check_estimator(estimator, unbiased=False)


# Two blocks.


def by_hand(estimate, params, k):
    return noise.direction(estimate.terms[k].seed, {n: params[n] for n in estimate.terms[k].block})


@pytest.mark.parametrize("top", [0, 1])
def test_joint_with_one_direction_each_is_a_mezo_step(top):
    params, batch = problem()
    estimate = two_block(top=top, p1=1, p2=1, mu=1e-2)(Toy(), params, batch, 6)
    assert [set(term.block) for term in estimate.terms] == [set(BLOCKS[top]), set(params) - set(BLOCKS[top])]
    z = {**by_hand(estimate, params, 0), **by_hand(estimate, params, 1)}
    c = (value(params, batch, z, 1e-2) - value(params, batch, z, -1e-2)) / 2e-2
    assert [term.coefficient for term in estimate.terms] == pytest.approx([c, c], rel=1e-6)


@pytest.mark.parametrize("scheme", ["central", "forward", "jvp"])
@pytest.mark.parametrize("budget", [0.0, 9.0])
@pytest.mark.parametrize(("top", "names"), [(2, ("a", "b", "head.weight", "head.bias")), (0, ("a", "b")), (1, ("b",))])
def test_a_cut_with_nothing_on_one_side_is_mezo(top, names, scheme, budget):
    if budget and not top:
        pytest.skip("a budget needs blocks above the cut")
    params, batch = problem()
    loss_fn, moved = Toy(tree.without(params, names)), tree.select(params, names)
    pairing = "decoupled" if budget else "joint"
    estimate = two_block(top=top, p1=2, p2=3, mu=1e-3, scheme=scheme, pairing=pairing, budget=budget)(
        loss_fn, moved, batch, 6
    )
    second = top > 0
    plain = {"central": central_difference, "forward": forward_difference}.get(scheme)
    count = len(estimate.terms)
    options = {"mu": 1e-3} if plain else {}
    same = (plain or forward)(directions=count, **options)(loss_fn, moved, batch, 6)
    assert [t.coefficient for t in estimate.terms] == pytest.approx([t.coefficient for t in same.terms], rel=2e-5)
    assert [(t.seed, t.block) for t in estimate.terms] == [(t.seed, t.block) for t in same.terms]
    if not budget:
        assert count == (6 if second else 2)
    assert not budget or estimate.passes.value + estimate.passes.tangent <= budget


@pytest.mark.parametrize("scheme", ["central", "forward", "jvp"])
def test_the_scalars_of_both_pairings_are_the_derivatives_along_their_directions(scheme):
    """joint: c_pq along (z1_p, z2_pq); decoupled: c along one block's direction alone; coefficients are the means."""
    params, batch = problem()
    truth = true_gradient(params, batch)
    near = {"central": 1e-4, "forward": 1e-2, "jvp": 1e-5}[scheme]

    def slope(along):
        return sum(float((truth[n] * v.double()).sum()) for n, v in along.items())

    p1, p2 = 3, 2
    joint = two_block(p1=p1, p2=p2, mu=1e-4, scheme=scheme)(Toy(), params, batch, 1)
    for p in range(p1):
        at = p * (1 + p2)
        first = slope(by_hand(joint, params, at))
        each = [first + slope(by_hand(joint, params, at + 1 + q)) for q in range(p2)]
        got = [joint.terms[at + i].coefficient for i in range(1 + p2)]
        assert got == pytest.approx([sum(each) / 6, *(c / 6 for c in each)], rel=near, abs=near)
    alone = two_block(p1=p1, p2=p2, mu=1e-4, scheme=scheme, pairing="decoupled")(Toy(), params, batch, 1)
    expected = [slope(by_hand(alone, params, k)) / (p1 if k < p1 else p2) for k in range(p1 + p2)]
    assert [term.coefficient for term in alone.terms] == pytest.approx(expected, rel=near, abs=near)
    assert alone.scalars.count == 5
    assert joint.scalars.count == 6


@pytest.mark.parametrize("pairing", ["joint", "decoupled"])
@pytest.mark.parametrize("scheme", ["central", "jvp"])
def test_orthogonal_directions_of_two_blocks_are_those_that_expand_draws(pairing, scheme):
    """Each scalar is the derivative along the direction that the server makes of the term."""
    params, batch = problem()
    truth = true_gradient(params, batch)
    options = {"p1": 2, "p2": 3, "mu": 1e-4, "scheme": scheme, "pairing": pairing, "distribution": "orthogonal"}
    estimate = two_block(**options)(Toy(), params, batch, 1)

    def along(chosen):
        weighted = [t._replace(coefficient=float(k in chosen)) for k, t in enumerate(estimate.terms)]
        return sum(float((truth[n] * v.double()).sum()) for n, v in expand(weighted, params).items())

    got = [term.coefficient for term in estimate.terms]
    if pairing == "decoupled":
        expected = [along({k}) / (2 if k < 2 else 3) for k in range(5)]
    else:
        expected = [sum(along({0, q}) for q in (1, 2, 3)) / 6, *(along({0, q}) / 6 for q in (1, 2, 3))]
        expected += [sum(along({4, q}) for q in (5, 6, 7)) / 6, *(along({4, q}) / 6 for q in (5, 6, 7))]
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_pilot_and_rest_are_averaged_by_what_they_cost():
    params, batch = problem()
    truth = true_gradient(params, batch)
    estimator = two_block(p1=1, p2=2, pairing="decoupled", scheme="forward", mu=1e-4, budget=9.0)
    estimate = estimator(Toy(), params, batch, 2)
    weight = (1 * 1 + 2 * 0.5) / (9 - 1)  # the pilot's share of what directions may cost
    blocks = [term.block == ("a",) for term in estimate.terms]
    assert blocks[:3] == [True, False, False]
    more = [sum(blocks[3:]), len(blocks[3:]) - sum(blocks[3:])]
    for k, (term, first) in enumerate(zip(estimate.terms, blocks, strict=True)):
        slope = sum(float((truth[n] * v.double()).sum()) for n, v in by_hand(estimate, params, k).items())
        share = weight / (1 if first else 2) if k < 3 else (1 - weight) / more[0 if first else 1]
        assert term.coefficient == pytest.approx(share * slope, rel=0.01, abs=2e-4)


@pytest.mark.parametrize("scheme", ["central", "forward", "jvp"])
@pytest.mark.parametrize("budget", [8.0, 13.3, 30.0])
def test_a_budget_is_kept_and_nearly_spent(scheme, budget):
    params, batch = problem()
    estimator = two_block(p1=1, p2=1, pairing="decoupled", scheme=scheme, budget=budget)
    passes = estimator(Toy(), params, batch, 2).passes
    dearest = 2.0 if scheme == "central" else 1.0
    assert budget - dearest < passes.value + passes.tangent <= budget + 1e-9


def test_the_rest_is_dealt_by_the_pilots_scalars():
    """P2/P1 = sqrt((d2 E2 / f2) / (d1 E1)), found by trying every division of a large budget."""
    energy, costs, left = (3.0, 40.0), (2.0, 0.5), 400.0
    n1, n2 = dealt((2, 2), energy, costs, left)
    assert (n2 + 2) / (n1 + 2) == pytest.approx(math.sqrt((40 / 0.5) / (3 / 2)), rel=0.02)

    def error(first):
        return energy[0] / (first + 2) + energy[1] / ((left - first * costs[0]) / costs[1] + 2)

    best = min(range(1, 199), key=error)
    assert abs(best - n1) <= 1
    assert left - max(costs) < n1 * costs[0] + n2 * costs[1] <= left


@pytest.mark.parametrize("energy", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_each_block_gets_one_more_whatever_the_pilot_said(energy):
    n1, n2 = dealt((1, 1), energy, (1.0, 0.25), 10.0)
    assert min(n1, n2) >= 1
    assert n1 * 1.0 + n2 * 0.25 <= 10.0


def test_a_value_on_both_sides_of_the_cut_is_refused():
    class Tied(Toy):
        def cut(self, batch, seed=None, top=0, checkpoint=False):
            return super().cut(batch, seed, top, checkpoint)._replace(both=frozenset({"a"}))

    params, batch = problem()
    for estimator in (two_block(), forward(exact_top=1)):
        with pytest.raises(ValueError, match="a is read below the cut and above it"):
            estimator(Tied(), params, batch, 0)
    fixed = Tied({"a": params["a"]})
    assert isinstance(two_block()(fixed, tree.without(params, "a"), batch, 0), Estimate)


FINITE = (central_difference, forward_difference)


@pytest.mark.parametrize(
    ("builder", "options", "text"),
    [
        *((b, {"directions": 0}, "at least 1 direction") for b in (forward, *FINITE)),
        *((b, {"distribution": "cauchy"}, "gaussian, rademacher, sphere") for b in (forward, *FINITE, two_block)),
        *((b, {"clip": -1.0}, "clip = -1.0") for b in (forward, *FINITE, two_block)),
        *((b, {"candidates": 0}, "candidates = 0") for b in (forward, *FINITE)),
        *((b, {"candidates": 2, "distribution": "orthogonal"}, "before the directions") for b in (forward, *FINITE)),
        *((b, {"mu": 0.0}, "mu = 0.0") for b in (*FINITE, two_block)),
        *((b, {"length": "long"}, "possible: value, direction") for b in FINITE),
        (forward, {"directions": 4, "chunk": 4}, "less than that"),
        (forward, {"exact_top": -2}, "-1 for all"),
        (forward, {"checkpoint": True, "exact_head": True}, "no effect"),
        (forward_difference, {"normalize": True}, "at least 2"),
        (two_block, {"pairing": "both"}, "joint, decoupled"),
        (two_block, {"scheme": "backward"}, "central, forward, jvp"),
        (two_block, {"top": -2}, "-1 for all"),
        (two_block, {"p2": 0}, "at least 1 direction"),
        (two_block, {"budget": 5.0}, "decoupled"),
        (two_block, {"budget": 5.0, "pairing": "decoupled", "top": 0}, "nothing to deal"),
    ],
)
def test_bad_options_are_refused(builder, options, text):
    with pytest.raises(ValueError, match=text):
        builder(**options)


@pytest.mark.parametrize("names", [("a", "b"), ("b",)])
def test_a_budget_below_the_pilots_cost_is_refused(names):
    params, batch = problem()
    estimator = two_block(p1=4, p2=4, pairing="decoupled", budget=1.0)
    with pytest.raises(ValueError, match=r"budget = 1.0 passes"):
        estimator(Toy(tree.without(params, names)), tree.select(params, names), batch, 0)
