"""The probe: alignment by hand, the law against many seeds, units, quantiles; a run is the same with it and without."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_exchange import HEAD, UNITS, local
from test_exchange import start as values
from toy import Toy, problem, true_gradient

from spryfl import job, journal, ledger, noise, probe, server, train, tree
from spryfl.api import prepared
from spryfl.config import parse
from spryfl.engines.simulate import simulation
from spryfl.methods import Method, build, named
from spryfl.pictures import alignment as picture
from spryfl.report import read
from spryfl.train import TIMED

FORWARD = {"kind": "forward", "directions": 2}
PLAIN = Method("m", FORWARD, local_optimizer={"kind": "sgd", "lr": 0.05}, server_optimizer={"kind": "sgd", "lr": 1.0})
ROWS = problem(seed=900)[1]


def one_round(method, seed=3, batches=3):
    """(probe, state before, instructions, answers, state after) of one round on the toy."""
    built = build(method)
    plan = train.Plan(built, UNITS, seed, 1, 3, 3, eval_every=1, patience=0)
    before = server.init(values(), built, clients=3)
    told = server.begin(before, UNITS, [2, 0, 1], built, seed)
    answers = simulation(built, lambda i: local(i, batches), lambda r, c: False, HEAD)(told).updates
    after, _ = server.finish(before, told, answers, built, HEAD)
    batch = {name: v.float() if v.is_floating_point() else v for name, v in ROWS.items()}
    bind = lambda told, fixed: Toy({**values(), **fixed}, guide=told.guide)  # noqa: E731
    return probe.Probe(plan, bind, lambda fixed: Toy({**values(), **fixed}), batch), before, told, answers, after


def flat(gradient, names=None):
    return torch.cat([gradient[name].double().flatten() for name in names or gradient])


def cosine(one, other):
    return float(one @ other / (one.norm() * other.norm()))


def by_hand(told, examples, batch, owned):
    """The mean of the owners' estimates: c along each direction by the true gradient, K = 2."""
    total, weight = tree.zeros(values()), dict.fromkeys(values(), 0.0)
    for one in told:
        own = {name: values()[name] for name in one.names}
        g = {name: v for name, v in true_gradient(values(), batch).items() if name in own}
        for k in range(2):
            v = noise.direction(noise.child_seed(noise.child_seed(one.seed, "probe"), "direction", k), own)
            c = float(flat(g) @ flat(v, list(g)))
            for name in own:
                total[name] = total[name] + examples[one.client] * c / 2 * v[name]
        for name in own:
            weight[name] += examples[one.client]
    return {name: total[name] / weight[name] for name in owned}


@pytest.mark.parametrize("assignment", ["everyone", "cyclic"])
def test_every_number_by_hand(assignment):
    seen, before, told, answers, after = one_round(replace(PLAIN, assignment={"kind": assignment}))
    found = probe.alignment(seen, before, told, answers, after)
    truth = true_gradient(values(), seen.batch)
    names = [name for name in values() if any(name in one.names for one in told)]
    g, mean = flat(truth, names), by_hand(told, {u.client: u.examples for u in answers}, seen.batch, names)
    assert found["cos"] == pytest.approx(cosine(flat(mean, names), g), rel=1e-4)
    assert found["gradient"] == pytest.approx(float(g.norm()), rel=1e-5)
    assert found["values"] == len(g)
    moved = flat(tree.subtract(before.params, after.params), names)
    assert found["step_cos"] == pytest.approx(cosine(moved, g), rel=1e-4)
    assert found["round_cos"] == pytest.approx(found["step_cos"], rel=1e-4)  # the server's step is the mean itself
    for unit in UNITS:
        own = [name for name in unit.params if name in names]
        one = found["units"][unit.name]
        assert one["cos"] == pytest.approx(cosine(flat(mean, own), flat(truth, own)), rel=1e-4)
        assert one["energy"] == pytest.approx(float((flat(mean, own).norm() / flat(mean, names).norm()) ** 2), rel=1e-4)
        assert one["gradient"] == pytest.approx(float((flat(truth, own).norm() / g.norm()) ** 2), rel=1e-4)
        change = flat(tree.subtract(before.params, after.params), own).norm() / flat(before.params, own).norm()
        assert one["step"] == pytest.approx(float(change), rel=1e-4)
    assert found["scalars"]["count"] == 6
    assert (found["seeded_cos"], found["seeded_law"]) == (found["cos"], found["law"])  # all are along directions


def test_behind_an_exact_head_the_rest_is_looked_at_alone():
    """Of equal weights: 1 / (1 + 21 / 6) for the 20 values of both blocks, nearer to 1 with the head."""
    seen, before, told, answers, after = one_round(replace(PLAIN, head="exact"))
    answers = [one._replace(examples=7) for one in answers]
    found = probe.alignment(seen, before, told, answers, after)
    truth, blocks = true_gradient(values(), seen.batch), ["a", "b"]
    mean = by_hand([one._replace(names=("a", "b")) for one in told], dict.fromkeys(range(3), 7), seen.batch, blocks)
    assert found["seeded_values"] == 20
    assert found["seeded_cos"] == pytest.approx(cosine(flat(mean, blocks), flat(truth, blocks)), rel=1e-4)
    assert found["seeded_law"] ** 2 == pytest.approx(1 / (1 + 21 / 6))
    share = float((flat(truth, blocks).norm() / flat(truth).norm()) ** 2)
    assert found["law"] ** 2 == pytest.approx(1 / (1 + share * 21 / 6))


def test_a_servers_optimizer_turns_the_step_but_not_the_round():
    yogi = replace(PLAIN, server_optimizer={"kind": "yogi", "lr": 0.1})
    plain, turned = (probe.alignment(*one_round(method)) for method in (PLAIN, yogi))
    assert turned["round_cos"] == pytest.approx(plain["round_cos"], rel=1e-5)
    assert abs(turned["step_cos"] - plain["step_cos"]) > 1e-3


@pytest.mark.parametrize("exchange", ["weights", "scalars"])
@pytest.mark.parametrize("kind", ["sgd", "none"])
def test_what_was_aggregated_is_the_same_by_either_exchange(exchange, kind):
    method = replace(PLAIN, exchange=exchange, local_optimizer={"kind": kind})
    seen, before, told, answers, after = one_round(method)
    shares = ledger.shares({one.client: one for one in told}, answers, seen.plan.method, before.params)
    _, _, grads = ledger.advance(before.params, before.optimizer, shares, seen.plan.method, HEAD)
    truth = flat(true_gradient(values(), seen.batch))
    found = probe.alignment(seen, before, told, answers, after)
    assert found["round_cos"] == pytest.approx(cosine(flat(grads, list(values())), truth), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head": "exact"},
        {"assignment": {"kind": "cyclic"}},
        {"seeds": {"kind": "shared"}, "exchange": "scalars"},
        {"estimator": {**FORWARD, "distribution": "rademacher"}},
    ],
    ids=str,
)
def test_the_law_is_the_mean_square_over_seeds(changes):
    """law^2 = |g|^2 / E|g_hat|^2, E measured over seeds."""
    seen, before, told, answers, after = one_round(replace(PLAIN, **changes), batches=1)
    found, squares, own = probe.alignment(seen, before, told, answers, after), 0.0, values()
    by_client = {update.client: update for update in answers}
    for seed in range(120):
        shared = seen.plan.method.seeds.shared
        told = [one._replace(seed=noise.child_seed(seed, 0 if shared else one.client)) for one in told]
        made = [probe.estimated(seen, own, one, by_client[one.client]) for one in told]
        squares += tree.norm(probe.mean_of(made, [n for n in own if any(n in one.names for one in told)])) ** 2 / 120
    assert found["law"] ** 2 == pytest.approx(found["gradient"] ** 2 / squares, rel=0.2)


def test_the_law_of_the_round_counts_the_directions_of_all_steps():
    """Of equal weights, M = 3, K = 2, 4 steps, d = 29: 1 / (1 + 30 / 24)."""
    seen, before, told, answers, after = one_round(PLAIN, batches=4)
    answers = [one._replace(examples=7) for one in answers]
    found = probe.alignment(seen, before, told, answers, after)
    d, directions = 29, 3 * 2
    assert found["law"] ** 2 == pytest.approx(1 / (1 + (d + 1) / directions))
    assert found["round_law"] ** 2 == pytest.approx(1 / (1 + (d + 1) / (4 * directions)))


def test_backprop_on_the_probe_is_the_gradient():
    found = probe.alignment(*one_round(replace(PLAIN, estimator={"kind": "backprop"})))
    assert found["cos"] == pytest.approx(1.0, abs=1e-6)
    assert found["law"] == 1.0
    assert found["scalars"] == {"count": 0}


def test_the_spread_is_numpys():
    given = [3.0, -1.0, 0.5, 7.25, 2.0, 2.5]
    found = probe.spread(given)
    assert found["quantiles"] == pytest.approx(np.quantile(given, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]).tolist())
    assert (found["mean"], found["std"]) == pytest.approx((np.mean(given), np.std(given, ddof=1)))
    assert probe.spread([2.0])["std"] == 0.0


def test_the_scalars_are_the_derivatives():
    """Two directions: each coefficient is half a derivative."""
    seen, _, told, answers, _ = one_round(PLAIN)
    one = probe.estimated(seen, values(), told[0], next(u for u in answers if u.client == told[0].client))
    truth = flat(true_gradient(values(), seen.batch))
    expected = [float(flat(noise.direction(t.seed, values()), list(values())) @ truth) for t in one.made.terms]
    assert probe.slopes(one.made) == pytest.approx(expected, rel=1e-4)


def test_rows_are_drawn_once_from_the_training_rows():
    parts = ((5, 1, 9), (2, 7), (11,))
    rows = probe.drawn(parts, 4, seed=1)
    assert rows == probe.drawn(parts, 4, seed=1) == sorted(rows)
    assert len(set(rows)) == 4
    assert set(rows) <= {1, 2, 5, 7, 9, 11}
    assert any(probe.drawn(parts, 4, seed=s) != rows for s in range(2, 6))
    assert probe.drawn(parts, 99, seed=1) == [1, 2, 5, 7, 9, 11]


def experiment(tiny, reviews, **train_):
    return {
        "model": {"name": str(tiny)},
        "data": {"name": str(reviews), "train_rows": 80, "test_rows": 20},
        "partition": {"clients": 4},
        "adapter": {"kind": "lora_xs", "r": 2},
        "method": {"name": "spry", "estimator": {"directions": 2}, "head": "exact", "average": 0.5},
        "train": {"rounds": 4, "cohort": 2, "steps": 2, "eval_every": 2, "dropout": True, **train_},
    }


def finished(given, folder):
    made = prepared(parse(given))
    opened, state, progress = job.begin(made, folder)
    records = [record for record, _ in job.run(made, opened, state, progress)]
    state, progress = journal.load(journal.open_folder(folder))
    return records, state, progress._replace(seconds=0)


@pytest.fixture(scope="module")
def runs(tiny, reviews, tmp_path_factory):
    out = tmp_path_factory.mktemp("probed")
    without = finished(experiment(tiny, reviews), out / "without")
    return without, finished(experiment(tiny, reviews, probe=12), out / "with"), out


class TestRuns:
    def test_a_run_is_the_same_with_it_and_without(self, runs):
        (records, state, progress), (seen, probed, other), _ = runs
        extra = {"alignment", *TIMED}
        plain = lambda many: [{k: v for k, v in one.items() if k not in extra} for one in many]  # noqa: E731
        assert plain(records) == plain(seen)
        assert progress == other
        for mine, theirs in ((state.params, probed.params), (state.average, probed.average)):
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert not any("alignment" in one for one in records)

    def test_it_looks_with_each_evaluation_or_as_often_as_asked(self, runs, tiny, reviews):
        assert [one["round"] for one in runs[1][0] if "alignment" in one] == [2, 4]
        made = prepared(parse(experiment(tiny, reviews, probe=4, probe_every=3)))
        often = [record for record, _ in job.run(made, *job.begin(made, None))]
        assert [one["round"] for one in often if "alignment" in one] == [3]

    def test_the_record_is_json_and_says_each_unit(self, runs):
        for one in (record["alignment"] for record in runs[1][0] if "alignment" in record):
            assert json.loads(json.dumps(one, allow_nan=False)) == one
            assert -1 <= one["cos"] <= 1
            assert 0 < one["law"] <= 1
            assert math.isclose(sum(unit["energy"] for unit in one["units"].values()), 1, rel_tol=1e-5)
            assert math.isclose(sum(unit["gradient"] for unit in one["units"].values()), 1, rel_tol=1e-5)
            assert next(iter(reversed(one["units"].values())))["cos"] == pytest.approx(1, abs=1e-4)  # the exact head

    def test_a_picture_of_it(self, runs, tmp_path):
        picture([read(runs[2] / "with")], tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        with pytest.raises(ValueError, match=r"train\.probe"):
            picture([read(runs[2] / "without")], tmp_path / "b.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"probe_every": 2}}, "no effect without train.probe"),
        ({"train": {"probe": 8}, "method": "alone"}, 'sharing = "alone"'),
        ({"train": {"probe": 8}, "method": "fedavg", "privacy": {"clip": 1.0}}, "promises"),
    ],
)
def test_where_it_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        parse(changes)


def test_other_rows_of_the_table_can_be_probed():
    for name in ("fedkseed", "fwdllm_plus", "decomfl", "fedspzo", "fedsgd"):
        row = named(name)
        if "top" in row.estimator:
            row = replace(row, estimator={**row.estimator, "top": 1})
        found = probe.alignment(*one_round(row))
        assert math.isfinite(found["cos"])
        assert found["round_cos"] is not None
