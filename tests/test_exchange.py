"""Exchange by scalars: the same bits as by values, merged and summed to rounding, caught up, refused, resumed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from toy import Toy, problem

from spryfl import client, ledger, noise, server, trace, tree, wire
from spryfl.engines.simulate import simulation
from spryfl.methods import METHODS, Method, build, named
from spryfl.types import (
    CatchUp,
    Directional,
    Estimate,
    Instruction,
    Ledger,
    Passes,
    Pool,
    Round,
    Share,
    Trace,
    Unit,
    Update,
)

HEAD = frozenset({"head.weight", "head.bias"})
UNITS = (Unit("a", ("a",), 12), Unit("b", ("b",), 8), Unit("head", ("head.weight", "head.bias"), 9, head=True))
FORWARD = {"kind": "forward", "directions": 2}
SGD = {"kind": "sgd", "lr": 0.05}


def local(i, batches=3, dtype=torch.float32):
    """A client with data of its own."""
    own = [problem(seed=100 * i + step, dtype=dtype)[1] for step in range(batches)]
    return client.Local(
        bind=lambda fixed, guide: Toy({**start(dtype), **fixed}, guide=guide),
        batches=lambda seed: iter(own),
        examples=5 + i,
        held_out=lambda: iter(()),
        score=lambda params, rows: (0, 0),
        device=torch.device("cpu"),
    )


def start(dtype=torch.float32):
    return problem(seed=1, dtype=dtype)[0]


def rounds(method, count=3, cohorts=((0, 1, 2),), lost=lambda r, c: False, dtype=torch.float32, state=None):
    """The states after each round, and each round's answers and instructions."""
    built = build(method)
    state = state or server.init(start(dtype), built, clients=4)
    exchange = simulation(built, lambda i: local(i, dtype=dtype), lost, HEAD, ledger.held_by_all(state, built))
    out = []
    for _ in range(count):
        told = server.begin(state, UNITS, list(cohorts[state.round % len(cohorts)]), built, seed=3)
        answers = exchange(told)
        state, refused = server.finish(state, told, answers.updates, built, HEAD)
        assert refused.failed == {}
        out.append((state, told, answers))
    return out


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b, tolerance):
    return max(tree.norm({n: a[n] - b[n]}) / max(tree.norm({n: b[n]}), 1e-30) for n in a) < tolerance


@pytest.mark.parametrize("head", ["shared", "split", "exact"])
@pytest.mark.parametrize("assignment", ["everyone", "cyclic", "contiguous"])
@pytest.mark.parametrize("optimizer", [SGD, {"kind": "sgd", "lr": 0.05, "momentum": 0.9}, {"kind": "adamw"}])
def test_scalars_end_in_the_bits_of_values(head, assignment, optimizer):
    by = Method("m", FORWARD, {"kind": assignment}, local_optimizer=optimizer, head=head, head_lr=2.0)
    values, scalars = (rounds(replace(by, exchange=kind)) for kind in ("weights", "scalars"))
    for (one, _, _), (two, _, _) in zip(values, scalars, strict=True):
        assert equal(one.params, two.params)
    assert sum(a.bytes_up for *_, a in scalars) != sum(a.bytes_up for *_, a in values)


@pytest.mark.parametrize("server_optimizer", [{"kind": "yogi"}, {"kind": "sgd", "lr": 0.1}])
@pytest.mark.parametrize("head", ["shared", "exact"])
def test_gradients_by_scalars_are_gradients_by_values(server_optimizer, head):
    by = Method("m", FORWARD, {"kind": "cyclic"}, local_optimizer={"kind": "none"}, server_optimizer=server_optimizer)
    values, scalars = (rounds(replace(by, exchange=kind, head=head)) for kind in ("weights", "scalars"))
    assert all(close(one[0].params, two[0].params, 1e-6) for one, two in zip(values, scalars, strict=True))


def test_without_local_steps_the_server_gets_the_mean_gradient_over_the_batches():
    built = build(named("fedavg", local_optimizer={"kind": "none"}))
    told = server.begin(server.init(start(), built, 1), UNITS, [2], built, seed=0)[0]
    update = client.run(told, built, local(2))
    expected = tree.zeros(start())
    for batch in local(2).batches(0):
        leaves = {n: v.clone().requires_grad_() for n, v in start().items()}
        grads = torch.autograd.grad(Toy()(leaves, batch), list(leaves.values()))
        expected = tree.add(expected, {n: g / 3 for n, g in zip(leaves, grads, strict=True)})
    assert close(update.params, expected, 1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_a_replay_is_the_clients_own_walk_bit_for_bit(exact):
    built = build(Method("m", FORWARD, exchange="scalars", head="exact" if exact else "shared"))
    told = server.begin(server.init(start(), built, 1), UNITS, [1], built, seed=0)[0]
    walk = client._walk(told, told.params, built, local(1))
    update = client.run(told, built, local(1))
    seeded = [name for name in told.names if name not in update.params]
    steps = trace.steps_of(update.trace, seeded, told.names, told)
    again = trace.replay(steps, tree.select(told.params, seeded), built.local, 1.0)
    assert seeded
    assert all(torch.equal({**again, **update.params}[name], walk.params[name]) for name in told.names)
    assert len(update.trace.seeds) == 0  # they follow from the instruction


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_merged_scalars_are_the_mean_of_the_models(dtype, tolerance):
    """Shared seeds and plain SGD: replaying the mean of the scalars is the mean of the replayed models."""
    by = Method("m", FORWARD, seeds={"kind": "shared"}, local_optimizer=SGD)
    values, scalars = (rounds(replace(by, exchange=kind), dtype=dtype) for kind in ("weights", "scalars"))
    for (one, _, _), (two, _, _) in zip(values, scalars, strict=True):
        assert close(two.params, one.params, tolerance)
    _, told, answers = scalars[-1]
    asked = {one.client: one for one in told}
    merged = ledger.shares(asked, answers.updates, build(replace(by, exchange="scalars")), start(dtype))
    weights = [u.examples for u in answers.updates]
    expected = sum(w * u.trace.scalars.double() for w, u in zip(weights, answers.updates, strict=True)) / sum(weights)
    assert len(merged) == 1
    assert torch.allclose(merged[0].trace.scalars.double(), expected, rtol=tolerance)


def test_merging_needs_plain_sgd():
    adaptive = Method("m", FORWARD, seeds={"kind": "shared"}, exchange="scalars", local_optimizer={"kind": "adamw"})
    _, told, answers = rounds(adaptive)[-1]
    assert len(ledger.shares({one.client: one for one in told}, answers.updates, build(adaptive), start())) == 3


@pytest.mark.parametrize("kind", ["median", "trimmed_mean", "krum"])
def test_one_client_that_lies_about_its_scalars_does_not_carry_a_robust_round(kind):
    def moved(aggregate, liar):
        method = Method("m", FORWARD, seeds={"kind": "shared"}, exchange="scalars", local_optimizer=SGD)
        built = build(replace(method, aggregate=aggregate))
        state = server.init(start(), built, 6)
        told = server.begin(state, UNITS, [0, 1, 2, 3, 4], built, seed=3)
        answers = [client.run(one, built, local(one.client)) for one in told]
        if liar:
            answers[2] = answers[2]._replace(trace=answers[2].trace._replace(scalars=answers[2].trace.scalars + 1e4))
        after, _ = server.finish(state, told, answers, built, HEAD)
        return tree.norm(tree.subtract(after.params, state.params))

    robust = {"kind": kind, **({"share": 0.2} if kind == "trimmed_mean" else {})}
    assert moved({"kind": "mean"}, liar=True) > 100 * moved({"kind": "mean"}, liar=False)
    assert moved(robust, liar=True) < 3 * moved({"kind": "mean"}, liar=False)


def test_a_round_with_too_few_for_krum_moves_nothing_and_says_so():
    built = build(Method("m", FORWARD, aggregate={"kind": "krum", "byzantine": 1}))
    state = server.init(start(), built, 6)
    told = server.begin(state, UNITS, [0, 1], built, seed=3)
    answers = [client.run(one, built, local(one.client)) for one in told]
    after, refused = server.finish(state, told, answers, built, HEAD)
    assert equal(after.params, state.params)
    assert after.round == 1
    assert "krum" in refused.note


POOLED = Method(
    "m", {"kind": "forward"}, seeds={"kind": "pool", "size": 16}, exchange="scalars", local_optimizer=SGD, head="exact"
)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("head", ["shared", "exact"])
def test_a_summed_pool_is_the_simulation_that_moves_whole_models(weighted, head):
    method = replace(POOLED, seeds={"kind": "pool", "size": 16, "weighted": weighted}, head=head)
    built, values = build(method), start()
    for state, told, answers in rounds(method, 4):
        total, weight = tree.zeros(values), sum(u.examples for u in answers.updates)
        for one in told:
            full = one._replace(params=values, catch_up=None)
            walked = client._walk(full, values, built, local(one.client)).params
            total = tree.add(total, tree.scale(walked, (5 + one.client) / weight))
        values = total
        assert close(state.params, values, 1e-5)
        values = state.params  # of this round's steps; over the rounds roundings add up


def test_a_pool_is_drawn_from_and_what_was_large_is_drawn_more_often():
    pool = Pool(5, 4, torch.empty(0))
    told = Instruction(1, 0, 9, (), {}, pool=pool)
    drawn = [trace.pool_index(told, step) for step in range(2000)]
    assert [drawn.count(i) / 2000 for i in range(4)] == pytest.approx([0.25] * 4, abs=0.04)
    assert trace.step_seed(told, 3) == trace.pool_seed(pool, drawn[3])
    sizes = torch.tensor([[2.0, 1.0, 0.0, 4.0], [2.0, 3.0, 0.0, 4.0]])  # mean |c| = 1, 3, never drawn, 1
    chances = ledger.chances(Ledger(sizes=sizes))
    normal = torch.tensor([0.0, 1.0, (1 + 3 + 1) / 3 / 2 - 0.5, 0.0])
    assert torch.allclose(chances, torch.softmax(normal, 0))
    heavy = told._replace(pool=pool._replace(chances=torch.tensor([0.7, 0.1, 0.1, 0.1])))
    assert sum(trace.pool_index(heavy, s) == 0 for s in range(2000)) / 2000 == pytest.approx(0.7, abs=0.04)


@pytest.mark.parametrize("first", [True, False])
def test_a_pool_takes_no_scalars_of_other_seeds_or_terms(first):
    built = build(POOLED)
    state = server.init(start(), built, 4) if first else rounds(POOLED, 1)[-1][0]
    told = server.begin(state, UNITS, [0, 1, 2, 3], built, seed=3)
    memory = ledger.held_by_all(state, built)
    full = [one._replace(params=ledger.restored(one, memory, built, HEAD)[0]) for one in told]
    good, *bad = [client.run(one, built, local(one.client)) for one in full]
    own = bad[0].trace._replace(seeds=torch.arange(3))
    wide = bad[1].trace._replace(layouts=((((), "gaussian", 3),),), steps=(0,))
    other = bad[2].trace._replace(layouts=((((), "rademacher", 1),),))
    spoilt = [one._replace(trace=made) for one, made in zip(bad, (own, wide, other), strict=True)]
    after, refused = server.finish(state, told, [good, *spoilt], built, HEAD)
    alone, _ = server.finish(state, told, [good], built, HEAD)
    assert set(refused.failed) == {1, 2, 3}
    assert all("pool" in why for why in refused.failed.values())
    assert equal(after.params, alone.params)


def test_a_seed_of_the_pool_keeps_its_direction_over_rounds_and_clients():
    built = build(POOLED)
    told = server.begin(server.init(start(), built, 3), UNITS, [0, 1], built, seed=3)
    seeds = {trace.step_seed(one, step) for one in told for step in range(200)}
    assert len(seeds) == 16


# Catching up


def walked(method, cohorts, count):
    """Each client's own memory, brought up to date from the messages alone; yields what server and client hold."""
    built, memories = build(method), {}
    state = server.init(start(), built, clients=6)
    for _ in range(count):
        told = [
            wire.decode(wire.encode(one))
            for one in server.begin(state, UNITS, list(cohorts[state.round % len(cohorts)]), built, seed=3)
        ]
        answers = []
        for one in told:
            params, memories[one.client] = ledger.restored(one, memories.get(one.client), built, HEAD)
            yield one, params, state
            answers.append(wire.decode(wire.encode(client.run(one._replace(params=params), built, local(one.client)))))
        state, refused = server.finish(state, told, answers, built, HEAD)
        assert refused.failed == {}


@pytest.mark.parametrize("seeds", ["own", "shared"])
@pytest.mark.parametrize("head", ["shared", "exact"])
@pytest.mark.parametrize("optimizer", [{"kind": "adamw"}, SGD])
def test_a_client_that_missed_rounds_replays_them_to_the_servers_bits(seeds, head, optimizer, monkeypatch):
    """With the toy's 29 values a trace is never fewer bytes: here the server is made to think otherwise."""
    method = Method(
        "m", FORWARD, seeds={"kind": seeds}, exchange="scalars", local_optimizer=optimizer, head=head, head_lr=3.0
    )
    monkeypatch.setattr(ledger, "recorded", lambda book, moved, params: book._replace(rounds=(*book.rounds, moved)))
    monkeypatch.setattr(server, "min", lambda whole, replayed, key: replayed, raising=False)
    missed = []
    for one, params, state in walked(method, [(0, 1, 5), (2, 3), (1, 2), (0, 3)], 8):
        assert equal(params, state.params)
        missed.append(0 if one.catch_up is None else len(one.catch_up.missed))
    assert max(missed) >= 3


def test_a_client_on_a_pool_rebuilds_the_servers_bits():
    wide = replace(POOLED, seeds={"kind": "pool", "size": 8})
    ways = []
    for one, params, state in walked(wide, [(0, 1), (2, 3), (1, 2), (0, 3)], 8):
        assert all(torch.equal(params[name], state.params[name]) for name in state.params)
        ways.append(one.catch_up is not None)
    assert not any(ways[:2])
    assert all(ways[2:])


def test_the_server_sends_whichever_is_fewer_bytes():
    """Long traces against 29 values: the values. One scalar a round: the trace, until too many rounds were missed."""
    short = Method("m", {"kind": "forward"}, seeds={"kind": "shared"}, exchange="scalars", local_optimizer=SGD)
    big = {f"a{i}": torch.zeros(40, 40) for i in range(2)}
    unit = (Unit("a", tuple(big), 3200),)
    built = build(short)
    state = server.init(big, built, 4)
    layout = (((), "gaussian", 1),)
    light, heavy = (Trace(torch.ones(n), (layout,), (0,) * n, torch.empty(0, dtype=torch.int64)) for n in (1, 5000))
    rounds_ = tuple(Round(r, (Share(r, (), 1.0, 1.0, {}, light),)) for r in range(1, 6))
    state = state._replace(round=5, ledger=state.ledger._replace(seen={0: 2, 1: 0}, rounds=rounds_))
    told = server.begin(state, unit, [0, 1, 2], built, seed=0)
    assert [one.catch_up and len(one.catch_up.missed) for one in told] == [3, 5, None]
    assert [len(one.params) for one in told] == [0, 0, 2]
    last = Round(5, (Share(5, (), 1.0, 1.0, {}, heavy),))
    costly = state._replace(ledger=state.ledger._replace(rounds=(*rounds_[:4], last)))
    assert [one.catch_up for one in server.begin(costly, unit, [0, 1, 2], built, seed=0)] == [None] * 3


def test_old_rounds_leave_the_ledger_when_values_are_fewer_bytes():
    one = Round(1, (Share(1, (), 1.0, 1.0, {"w": torch.ones(50)}, None),))
    book, params = Ledger(), {"w": torch.ones(200)}
    for number in range(1, 9):
        book = ledger.recorded(book, one._replace(number=number), params)
    assert 1 <= len(book.rounds) < 4
    assert book.rounds[-1].number == 8


def test_a_client_that_lost_its_memory_is_told_so():
    told = Instruction(5, 2, 1, ("a",), {}, catch_up=CatchUp(3))
    with pytest.raises(ValueError, match="holds no values"):
        ledger.restored(told, None, build(named("fedavg")), HEAD)
    with pytest.raises(ValueError, match="holds the values of round 1"):
        ledger.restored(told, ledger.Held(1, {}), build(named("fedavg")), HEAD)


def test_scalars_up_do_not_hang_on_the_number_of_values():
    """DeComFL's promise: four bytes a direction and step, whatever the model."""

    def message(width, directions=10):
        told = Instruction(1, 0, 7, ("w",), {"w": torch.zeros(width)}, fingerprint=trace.fingerprint())
        seeds = [trace.term_seeds(trace.step_seed(told, t), directions) for t in range(4)]
        steps = [tuple(Directional(s, 0.5, ("w",), "gaussian") for s in own) for own in seeds]
        made = trace.compress(steps, ["w"], ["w"], told)
        return len(wire.encode(client_update(told, made)))

    assert message(10) == message(100_000)
    assert message(10, 20) - message(10, 10) == pytest.approx(4 * 4 * 10, abs=4)  # and a digit or two of the header


def client_update(told, made, **more):
    whole = Update(told.round, told.client, {}, 3, 0.5, Passes(1, 1), 0, 0.0, trace=made)
    return whole._replace(**more)


def test_seeds_of_their_own_travel_and_arrive():
    told = Instruction(1, 0, 7, ("w", "u"), {"w": torch.zeros(3), "u": torch.zeros(2)})
    steps = [(Directional(123, 0.5, ("w",), "gaussian"), Directional(2**62 + 1, -1.5, ("u",), "rademacher"))]
    made = wire.decode(wire.encode(client_update(told, trace.compress(steps, ["w", "u"], told.names, told)))).trace
    assert list(trace.steps_of(made, ["w", "u"], told.names, told)) == steps


# Refusals


def bad_traces():
    good = Trace(torch.ones(2), ((((), "gaussian", 2),),), (0,), torch.empty(0, dtype=torch.int64))
    yield "foreign", good._replace(layouts=((((9,), "gaussian", 2),),)), "not its own"
    yield "negative place", good._replace(layouts=((((-1,), "gaussian", 2),),)), "not its own"
    yield "too few", good._replace(scalars=torch.ones(1)), "1 scalars for 2 terms"
    yield "too many seeds", good._replace(seeds=torch.ones(3, dtype=torch.int64)), "scalars for 2 terms"
    yield "not finite", good._replace(scalars=torch.tensor([1.0, math.nan])), "not finite"
    yield "unknown distribution", good._replace(layouts=((((), "cauchy", 2),),)), "unknown distribution"
    yield "no steps", good._replace(steps=()), "without steps"
    yield "no layout", good._replace(steps=(1,)), "without a layout"
    yield "values", None, "where scalars were asked for"


@pytest.mark.parametrize(("made", "text"), [c[1:] for c in bad_traces()], ids=[c[0] for c in bad_traces()])
def test_a_trace_that_does_not_fit_is_refused_and_changes_nothing_but_its_absence(made, text):
    built = build(Method("m", FORWARD, exchange="scalars"))
    state = server.init(start(), built, 4)
    told = server.begin(state, UNITS, [0, 1], built, seed=3)
    good = client.run(told[0], built, local(0))
    bad = client.run(told[1], built, local(1))
    bad = bad._replace(trace=made, params=bad.params if made else told[1].params)
    with_it, refused = server.finish(state, told, [good, bad], built, HEAD)
    without_it, _ = server.finish(state, told, [good], built, HEAD)
    assert text in refused.failed[1]
    assert equal(with_it.params, without_it.params)


def test_a_dense_part_of_another_shape_is_refused_though_no_values_were_sent():
    """A client that caught up was sent no values: the shapes are the server's own."""
    built = build(Method("m", FORWARD, exchange="scalars", head="exact"))
    state = server.init(start(), built, 4)
    told = server.begin(state, UNITS, [0, 1], built, seed=3)
    good, bad = (client.run(one, built, local(one.client)) for one in told)
    told[1] = told[1]._replace(params={}, catch_up=CatchUp(0))
    bad = bad._replace(params={**bad.params, "head.bias": torch.zeros(1)})
    after, refused = server.finish(state, told, [good, bad], built, HEAD)
    assert "other shapes" in refused.failed[1]
    assert equal(after.params, server.finish(state, told, [good], built, HEAD)[0].params)


def test_scalars_where_values_were_asked_for_are_refused():
    built = build(Method("m", FORWARD))
    state = server.init(start(), built, 4)
    told = server.begin(state, UNITS, [0], built, seed=3)
    made = Trace(torch.ones(2), ((((), "gaussian", 2),),), (0,), torch.empty(0, dtype=torch.int64))
    _, refused = server.finish(state, told, [client_update(told[0], made)], built, HEAD)
    assert "scalars" in refused.failed[0]


def test_another_noise_on_the_other_side_is_an_error(monkeypatch):
    built = build(Method("m", FORWARD, exchange="scalars"))
    told = server.begin(server.init(start(), built, 4), UNITS, [0], built, seed=3)[0]
    gaussian = noise.DISTRIBUTIONS["gaussian"]
    monkeypatch.setitem(
        noise.DISTRIBUTIONS, "gaussian", lambda seeds, like: tree.scale(gaussian(seeds, like), 1.0 + 1e-6)
    )
    with pytest.raises(ValueError, match="not the server's"):
        client.run(told, built, local(0))


# The gate, the average, the guide


def test_a_client_too_noisy_for_the_gate_is_left_out():
    def variance(i):
        built = build(Method("m", FORWARD, gate=1e9))
        told = server.begin(server.init(start(), built, 4), UNITS, [i], built, seed=3)[0]
        return client.run(told, built, local(i)).variance

    spread = [variance(i) for i in range(3)]
    limit = sorted(spread)[1]
    built = build(Method("m", FORWARD, gate=limit))
    state = server.init(start(), built, 4)
    told = server.begin(state, UNITS, [0, 1, 2], built, seed=3)
    answers = [client.run(one, built, local(one.client)) for one in told]
    noisy = max(range(3), key=lambda i: answers[i].variance)
    after, refused = server.finish(state, told, answers, built, HEAD)
    quiet, _ = server.finish(state, told, [a for i, a in enumerate(answers) if i != noisy], built, HEAD)
    assert set(refused.gated) == {noisy}
    assert equal(after.params, quiet.params)


def test_the_variance_is_that_of_the_mean_of_the_steps_gradients():
    seen = []

    def estimator(loss_fn, params, batch, seed):
        made = build(Method("m", FORWARD)).estimator(loss_fn, params, batch, seed)
        seen.append(noise.expand(made.terms, params))
        return made

    built = build(Method("m", FORWARD, gate=1.0))._replace(estimator=estimator)
    told = server.begin(server.init(start(), built, 4), UNITS, [1], built, seed=3)[0]
    update = client.run(told, built, local(1))
    flat = torch.stack([torch.cat([g[n].flatten() for n in g]) for g in seen]).double()
    assert update.variance == pytest.approx(float(flat.var(0, unbiased=True).mean() / len(seen)), rel=1e-5)


def test_one_local_batch_has_no_variance_and_does_not_pass_a_gate():
    built = build(Method("m", FORWARD, gate=1e30))
    told = server.begin(server.init(start(), built, 4), UNITS, [1], built, seed=3)[0]
    assert math.isnan(client.run(told, built, local(1, batches=1)).variance)


def test_the_average_over_the_rounds_is_what_is_served():
    states = [state for state, *_ in rounds(Method("m", FORWARD, local_optimizer=SGD, average=0.9))]
    expected = start()
    for state in states:
        expected = {n: 0.9 * v + 0.1 * state.params[n] for n, v in expected.items()}
        assert close(server.served(state), expected, 1e-6)
    assert not equal(server.served(states[-1]), states[-1].params)


def test_the_guide_is_the_last_pseudo_gradient_and_reaches_the_estimator():
    seen = []

    def watching(loss_fn, params, batch, seed):
        seen.append(dict(loss_fn.guide))
        return Estimate(0.0, {n: torch.ones_like(v) for n, v in params.items()}, (), Passes(1))

    method = Method("m", guide=True, local_optimizer=SGD)
    built = build(replace(method, guide=False))._replace(guide=True, estimator=watching)
    state = server.init(start(), built, 4)
    exchange = simulation(built, local, lambda r, c: False, HEAD)
    for _ in range(2):
        told = server.begin(state, UNITS, [0], built, seed=3)
        state, _ = server.finish(state, told, exchange(told).updates, built, HEAD)
    assert seen[0] == {}
    assert all(torch.allclose(seen[-1][n], torch.full_like(v, 3 * 0.05), atol=1e-6) for n, v in start().items())


# Choices that do not go together


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"exchange": "scalars"}, "needs a seeded estimator"),
        ({"seeds": {"kind": "shared"}}, "no effect"),
        ({"estimator": FORWARD, "seeds": {"kind": "pool"}}, "pool"),
        ({"guide": True}, "go together"),
        ({"average": 1.0}, "average"),
        ({"gate": -1.0}, "gate"),
        ({"exchange": "carrier pigeon"}, "weights, scalars"),
        ({"local_optimizer": {"kind": "none"}, "head_lr": 2.0}, "head_lr has no effect"),
        ({"estimator": FORWARD, "exchange": "scalars", "sharing": "alone"}, "alone"),
        ({"estimator": FORWARD, "seeds": {"kind": "pool", "size": 0}}, "size = 0"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        build(replace(Method("m"), **changes))


# Laws of every row


SHARED = [name for name, row in METHODS.items() if row.sharing == "federated"]


@pytest.mark.parametrize("name", SHARED)
def test_every_row_goes_on_from_its_saved_state_to_the_same_bits(name):
    through = [state for state, *_ in rounds(METHODS[name], 4, cohorts=((0, 1, 2), (1, 2, 3)))]
    saved, _ = wire.load(wire.dump(through[1]))
    again = [(s, a) for s, _, a in rounds(METHODS[name], 2, cohorts=((0, 1, 2), (1, 2, 3)), state=saved)]
    assert equal(again[-1][0].params, through[-1].params)
    assert wire.dump(again[-1][0]) == wire.dump(through[-1])


def not_finite(update):
    return update._replace(loss=math.nan)


def nan_inside(update):
    """NaN in what would move the values: a scalar, or a value."""
    if update.trace is not None and len(update.trace.scalars):
        return update._replace(trace=update.trace._replace(scalars=update.trace.scalars * math.nan))
    return update._replace(params={name: value * math.nan for name, value in update.params.items()})


def foreign(update):
    """An answer for a value that it was not told to train."""
    if update.trace is not None:
        layouts = tuple(tuple(((99,), kind, count) for _, kind, count in one) for one in update.trace.layouts)
        return update._replace(trace=update.trace._replace(layouts=layouts))
    return update._replace(params={**update.params, "not mine": torch.ones(3)})


@pytest.mark.parametrize("spoil", [not_finite, nan_inside, foreign])
@pytest.mark.parametrize("name", SHARED)
def test_every_row_shrugs_off_an_answer_that_is_broken_or_for_others_units(name, spoil):
    built = build(METHODS[name])
    state = server.init(start(), built, 4)
    told = server.begin(state, UNITS, [0, 1, 2], built, seed=3)
    answers = [client.run(one, built, local(one.client)) for one in told]
    with_it, refused = server.finish(state, told, [answers[0], spoil(answers[1]), answers[2]], built, HEAD)
    without_it, _ = server.finish(state, told, [answers[0], answers[2]], built, HEAD)
    assert list(refused.failed) == [1]
    assert wire.dump(with_it) == wire.dump(without_it)
    assert not equal(with_it.params, state.params)


@pytest.mark.parametrize("name", SHARED)
def test_every_seeded_row_ends_in_the_same_values_by_scalars_and_by_weights(name):
    row = METHODS[name]
    other = "weights" if row.exchange == "scalars" else "scalars"
    try:
        built = build(replace(row, exchange=other))
    except ValueError:
        pytest.skip("dense, or on a pool of seeds")
    state = server.init(start(), built, 4)
    told = server.begin(state, UNITS, [0, 1, 2], built, seed=3)
    assert told
    one, two = (rounds(replace(row, exchange=kind), 2)[-1][0] for kind in ("weights", "scalars"))
    assert close(one.params, two.params, 1e-5)
