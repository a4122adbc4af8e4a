"""Laws that every estimator keeps: same seed same result, nothing moved, mean and variance as theory gives."""

from __future__ import annotations

import pytest
import torch
from toy import Toy, problem, true_gradient

from spryfl import noise, tree
from spryfl.estimators import ESTIMATORS, backprop, forward
from spryfl.noise import child_seed, expand
from spryfl.types import Passes

# Every registered estimator stands here with the settings it is tested at; a new one fails the first test until then.
CASES = {
    "backprop": [{}, {"checkpoint": True}],
    "forward": [
        {"directions": k, "distribution": d, "exact_head": exact, "chunk": chunk}
        for k, chunk in ((1, 0), (4, 0), (4, 3))
        for d in noise.DISTRIBUTIONS
        for exact in (False, True)
    ],
}
ALL = [pytest.param(name, options, id=f"{name} {options}") for name, cases in CASES.items() for options in cases]


def full(estimate, params):
    return tree.add(estimate.dense, expand(estimate.terms, params))


def test_every_estimator_is_tested():
    assert set(CASES) == set(ESTIMATORS)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_same_seed_same_result_and_nothing_is_moved(name, options):
    params, batch = problem()
    kept = {n: v.clone() for n, v in params.items()}
    estimator, before = ESTIMATORS[name](**options), torch.get_rng_state()
    one, two = estimator(Toy(), params, batch, 5), estimator(Toy(), params, batch, 5)
    assert one.loss == two.loss
    assert one.terms == two.terms
    assert all(torch.equal(one.dense[n], two.dense[n]) for n in one.dense)
    assert all(torch.equal(params[n], kept[n]) and not params[n].requires_grad for n in params)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("name", "options"), ALL)
def test_the_loss_is_the_loss(name, options):
    params, batch = problem()
    assert ESTIMATORS[name](**options)(Toy(), params, batch, 1).loss == pytest.approx(
        float(Toy()(params, batch)), rel=1e-12
    )


@pytest.mark.parametrize(("name", "options"), ALL)
def test_every_value_is_covered_once(name, options):
    """A name is in the dense part or in the terms' block, and none is missing."""
    params, batch = problem()
    estimate = ESTIMATORS[name](**options)(Toy(), params, batch, 1)
    seeded = {n for term in estimate.terms for n in term.block}
    assert set(estimate.dense) | seeded == set(params)
    assert not set(estimate.dense) & seeded


@pytest.mark.parametrize(("name", "options"), ALL)
def test_mean_and_variance_over_seeds_are_the_theorems(name, options):
    """E g_hat = g, and E|g_hat - g|^2 = ((d+1)/K)|g|^2 for Gaussian v, (d-1)/K for signs and sphere, 0 where exact."""
    params, batch = problem(dtype=torch.float32)
    truth, seeds = true_gradient(params, batch), 600
    estimator = ESTIMATORS[name](**options)
    errors, total = [], tree.zeros(params)
    for seed in range(seeds if name == "forward" else 2):
        guess = full(estimator(Toy(), params, batch, child_seed(0, "law", seed)), params)
        errors.append(tree.norm(tree.subtract(guess, truth)) ** 2)
        total = tree.add(total, guess)
    mean = tree.scale(total, 1 / len(errors))
    random_part = tree.without(truth, Toy.head) if options.get("exact_head") else truth
    d, k = tree.size(random_part), options.get("directions", 1)
    more = 1 if options.get("distribution") == "gaussian" else -1
    expected = 0.0 if name == "backprop" else (d + more) / k * tree.norm(random_part) ** 2
    measured = sum(errors) / len(errors)
    assert measured == pytest.approx(expected, rel=0.2, abs=1e-9)
    bias = tree.norm(tree.subtract(mean, truth)) ** 2
    assert bias < max(2.5 * expected / len(errors), 1e-9)


def test_basis_directions_give_the_exact_gradient():
    from spryfl.jvp import jvp

    params, batch = problem()
    truth = true_gradient(params, batch)
    for name, value in params.items():
        basis = torch.eye(value.numel(), dtype=value.dtype).reshape(-1, *value.shape)
        _, slopes = jvp(lambda p: Toy()(p, batch), params, {name: basis})
        assert torch.allclose(slopes, truth[name].flatten(), atol=1e-12)


def test_the_coefficient_is_the_jvp_over_k_in_float32():
    params, batch = problem()
    truth = true_gradient(params, batch)
    for term in forward(directions=3)(Toy(), params, batch, 2).terms:
        along = noise.direction(term.seed, params)
        slope = sum((truth[n] * along[n].double()).sum() for n in params)
        assert term.coefficient == pytest.approx(float(slope) / 3, rel=1e-5)
        assert term.coefficient == float(torch.tensor(term.coefficient, dtype=torch.float32))


def test_directions_of_one_estimate_and_of_two_steps_all_differ():
    params, batch = problem()
    seeds = [
        t.seed for step in range(5) for t in forward(directions=4)(Toy(), params, batch, child_seed(0, step)).terms
    ]
    assert len(set(seeds)) == 20


def test_an_exact_head_is_exact_and_leaves_the_slopes_as_they_are():
    params, batch = problem()
    truth = true_gradient(params, batch)
    trunk = tree.without(params, Toy.head)
    cut = forward(directions=4, exact_head=True)(Toy(), params, batch, 3)
    whole = forward(directions=4)(Toy(tree.select(params, Toy.head)), trunk, batch, 3)
    assert all(torch.allclose(cut.dense[n], truth[n], rtol=1e-12) for n in Toy.head)
    assert [t.coefficient for t in cut.terms] == pytest.approx([t.coefficient for t in whole.terms], rel=1e-6)


def test_an_exact_head_alone_needs_no_direction():
    params, batch = problem()
    only = tree.select(params, Toy.head)
    estimate = forward(exact_head=True)(Toy(tree.without(params, Toy.head)), only, batch, 0)
    assert estimate.terms == ()
    assert set(estimate.dense) == set(Toy.head)


def test_checkpointed_backprop_is_backprop():
    params, batch = problem()
    plain, again = (backprop(checkpoint=c)(Toy(), params, batch, 0) for c in (False, True))
    assert all(torch.equal(plain.dense[n], again.dense[n]) for n in params)
    assert (plain.passes, again.passes) == (Passes(1, 0, 1), Passes(2, 0, 1))


def test_forward_counts_one_value_pass_for_all_directions():
    params, batch = problem()
    assert forward(directions=8)(Toy(), params, batch, 0).passes == Passes(1, 8, 0)


@pytest.mark.parametrize("exact", [False, True])
def test_chunks_change_nothing_but_the_passes(exact):
    params, batch = problem()
    whole, parts = (forward(directions=8, chunk=c, exact_head=exact)(Toy(), params, batch, 0) for c in (0, 3))
    assert [t.coefficient for t in parts.terms] == pytest.approx([t.coefficient for t in whole.terms], rel=1e-12)
    assert [t.seed for t in parts.terms] == [t.seed for t in whole.terms]
    assert (whole.passes, parts.passes) == (Passes(1, 8, 0), Passes(3, 8, 0))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"directions": 0}, "at least 1 direction"),
        ({"directions": 4, "chunk": 4}, "less than that"),
        ({"distribution": "cauchy"}, "gaussian, rademacher, sphere"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        forward(**options)
