"""Switches of a method against hand recursions: growth, warm-up, server rates, shrinking, guides, axes, EMA."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from test_exchange import HEAD, UNITS, close, equal, local, rounds, start
from toy import Toy, problem, true_gradient

from spryfl import client, ledger, noise, server, train, tree
from spryfl.engines.simulate import simulation
from spryfl.estimators import forward
from spryfl.journal import Progress
from spryfl.methods import Method, build, named
from spryfl.optimizers import SCHEDULES, warmed
from spryfl.types import Directional

FORWARD = {"kind": "forward", "directions": 4}
SGD = {"kind": "sgd", "lr": 0.05}
PLAIN = Method("m", FORWARD, local_optimizer=SGD, server_optimizer={"kind": "sgd", "lr": 1.0})


def run(method, count=4, seed=3):
    """The records and states of a run on the toy, by the loop itself."""
    built = build(method)
    plan = train.Plan(built, UNITS, seed, count, 3, 3, eval_every=1, patience=0, metric="x")
    state, progress = server.init(start(), built, clients=3), Progress(best=0.0)
    exchange = simulation(built, local, lambda r, c: False, HEAD)
    out = []
    for _ in range(count):
        record, state, progress = train.one_round(plan, state, progress, exchange, lambda params: {"x": 1.0})
        out.append((record, state))
    return out


class TestGrowth:
    @pytest.mark.parametrize("exchange", ["weights", "scalars"])
    def test_directions_grow_geometrically_over_the_run(self, exchange):
        """K_r = round(4 x 8^((r - 1) / 4)), 3 clients of 3 steps each."""
        records = [record for record, _ in run(replace(PLAIN, growth=8.0, exchange=exchange))]
        assert [one["scalars"] for one in records] == [9 * round(4 * 8 ** ((r - 1) / 4)) for r in (1, 2, 3, 4)]
        assert records[-1]["tangent_passes"] == sum(one["scalars"] for one in records)

    @pytest.mark.parametrize("local_optimizer", [SGD, {"kind": "none"}])
    def test_by_scalars_as_by_values(self, local_optimizer):
        by = replace(PLAIN, growth=8.0, local_optimizer=local_optimizer, assignment={"kind": "cyclic"})
        one, two = (run(replace(by, exchange=kind)) for kind in ("weights", "scalars"))
        assert all(close(a.params, b.params, 1e-6) for (_, a), (_, b) in zip(one, two, strict=True))

    def test_a_round_is_that_of_the_method_with_as_many_directions(self):
        grown = run(replace(PLAIN, growth=4.0), count=2)
        built = build(replace(PLAIN, estimator={**FORWARD, "directions": 8}))
        state = grown[0][1]
        told = server.begin(state, UNITS, list(grown[1][0]["cohort"]), built, 3)
        answers = simulation(built, local, lambda r, c: False, HEAD)(told)
        expected, _ = server.finish(state, told, answers.updates, built, HEAD)
        assert equal(grown[1][1].params, expected.params)

    def test_costs_are_those_of_the_mean(self):
        from spryfl.choices import evenly

        assert evenly(replace(PLAIN, growth=8.0)).estimator["directions"] == round(4 * 7 / math.log(8))
        assert evenly(PLAIN) is PLAIN


class TestRates:
    @pytest.mark.parametrize("name", SCHEDULES)
    def test_a_warm_up_rises_from_a_tenth_and_then_is_the_schedule(self, name):
        rate, usual = warmed(SCHEDULES[name], 0.4), SCHEDULES[name]
        for done in (0.0, 0.1, 0.3, 0.4, 0.9):
            expected = (0.1 + 0.9 * done / 0.4 if done < 0.4 else 1.0) * usual(done)
            assert rate(done) == pytest.approx(expected)
        assert warmed(usual, 0.0) is usual

    def test_a_methods_local_rate_follows_it(self):
        """Without local steps it is the server's: one step of sgd a round, by hand."""
        by = replace(PLAIN, estimator={"kind": "backprop"}, local_optimizer={"kind": "none"}, server_optimizer=SGD)
        by = replace(by, warmup=0.5, schedule="linear")
        states, values = run(by), start()
        for r, (_, state) in enumerate(states):
            factor = min(1.0, 0.1 + 0.9 * (r / 4) / 0.5) * (1 - r / 4)
            grads = mean_gradient(values)
            values = {name: v - 0.05 * factor * grads[name] for name, v in values.items()}
            assert close(state.params, values, 1e-5)
            values = dict(state.params)

    def test_the_servers_rate_beside_local_steps(self):
        """w -= lr factor (w - mean of the clients' values)."""
        by = replace(PLAIN, server_optimizer={"kind": "sgd", "lr": 0.8}, server_schedule="cosine", server_warmup=0.25)
        states, built, before = run(by), build(replace(by, server_schedule="constant", server_warmup=0.0)), None
        before = server.init(start(), built, 3)
        for r, (record, state) in enumerate(states):
            told = server.begin(before, UNITS, record["cohort"], built, 3)
            answers = simulation(built, local, lambda r, c: False, HEAD)(told).updates
            whole = sum(one.examples for one in answers)
            factor = min(1.0, 0.1 + 0.9 * (r / 4) / 0.25) * 0.5 * (1 + math.cos(math.pi * r / 4))
            for name, old in before.params.items():
                mean = sum(one.examples * one.params[name] for one in answers) / whole
                assert torch.allclose(state.params[name], old - 0.8 * factor * (old - mean), atol=1e-6)
            before = state


def mean_gradient(values):
    """Of three clients with 5, 6 and 7 rows, each the mean over its three batches."""
    total = tree.zeros(values)
    for i in range(3):
        for batch in local(i).batches(0):
            grads = true_gradient(values, batch)
            total = {name: total[name] + (5 + i) / 18 * grads[name] / 3 for name in values}
    return total


class TestShrink:
    @pytest.mark.parametrize("assignment", ["everyone", "cyclic"])
    @pytest.mark.parametrize("head", ["shared", "exact"])
    def test_local_steps_by_hand(self, assignment, head):
        """lr K / (d + K + 1), d the values that a client's directions cover; the exact head at its own rate."""
        by = replace(PLAIN, shrink=True, assignment={"kind": assignment}, head=head, head_lr=2.0)
        built = build(by)
        told = server.begin(server.init(start(), built, 3), UNITS, [0, 1, 2], built, 3)[1]
        exact = HEAD if head == "exact" else frozenset()
        d = sum(start()[name].numel() for name in told.names if name not in exact)
        values = {name: start()[name] for name in told.names}
        for step, batch in enumerate(local(told.client).batches(0)):
            loss = Toy({**start(), **tree.without(start(), told.names)})
            made = built.estimator(loss, values, batch, noise.child_seed(told.seed, "step", step))
            grads = tree.add(made.dense, noise.expand(made.terms, values))
            rate = {n: 0.05 * (1 if n in exact else 4 / (d + 5)) * (2.0 if n in HEAD else 1.0) for n in values}
            values = {name: v - rate[name] * grads[name] for name, v in values.items()}
        update = client.run(told, built, local(told.client))
        assert close(update.params, values, 1e-5)

    @pytest.mark.parametrize("optimizer", [SGD, {"kind": "adamw"}, {"kind": "none"}])
    @pytest.mark.parametrize("head", ["shared", "exact"])
    def test_by_scalars_as_by_values(self, optimizer, head):
        by = replace(PLAIN, shrink=True, assignment={"kind": "cyclic"}, local_optimizer=optimizer, head=head)
        one, two = (rounds(replace(by, exchange=kind)) for kind in ("weights", "scalars"))
        assert all(close(a[0].params, b[0].params, 1e-6) for a, b in zip(one, two, strict=True))

    @pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
    def test_it_is_the_factor_that_errs_least(self, distribution):
        """E|f g_hat - g|^2 over seeds is lower at f than a fifth beside it."""
        params, batch = problem(dtype=torch.float32)
        truth, squares = true_gradient(params, batch), {}
        for seed in range(300):
            made = forward(directions=4, distribution=distribution)(Toy(), params, batch, seed)
            g_hat, f = noise.expand(made.terms, params), ledger.shrunk(made.terms, params)["a"]
            for factor in (0.8 * f, f, 1.2 * f):
                error = tree.norm(tree.subtract(tree.scale(g_hat, factor), truth)) ** 2
                squares[factor] = squares.get(factor, 0.0) + error
        low, at, high = (squares[factor] for factor in sorted(squares))
        assert at < low
        assert at < high

    def test_exact_gradients_are_left_alone(self):
        like = {"w": torch.zeros(6), "head": torch.zeros(3)}
        assert ledger.shrunk([Directional(k, 1.0, ("w",), "basis") for k in range(6)], like) == {"w": 1.0, "head": 1.0}


class TestGuided:
    def flat(self, values):
        return torch.cat([value.double().flatten() for value in values.values()])

    def estimates(self, guide, count, **options):
        params, batch = problem(dtype=torch.float64)
        for seed in range(count):
            made = forward(directions=4, guided=True, **options)(Toy(guide=guide), params, batch, seed)
            yield made, self.flat(tree.add(made.dense, noise.expand(made.terms, params)))

    def test_along_the_gradient_itself_it_is_exact(self):
        params, batch = problem(dtype=torch.float64)
        truth = true_gradient(params, batch)
        for _, g_hat in self.estimates(tree.scale(truth, 7.0), 3):
            assert torch.allclose(g_hat, self.flat(truth), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "orthogonal"])
    def test_it_is_the_projection_formula(self, distribution):
        params, batch = problem(dtype=torch.float64)
        truth, guide = self.flat(true_gradient(params, batch)), problem(seed=8)[0]
        u = self.flat(guide) / self.flat(guide).norm()
        for made, g_hat in self.estimates(guide, 3, distribution=distribution):
            drawn = noise.stack([term.seed for term in made.terms], params, distribution)
            v = torch.cat([value.flatten(1) for value in drawn.values()], dim=1).double()
            v = v - (v @ u)[:, None] * u
            assert len(v) == 3
            assert torch.allclose(g_hat, (truth @ u) * u + (v @ truth) @ v / 3, rtol=1e-4, atol=1e-5)
            assert made.passes.tangent == 4

    def test_unbiased_and_of_the_variance_that_it_claims(self):
        params, batch = problem(dtype=torch.float64)
        truth = self.flat(true_gradient(params, batch))
        off = problem(seed=8)[0]
        guide = {name: value + 2 * off[name] / 10 for name, value in true_gradient(params, batch).items()}
        u = self.flat(guide) / self.flat(guide).norm()
        many = torch.stack([g_hat for _, g_hat in self.estimates(guide, 400)])
        rest = truth - (truth @ u) * u
        assert rest.norm() > 0.1 * truth.norm()
        claimed = 29 / 3 * float(rest.square().sum())
        assert float((many - truth).square().sum(1).mean()) == pytest.approx(claimed, rel=0.2)
        assert float((many.mean(0) - truth).norm()) < 3 * math.sqrt(claimed / 400)

    def test_without_a_guide_all_directions_are_random(self):
        params, batch = problem()
        plain, guided = (forward(directions=4, guided=g)(Toy(), params, batch, 5) for g in (False, True))
        assert plain == guided

    def test_pieces_agree_with_the_whole(self):
        params, batch = problem(dtype=torch.float64)
        guide = problem(seed=8)[0]
        one, two = (
            forward(directions=4, guided=True)(Toy(guide=guide, micro_batch=m), params, batch, 5) for m in (0, 2)
        )
        whole, parts = (self.flat(tree.add(e.dense, noise.expand(e.terms, params))) for e in (one, two))
        assert torch.allclose(whole, parts, rtol=1e-5)

    def test_in_a_run_the_guide_is_what_the_server_sent(self):
        """The part along the guide is in the second round's answers; a decaying guide by hand."""
        by = replace(PLAIN, estimator={**FORWARD, "guided": True}, guide=True, guide_decay=0.5)
        states = [state for _, state in run(by, count=3)]
        guide = tree.subtract(start(), states[0].params)  # the server's step is the mean itself
        assert close(states[0].guide, guide, 1e-5)
        for before, after in itertools.pairwise(states):
            guide = tree.add(tree.scale(guide, 0.5), tree.subtract(before.params, after.params))
            assert close(after.guide, guide, 1e-4)


class TestAxes:
    def test_all_axes_give_the_gradient(self):
        params, batch = problem(dtype=torch.float32)
        made = forward(directions=29, distribution="basis")(Toy(), params, batch, 4)
        assert close(noise.expand(made.terms, params), true_gradient(params, batch), 1e-5)

    def test_a_client_with_one_unit_sweeps_its_own(self):
        """d_u = 8 of unit b by 8 directions: the exact gradient of that unit, whatever the others are."""
        params, batch = problem(dtype=torch.float32)
        own = {"b": params["b"]}
        made = forward(directions=8, distribution="basis")(Toy(tree.without(params, own)), own, batch, 4)
        assert close(noise.expand(made.terms, own), {"b": true_gradient(params, batch)["b"]}, 1e-5)

    def test_each_is_an_axis_of_length_root_d_and_none_comes_twice(self):
        like = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
        drawn = noise.stack(range(50, 62), like, "basis")
        rows = torch.cat([value.flatten(1) for value in drawn.values()], dim=1)
        assert torch.equal(rows.square().sum(1), torch.full((12,), 17.0)) or torch.allclose(
            rows.square().sum(1), torch.full((12,), 17.0)
        )
        assert int((rows != 0).sum()) == 12
        assert len(set(rows.argmax(1).tolist())) == 12

    @pytest.mark.parametrize("k", [0, 2])
    def test_every_axis_is_as_likely_in_each_place(self, k):
        like = {"a": torch.zeros(2), "b": torch.zeros(3)}
        drawn = [noise.stack([3 * i, 3 * i + 1, 3 * i + 2], like, "basis") for i in range(3000)]
        hits = torch.stack([torch.cat([one["a"][k], one["b"][k]]) for one in drawn]).count_nonzero(0)
        assert torch.allclose(hits / 3000, torch.full((5,), 0.2), atol=0.03)

    def test_more_axes_than_values_are_refused(self):
        with pytest.raises(ValueError, match="4 axes do not fit into 3 values"):
            noise.stack(range(4), {"a": torch.zeros(3)}, "basis")

    def test_scalars_end_in_the_bits_of_values(self):
        by = replace(PLAIN, estimator={**FORWARD, "distribution": "basis"}, assignment={"kind": "cyclic"})
        one, two = (rounds(replace(by, exchange=kind)) for kind in ("weights", "scalars"))
        assert all(equal(a[0].params, b[0].params) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("debiased", [False, True])
def test_the_mean_over_the_rounds_by_hand(debiased):
    """Debiased: sum_s b^(t-s) (1-b) w_s / (1 - b^t), of the rounds' values alone."""
    states = [state for _, state in run(replace(PLAIN, average=0.7, average_debiased=debiased))]
    for t in range(1, 5):
        weights = [0.3 * 0.7 ** (t - s) for s in range(1, t + 1)]
        for name, value in start().items():
            own = sum(w * states[s].params[name] for s, w in enumerate(weights))
            expected = own / (1 - 0.7**t) if debiased else own + 0.7**t * value
            assert torch.allclose(server.served(states[t - 1])[name], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"growth": 0.5}, "growth = 0.5"),
        ({"growth": 2.0, "estimator": {"kind": "backprop"}}, "growth = 2.0 needs an estimator with directions"),
        ({"growth": 2.0, "seeds": {"kind": "pool"}, "exchange": "scalars"}, "growth = 2.0"),
        ({"shrink": True, "estimator": {"kind": "backprop"}}, "shrink"),
        ({"warmup": 1.5}, "warmup = 1.5"),
        ({"server_schedule": "steep"}, "server_schedule"),
        ({"server_schedule": "linear", "local_optimizer": {"kind": "none"}}, "no effect with local_optimizer"),
        ({"server_warmup": 0.1, "exchange": "scalars"}, "catch"),
        ({"guide_decay": 0.5}, "no effect without guide"),
        ({"average_debiased": True}, "no effect without average"),
        ({"guide": True}, "go together"),
        ({"guide": True, "exchange": "scalars", "estimator": {**FORWARD, "guided": True}}, "dense"),
        ({"guide": True, "estimator": {**FORWARD, "directions": 1, "guided": True}}, "2 or more"),
    ],
    ids=str,
)
def test_where_a_switch_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        build(replace(PLAIN, **changes))


def test_rows_of_the_table_are_without_them():
    row = named("spry")
    assert (row.growth, row.shrink, row.warmup, row.server_schedule) == (1.0, False, 0.0, "constant")


def test_over_flower_an_answer_may_be_as_long_as_its_directions_ask(tiny, reviews):
    from spryfl.api import prepared
    from spryfl.config import parse
    from spryfl.engines import flower_check, flower_server

    given = {"model": {"name": str(tiny)}, "data": {"name": str(reviews), "train_rows": 40, "test_rows": 20}}
    method = {"name": "spry_per_iteration", "estimator": {"directions": 5}, "growth": 8.0}
    made = prepared(parse({**given, "partition": {"clients": 3}, "method": method, "train": {"steps": 2}}))
    expected = flower_server.expected(made)
    plan, state = made.plan, train.start(made.plan, made.model.params)[0]
    plain, grown = (server.begin(state, plan.units, [0], plan.method, 0, growth=g)[0] for g in (1.0, 8.0))
    assert expected.seeded(plain)[0] == 5
    assert expected.seeded(grown)[0] >= 40
    assert flower_check.largest(grown, expected) - flower_check.largest(plain, expected) >= 2 * 2 * 35 * 12
