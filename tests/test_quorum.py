"""Clients that do not answer: rounds repeated with another cohort, clients left out for a while, memory lost."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_exchange import HEAD, UNITS, equal, local, start

from spryfl import api, client, ledger, server, train, wire
from spryfl.config import parse
from spryfl.engines.simulate import simulation
from spryfl.journal import Progress
from spryfl.methods import METHODS, build
from spryfl.train import Quorum
from spryfl.types import CatchUp, Instruction, Pool


def plan(name="fedavg", quorum=Quorum(), **changes):  # noqa: B008
    return train.Plan(
        build(METHODS[name]), UNITS, 3, **{"rounds": 8, "clients": 8, "cohort": 4, **changes},
        eval_every=1, patience=0, quorum=quorum,
    )  # fmt: skip


def ran(made, lost, name="fedavg", watch=lambda told: None):
    """(records, last state, last progress) of a run in which some clients never answer."""
    state, progress = train.start(made, start())
    whole = simulation(build(METHODS[name]), local, lost, HEAD)

    def exchange(told):
        watch(told)
        return whole(told)

    out = []
    while train.unfinished(made, state, progress):
        if not out:
            record, progress = train._first(made, state, progress, lambda params: {"accuracy": 0.0})
        else:
            record, state, progress = train.one_round(made, state, progress, exchange, lambda params: {"accuracy": 0.0})
        out.append(record)
    return out, state, progress


def test_a_round_with_too_few_answers_is_repeated_with_another_cohort_and_says_so():
    made = plan(quorum=Quorum(share=1.0, tries=3), rounds=2)
    first, second = (train.cohort(made, 2, attempt) for attempt in (0, 1))
    gone = set(first) - set(second)
    out, state, progress = ran(made, lambda round_, client: round_ == 2 and client in gone)
    assert out[2]["cohort"] == second
    failed = {str(client): "did not answer (simulated)" for client in first if client in gone}
    assert out[2]["repeated"] == [{"cohort": first, "failed": failed}]
    # The state is that of a run whose second cohort was the first.
    _, before, _ = ran(made._replace(rounds=1), lambda r, c: False)
    told = server.begin(before, UNITS, second, made.method, 3, made.method.schedule(0.5), True)
    answers = simulation(made.method, local, lambda r, c: False, HEAD)(told)
    expected, _ = server.finish(before, told, answers.updates, made.method, HEAD)
    assert equal(dict(state.params), dict(expected.params))
    # What the first cohort cost is counted.
    _, _, alone = ran(made, lambda r, c: False)
    assert progress.bytes_down > alone.bytes_down
    assert progress.backward_passes > alone.backward_passes


def test_without_the_setting_a_round_goes_on_with_whoever_answered():
    out, _, _ = ran(plan(rounds=2), lambda round_, client: True)
    assert [len(record["failed"]) for record in out[1:]] == [4, 4]
    assert not any("repeated" in record for record in out)


def test_the_run_ends_with_a_clear_message_when_no_cohort_answers():
    with pytest.raises(ValueError, match=r"round 1: too few clients answered, 0 of 4; 0 of 4; train.min_answers = 0.5"):
        ran(plan(quorum=Quorum(0.5, 2)), lambda round_, client: True)


def test_a_client_that_failed_twice_running_rests():
    made = plan(quorum=Quorum(rest=3), rounds=30, clients=6)
    asked = []

    def watch(told):
        asked.append([one.client for one in told])

    _, _, progress = ran(made, lambda round_, client: client == 2, watch=watch)
    times = [i for i, cohort in enumerate(asked, 1) if 2 in cohort]
    plain = [i for i in range(1, 31) if 2 in train.cohort(made, i)]
    assert times[:2] == plain[:2]  # the first failure alone leaves nobody out
    assert len(plain) > len(times) > 4
    assert all(later - earlier > 3 for earlier, later in itertools.pairwise(times[1:]))
    assert progress.failing[2][0] == len(times)


def test_one_answer_ends_the_rest():
    made = plan(quorum=Quorum(rest=2), rounds=30, clients=6)
    _, _, free = ran(made, lambda round_, client: client == 2 and round_ < 9)
    assert free.failing == {}
    _, _, held = ran(made, lambda round_, client: client == 2)
    assert list(held.failing) == [2]


def test_nobody_rests_when_nobody_else_is_there():
    made = plan(quorum=Quorum(rest=100), clients=4, rounds=5)
    out, _, _ = ran(made, lambda round_, client: True)
    assert [len(record["cohort"]) for record in out[1:]] == [4] * 5


def test_what_rests_is_resumed():
    failing = {2: (3, 7), 5: (1, 0)}
    saved, _ = wire.load(wire.dump({"progress": Progress(failing=failing)._asdict()}))
    assert {client: tuple(one) for client, one in Progress(**saved["progress"]).failing.items()} == failing


@pytest.mark.parametrize("name", ["decomfl", "fedspzo"])
def test_a_client_that_lost_its_memory_is_asked_again_in_the_same_round(name, monkeypatch):
    # The toy's 29 values are always fewer bytes than what made them: the server must not think so.
    monkeypatch.setattr(ledger, "recorded", lambda book, moved, params: book._replace(rounds=(*book.rounds, moved)))
    monkeypatch.setattr(server, "min", lambda whole, replayed, key: replayed, raising=False)
    made = plan(name, clients=3, cohort=3, rounds=5)
    state, progress = train.start(made, start())
    memory, asked = {}, []
    head, method = HEAD, made.method

    def exchange(told):
        asked.append(len(told))
        updates, lost = [], []
        for one in told:
            if one.client == 1:
                memory.pop(1, None)
            try:
                values, memory[one.client] = ledger.restored(one, memory.get(one.client), method, head)
            except ledger.LostError:
                lost.append(one.client)
                continue
            updates.append(client.run(one._replace(params=values), method, local(one.client)))
        return train.Answers(updates, {}, 1, 1, lost=frozenset(lost))

    for _ in range(5):
        record, state, progress = train.one_round(made, state, progress, exchange, lambda params: {"accuracy": 0.0})
        assert record["failed"] == {}
    assert 1 in asked  # the second question of a round
    _, whole, _ = ran(made, lambda r, c: False, name)
    assert equal(dict(state.params), dict(whole.params))


def test_a_pools_origin_that_was_lost_is_noticed():
    told = Instruction(3, 1, 5, ("a", "b"), {"b": torch.zeros(2)}, pool=Pool(1, 4, torch.empty(0)),
                       catch_up=CatchUp(0, (), torch.zeros(4, 1), (((0,), "gaussian", 1),)))  # fmt: skip
    method = build(METHODS["fedkseed"])
    with pytest.raises(ledger.LostError, match="round 0"):
        ledger.restored(told, None, method, frozenset())
    values, _ = ledger.restored(told, ledger.Held(0, {"a": torch.ones(3)}), method, frozenset())
    assert list(values) == ["a", "b"]


@pytest.mark.parametrize(("train_", "said"), [
    ({"tries": 2}, "train.tries = 2 has no effect without train.min_answers"),
    ({"min_answers": 1.5}, "less than or equal to 1"),
    ({"rest": -1}, "greater than or equal to 0"),
])  # fmt: skip
def test_settings_that_cannot_be(train_, said):
    with pytest.raises(ValueError, match=said):
        parse({"train": train_})


def test_settings_reach_the_plan(tiny, reviews):
    one = {"model": {"name": str(tiny)}, "data": {"name": str(reviews), "train_rows": 20}, "partition": {"clients": 4}}
    made = api.prepared(parse({**one, "train": {"min_answers": 0.5, "tries": 4, "rest": 2}}))
    assert made.plan.quorum == Quorum(0.5, 4, 2)
