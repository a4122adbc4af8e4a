"""Begin and finish: who gets what, the mean by name, what is refused, and what a silent unit keeps."""

from __future__ import annotations

import math

import pytest
import torch
from toy import pseudo_gradient

from spryfl import server
from spryfl.methods import METHODS, Method, build
from spryfl.types import Instruction, Passes, Unit, Update

UNITS = (
    Unit("a", ("a.A", "a.B"), 3),
    Unit("b", ("b.A", "b.B"), 3),
    Unit("c", ("c.A", "c.B"), 3),
    Unit("head", ("h.weight", "h.bias"), 3, head=True),
)
SGD = {"kind": "sgd", "lr": 1.0}


def values(start=0.0):
    names = [name for unit in UNITS for name in unit.params]
    return {
        name: torch.arange(2.0 if name.endswith(("A", "weight")) else 1.0) + start + i for i, name in enumerate(names)
    }


def method(**changes):
    return build(Method("t", **{"assignment": {"kind": "cyclic", "rotate": False}, "server_optimizer": SGD, **changes}))


def update(told: Instruction, shift=1.0, **changes):
    moved = {name: told.params[name] + shift for name in told.names}
    whole = Update(told.round, told.client, moved, examples=10, loss=0.5, passes=Passes(1), peak_bytes=0, seconds=0.0)
    return whole._replace(**changes)


def begun(built, cohort=(4, 7), **more):
    state = server.init(values(), built, clients=10)
    return state, server.begin(state, UNITS, list(cohort), built, seed=1, **more)


def test_spry_gives_each_client_its_units_the_head_and_all_values():
    _, told = begun(method())
    assert [one.client for one in told] == [4, 7]
    assert told[0].names == ("a.A", "a.B", "c.A", "c.B", "h.weight", "h.bias")
    assert told[1].names == ("b.A", "b.B", "h.weight", "h.bias")
    assert all(set(one.params) == set(values()) for one in told)


def test_a_split_head_is_a_unit_like_any_other():
    _, told = begun(method(head="split"))
    assert told[0].names == ("a.A", "a.B", "c.A", "c.B")
    assert told[1].names == ("b.A", "b.B", "h.weight", "h.bias")


def test_where_only_the_head_moves_only_the_head_travels():
    _, told = begun(method(assignment={"kind": "nobody"}))
    assert all(set(one.params) == set(one.names) == {"h.weight", "h.bias"} for one in told)


def test_a_round_in_which_only_the_head_moves_gets_the_adapters_as_they_are():
    """Client 4 has room for a unit, client 7 for none; what client 4 moved must reach client 7's forward pass."""
    built = method(assignment={"kind": "budget", "values": (9, 0)})
    state, told = begun(built, cohort=(4,))
    state, _ = server.finish(state, told, [update(told[0], 2.0)], built)
    [weak] = server.begin(state, UNITS, [7], built, seed=1)
    assert weak.names == ("h.weight", "h.bias")
    assert torch.equal(weak.params["a.A"], values()["a.A"] + 2.0)


def test_a_cohort_without_a_unit_is_not_asked():
    built = method(assignment={"kind": "budget", "values": (9, 0)}, head="split")
    state, told = begun(built, cohort=(4, 7))
    assert [one.client for one in told] == [4]
    assert begun(built, cohort=(7,))[1] == []
    after, _ = server.finish(state, [], [], built)
    assert after.round == 1


def test_seeds_differ_by_client_round_and_run():
    built = method()
    state, told = begun(built)
    later = server.begin(state._replace(round=1), UNITS, [4, 7], built, seed=1)
    other = server.begin(state, UNITS, [4, 7], built, seed=2)
    assert len({one.seed for one in [*told, *later, *other]}) == 6


def test_the_mean_is_by_name_over_its_owners_weighted_by_examples():
    """Overlapping, unequal and missing owners: the head has two, a one, c none."""
    one = Update(1, 2, {"a": torch.tensor([1.0]), "h": torch.tensor([4.0])}, 10, 0.0, Passes(), 0, 0.0)
    two = Update(1, 1, {"h": torch.tensor([1.0])}, 30, 0.0, Passes(), 0, 0.0)
    old = {"a": torch.tensor([0.5]), "h": torch.tensor([0.0]), "c": torch.tensor([5.0])}
    assert pseudo_gradient(old, [one, two]) == {"a": torch.tensor([-0.5]), "h": torch.tensor([-1.75])}


def test_the_order_of_answers_does_not_matter():
    built = method(assignment={"kind": "everyone"})
    state, told = begun(built, cohort=(4, 7, 1))
    answers = [update(one, 0.1 * (i + 1) / 3) for i, one in enumerate(told)]
    forth, back = (server.finish(state, told, some, built)[0].params for some in (answers, answers[::-1]))
    assert all(torch.equal(forth[name], back[name]) for name in forth)


def test_finish_takes_the_mean_with_plain_sgd():
    built = method()
    state, told = begun(built)
    after, refused = server.finish(state, told, [update(one, 2.0) for one in told], built)
    assert refused.failed == {}
    assert after.round == 1
    assert all(torch.allclose(after.params[name], value + 2.0) for name, value in state.params.items())


def test_a_unit_that_nobody_returned_keeps_value_and_optimizer_state():
    built = method(server_optimizer={"kind": "yogi"})
    state, told = begun(built)
    state, _ = server.finish(state, told, [update(one) for one in told], built)
    told = server.begin(state, UNITS, [4, 7], built, seed=1)
    after, _ = server.finish(state, told, [update(told[0])], built)
    for name in ("b.A", "b.B"):
        assert torch.equal(after.params[name], state.params[name])
        assert all(torch.equal(after.optimizer[slot][name], state.optimizer[slot][name]) for slot in ("m", "v"))
    assert not torch.equal(after.params["a.A"], state.params["a.A"])


def test_a_round_without_answers_changes_nothing_but_its_number():
    built = method(server_optimizer={"kind": "yogi"})
    state, told = begun(built)
    after, _ = server.finish(state, told, [], built)
    assert after.round == 1
    assert all(torch.equal(after.params[name], state.params[name]) for name in state.params)


FAULTS = {
    "another round": ({"round": 9}, "round"),
    "not asked": ({"client": 99}, "not asked"),
    "no examples": ({"examples": 0}, "examples"),
    "another client's unit": ({"params": {"b.A": torch.zeros(2)}}, "names"),
    "a unit missing": ({"params": {}}, "names"),
}


@pytest.mark.parametrize("fault", [*FAULTS, "nan", "infinite", "shape"])
def test_an_answer_that_does_not_fit_is_as_if_absent(fault):
    built = method()
    state, told = begun(built)
    good = update(told[1])
    bad = update(told[0])
    if fault in FAULTS:
        changes, text = FAULTS[fault]
        bad = bad._replace(**changes)
    else:
        worse = {
            "nan": torch.tensor([math.nan, 0.0]),
            "infinite": torch.tensor([math.inf, 0.0]),
            "shape": torch.zeros(5),
        }
        bad.params["a.A"] = worse[fault]
        text = "shapes" if fault == "shape" else "finite"
    after, refused = server.finish(state, told, [bad, good], built)
    without, _ = server.finish(state, told, [good], built)
    assert text in refused.failed[bad.client]
    assert all(torch.equal(after.params[name], without.params[name]) for name in after.params)


def test_clients_that_never_share_stay_apart():
    built = method(sharing="alone", assignment={"kind": "everyone"})
    state, told = begun(built)
    after, _ = server.finish(state, told, [update(told[0], 1.0), update(told[1], 5.0)], built)
    for client, shift in ((4, 1.0), (7, 5.0), (5, 0.0)):
        own = server.personal(after.params, client, built)
        assert all(torch.allclose(own[name], value + shift) for name, value in values().items())


@pytest.mark.parametrize("name", METHODS)
def test_every_row_builds(name):
    assert build(METHODS[name]).estimator


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"head": "both"}, "shared, split, exact"),
        ({"schedule": "step"}, "constant, linear, cosine"),
        ({"sharing": "some"}, "federated, pooled, alone"),
        ({"head": "exact"}, "exact already"),
        ({"estimator": {"kind": "magic"}}, "backprop, forward"),
        ({"head_lr": 0.0}, "above 0"),
        ({"estimator": {"kind": "backprop", "directions": 2}}, "directions"),
    ],
)
def test_choices_that_do_not_fit_say_what_does(changes, text):
    with pytest.raises(ValueError, match=text):
        method(**changes)


def test_a_builder_of_ones_own_is_a_choice():
    def mine(scale=1.0):
        return lambda loss_fn, params, batch, seed: scale

    built = method(estimator={"kind": mine, "scale": 3.0})
    assert built.estimator(None, None, None, 0) == 3.0
