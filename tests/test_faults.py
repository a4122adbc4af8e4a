"""What released programs of this field got wrong, one test a fault, named after what must hold instead."""

from __future__ import annotations

import csv
import itertools
import random
from dataclasses import replace

import pytest
import torch
from conftest import PLAIN
from test_exchange import HEAD, UNITS, close, equal, local, rounds, start
from toy import Toy, problem, true_gradient

from spryfl import api, client, job, journal, ledger, models, noise, server, tasks, trace, train, tree, wire
from spryfl.config import parse
from spryfl.engines.simulate import simulation
from spryfl.methods import METHODS, build, named
from spryfl.partition import PARTITIONS, dirichlet
from spryfl.testing import gradient
from spryfl.types import Unit

FEDERATED = [name for name, row in METHODS.items() if row.sharing == "federated"]
FIXED = {"kind": "cyclic", "rotate": False}
SGD = {"kind": "sgd", "lr": 0.05}


def run_job(made, folder=None):
    """(records, last state) of a prepared experiment."""
    opened, state, progress = job.begin(made, folder)
    kept = list(job.run(made, opened, state, progress))
    return [record for record, _ in kept], kept[-1][1]


@pytest.fixture(scope="module")
def prepared(tiny, reviews):
    """A small experiment, its data read and its model loaded; `prepared(method="fedavg", train={...})` changes it."""

    def make(**changes):
        base = {
            "model": {"name": str(tiny)},
            "data": {"name": str(reviews), "train_rows": 40},
            "partition": {"clients": 4, "held_out": 0.3, "split": "iid"},
            "train": {"rounds": 1, "cohort": 2, "steps": 2, "eval_every": 1},
        }
        given = {**base, **{k: {**base.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}}
        return api.prepared(parse(given))

    return make


def watched(method, seen):
    """The method's functions; `seen` gets (values, batch, seed, estimate, loss function) of every call."""
    built = build(method)

    def estimator(loss_fn, params, batch, seed):
        made = built.estimator(loss_fn, params, batch, seed)
        seen.append((dict(params), batch, seed, made, loss_fn))
        return made

    return built._replace(estimator=estimator)


def one_round(built, state, cohort, here=local):
    """(next state, instructions, answers) of one round through the engine."""
    told = server.begin(state, UNITS, list(cohort), built, seed=3)
    exchange = simulation(built, here, lambda r, c: False, HEAD, ledger.held_by_all(state, built))
    answers = exchange(told)
    after, refused = server.finish(state, told, answers.updates, built, HEAD)
    assert refused.failed == {}
    return after, told, answers


# Spry's program


def test_each_client_trains_the_units_of_its_own_slot():
    """All clients share one configuration object, so all train the last slot's units."""
    built = build(named("spry", assignment=FIXED, head="split"))
    _, told, answers = one_round(built, server.init(start(), built, 4), (0, 1, 2))
    expected = {0: {"a"}, 1: {"b"}, 2: {"head.weight", "head.bias"}}
    assert {one.client: set(one.names) for one in told} == expected
    for update in answers.updates:
        assert {n for n, v in update.params.items() if not torch.equal(v, start()[n])} == expected[update.client]


def test_answers_are_joined_by_name_not_by_place():
    """Aggregation zips clients' partial lists by position and averages unrelated layers."""
    units = [Unit(n, (n,), 2) for n in "abc"]
    values = {n: torch.full((2,), float(i)) for i, n in enumerate("abc")}
    built = build(named("fedavg_split", assignment=FIXED))
    state = server.init(values, built, 2)
    told = server.begin(state, units, [0, 1], built, seed=0)
    first, second = ({n: values[n] + shift for n in one.names} for one, shift in zip(told, (10.0, 20.0), strict=True))
    assert (list(first), list(second)) == (["a", "c"], ["b"])
    blank = client.Update(1, 0, {}, 4, 0.5, client.Passes(), 0, 0.0)
    answers = [blank._replace(client=0, params=dict(reversed(first.items()))), blank._replace(client=1, params=second)]
    after, _ = server.finish(state, told, answers, built)
    moved = {n: (after.params[n] - values[n]).tolist() for n in values}
    assert moved == {"a": [10.0, 10.0], "b": [20.0, 20.0], "c": [10.0, 10.0]}


@pytest.mark.parametrize("kind", ["cyclic", "contiguous", "balanced"])
def test_more_clients_than_units_share_them(kind):
    """The program crashes where clients outnumber units."""
    built = build(named("spry", assignment={"kind": kind}))
    after, told, answers = one_round(built, server.init(start(), built, 5), range(5))
    owners = [one.names[0] for one in told]
    assert len(answers.updates) == 5
    assert sorted(owners.count(name) for name in ("a", "b")) == [2, 3]
    assert not any(torch.equal(after.params[name], start()[name]) for name in start())


def test_the_per_iteration_mode_sends_scalars_and_the_server_steps():
    """There is no per-iteration mode. Against its text: mean of c v by unit, then Yogi's first step, written out."""
    seen = []
    row = METHODS["spry_per_iteration"]
    built = watched(replace(row, assignment=FIXED), seen)
    after, _, answers = one_round(built, server.init(start(), built, 4), (0, 1), here=lambda i: local(i, batches=1))
    assert all(not u.params and u.trace.scalars.shape == (1,) for u in answers.updates)
    total, weight = tree.zeros(start()), dict.fromkeys(start(), 0)
    for (_, batch, _, estimate, _), examples in zip(seen, (5, 6), strict=True):
        [term] = estimate.terms
        v = noise.direction(term.seed, tree.select(start(), term.block))
        truth = true_gradient(start(), batch)
        slope = sum(float((truth[n].double() * v[n].double()).sum()) for n in v)
        for name in v:
            total[name], weight[name] = total[name] + examples * slope * v[name], weight[name] + examples
    assert weight == {"a": 5, "b": 6, "head.weight": 11, "head.bias": 11}
    for name, value in start().items():
        g = total[name] / weight[name]
        m, second = 0.1 * g, 0.01 * g.square()
        expected = value - 1e-2 * m / (second.sqrt() + 1e-3)
        assert torch.allclose(after.params[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("exchange", ["weights", "scalars"])
def test_no_direction_comes_twice(exchange):
    """With fixed seeds all K directions and all steps coincide (and all clients' and all rounds')."""
    seen = []
    built = watched(named("spry", estimator={"kind": "forward", "directions": 4}, exchange=exchange), seen)
    state = server.init(start(), built, 4)
    for _ in range(2):
        state, _, _ = one_round(built, state, (0, 1))
    terms = [term for *_, estimate, _ in seen for term in estimate.terms]
    drawn = {
        tuple(noise.direction(t.seed, {"head.weight": start()["head.weight"]})["head.weight"].flatten().tolist())
        for t in terms
    }
    assert len(terms) == 2 * 2 * 3 * 4  # rounds, clients, steps, K
    assert len(drawn) == len(terms)


@pytest.mark.parametrize("name", ["spry", "fedavg", "baffle", "fedspzo"])
def test_accuracy_is_that_of_the_servers_values(name, prepared, tmp_path):
    """Generalized accuracy is measured after five extra epochs of finetuning, for Spry alone."""
    made = prepared(method=name)
    records, _ = run_job(made, tmp_path / "run")
    state, _ = journal.load(journal.open_folder(tmp_path / "run"))
    values, right, loss = {**state.params, **state.average}, 0, 0.0
    for i, label in enumerate(made.test.labels):
        [row] = made.test.inputs[i]
        inputs = {key: torch.tensor([row[key]]) for key in row if key != "labels"}
        with torch.no_grad():
            output = torch.func.functional_call(made.model.module, values, (), inputs)
        logits = output.logits[0].double()
        right += int(logits.argmax()) == label
        loss += float(logits.logsumexp(0) - logits[label])
    assert len(made.test.labels) == 80
    assert records[-1]["accuracy"] == right / 80
    assert records[-1]["test_loss"] == pytest.approx(loss / 80, rel=1e-5)
    assert records[-1]["test_loss"] != records[0]["test_loss"]


# The baselines beside it


@pytest.mark.parametrize("name", FEDERATED)
def test_every_client_starts_each_round_from_the_servers_values(name):
    """FedAvg never loads the global weights: its clients go on from their own."""
    seen = []
    built = watched(METHODS[name], seen)
    state = server.init(start(), built, 4)
    for number in (1, 2, 3):
        seen.clear()
        before = state.params
        state, told, _ = one_round(built, state, (0, 1))
        firsts = [({**seen[i][4].fixed, **seen[i][0]}, seen[i][0]) for i in range(0, len(seen), 3)]
        assert len(firsts) == len(told) == 2
        for one, (everything, own) in zip(told, firsts, strict=True):
            assert tuple(own) == one.names
            assert close(everything, before, 1e-6)
        assert number == 1 or not equal(dict(before), start())


def test_fedsgd_weighs_clients_by_their_examples():
    """FedSGD weighs clients by powers of two: the running mean of two, again and again."""
    built = build(METHODS["fedsgd"])
    here = lambda i: local(i, batches=1)._replace(examples=(40, 1, 7, 12)[i])  # noqa: E731
    after, *_ = one_round(built, server.init(start(), built, 4), range(4), here=here)
    total = tree.zeros(start())
    for i, examples in enumerate((40, 1, 7, 12)):
        [batch] = local(i, batches=1).batches(0)
        total = tree.add(total, tree.scale(true_gradient(start(), batch), examples / 60))
    lr = METHODS["fedsgd"].server_optimizer["lr"]
    assert close(tree.subtract(start(), after.params), tree.scale(total, lr), 1e-4)


def test_baffle_divides_by_sigma_and_ten_directions_are_ten():
    """BAFFLE+ multiplies by sigma where it must divide, and K = 10 acts as K = 1."""
    params, batch = problem()
    row = METHODS["baffle_plus"].estimator
    sigma, truth = row["mu"], true_gradient(params, batch)

    def estimates(k, seed):
        built = build(named("baffle_plus", estimator={**row, "directions": k}))
        return noise.expand(built.estimator(Toy(), params, batch, seed).terms, params)

    expected = tree.zeros(params)
    for k in range(10):
        z = noise.direction(noise.child_seed(4, "direction", k), params)
        up, down = (float(Toy()({n: v + s * sigma * z[n] for n, v in params.items()}, batch)) for s in (1, -1))
        expected = tree.add(expected, tree.scale(z, (up - down) / (2 * sigma) / 10))
    assert close(estimates(10, 4), expected, 1e-5)
    errors = {k: sum(tree.norm(tree.subtract(estimates(k, s), truth)) ** 2 for s in range(60)) for k in (1, 10)}
    assert errors[1] / errors[10] == pytest.approx(10, rel=0.4)


def guided_rounds(estimator, gate, cohort=(0, 1, 2)):
    """Two rounds of FwdLLM+: (what its estimator saw in the second, the states, answers and refusals of both)."""
    seen, out = [], []
    row = named("fwdllm_plus", gate=gate)
    built = watched(replace(row, estimator={**row.estimator, **estimator}), seen)
    state = server.init(start(), built, 4)
    for _ in range(2):
        seen.clear()
        told = server.begin(state, UNITS, list(cohort), built, seed=3)
        updates = [client.run(one, built, local(one.client)) for one in told]
        state, refused = server.finish(state, told, updates, built, HEAD)
        out.append((state, told, updates, refused))
    return built, seen, out


def test_a_guide_chooses_k_different_directions():
    """FwdLLM+ repeats one direction for all K once a previous gradient exists."""
    _, seen, [(first, *_), _] = guided_rounds({"directions": 4, "candidates": 5}, gate=1e9)
    assert tree.norm(first.guide) > 0
    for params, _, seed, estimate, loss_fn in seen:
        assert equal(dict(loss_fn.guide), dict(first.guide))
        candidates = [noise.child_seed(seed, "direction", k) for k in range(20)]
        drawn = [noise.direction(one, params) for one in candidates]
        near = [sum(float((v[n].double() * first.guide[n].double()).sum()) for n in v) / tree.norm(v) for v in drawn]
        best = {candidates[k] for k in sorted(range(20), key=lambda k: -near[k])[:4]}
        assert {term.seed for term in estimate.terms} == best
        assert len({term.coefficient for term in estimate.terms}) == 4


def test_the_variance_gate_is_on():
    """FwdLLM+'s variance gate is off: every client is aggregated, however noisy its estimate."""
    assert METHODS["fwdllm_plus"].gate > 0
    _, _, [(_, _, free, _), _] = guided_rounds({}, gate=1e9)
    spread = sorted(update.variance for update in free)
    built, _, [(after, told, updates, refused), _] = guided_rounds({}, gate=spread[1])
    noisy = max(updates, key=lambda update: update.variance)
    assert set(refused.gated) == {noisy.client}
    quiet = [update for update in updates if update is not noisy]
    without, _ = server.finish(server.init(start(), built, 4), told, quiet, built, HEAD)
    everyone, _ = server.finish(server.init(start(), built, 4), told, updates, built._replace(gate=1e9), HEAD)
    assert equal(after.params, without.params)
    assert not equal(after.params, everyone.params)


@pytest.mark.parametrize("name", ["baffle_plus", "fwdllm_plus", "fedzo", "fedspzo"])
def test_both_sides_of_a_difference_have_one_dropout_mask(name, prepared):
    """Both difference under dropout, each side with masks of its own: the scalar is the masks' difference."""
    made = prepared(method=name, train={"dropout": True})
    batch = tasks.collate(made.rows, made.parts[0][:6])
    loss_fn, values = models.loss_fn(made.model, {}, dropout=True), made.model.params
    row = METHODS[name].estimator
    wide = {"directions": 4, "candidates": 1, "p2": 1}
    built = build(named(name, guide=False, estimator={**row, **{k: v for k, v in wide.items() if k in row}}))
    truths = [true_gradient(values, batch, loss_fn, seed) for seed in (1, 2)]
    assert tree.norm(tree.subtract(*truths)) > 0.1 * tree.norm(truths[0])
    for seed, truth in zip((1, 2), truths, strict=True):
        terms = built.estimator(loss_fn, values, batch, seed).terms
        # Terms of one derivative along several blocks share its coefficient; the others are of one block.
        groups = [terms] if name == "fedspzo" else [(term,) for term in terms]
        for group in groups:
            slope = 0.0
            for term in group:
                v = noise.direction(term.seed, tree.select(values, term.block), term.distribution)
                slope += sum(float((truth[n] * v[n]).sum()) for n in v)
            share = slope / (1 if name == "fedspzo" else len(terms))
            assert group[0].coefficient == pytest.approx(share, rel=0.1, abs=0.05 * tree.norm(truth))


# DeComFL, FedKSeed, MeZO


@pytest.mark.parametrize("name", FEDERATED)
def test_a_seed_for_every_round_client_step_and_direction(name):
    """DeComFL's seed formula is not injective: a step's k-th direction is another step's first."""
    assert len({noise.child_seed(*facts) for facts in itertools.product(range(12), repeat=3)}) == 12**3
    built = build(METHODS[name])
    cohort = (0, 1, 10, 11)
    sources = [
        one
        for round_ in (0, 1, 2, 9, 10, 11)
        for one in server.begin(server.init(start(), built, 12)._replace(round=round_), UNITS, cohort, built, seed=3)
    ]
    seeds = [trace.step_seed(one, step) for one in sources for step in range(12)]
    terms = {seed: tuple(trace.term_seeds(seed, 12)) for seed in seeds}
    if built.seeds.pool:
        assert len(terms) > 200  # 288 draws from 1024
    else:
        assert len(terms) == 6 * 12 * (1 if built.seeds.shared else len(cohort))
    assert len({seed for own in terms.values() for seed in own}) == 12 * len(terms)


@pytest.mark.parametrize("name", ["decomfl", "fedspzo", "fedkseed", "fedavg"])
def test_a_schedule_moves_the_local_rate(name):
    """Learning-rate schedules are ignored: each round's move is its own rate times the estimate."""
    seen = []
    built = watched(named(name, schedule="linear", local_optimizer=SGD), seen)
    plan = train.Plan(built, UNITS, 3, rounds=4, clients=1, cohort=1, eval_every=1, patience=0)
    state, progress = train.start(plan, start(torch.float64))
    exchange = simulation(built, lambda i: local(i, batches=1, dtype=torch.float64), lambda r, c: False, HEAD)
    loop = train.train(plan, state, progress, exchange, lambda params: {"accuracy": 0.0})
    states = [state for _, state in loop]
    for i, factor in enumerate((1.0, 0.75, 0.5, 0.25)):
        moved = tree.subtract(states[i].params, states[i + 1].params)
        step = gradient(seen[i][3], states[i].params)
        assert close(moved, tree.scale(step, factor * SGD["lr"]), 1e-5)


@pytest.mark.parametrize("name", ["decomfl", "fedspzo", "fedkseed"])
def test_a_schedule_is_replayed_as_it_was(name, monkeypatch):
    """Learning-rate schedules are replayed wrongly: a client that missed rounds takes them at the rate of today."""
    row = METHODS[name]
    seeds = {**row.seeds, "size": 8} if "size" in row.seeds else row.seeds
    built = build(replace(row, schedule="linear", local_optimizer=SGD, seeds=seeds))
    # The toy's 29 values are always fewer bytes than what made them: the server must not think so.
    monkeypatch.setattr(ledger, "recorded", lambda book, moved, params: book._replace(rounds=(*book.rounds, moved)))
    monkeypatch.setattr(server, "min", lambda whole, replayed, key: replayed, raising=False)
    state, memories, came = server.init(start(), built, 4), {}, []
    for number in range(5):
        cohort = (0, 3) if number in (0, 4) else (0, 1)
        told = server.begin(state, UNITS, cohort, built, seed=3, lr_scale=built.schedule(number / 5))
        updates = []
        for one in (wire.decode(wire.encode(one)) for one in told):
            values, memories[one.client] = ledger.restored(one, memories.get(one.client), built, HEAD)
            came += [number] if one.client == 3 and one.catch_up else []
            assert equal(dict(values), dict(state.params))
            updates.append(client.run(one._replace(params=values), built, local(one.client)))
        state, _ = server.finish(state, told, updates, built, HEAD)
    assert came == [4]


def test_three_classes_are_scored_as_three(tiny, tmp_path):
    """A three-class task is scored as two: the third class is never an answer, and never right."""
    draw = random.Random(0)
    with open(tmp_path / "three.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for label, count in (("bad", 10), ("good", 20), ("none", 30)):
            rows.writerows([" ".join(draw.choices(PLAIN, k=5)), label] for _ in range(count))
    given = {"model": {"name": str(tiny)}, "data": {"name": str(tmp_path / "three.csv")}, "partition": {"clients": 2}}
    made = api.prepared(parse({**given, "method": "decomfl", "train": {"rounds": 1, "cohort": 2, "steps": 1}}))
    head = next(unit for unit in made.model.units if unit.head)
    bias = next(name for name in head.params if name.endswith("bias"))
    assert made.model.params[bias].shape == (3,)
    for number, share in enumerate((2 / 12, 4 / 12, 6 / 12)):
        values = {**made.model.params, bias: torch.eye(3)[number] * 1e3}  # the answer is this class, whatever the text
        assert job.evaluate(made)(values)["accuracy"] == share


def test_a_pools_sums_are_weighted_by_examples():
    """FedKSeed's ports sum the scalars of all clients without weights."""
    row = METHODS["fedkseed"]
    [(state, told, answers)] = rounds(replace(row, seeds={"kind": "pool", "size": 16}), count=1)
    lr, expected = row.local_optimizer["lr"], torch.zeros(16, dtype=torch.float64)
    for one, update in zip(told, answers.updates, strict=True):
        for step, scalar in enumerate(update.trace.scalars.tolist()):
            expected[trace.pool_index(one, step)] += lr * (5 + one.client) / (5 + 6 + 7) * scalar
    assert torch.allclose(state.ledger.summed.flatten().double(), expected, rtol=1e-5, atol=1e-9)
    pool = told[0].pool
    moved = tree.zeros(start())
    for index, amount in enumerate(expected.tolist()):
        [seed] = trace.term_seeds(trace.pool_seed(pool, index), 1)
        moved = tree.add(moved, tree.scale(noise.direction(seed, start()), amount))
    assert close(tree.subtract(start(), state.params), moved, 1e-3)


@pytest.mark.parametrize("name", ["fedmezo", "spry", "fedspzo"])
def test_no_global_generator_is_read_or_reseeded(name, prepared):
    """MeZO reseeds the global generator to make its direction again, and dropout and sampling with it."""
    made = prepared(method=name, train={"dropout": True})

    def final(before):
        torch.manual_seed(before)
        random.seed(before)
        kept = torch.get_rng_state(), random.getstate()
        _, state = run_job(made)
        assert torch.equal(torch.get_rng_state(), kept[0])
        assert random.getstate() == kept[1]
        return dict(state.params)

    before = random.getstate()
    try:
        assert equal(final(1), final(2))
    finally:
        random.setstate(before)


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_a_direction_hangs_on_seed_name_and_shape_alone(distribution):
    """MeZO's z depends on the values' dtype and device."""
    plain = noise.stack([7, 8], {"a": torch.zeros(5, 3), "b": torch.zeros(6)}, distribution)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        like = {"a": torch.ones(5, 3, dtype=dtype), "b": torch.ones(6, dtype=dtype)}
        other = noise.stack([7, 8], like, distribution)
        assert all(torch.equal(other[n], plain[n]) and other[n].dtype == torch.float32 for n in plain)
    there = {"a": torch.empty(5, 3, device="meta"), "b": torch.empty(6, device="meta")}
    drawn = noise.DISTRIBUTIONS[distribution]([7, 8], there)  # before they are carried to their device
    assert all(torch.equal(drawn[n], plain[n]) for n in plain)
    assert all(value.device.type == "meta" for value in noise.stack([7], there, distribution).values())
    if torch.cuda.is_available():
        far = noise.stack([7, 8], {"a": torch.zeros(5, 3).cuda(), "b": torch.zeros(6).cuda()}, distribution)
        assert all(torch.equal(far[n].cpu(), plain[n]) for n in plain)


# Partitions and tokens


@pytest.mark.parametrize("alpha", [1e-9, 0.01, 1.0])
def test_a_class_that_is_used_up_leaves_its_share_to_the_others(alpha):
    """The class shares of exhausted classes become 0/0."""
    labels = [0] * 200 + [1] * 3 + [2] * 40
    for seed in range(10):
        parts = dirichlet(alpha)(labels, None, 9, seed)
        assert sorted(row for part in parts for row in part) == list(range(243))
        assert {len(part) for part in parts} == {27}


@pytest.mark.parametrize("split", PARTITIONS)
def test_the_runs_seed_decides_the_partition(split, prepared):
    """The seed of the partition is fixed, so that every repetition has the same clients."""
    made = prepared(partition={"split": split}, data={"group": "site"})
    one, same, other = (job.deal(made.experiment.model_copy(update={"seed": seed}), made.corpus) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_tokens_follow_the_length_that_is_asked_for(prepared):
    """Caches of tokens whose key omits the length: the second run has the first one's tokens."""
    for length in (6, 12, 4, 6):
        made = prepared(data={"max_length": length})
        for rows, side in ((made.rows, made.corpus.train), (made.test, made.corpus.test)):
            for text, [sequence] in zip(side.text, rows.inputs, strict=True):
                assert sequence["input_ids"] == made.model.tokenizer(text)["input_ids"][:length]
        assert made.rows.cut > 0 or length == 12


def test_a_kept_prefix_is_of_its_batch_and_shape(prepared):
    """The one cache there is here: equal bytes of tokens in another shape are another batch."""
    made = prepared(method="head_only")
    flat = torch.tensor([4, 9, 15, 16, 6, 20, 21, 17, 10, 11, 12, 13])
    head = {n: made.model.params[n] for unit in made.model.units if unit.head for n in unit.params}
    rest = tree.without(made.model.params, head)
    loss_fn = models.loss_fn(made.model, rest, keep=10**9)
    for rows in (2, 3, 4, 2):
        ids = flat.reshape(rows, -1)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}
        assert torch.equal(loss_fn(head, batch), models.loss_fn(made.model, rest)(head, batch))
    assert len(loss_fn.prefix.answers) == 3


# Test data


@pytest.fixture
def collated(monkeypatch):
    """(token rows, indices) of every batch that is made."""
    seen, real = [], tasks.collate

    def collate(rows, chosen, *more):
        seen.append((rows, tuple(chosen)))
        return real(rows, chosen, *more)

    monkeypatch.setattr(tasks, "collate", collate)
    return seen


def lines(path):
    """(text, label) of each row of a file."""
    with open(path, encoding="utf-8") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["spry", "pooled", "alone"])
@pytest.mark.parametrize(("seed", "clients"), [(0, 4), (1, 7)])
def test_the_public_test_rows_are_the_files_and_nobodys(name, seed, clients, prepared, reviews, collated):
    """Train and test are pooled and cut again by client, so that no two programs are measured on the same rows."""
    made = prepared(method=name, seed=seed, data={"train_rows": 0}, partition={"clients": clients})
    for side, file in ((made.corpus.test, "test.csv"), (made.corpus.train, "train.csv")):
        names = [made.corpus.labels[i] for i in side.label]
        assert list(zip(side.text, names, strict=True)) == lines(reviews / file)
    assert (made.rows, made.test) == job.encode(made.experiment, made.corpus, made.model)
    assert sorted(row for part in (*made.parts, *made.held) for row in part) == list(range(240))
    few = made._replace(plan=made.plan._replace(clients=2))  # for `alone`: fewer models to evaluate
    _, state, _ = job.begin(few, None)
    collated.clear()
    job.evaluate(few)(state.params)
    own = len(job.own_models(few, state.params))
    assert all(rows is made.test for rows, _ in collated)
    assert sorted(row for _, chosen in collated for row in chosen) == sorted(list(range(80)) * own)


def test_held_out_rows_are_the_clients_own_and_never_trained_on(prepared, collated):
    """The rows of personal accuracy come from a pool with the public test, or are among those trained on."""
    made = prepared(train={"steps": 0, "epochs": 2})
    whole = [row for part in (*made.parts, *made.held) for row in part]
    assert sorted(whole) == list(range(40))
    assert all(made.held)
    for i in range(4):
        here = job.local(made)(i)
        for expected, batches in ((made.parts[i], here.batches(5)), (made.held[i], here.held_out())):
            collated.clear()
            assert len(list(batches)) == len(collated) > 0
            assert all(rows is made.rows for rows, _ in collated)
            assert {row for _, chosen in collated for row in chosen} == set(expected)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_personalised_alike(name):
    """One method's personal accuracy comes after a finetuning of its own: here, after the round's steps, for all."""
    built, scored, drawn = build(METHODS[name]), [], []

    def batches(seed):
        for batch in local(1).batches(seed):
            drawn.append(batch)
            yield batch

    def score(values, rows):
        scored.append((dict(values), rows))
        return len(scored), 10

    here = local(1)._replace(batches=batches, held_out=lambda: "its own rows", score=score)
    [told] = server.begin(server.init(start(), built, 4), UNITS, [1], built, seed=3, evaluate=True)
    update = client.run(told, built, here)
    (before, first), (after, second) = scored
    assert (first, second) == ("its own rows", "its own rows")
    assert (update.correct_before, update.correct_after, update.held_out) == (1, 2, 10)
    assert len(drawn) == 3  # the round's local batches, and none besides
    walked = client._walk(told, told.params, built, local(1)).params
    assert equal(before, dict(told.params))
    assert equal(after, {**told.params, **walked})
    assert equal(after, before) == (built.local is None)
