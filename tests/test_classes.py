"""Clients of unequal size: who belongs where, what each class is dealt, how answers are weighed, what is refused."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_exchange import HEAD, UNITS, close, equal, local, rounds, start
from test_methods import ran, settings, untimed  # noqa: F401  (a fixture)
from toy import Toy, problem

from spryfl import (
    api,
    assign,
    classes,
    client,
    compare,
    costs,
    explain,
    job,
    journal,
    models,
    noise,
    packing,
    plan,
    server,
    sizing,
    train,
    tree,
    wire,
)
from spryfl.assign import budget, few
from spryfl.classes import ClientClass, member
from spryfl.config import Experiment, parse
from spryfl.costs import shapes
from spryfl.methods import METHODS, Method, build, named
from spryfl.types import Passes, Unit, Update

BACKPROP, FORWARD = {"kind": "backprop"}, {"kind": "forward", "directions": 2}
FEW = {"kind": "few", "units": 1}
SGD = {"kind": "sgd", "lr": 0.05}
THREE = (
    ClientClass("strong", clients=(0,), estimator=BACKPROP),
    ClientClass("middle", clients=(1,), estimator={**FORWARD, "exact_top": 1}),
    ClientClass("weak", clients=(2, 3), estimator=FORWARD, assignment=FEW, head="exact", lr=0.5),
)


def mixed(**changes):
    return Method("mixed", **{"local_optimizer": SGD, "classes": THREE, **changes})


def units(count):
    return tuple(Unit(f"u{i}", (f"u{i}",), 4 + i) for i in range(count))


# Who belongs where ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 150), st.booleans())
def test_a_class_has_its_share_of_the_first_clients_to_within_one(parts, clients, rest):
    total = sum(parts) + (5 if rest or len(parts) == 1 else 0)
    made = [ClientClass(f"c{i}", share=part / total) for i, part in enumerate(parts)]
    of = member(made)
    count = Counter(of(client) for client in range(clients))
    for one in made:
        assert abs(count[one.name] - one.share * clients) <= 1 + 1e-6
    assert clients - sum(count[one.name] for one in made) == count[""]
    if sum(parts) == total:
        assert not count[""]


def test_shares_that_come_out_even_are_exact():
    of = member([ClientClass("a", share=0.2), ClientClass("b", share=0.3), ClientClass("c", share=0.5)])
    assert Counter(of(i) for i in range(80)) == {"a": 16, "b": 24, "c": 40}


def test_a_clients_class_hangs_on_its_number_alone():
    made = [ClientClass("a", share=0.37), ClientClass("b", share=0.21)]
    far = member(made)
    far(3000)  # asked in another order
    assert [far(i) for i in range(100)] == [member(made)(i) for i in range(100)]


def test_listed_clients_are_the_class():
    of = member([ClientClass("a", clients=(0, 5)), ClientClass("b", clients=(3,))])
    assert [of(i) for i in range(6)] == ["a", "", "", "b", "", "a"]


# Dealing -------------------------------------------------------------------------------------------------------------


def dealt(built, cohort, round_, of=UNITS):
    return server.deal(of, cohort, built, round_)


def test_each_class_is_dealt_by_its_own_assignment_and_all_train_the_head():
    built = build(mixed(assignment={"kind": "cyclic"}))
    for round_ in range(1, 5):
        out = dealt(built, [3, 0, 2, 1], round_)
        assert list(out) == [3, 0, 2, 1]
        assert all(mine[-1].head for mine in out.values())
        assert [len(out[i]) for i in range(4)] == [3, 3, 2, 2]  # cyclic among one client is everything
        assert out[2][0] != out[3][0]


@pytest.mark.parametrize("cohort", [[0], [2], [3, 2], [0, 3], [1, 0]])
def test_a_class_may_be_absent_from_a_round_or_have_one_client(cohort):
    out = dealt(build(mixed()), cohort, 1)
    assert list(out) == cohort
    assert all(len(out[i]) == (3 if i < 2 else 2) for i in cohort)


@pytest.mark.parametrize(
    ("count", "each", "clients"), [(6, 1, 1), (7, 2, 1), (12, 1, 4), (5, 3, 2), (1, 1, 3), (24, 1, 5)]
)
def test_few_units_come_round_to_the_whole_model(count, each, clients):
    """Each unit is first in line once in L rounds, so that none waits longer."""
    make, all_ = few(each), units(count)
    for begin in (0, 17):
        firsts = [make(all_, [9], begin + r)[9] for r in range(count)]
        assert {unit for mine in firsts for unit in mine} == set(all_)
        heads = Counter(few(1)(all_, [9], begin + r)[9] for r in range(count))
        assert set(heads.values()) == {1}
    split = make(all_, list(range(clients)), 3)
    owners = Counter(unit for mine in split.values() for unit in mine)
    assert all(len(mine) == min(each, count) for mine in split.values())
    assert len(owners) == min(count, each * clients)  # nobody doubles what somebody could have


@pytest.mark.parametrize("limited", [few(2), budget((14,))])
def test_units_that_others_hold_come_last(limited):
    all_ = units(6)
    for round_ in range(8):
        mine = assign.dealt(limited, all_, [4], round_, Counter({all_[0]: 2, all_[1]: 1, all_[3]: 1, all_[5]: 1}))[4]
        assert mine == (all_[2], all_[4])


def test_two_weak_classes_share_the_model_out():
    weak = tuple(
        ClientClass(n, clients=c, assignment={"kind": "few", "units": 2}) for n, c in (("a", (0,)), ("b", (1, 2)))
    )
    built = build(Method("m", classes=weak))
    for round_ in range(6):
        out = dealt(built, [0, 1, 2], round_, units(6))
        assert sorted(unit.name for mine in out.values() for unit in mine) == [f"u{i}" for i in range(6)]


def test_assignments_that_do_not_ask_are_not_told_of_owners():
    assert assign.dealt(assign.cyclic(), units(2), [5], 0, Counter({units(2)[0]: 3}))[5] == units(2)


# A round -------------------------------------------------------------------------------------------------------------


def test_every_client_works_by_its_class():
    seen = rounds(mixed(), count=1, cohorts=((0, 1, 2, 3),))[0]
    told, answers = {one.client: one for one in seen[1]}, {one.client: one for one in seen[2].updates}
    assert [told[i].client_class for i in range(4)] == ["strong", "middle", "weak", "weak"]
    assert [told[i].lr_scale for i in range(4)] == [1.0, 1.0, 0.5, 0.5]
    assert answers[0].passes == Passes(3, 0, 3)
    assert answers[1].passes.backward == 3 / 2  # one of the toy's two blocks
    assert answers[2].passes == Passes(3, 6, 0)
    alone = Method("weak", FORWARD, FEW, local_optimizer={**SGD, "lr": 0.025}, head="exact")
    one = next(one for one in seen[1] if one.client == 2)
    same = client.run(one._replace(lr_scale=1.0, client_class=""), build(alone), local(2))
    assert all(torch.allclose(same.params[n], answers[2].params[n], atol=1e-7) for n in same.params)


def test_the_rest_do_as_the_method_says():
    built = build(Method("m", FORWARD, classes=(ClientClass("strong", share=0.5, estimator=BACKPROP),)))
    assert [one.name for one in built.groups] == ["strong", ""]
    state = server.init(start(), built, 4)
    told = server.begin(state, UNITS, [0, 1], built, seed=1)
    ways = [client.run(one, built, local(one.client)).passes for one in told]
    assert {one.client_class: way for one, way in zip(told, ways, strict=True)} == {
        "strong": Passes(3, 0, 3),
        "": Passes(3, 6, 0),
    }


@pytest.mark.parametrize("exchange", ["weights", "scalars"])
@pytest.mark.parametrize("weigh", ["examples", "variance"])
def test_scalars_end_in_the_bits_of_values_with_classes_too(exchange, weigh):
    """A class of exact gradients sends its dense part beside an empty trace."""
    by = mixed(aggregate={"kind": "mean", "weigh": weigh})
    cohorts = ((0, 1, 2), (3, 1), (0,), (2, 3, 0))
    values, other = (rounds(replace(by, exchange=kind), 4, cohorts) for kind in ("weights", exchange))
    assert all(equal(one[0].params, two[0].params) for one, two in zip(values, other, strict=True))


def test_gradients_of_classes_without_local_steps():
    classes_ = tuple(replace(one, lr=1.0) for one in THREE)
    by = mixed(local_optimizer={"kind": "none"}, classes=classes_)
    values, scalars = (rounds(replace(by, exchange=kind), 2, ((0, 1, 2),)) for kind in ("weights", "scalars"))
    assert all(close(one[0].params, two[0].params, 1e-6) for one, two in zip(values, scalars, strict=True))


def test_absent_clients_are_never_asked_and_the_others_keep_their_rows(settings):  # noqa: F811
    few_left = [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.5, "absent": True}]
    made, records, _ = ran(settings(method={"name": "fedavg", "classes": few_left}, train={"rounds": 3}))
    whole = api.prepared(parse(settings(method="fedavg")))
    assert made.parts == whole.parts
    assert {i for record in records[1:] for i in record["cohort"]} == {0, 2}
    assert made.plan.cohort == 2


# Weights by variance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "count", "expected"),
    [("gaussian", 4, 21 / 4), ("rademacher", 4, 19 / 4), ("sphere", 5, 19 / 5), ("orthogonal", 5, 15 / 5)],
)
def test_the_predicted_variance_is_the_measured_one(distribution, count, expected):
    """E|g_hat - g|^2 / |g|^2 over many draws, for the toy's two blocks of 12 and 8 values together."""
    params, batch = problem(dtype=torch.float32)
    own, rest = tree.select(params, ("a", "b")), tree.without(params, ("a", "b"))
    leaves = {name: value.clone().requires_grad_() for name, value in own.items()}
    truth = dict(zip(own, torch.autograd.grad(Toy(rest)(leaves, batch), list(leaves.values())), strict=True))
    estimator = build(Method("m", {"kind": "forward", "directions": count, "distribution": distribution})).estimator
    errors = []
    for seed in range(500):
        estimate = estimator(Toy(rest), own, batch, seed)
        errors.append(tree.norm(tree.subtract(noise.expand(estimate.terms, own), truth)) ** 2 / tree.norm(truth) ** 2)
    predicted = noise.relative_variance(estimate.terms, params)
    assert predicted["a"] == predicted["b"] == pytest.approx(expected)
    assert predicted["head.weight"] == predicted["head.bias"] == 0.0
    assert statistics.fmean(errors) == pytest.approx(expected, rel=0.12)


def test_a_clients_answer_says_the_variance_of_each_of_its_names():
    built = build(mixed(aggregate={"kind": "mean", "weigh": "variance"}))
    told = server.begin(server.init(start(), built, 4), UNITS, [0, 1, 2], built, seed=1)
    said = {
        one.client: dict(zip(one.names, client.run(one, built, local(one.client)).noise, strict=True)) for one in told
    }
    assert set(said[0].values()) == {0.0}
    assert said[1] == {"a": 13 / 2, "b": 0.0, "head.weight": 0.0, "head.bias": 0.0}  # b lies above the cut
    size = {"a": 12, "b": 8}
    own = next(name for name in said[2] if name in size)
    assert said[2] == {own: (size[own] + 1) / 2, "head.weight": 0.0, "head.bias": 0.0}
    plain = build(mixed())
    told = server.begin(server.init(start(), plain, 4), UNITS, [2], plain, seed=1)
    assert client.run(told[0], plain, local(2)).noise == ()


def test_the_mean_by_variance_by_hand():
    """examples / (1 + v) by name: 10 / (1 + 4) and 30 / (1 + 0) for a; b has one owner."""
    held = [{"a": torch.tensor([1.0]), "b": torch.tensor([3.0])}, {"a": torch.tensor([8.0])}]
    noisy = [{"a": 4.0, "b": 9.0}, {"a": 0.0}]
    make = METHODS["fedavg"].aggregate
    by = build(
        named("fedavg", aggregate={**make, "weigh": "variance"}, assignment={"kind": "cyclic"}, estimator=FORWARD)
    )
    assert by.aggregate(held, [10, 30], noise=noisy) == {
        "a": torch.tensor([(2 * 1.0 + 30 * 8.0) / 32]),
        "b": torch.tensor([3.0]),
    }
    plain = build(named("fedavg")).aggregate
    assert plain(held, [10, 30], noise=noisy)["a"] == torch.tensor([(10 * 1.0 + 30 * 8.0) / 40])


@pytest.mark.parametrize("v", [0.0, 2.5])
def test_equal_variances_leave_the_weights_by_examples(v):
    held = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([5.0, -1.0])}]
    by = aggregates("variance")(held, [3, 4], noise=[{"a": v}, {"a": v}])
    assert torch.allclose(by["a"], aggregates("examples")(held, [3, 4])["a"], atol=1e-6)


def aggregates(weigh):
    from spryfl.aggregate import mean

    return mean(weigh)


def test_it_is_unbiased_and_of_least_variance_for_independent_estimates():
    """Batch gradients g + xi, var xi = s^2 / n >> |g|^2, seen through K directions: (1 + v) s^2 / n each.

    The error of a weighted mean is sum_i p_i^2 (1 + v_i) s^2 / n_i over (sum_i p_i)^2: least at p_i = n_i / (1 + v_i),
    where it is s^2 / sum_i n_i / (1 + v_i). Weights by examples and equal ones are worse by what the same sum says.
    """
    d, s2 = 6, 25.0
    examples, directions = [8, 16, 4], [0, 3, 1]  # 0 directions: the exact gradient of its batch
    variances = [0.0 if k == 0 else (d + 1) / k for k in directions]
    draw = torch.Generator().manual_seed(0)
    g = torch.full((d,), 0.1)
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, float] = {}
    repeats = 6000
    for _ in range(repeats):
        answers = [_answer(g, s2 / n, k, draw) for n, k in zip(examples, directions, strict=True)]
        said = [{"w": v} for v in variances]
        for weigh in ("examples", "variance"):
            made = aggregates(weigh)([{"w": one} for one in answers], examples, noise=said)["w"]
            sums[weigh] = sums.get(weigh, 0) + made / repeats
            squares[weigh] = squares.get(weigh, 0.0) + float((made - g).square().sum()) / repeats
    each = [(1 + v) * s2 / n * d for v, n in zip(variances, examples, strict=True)]
    least = 1 / sum(1 / one for one in each)
    by_examples = sum(n * n * one for n, one in zip(examples, each, strict=True)) / sum(examples) ** 2
    assert squares["variance"] == pytest.approx(least, rel=0.08)
    assert squares["examples"] == pytest.approx(by_examples, rel=0.08)
    assert least < 0.7 * by_examples
    for weigh in sums:
        spread = math.sqrt(squares[weigh] / d / repeats)
        assert float((sums[weigh] - g).abs().max()) < 4.5 * spread


def _answer(g, variance, directions, draw):
    batch = g + math.sqrt(variance) * torch.randn(g.shape, generator=draw)
    if not directions:
        return batch
    v = torch.randn((directions, len(g)), generator=draw)
    return (v @ batch) @ v / directions


def test_variances_that_do_not_fit_are_refused():
    built = build(mixed(aggregate={"kind": "mean", "weigh": "variance"}))
    state = server.init(start(), built, 4)
    told = server.begin(state, UNITS, [2], built, seed=1)
    update = client.run(told[0], built, local(2))
    for bad in (
        update.noise[:-1],
        (*update.noise[:-1], -0.5),
        (*update.noise[:-1], math.nan),
        (1e400,) * len(update.noise),
    ):
        _, refused = server.finish(state, told, [update._replace(noise=bad)], built, HEAD)
        assert "variances" in refused.failed[2]
    assert server.finish(state, told, [update], built, HEAD)[1].failed == {}


def test_they_travel():
    update = Update(1, 2, {"a": torch.ones(2)}, 3, 0.5, Passes(1), 0, 0.0, noise=(0.0, 2.25))
    assert wire.decode(wire.encode(update)).noise == (0.0, 2.25)
    assert len(wire.encode(update._replace(noise=()))) < len(wire.encode(update))


# A run ---------------------------------------------------------------------------------------------------------------

TINY = [
    {"name": "strong", "share": 0.25, "estimator": "backprop"},
    {"name": "middle", "share": 0.25, "estimator": {"kind": "forward", "directions": 2, "exact_top": 1}},
    {"name": "weak", "share": 0.5, "estimator": "forward", "assignment": "few", "head": "exact", "lr": 0.3},
]


def unequal(settings, **method):  # noqa: F811
    given_ = {"name": "fedavg", "classes": TINY, "aggregate": {"weigh": "variance"}, **method}
    return settings(method=given_, train={"rounds": 4, "cohort": 3, "steps": 2, "eval_every": 2})


def test_a_run_records_each_class(settings):  # noqa: F811
    made, records, _ = ran(unequal(settings))
    of = made.plan.method.member
    for record in records[1:]:
        asked = Counter(of(i) for i in record["cohort"])
        assert {name: one["asked"] for name, one in record["classes"].items()} == {
            name: asked[name] for name in ("strong", "middle", "weak")
        }
        for name, one in record["classes"].items():
            assert one["answered"] == asked[name]
            assert (one["loss"] is None) == (not asked[name])
            assert bool(one["passes"]) == bool(record["class_peak_bytes"][name]) == bool(asked[name])
        assert record["peak_bytes"] == max(record["class_peak_bytes"].values())
    total = sum(one["passes"] for record in records[1:] for one in record["classes"].values())
    assert total == pytest.approx(sum(records[-1][f"{kind}_passes"] for kind in ("value", "tangent", "backward")))


@pytest.mark.parametrize("exchange", ["weights", "scalars"])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(exchange, stop, settings, tmp_path):  # noqa: F811
    made = api.prepared(parse(unequal(settings, exchange=exchange)))
    whole = list(job.run(made, *job.begin(made, tmp_path / "whole")))
    begun = job.begin(made, tmp_path / "cut")
    for _ in zip(range(stop + 1), job.run(made, *begun), strict=False):
        pass
    again = api.prepared(Experiment.load(tmp_path / "cut" / "config.toml"))
    rest = list(job.run(again, *job.resume(again, tmp_path / "cut")))
    assert equal(rest[-1][1].params, whole[-1][1].params)
    one, other = (journal.records(journal.open_folder(tmp_path / name)) for name in ("whole", "cut"))
    assert untimed(one) == untimed(other)


@pytest.mark.parametrize("exchange", ["weights", "scalars"])
@pytest.mark.parametrize("weigh", ["examples", "variance"])
def test_predicted_costs_are_counted_costs(exchange, weigh, settings):  # noqa: F811
    method = {"exchange": exchange, "aggregate": {"weigh": weigh}, "local_optimizer": SGD}
    made = api.prepared(parse(unequal(settings, **method)))
    _, state, progress = job.begin(made, None)
    inner, counted = job.exchange(made, state), []

    def exchanged(told):
        answers = inner(told)
        down, up = (sum(map(costs.header, side)) for side in (told, answers.updates))
        passes = sum((one.passes for one in answers.updates), start=Passes())
        counted.append((answers.bytes_down - down, answers.bytes_up - up, passes))
        return answers

    list(train.train(made.plan, state, progress, exchanged, job.evaluate(made)))
    given_ = models.shapes_of(made.model.module, made.model.units, 8, 16)
    work = costs.work(made.experiment.method, given_)
    dealt_ = [server.deal(made.plan.units, train.cohort(made.plan, r), made.plan.method, r) for r in range(1, 5)]
    parts = costs.traffic.run(made.plan.method, made.plan.units, work, dealt_, made.steps)
    assert [(part.down, part.up) for part in parts] == [(down, up) for down, up, _ in counted]
    for one, (*_, passes) in zip(dealt_, counted, strict=True):
        steps = [costs.passes(given_, work(mine, i)) for i, mine in one.items()]
        total = sum(steps, start=Passes())
        assert [made.steps * count for count in total] == pytest.approx(list(passes), abs=1e-4)


def test_explained_and_shown(settings):  # noqa: F811
    method = parse(unequal(settings)).method
    lines = {what: chosen for what, chosen, _ in explain.choices(method)}
    assert "backprop" in lines["class strong"]
    assert "few(units=1)" in lines["class weak"]
    made = explain.costs(method, shapes(layers=4, width=64), 20, 5, 3)
    assert made.passes.backward
    assert made.passes.tangent


# What is refused -----------------------------------------------------------------------------------------------------


def classed(*sections, clients=8, **method):
    return {"partition": {"clients": clients}, "method": {"name": "fedavg", "classes": list(sections), **method}}


A = {"name": "a", "share": 0.3}


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        (classed({**A, "share": 0.8}, {"name": "b", "share": 0.3}), ["1.1", "at most 1"]),
        (classed({**A, "share": 1.5}), ["share = 1.5", "at most 1"]),
        (classed({**A, "share": -0.5}), ["share = -0.5", "above 0"]),
        (classed({**A, "share": 1.0}), ["no effect"]),
        (classed({"name": "a"}), ["neither share nor clients"]),
        (classed({**A, "clients": [1]}), ["both share and clients"]),
        (classed(A, {"name": "b", "clients": [1]}), ["for all"]),
        (classed(A, A), ["'a' stands there twice"]),
        (classed({"share": 0.3}), ["no name"]),
        (classed({**A, "name": "rest"}), ["no name"]),
        (classed({**A, "shares": 0.3}), ["unknown key", "shares", "did you mean share"]),
        (classed({**A, "estimator": {"kind": "forward", "direction": 2}}), ["unknown key", "did you mean directions"]),
        (classed({**A, "estimator": "forwards"}), ["forwards", "did you mean forward"]),
        (classed({**A, "assignment": {"kind": "few", "units": 0}}), ["units = 0"]),
        (classed({**A, "head": "split"}), ["head", "split", "shared"]),
        (classed({**A, "head": "shared"}, head="split"), ["method.head"]),
        (classed({**A, "head": "exact"}), ["exact", "forward"]),
        (classed({**A, "lr": 0}), ["lr = 0"]),
        (classed({**A, "lr": 2.0}, local_optimizer="none"), ["no effect", "local_optimizer"]),
        (classed({"name": "a", "clients": [8]}), ["client 8", "0 to 7"]),
        (classed({"name": "a", "clients": [-1]}), ["client -1"]),
        (classed({"name": "a", "clients": [2]}, {"name": "b", "clients": [1, 2]}), ["client 2", "twice"]),
        (classed({**A, "share": 0.01}), ["no client among 8"]),
        (classed({**A, "absent": True}, {"name": "b", "share": 0.7, "absent": True}), ["all clients are absent"]),
        (classed({**A, "absent": True}, sharing="alone"), ["absent", "alone"]),
        (classed(A, sharing="pooled"), ["pooled"]),
        (classed({**A, "estimator": {"kind": "forward", "candidates": 3}}), ["guide"]),
        (classed({**A, "assignment": "nobody"}, head="split"), ["leaves it nothing"]),
        (classed({**A, "assignment": "cyclic"}, aggregate="krum"), ["krum"]),
        (classed({**A, "estimator": {"checkpoint": True}}, exchange="scalars"), ["scalars", "seeded"]),
        (classed({**A, "estimator": {"checkpoint": True}}, aggregate={"weigh": "variance"}), ["no effect", "exact"]),
        (classed(aggregate={"weigh": "variance"}, estimator="forward"), ["no effect", "one estimator"]),
        (classed(aggregate={"weigh": "bytes"}), ["weigh", "variance"]),
        (classed(A, name="fedkseed"), ["classes"]),
        ({"method": {"name": "fedavg", "classes": {"a": 1}}}, ["[[method.classes]]"]),
        ({"method": {"name": "fedavg", "classes": [3]}}, ["[[method.classes]]"]),
    ],
)
def test_what_cannot_be_is_said_at_configuration_time(given_, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse(given_)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert type(error.value) is ValueError


def test_a_cohort_larger_than_those_that_take_part():
    given_ = classed(A, {"name": "b", "share": 0.7, "absent": True}, clients=10)
    assert parse(given_).train.cohort == 3
    with pytest.raises(ValueError, match="of 10 clients 3 are not absent"):
        parse({**given_, "train": {"cohort": 4}})


def test_a_class_in_plain_python_is_a_client_class():
    with pytest.raises(ValueError, match=r"spryfl\.ClientClass"):
        build(Method("m", classes=({"name": "a", "share": 0.5},)))


def test_toml_there_and_back(settings, tmp_path):  # noqa: F811
    made = parse(unequal(settings))
    (tmp_path / "a.toml").write_text(made.toml())
    again = Experiment.load(tmp_path / "a.toml")
    assert again == made
    weak = again.method.classes[2]
    assert (weak.estimator["directions"], weak.assignment, weak.head) == (1, {"kind": "few", "units": 1}, "exact")
    assert "classes" not in json.dumps(parse(settings(method="fedavg")).as_dict())
    same = parse(settings(method=replace(made.method)))
    assert same.method.classes == made.method.classes


def test_a_class_keeps_the_methods_options_of_the_same_kind():
    made = parse(classed({**A, "estimator": {"directions": 5}}, name="fedfgd", estimator={"distribution": "sphere"}))
    assert made.method.classes[0].estimator["distribution"] == "sphere"
    assert made.method.classes[0].estimator["directions"] == 5
    assert classes.present(made.method.classes, 4) == (0, 1, 2, 3)


# Memory --------------------------------------------------------------------------------------------------------------


MEMORY = [
    {"name": "large", "share": 0.5, "memory": "4GB"},
    {"name": "small", "share": 0.25, "memory": "3GB", "lr": 0.5},
    {"name": "plain", "share": 0.25, "estimator": "forward"},
]


@pytest.fixture
def planner(monkeypatch):
    """A planner by hand: backprop from 4 GB on, else forward mode in pieces; what it was asked is kept."""
    asked = []

    def fitting(budget, of, method, mine=None, *, rows, tokens, clients=1, stream=True):
        asked.append((budget, mine and [unit.name for unit in mine], rows, tokens, stream))
        if budget < 1e9:
            raise ValueError("nothing fits; the smallest need is 1.0 GB.")
        large = budget >= 4e9
        kind = {"kind": "backprop", "checkpoint": True} if large else {"kind": "forward", "directions": 3}
        made = replace(method, estimator=kind, head="shared" if large else "exact")
        return SimpleNamespace(setting=SimpleNamespace(method=made, micro_batch=0 if large else 2, stream=False))

    monkeypatch.setattr(plan, "fitting", fitting)
    return asked


def test_a_budget_becomes_what_fits_it_and_stands_in_the_configuration(settings, planner, tmp_path):  # noqa: F811
    made = api.prepared(parse(settings(method={"name": "fedavg", "classes": MEMORY}, train={"rounds": 2})))
    large, small, plain = made.experiment.method.classes
    assert (large.estimator, large.assignment, large.head) == ({"kind": "backprop", "checkpoint": True}, {}, "")
    assert (small.estimator["directions"], small.assignment, small.head) == (3, sizing.ONE, "exact")
    assert (small.micro_batch, small.lr, small.memory, small.chosen_for) == (2, 0.5, "", "3GB")
    assert plain.chosen_for == ""
    assert [(budget, mine is None) for budget, mine, *_ in planner] == [(4e9, True), (3e9, True), (3e9, False)]
    assert planner[0][2] == 8
    longest = max(len(one["input_ids"]) for row in made.rows.inputs for one in row)
    assert planner[0][3] == longest
    assert not planner[0][4]  # not a packed model
    whole = list(job.run(made, *job.begin(made, tmp_path / "one")))
    asked = len(planner)
    again = api.prepared(Experiment.load(tmp_path / "one" / "config.toml"))
    assert len(planner) == asked  # the planner is not needed again
    assert again.experiment.method.classes == made.experiment.method.classes
    rest = list(job.run(again, *job.begin(again, None)))
    assert equal(rest[-1][1].params, whole[-1][1].params)


def test_a_budget_that_nothing_fits_names_the_class(settings, planner):  # noqa: F811
    few_bytes = [{"name": "tiny", "share": 0.5, "memory": "10MB"}]
    with pytest.raises(ValueError, match=r'"tiny" with memory = "10MB": nothing fits; the smallest need is 1\.0 GB'):
        api.prepared(parse(settings(method={"name": "fedavg", "classes": few_bytes})))


def test_a_users_own_assignment_is_kept(settings, planner):  # noqa: F811
    own = [{"name": "small", "share": 0.5, "memory": "3GB", "assignment": {"kind": "few", "units": 2}}]
    made = api.prepared(parse(settings(method={"name": "fedavg", "classes": own})))
    assert made.experiment.method.classes[0].assignment == {"kind": "few", "units": 2}


def test_a_comparison_goes_on_though_the_budget_was_turned_into_choices(settings, planner, tmp_path):  # noqa: F811
    changes = {"mixed": {"method": {"name": "fedavg", "classes": MEMORY}}}
    given_ = {**settings(), "compare": {"methods": ["mixed"], "changes": changes}}
    list(compare.turns(compare.parse(given_), tmp_path / "c"))
    asked = len(planner)
    assert asked
    list(compare.turns(compare.parse(given_), tmp_path / "c"))
    changes["mixed"]["method"]["classes"][0] = {**MEMORY[0], "memory": "5GB"}
    with pytest.raises(ValueError, match="other settings"):
        list(compare.turns(compare.parse(given_), tmp_path / "c"))


def test_a_class_holds_the_model_in_its_own_pieces(settings):  # noqa: F811
    """Pieces change the memory, not the result beyond rounding."""
    weak = [{"name": "weak", "share": 0.5, "estimator": {"kind": "forward", "directions": 2}, "micro_batch": 2}]
    other = [{key: value for key, value in weak[0].items() if key != "micro_batch"}]
    one, two = (ran(settings(method={"name": "fedavg", "classes": c}, train={"rounds": 2})) for c in (weak, other))
    assert close(one[2], two[2], 1e-4)
    peaks = [[record["class_peak_bytes"]["weak"] for record in records[1:]] for _, records, _ in (one, two)]
    assert any(peaks[1])
    assert all(a < b for a, b in zip(*peaks, strict=True) if b)


def test_a_class_streams_the_packed_model(settings, tiny, tmp_path):  # noqa: F811
    """The same run whether its clients stream or not, bit for bit: values are read from other places, not others."""
    packing.pack(str(tiny), tmp_path / "packed", "float32")
    model = {"name": str(tmp_path / "packed")}
    weak = {"name": "weak", "share": 0.5, "estimator": "forward", "head": "exact", "assignment": "few"}
    results = []
    for stream in (True, False):
        method = {"name": "fedavg", "classes": [{**weak, "stream": stream}]}
        made, records, final = ran(settings(model=model, method=method, train={"rounds": 2}))
        assert (made.streamed is not None) == stream
        results.append((untimed(records), final))
    assert results[0][0] == results[1][0]
    assert equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({**A, "memory": "2GB", "estimator": "forward"}, ["memory and estimator", "Remove"]),
        ({**A, "memory": "2GB", "micro_batch": 2}, ["memory and micro_batch"]),
        ({**A, "stream": True}, ["packed"]),
        ({**A, "micro_batch": 9}, ['micro_batch of class "a" = 9', "batch_size = 8"]),
        ({**A, "micro_batch": -1}, ["micro_batch = -1"]),
    ],
)
def test_what_a_class_cannot_hold(section, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse(classed(section))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_planner_itself_settles_a_class_on_a_packed_model(settings, tiny, tmp_path):  # noqa: F811
    """An adapter that starts from the weights' singular vectors is planned without any weights."""
    packing.pack(str(tiny), tmp_path / "packed", "float32")
    adapter = {"kind": "lora_xs", "r": 2, "targets": ["query"]}
    changes = {"model": {"name": str(tmp_path / "packed")}, "adapter": adapter}
    roomy, tight = ([{"name": "a", "share": 0.5, "memory": memory}] for memory in ("8GB", "20MB"))
    made = api.prepared(parse(settings(method={"name": "fedavg", "classes": roomy}, **changes)))
    assert made.experiment.method.classes[0].estimator == {"kind": "backprop", "checkpoint": False}
    with pytest.raises(ValueError, match=r'"a" with memory = "20MB": nothing fits.*smallest need.*lower it'):
        api.prepared(parse(settings(method={"name": "fedavg", "classes": tight}, **changes)))
