"""Laws of every row of the table: its estimator's moments, its server against plain simulations, its resumed runs."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch
from test_estimators import CENTRAL, ONE_SIDED, claim
from test_exchange import UNITS, equal, local, rounds, start
from toy import Toy

from spryfl import api, client, job, journal, noise, server, trace, tree, wire
from spryfl.config import parse
from spryfl.estimators import ESTIMATORS
from spryfl.methods import METHODS, build, named
from spryfl.testing import check_estimator
from spryfl.train import TIMED

FEDERATED = [name for name, row in METHODS.items() if row.sharing == "federated"]
SGD = {"kind": "sgd", "lr": 0.05}


# Moments of every row's estimator


def joint(p1, p2, top):
    """Of joint blocks, where each carries the noise of the other's g.z.

    E|g_hat - g|^2 = [(d1 + 1)|g1|^2 + d1 |g2|^2 / P2 + (d2 |g1|^2 + (d2 + 1)|g2|^2) / P2] / P1
    """

    def variance(truth):
        below = tree.select(truth, Toy.blocks[: len(Toy.blocks) - top])
        above = tree.without(truth, below)
        (d1, one), (d2, two) = ((tree.size(part), tree.norm(part) ** 2) for part in (below, above))
        if not d1:
            return (d2 + 1) * two / (p1 * p2)
        return ((d1 + 1) * one + d1 * two / p2 + (d2 * one + (d2 + 1) * two) / p2) / p1

    return variance


def claims(kind, options):
    """What the theorems say of an estimator with these options: its bias and its variance."""
    if kind == "backprop":
        return {"variance": lambda truth: 0.0}
    if kind == "two_block":
        return {"variance": joint(options["p1"], options["p2"], options["top"]), **CENTRAL}
    near = {"forward": {}, "central_difference": CENTRAL, "forward_difference": ONE_SIDED}[kind]
    return {"variance": claim(**options), **near}


@functools.cache
def check(choice, seeds):
    """Rows that share an estimator share its check."""
    kind, options = (given := json.loads(choice)).pop("kind"), given
    check_estimator(ESTIMATORS[kind](**options), seeds=10 if kind == "backprop" else seeds, **claims(kind, options))


@pytest.mark.parametrize("name", METHODS)
def test_every_rows_estimator_keeps_the_laws(name):
    check(json.dumps(METHODS[name].estimator), seeds=40)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_rows_estimator_keeps_the_laws_over_many_seeds(name):
    check(json.dumps(METHODS[name].estimator), seeds=600)


@pytest.mark.parametrize(("p1", "p2"), [(1, 4), (2, 2), (1, 1)])
def test_joint_blocks_carry_each_others_noise(p1, p2):
    """FedSPZO's row with a cut inside the toy: the row's own leaves nothing of the toy below."""
    row = {**METHODS["fedspzo"].estimator, "top": 1, "p1": p1, "p2": p2}
    check(json.dumps(row), seeds=150)


# The server against plain simulations


def off(values, expected, origin):
    """The difference relative to the size of the whole move."""
    return tree.norm(tree.subtract(values, expected)) / tree.norm(tree.subtract(expected, origin))


def mezo_step(values, batch, step, mu, lr, top):
    """One step of MeZO, written out: w -= lr z [loss(w + mu z) - loss(w - mu z)] / 2 mu; z of two seeds, by block."""
    below = tree.select(values, Toy.blocks[: len(Toy.blocks) - top])
    blocks = [block for block in (below, tree.without(values, below)) if block]
    z = {}
    for k, block in enumerate(blocks):
        z |= noise.direction(noise.child_seed(step, "direction", k), block)
    up, down = (float(Toy()({n: values[n] + sign * mu * z[n] for n in values}, batch)) for sign in (1, -1))
    return {n: values[n] - lr * (up - down) / (2 * mu) * z[n] for n in values}


def single(top, **more):
    """FedSPZO's row with one direction a block."""
    return named("fedspzo", estimator={**METHODS["fedspzo"].estimator, "top": top, "p1": 1, "p2": 1}, **more)


@pytest.mark.parametrize("top", [0, 1, 2])
def test_joint_fedspzo_with_one_direction_each_is_mezos_client_step(top):
    row, mu = single(top, local_optimizer=SGD, exchange="weights"), METHODS["fedmezo"].estimator["mu"]
    built, origin = build(row), start(torch.float64)
    [told] = server.begin(server.init(origin, built, 4), UNITS, [1], built, seed=3)
    update = client.run(told, built, local(1, dtype=torch.float64))
    expected = origin
    for step, batch in enumerate(local(1, dtype=torch.float64).batches(0)):
        expected = mezo_step(expected, batch, trace.step_seed(told, step), mu, SGD["lr"], top)
    assert row.estimator["mu"] == mu
    assert off(update.params, expected, origin) < 1e-5


@pytest.mark.parametrize("top", [0, 1, 2])
def test_joint_fedspzo_with_one_direction_each_is_mezos_server_round(top):
    row, origin = single(top, local_optimizer=SGD), start(torch.float64)
    [(state, told, _)] = rounds(row, count=1, dtype=torch.float64)
    expected, weight = tree.zeros(origin), 5 + 6 + 7
    for one in told:
        values = origin
        for step, batch in enumerate(local(one.client, dtype=torch.float64).batches(0)):
            values = mezo_step(values, batch, trace.step_seed(one, step), row.estimator["mu"], SGD["lr"], top)
        expected = tree.add(expected, tree.scale(values, (5 + one.client) / weight))
    assert row.exchange == "scalars"
    assert off(state.params, expected, origin) < 1e-5


def test_fedspzo_with_nothing_below_its_cut_is_fedmezo_to_the_bit():
    """The same directions, the same scalars, the same replay: rows that differ by their estimator's name alone."""
    both = single(2), replace(METHODS["fedmezo"], exchange="scalars")
    one, two = (rounds(row, cohorts=((0, 1), (1, 2, 3)))[-1][0] for row in both)
    assert equal(one.params, two.params)
    assert wire.dump(one) == wire.dump(two)


def plain(row, told, weights, values, dtype):
    """One round that moves whole models: each client walks by hand, and the mean by examples is the next model."""
    built, mean = build(row), tree.zeros(values)
    for one in told:
        own = {name: value.clone() for name, value in values.items()}
        for step, batch in enumerate(local(one.client, dtype=dtype).batches(0)):
            for term in built.estimator(Toy(), own, batch, trace.step_seed(one, step)).terms:
                z = noise.direction(term.seed, tree.select(own, term.block), term.distribution)
                # All terms are of the values before the step: they were computed before the first one moves them.
                own |= {name: own[name] - SGD["lr"] * term.coefficient * z[name].to(dtype) for name in z}
        for name, value in own.items():
            mean[name] += value * weights[one.client] / sum(weights[other.client] for other in told)
    return mean


SUMMED = [
    pytest.param(replace(METHODS[name], local_optimizer=SGD, **changes), id=" ".join(map(str, [name, *more])))
    for name, more, changes in (
        *(
            (name, [size], {"seeds": {**METHODS[name].seeds, "size": size}})
            for name in ("fedkseed", "fedkseed_pro")
            for size in (8, 1024)
        ),
        ("decomfl", [], {}),
        # A cut inside the toy, and the row's own below it.
        ("fedspzo", [1], {"estimator": {**METHODS["fedspzo"].estimator, "top": 1}}),
        ("fedspzo", [2], {}),
    )
]


@pytest.mark.parametrize("row", SUMMED)
def test_a_servers_replay_is_the_simulation_that_moves_whole_models(row):
    """Three rounds of changing cohorts, the plain models never set back to the server's."""
    origin = values = start(torch.float64)
    cohorts = ((0, 1, 2), (1, 3), (0, 2, 3))
    for state, told, _ in rounds(row, cohorts=cohorts, dtype=torch.float64):
        values = plain(row, told, {i: 5 + i for i in range(4)}, values, torch.float64)
        assert off(state.params, values, origin) < 1e-5
    assert not equal(dict(state.params), dict(origin))


# Runs that are stopped and gone on with


@pytest.fixture(scope="module")
def prepared(tiny, reviews):
    """Every row's small experiment over one model and one set of tokens, which no run moves."""
    base = {
        "model": {"name": str(tiny)},
        "data": {"name": str(reviews), "train_rows": 24, "test_rows": 8, "max_length": 8},
        "partition": {"clients": 4, "held_out": 0.2},
        "train": {"rounds": 3, "cohort": 2, "steps": 2, "batch_size": 2, "eval_every": 2},
    }
    first = api.prepared(parse(base))

    def make(name):
        row = METHODS[name].estimator
        few = {"estimator": {"directions": 2}} if row.get("directions", 1) > 2 else {}  # K changes nothing but time
        experiment = parse({**base, "method": {"name": name, **few}})
        return job.prepare(experiment, first.corpus, first.model, (first.rows, first.test))

    return make


def ended(made, folder, begun):
    """(records without times, the last state) of a run that is taken to its end."""
    for _ in job.run(made, *begun):
        pass
    opened = journal.open_folder(folder)
    records = [{k: v for k, v in one.items() if k not in TIMED} for one in journal.records(opened)]
    return records, journal.load(opened)[0]


# What a state may hold: Yogi's moments, an average, a guide, rounds to replay, a pool's sums.
QUICK = ("spry", "baffle", "fwdllm_plus", "fedspzo", "fedkseed_pro")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FEDERATED]
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(name, prepared, tmp_path):
    made = prepared(name)
    records, state = ended(made, tmp_path / "whole", job.begin(made, tmp_path / "whole"))
    loop = job.run(made, *job.begin(made, tmp_path / "stopped"))
    stopped = [next(loop)[1].round for _ in range(2)]
    loop.close()
    again, final = ended(made, tmp_path / "stopped", job.resume(made, tmp_path / "stopped"))
    assert stopped == [0, 1]
    assert [record["round"] for record in records] == [0, 1, 2, 3]
    assert again == records
    assert equal(dict(final.params), dict(state.params))
    assert wire.dump(final) == wire.dump(state)
    assert not equal(dict(final.params), dict(made.model.params))
