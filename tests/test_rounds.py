"""A round's laws: fresh seeds, cohorts, failing clients, blocks that add, the bias of uneven classes."""

from __future__ import annotations

import math

import pytest
import torch
from toy import Toy, problem, pseudo_gradient, true_gradient

from spryfl import client, noise, server, train, tree
from spryfl.engines.simulate import simulation
from spryfl.estimators import forward
from spryfl.methods import METHODS, build, named
from spryfl.optimizers import sgd
from spryfl.types import Estimate, Instruction, Passes, Unit, Update


def local(batches=3, examples=10, loss=Toy):
    _, batch = problem(dtype=torch.float32)
    return client.Local(
        bind=lambda fixed, guide: loss(fixed),
        batches=lambda seed: iter([batch] * batches),
        examples=examples,
        held_out=lambda: iter(()),
        score=lambda params, rows: (0, 0),
        device=torch.device("cpu"),
    )


def told(names=("a", "b", "head.weight", "head.bias"), **changes):
    params, _ = problem(dtype=torch.float32)
    return Instruction(round=1, client=3, seed=77, names=tuple(names), params=params)._replace(**changes)


def made(estimator, local):
    """FedAvg with another estimator and local optimizer."""
    return build(named("fedavg"))._replace(estimator=estimator, local=local)


def zero(params):
    return Estimate(0.0, tree.zeros(params), (), Passes(value=1))


def test_every_step_of_a_client_has_a_seed_of_its_own():
    seen = []

    def watching(loss_fn, params, batch, seed):
        seen.append(seed)
        return zero(params)

    client.run(told(), made(watching, sgd(lr=1.0)), local(batches=5))
    client.run(told(seed=78), made(watching, sgd(lr=1.0)), local(batches=5))
    assert len(set(seen)) == 10


def test_a_client_moves_what_it_was_told_and_returns_nothing_else():
    update = client.run(told(names=("b",)), made(forward(), sgd(lr=0.1)), local())
    params, _ = problem(dtype=torch.float32)
    assert set(update.params) == {"b"}
    assert not torch.equal(update.params["b"], params["b"])
    assert update.passes == Passes(3, 3, 0)
    assert update.examples == 10


def test_local_steps_are_the_optimizers_on_the_estimates():
    """Two steps of SGD by hand, on the directions that the seeds stand for."""
    params, batch = problem(dtype=torch.float32)
    values = dict(params)
    for step in range(2):
        estimate = forward()(Toy(), values, batch, noise.child_seed(77, "step", step))
        values = tree.subtract(values, tree.scale(noise.expand(estimate.terms, values), 0.1))
    update = client.run(told(), made(forward(), sgd(lr=0.1)), local(batches=2))
    assert all(torch.allclose(update.params[name], values[name], rtol=1e-6, atol=1e-7) for name in values)


def test_the_heads_own_rate_and_the_schedule_are_factors():
    def ones(loss_fn, params, batch, seed):
        return Estimate(0.0, {name: torch.ones_like(v) for name, v in params.items()}, (), Passes(1))

    start = told(lr_scale=0.5)
    update = client.run(start, made(ones, sgd(lr=0.1))._replace(head_lr=4.0), local(batches=1))
    moved = {name: float((start.params[name] - value).mean()) for name, value in update.params.items()}
    assert moved == pytest.approx({"a": 0.05, "b": 0.05, "head.weight": 0.2, "head.bias": 0.2}, rel=1e-5)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_client_whose_loss_is_not_finite_is_absent_and_said_why(broken):
    def bad(loss_fn, params, batch, seed):
        return zero(params)._replace(loss=broken)

    built = build(named("fedavg"))._replace(estimator=bad)
    answers = simulation(built, lambda i: local(), lambda r, c: False)([told()])
    assert list(answers.updates) == []
    assert "not finite" in answers.failed[3]
    assert answers.bytes_down > 0
    assert answers.bytes_up == 0


def test_cohorts_follow_from_the_seed_and_change_with_the_round():
    plan = train.Plan(build(METHODS["spry"]), (), 5, 20, clients=30, cohort=6, eval_every=1, patience=0)
    rounds = [train.cohort(plan, r) for r in range(1, 9)]
    assert rounds == [train.cohort(plan, r) for r in range(1, 9)]
    assert len({tuple(one) for one in rounds}) == 8
    assert all(len(set(one)) == 6 and set(one) <= set(range(30)) for one in rounds)
    assert train.cohort(plan._replace(seed=6), 1) != rounds[0]


def test_simulated_dropout_is_of_the_size_asked_for():
    gone = [train.lost(1, 0.3)(r, c) for r in range(60) for c in range(60)]
    assert sum(gone) / len(gone) == pytest.approx(0.3, abs=0.03)
    assert not any(train.lost(1, 0.0)(r, 0) for r in range(50))


def test_the_mean_is_summed_in_the_order_of_client_ids():
    """In another order these would not even agree in float32: the first two cancel."""
    sizes = {1: 1e17, 2: -1e17, 3: 3.0}
    answers = [Update(1, i, {"w": torch.tensor([v])}, 1, 0.0, Passes(), 0, 0.0) for i, v in sizes.items()]
    old = {"w": torch.zeros(1)}
    expected = pseudo_gradient(old, answers)["w"]
    assert float(expected) == -1.0
    for order in ((2, 0, 1), (0, 2, 1), (1, 2, 0)):
        assert torch.equal(pseudo_gradient(old, [answers[i] for i in order])["w"], expected)


def test_an_exact_head_reaches_the_estimator():
    params, batch = problem(dtype=torch.float32)
    shared, exact = (build(named("spry", head=head)).estimator(Toy(), params, batch, 0) for head in ("shared", "exact"))
    assert not shared.dense
    assert set(exact.dense) == Toy.head


def test_blocks_with_directions_of_their_own_add_their_errors():
    """Two owners, one unit each: E|g_hat - g|^2 = sum_b (d_b + 1)/K_b |g_b|^2, less than over the whole at once."""
    params, batch = problem(dtype=torch.float32)
    truth = true_gradient(params, batch)
    owners = {"a": 1, "b": 2}  # K of each
    total = 0.0
    for seed in range(600):
        for name, k in owners.items():
            own, rest = {name: params[name]}, tree.without(params, [name])
            estimate = forward(directions=k)(Toy(rest), own, batch, noise.child_seed(seed, name))
            error = tree.subtract(noise.expand(estimate.terms, own), {name: truth[name]})
            total += tree.norm(error) ** 2 / 600
    expected = sum((params[n].numel() + 1) / k * tree.norm({n: truth[n]}) ** 2 for n, k in owners.items())
    assert total == pytest.approx(expected, rel=0.2)


UNITS = (Unit("a", ("a",), 12), Unit("b", ("b",), 8), Unit("h", ("head.weight", "head.bias"), 9, head=True))


def test_the_server_draws_what_a_client_drew_from_a_part_of_the_names():
    """A client that holds one unit and a server that holds all agree bit for bit."""
    params, batch = problem(dtype=torch.float32)
    estimate = forward(directions=3)(Toy(tree.without(params, ["b"])), {"b": params["b"]}, batch, 9)
    assert torch.equal(noise.expand(estimate.terms, {"b": params["b"]})["b"], noise.expand(estimate.terms, params)["b"])


@pytest.mark.parametrize(
    ("shares", "biased"),
    [({4: (6, 2), 7: (1, 3)}, True), ({4: (6, 2), 7: (6, 2)}, False)],
    ids=["uneven classes", "equal shares"],
)
def test_uneven_classes_bias_a_units_gradient_as_the_formula_says(shares, biased):
    """E g_u - grad_u = 1/M sum_m sum_c (n_mc / |D_m| - n_c / |D|) grad_u f_c, on f_c(w) = |w - t_c|^2 / 2."""
    targets = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0]])
    w, lr = torch.tensor([0.3, 0.1, -0.7]), 0.1
    grads = w - targets  # of f_c, by class
    updates = []
    for name, counts in shares.items():
        share = torch.tensor(counts) / sum(counts)
        moved = w - lr * (share @ grads)
        updates.append(Update(1, name, {"w": moved}, 8, 0.0, Passes(), 0, 0.0))
    whole = torch.tensor([shares[4][c] + shares[7][c] for c in (0, 1)]).float()
    measured = pseudo_gradient({"w": w}, updates)["w"] / lr - (whole / whole.sum()) @ grads
    formula = torch.stack([(torch.tensor(c) / sum(c) - whole / whole.sum()) @ grads for c in shares.values()]).mean(0)
    assert torch.allclose(measured, formula, atol=1e-6)
    assert (float(formula.abs().max()) > 0.05) == biased


def test_a_whole_round_of_spry_moves_every_unit_once_owned():
    params, _ = problem(dtype=torch.float32)
    built = build(named("spry", head="exact", server_optimizer={"kind": "sgd"}))
    state = server.init(params, built, 4)
    asked = server.begin(state, UNITS, [0, 1], built, seed=3)
    answers = simulation(built, lambda i: local(), lambda r, c: False)(asked)
    after, refused = server.finish(state, asked, answers.updates, built)
    assert refused.failed == {}
    assert all(not torch.equal(after.params[name], params[name]) for name in params)
