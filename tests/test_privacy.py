"""Clip, noise and account of private runs, against sums by hand, dp-accounting, and the exact curve of a Gaussian."""

from __future__ import annotations

import math
import statistics

import dp_accounting as dp
import pytest
import torch

from spryfl import api, journal, privacy, report, wire
from spryfl.config import Experiment, parse
from spryfl.privacy import Privacy

CLEAR = Privacy(clip=1.0, noise=0.0, delta=1e-5)


def answers(count: int, seed: int = 0, size: float = 1.0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 2), "b": (5,)}
    return [{n: size * torch.randn(s, generator=draw) for n, s in shapes.items()} for _ in range(count)]


def length(tree) -> float:
    return math.sqrt(sum(float(v.double().square().sum()) for v in tree.values()))


def like():
    return {name: torch.zeros_like(value) for name, value in answers(1)[0].items()}


# --- the mechanism


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 100.0])
def test_a_clipped_answer_keeps_its_direction_and_at_most_the_norm(size):
    [given] = answers(1, size=size)
    made = privacy.clipped(given, 0.5)
    assert length(made) == pytest.approx(min(length(given), 0.5), rel=1e-6)
    factor = min(1.0, 0.5 / length(given))
    for name in given:
        torch.testing.assert_close(made[name], given[name] * factor)


def test_without_noise_it_is_the_sum_of_clipped_answers_over_those_asked():
    given = answers(3, size=5.0)
    given[2] = {"b": given[2]["b"]}  # this one was asked for less
    made = privacy.noisy_mean(given, {"a": 3, "b": 4}, like(), CLEAR, 0)  # a fourth did not answer
    by_hand = {"a": torch.zeros(3, 2, dtype=torch.float64), "b": torch.zeros(5, dtype=torch.float64)}
    for one in given:
        for name, value in one.items():
            by_hand[name] += value.double() / max(1.0, length(one))
    torch.testing.assert_close(made["a"], (by_hand["a"] / 3).float())
    torch.testing.assert_close(made["b"], (by_hand["b"] / 4).float())


def test_one_clients_answer_moves_the_sum_by_no_more_than_twice_the_clip():
    given = answers(5)
    asked = {"a": 1, "b": 1}
    before = privacy.noisy_mean(given, asked, like(), CLEAR, 0)
    for other in ({n: v * 1e6 for n, v in answers(1, seed=9)[0].items()}, {n: -v * 1e6 for n, v in given[2].items()}):
        after = privacy.noisy_mean([*given[:2], other, *given[3:]], asked, like(), CLEAR, 0)
        moved = length({name: after[name] - before[name] for name in after})
        assert moved <= 2 + 1e-5
    assert moved == pytest.approx(2.0, rel=1e-5)  # the opposite answer reaches the bound


def test_the_noise_has_the_deviation_that_was_promised():
    wide = {"w": torch.zeros(40_000)}
    for z, clip, count in ((1.0, 1.0, 1), (0.5, 4.0, 10), (3.0, 0.1, 2)):
        made = privacy.noisy_mean([], {"w": count}, wide, Privacy(clip, z, 1e-5), 7)["w"]
        assert float(made.std()) == pytest.approx(z * clip / count, rel=0.02)
        assert abs(float(made.mean())) < 4 * z * clip / count / 200


def test_noise_follows_from_key_and_round_and_comes_though_nobody_answers():
    def drawn(key, round_):
        return privacy.private_mean(Privacy(1.0, 1.0, 1e-5), key, round_)([], {"a": 2}, like())["a"]

    assert torch.equal(drawn(5, 1), drawn(5, 1))
    assert not torch.equal(drawn(5, 1), drawn(5, 2))
    assert not torch.equal(drawn(5, 1), drawn(6, 1))
    assert drawn(5, 1).abs().min() > 0


def test_a_key_is_drawn_unless_it_is_given():
    assert privacy.drawn_key(None) == 0
    assert privacy.drawn_key(CLEAR._replace(key=11)) == 11
    first, second = privacy.drawn_key(CLEAR), privacy.drawn_key(CLEAR)
    assert first != second
    assert min(first, second) > 0


# --- the account


@pytest.mark.parametrize(("z", "rounds"), [(0.5, 1), (1.0, 500), (4.0, 10)])
def test_epsilon_is_the_accountants(z, rounds):
    """Fixed cohorts without replacement, one client replaced: the sensitivity is twice the clip."""
    book = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    book.compose(dp.SampledWithoutReplacementDpEvent(200, 10, dp.GaussianDpEvent(z / 2)), rounds)
    made = privacy.epsilon(Privacy(3.0, z, 1e-6), rounds, 200, 10)
    assert made == pytest.approx(book.get_epsilon(1e-6), rel=1e-12)


def exactly(z: float, rounds: int, delta: float) -> float:
    """The epsilon of Gaussian noise z C on a sum of sensitivity 2 C, so many times over, to the last digit.

    delta(e) = Phi(m / 2 - e / m) - exp(e) Phi(-m / 2 - e / m), m = sqrt(rounds) 2 / z    (Dong, Roth, Su 2022)
    """
    mean, normal = math.sqrt(rounds) * 2 / z, statistics.NormalDist()
    low, high = 0.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        tail = normal.cdf(-mean / 2 - middle / mean)
        spent = normal.cdf(mean / 2 - middle / mean) - (math.exp(middle) * tail if tail else 0.0)
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


@pytest.mark.parametrize("z", [2.0, 8.0, 30.0])
def test_without_sampling_it_is_above_the_exact_one_and_below_the_textbook_bound(z):
    """Renyi of order a: a (2C)^2 / (2 (zC)^2) a round; epsilon <= that + log(1 / delta) / (a - 1) for every a."""
    rounds, delta = 20, 1e-5
    orders = [1 + i / 50 for i in range(1, 20_000)]
    bound = min(rounds * 2 * a / z**2 + math.log(1 / delta) / (a - 1) for a in orders)
    assert exactly(z, rounds, delta) < privacy.epsilon(Privacy(1.0, z, delta), rounds, 10, 10) < bound


def test_more_noise_fewer_rounds_and_smaller_cohorts_spend_less():
    base = privacy.epsilon(Privacy(1.0, 2.0, 1e-5), 50, 100, 10)
    assert privacy.epsilon(Privacy(1.0, 3.0, 1e-5), 50, 100, 10) < base
    assert privacy.epsilon(Privacy(1.0, 2.0, 1e-5), 20, 100, 10) < base
    assert privacy.epsilon(Privacy(1.0, 2.0, 1e-5), 50, 100, 5) < base
    assert base < privacy.epsilon(Privacy(1.0, 2.0, 1e-5), 50, 100, 100)
    assert privacy.epsilon(Privacy(1.0, 2.0, 1e-5), 0, 100, 10) == 0


# --- whole runs


def given(tiny, reviews, **changes):
    base = {
        "model": {"name": str(tiny)},
        "data": {"name": str(reviews), "train_rows": 60, "test_rows": 20},
        "partition": {"clients": 6, "held_out": 0.2, "split": "iid"},
        "train": {"rounds": 3, "cohort": 3, "steps": 2, "eval_every": 2},
        "threads": 1,
        "privacy": {"clip": 0.05, "noise": 0.5, "key": 7},
    }
    return {**base, **{k: {**base.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}}


@pytest.mark.parametrize("method", ["spry", "fedsgd", "decomfl", "baffle"])
def test_a_private_run_tells_its_epsilon_and_nothing_of_single_answers(method, tiny, reviews, tmp_path):
    history = api.finetune(parse(given(tiny, reviews, method=method)), folder=tmp_path / "run")
    spent = [record["epsilon"] for record in history.records[1:]]
    promised = Privacy(0.05, 0.5, 1e-5)
    assert spent == [privacy.epsilon(promised, rounds, 6, 3) for rounds in (1, 2, 3)]
    for record in history.records[1:]:
        assert record["loss"] is None
        assert not {key for key in record if key.startswith(("personal", "scalar", "variance"))}
    state, _ = journal.load(journal.open_folder(tmp_path / "run"))
    assert state.key == 7
    head, [line] = report.rows([report.read(tmp_path / "run")])
    assert line[head.index("epsilon")] == f"{spent[-1]:.2f}"


def test_what_moves_the_values_is_the_clipped_noisy_mean(tiny, reviews):
    """FedAvg by a server of rate 1: the step of a round, from the clients' own values, by hand."""
    from spryfl import job, server, train

    clip = 0.01
    made = api.prepared(parse(given(tiny, reviews, method="fedavg", privacy={"clip": clip})))
    state, _ = train.start(made.plan, made.model.params)
    told = server.begin(state, made.plan.units, [4, 0, 2], made.plan.method, made.plan.seed)
    updates = job.exchange(made, state)(told).updates
    after, _ = server.finish(state, told, updates, made.plan.method, frozenset(), made.plan.promised)
    shapes = {name: torch.zeros_like(value) for name, value in state.params.items()}
    from spryfl import noise

    drawn = noise.direction(noise.child_seed(7, "privacy", 1), shapes)
    total = {name: 0.5 * clip * value.double() for name, value in drawn.items()}
    for update in updates:
        step = {name: (state.params[name] - value).double() for name, value in update.params.items()}
        assert length(step) > clip  # it is clipped
        for name, value in step.items():
            total[name] += value * clip / length(step)
    for name, value in total.items():
        torch.testing.assert_close(after.params[name], state.params[name] - (value / 3).float(), rtol=1e-5, atol=1e-7)


def test_scalars_are_added_up_before_they_go_on_to_others(tiny, reviews):
    """What a client that catches up is sent holds one share a round: the noisy sum, and no client's own scalars."""
    from spryfl import job, server, train

    made = api.prepared(parse(given(tiny, reviews, method="decomfl")))
    state, _ = train.start(made.plan, made.model.params)
    carry = job.exchange(made, state)
    told = server.begin(state, made.plan.units, [0, 1, 2], made.plan.method, made.plan.seed)
    updates = carry(told).updates
    state, _ = server.finish(state, told, updates, made.plan.method, frozenset(), made.plan.promised)
    [share] = state.ledger.rounds[0].shares
    assert share.merged
    own = [update.trace.scalars.double() for update in updates]
    clear = sum(one * min(1.0, 0.05 / float(one.norm())) for one in own) / 3
    noisy = share.trace.scalars.double() - clear
    assert 0 < float(noisy.abs().max()) < 6 * 0.5 * 0.05 / 3
    later = wire.encode(server.begin(state, made.plan.units, [0, 1, 2], made.plan.method, made.plan.seed)[0])
    assert all(one.float().numpy().tobytes() not in later for one in own)


def test_a_private_run_that_was_cut_off_ends_in_the_same_bits(tiny, reviews, tmp_path):
    """The key was drawn, and lies in the state."""
    from spryfl import job

    one = given(tiny, reviews, method="spry", privacy={"key": 0})
    made = api.prepared(parse(one))
    begun, state, progress = job.begin(made, tmp_path / "run")
    assert state.key > 0
    steps = job.run(made, begun, state, progress)
    next(steps), next(steps)
    steps.close()
    whole = [*job.run(made, None, state, progress)][-1][1]
    again = [*job.run(made, *job.resume(made, tmp_path / "run"))][-1][1]
    assert again.round == whole.round == 3
    assert all(torch.equal(again.params[name], value) for name, value in whole.params.items())


@pytest.mark.parametrize("method", ["spry", "decomfl"])
def test_on_flower_it_is_the_same_promise_and_the_same_bits(method, tiny, reviews, tmp_path, monkeypatch):
    from flower_cases import assert_same, in_process, lines, over_flower

    from spryfl.engines import flower_grid

    monkeypatch.setattr(flower_grid, "_POLL", {True: 0.001, False: 0.001})
    one = given(tiny, reviews, method=method, flower={"wait": 5.0})
    over_flower(one, tmp_path / "flower")
    assert_same(tmp_path / "flower", in_process(one, tmp_path / "here"))
    assert lines(tmp_path / "flower")[-1]["epsilon"] == privacy.epsilon(Privacy(0.05, 0.5, 1e-5), 3, 6, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"name": "fedavg", "aggregate": "median"}}, "aggregate"),
        ({"method": {"name": "spry", "aggregate": {"weigh": "variance"}}}, "weigh"),
        ({"method": {"name": "alone"}}, "sharing"),
        ({"method": {"name": "fedkseed"}}, "pool"),
        ({"method": {"name": "spry_per_iteration"}}, "scalars"),
        ({"method": {"name": "decomfl"}, "train": {"epochs": 1}}, "scalars"),
        ({"method": {"name": "fedavg", "gate": 1.0}}, "gate"),
        ({"train": {"rest": 2}}, "rest"),
        ({"train": {"tries": 2, "min_answers": 0.5}}, "tries"),
        ({"privacy": {"clip": 0.0}}, "no effect"),
    ],
)
def test_what_would_break_the_promise_is_refused(changes, said):
    whole = {"privacy": {"clip": 1.0, "noise": 1.0}, **changes}
    if "privacy" in changes:
        whole["privacy"] = {"noise": 2.0, **changes["privacy"]}
    with pytest.raises(ValueError, match=said):
        Experiment(**whole)


def test_without_an_accountant_there_is_no_promise(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"spryfl\[dp\]"):
        privacy.drawn_key(CLEAR)
