"""Every optimizer against its recursion in plain Python or torch.optim; names without a gradient stay as they are."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from spryfl.optimizers import OPTIMIZERS, SCHEDULES

# Each registered optimizer with settings away from its defaults, so that no argument can be forgotten.
CASES = {
    "sgd": [{"lr": 0.3}, {"lr": 0.3, "momentum": 0.8}],
    "adamw": [{"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1}],
    "adagrad": [{"lr": 0.05, "tau": 1e-2, "v0": 1e-4}],
    "adam": [{"lr": 0.05, "beta1": 0.7, "beta2": 0.9, "tau": 1e-2, "v0": 1e-4}],
    "yogi": [{"lr": 0.05, "beta1": 0.7, "beta2": 0.9, "tau": 1e-2, "v0": 1e-4}],
}
GRADS = [0.5, -0.2, 0.9, 0.0, -1.5, 0.01]


def recursion(name, o, w, grads):
    """One value's path, as the papers write it."""
    m = v = 0.0
    v = o.get("v0", 0.0)
    for t, g in enumerate(grads, start=1):
        if name == "sgd":
            m = o.get("momentum", 0.0) * m + g
            w -= o["lr"] * m
        elif name == "adamw":
            w -= o["lr"] * o["weight_decay"] * w
            m = o["beta1"] * m + (1 - o["beta1"]) * g
            v = o["beta2"] * v + (1 - o["beta2"]) * g * g
            w -= o["lr"] * (m / (1 - o["beta1"] ** t)) / (math.sqrt(v / (1 - o["beta2"] ** t)) + o["eps"])
        else:
            m = o.get("beta1", 0.0) * m + (1 - o.get("beta1", 0.0)) * g
            if name == "adagrad":
                v += g * g
            elif name == "adam":
                v = o["beta2"] * v + (1 - o["beta2"]) * g * g
            else:
                v -= (1 - o["beta2"]) * g * g * ((v > g * g) - (v < g * g))
            w -= o["lr"] * m / (math.sqrt(v) + o["tau"])
    return w


def run(optimizer, w, grads, scale=1.0):
    params = {"w": torch.tensor([w], dtype=torch.float64)}
    state = optimizer.init(params)
    for g in grads:
        params, state = optimizer.step(params, {"w": torch.tensor([g], dtype=torch.float64)}, state, scale)
    return float(params["w"])


def test_every_optimizer_is_tested():
    assert set(CASES) == set(OPTIMIZERS)


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, cases in CASES.items() for o in cases])
def test_path_is_the_papers_recursion(name, options):
    assert run(OPTIMIZERS[name](**options), 0.7, GRADS) == pytest.approx(
        recursion(name, options, 0.7, GRADS), rel=1e-12
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs(momentum):
    value = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    reference = torch.optim.SGD([value], lr=0.1, momentum=momentum)
    for g in GRADS:
        value.grad = torch.tensor([g], dtype=torch.float64)
        reference.step()
    assert run(OPTIMIZERS["sgd"](lr=0.1, momentum=momentum), 0.7, GRADS) == pytest.approx(value.item(), rel=1e-12)


def test_adamw_is_torchs():
    value = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    reference = torch.optim.AdamW([value], lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    for g in GRADS:
        value.grad = torch.tensor([g], dtype=torch.float64)
        reference.step()
    options = CASES["adamw"][0]
    assert run(OPTIMIZERS["adamw"](**options), 0.7, GRADS) == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("gradient", "first", "steady"),
    [(1e-5, 1.0, 9.9), (1e-4, 0.99, 9.1), (1e-3, 0.91, 5.0), (1e-2, 0.50, 0.91), (1e-1, 0.09, 0.099)],
)
def test_yogi_multiplies_as_tabulated(gradient, first, steady):
    """The step over the gradient at lr = 1e-2, first and after many rounds: small updates are amplified."""
    yogi = OPTIMIZERS["yogi"](lr=1e-2)
    one = -run(yogi, 0.0, [gradient]) / gradient
    many = [run(yogi, 0.0, [gradient] * n) for n in (2000, 2001)]
    assert one == pytest.approx(first, rel=0.06)
    assert (many[0] - many[1]) / gradient == pytest.approx(steady, rel=0.06)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_name_without_a_gradient_keeps_value_and_state(name):
    optimizer = OPTIMIZERS[name](**CASES[name][-1])
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    state = optimizer.init(params)
    both = {"a": torch.ones(2), "b": torch.ones(3)}
    params, state = optimizer.step(params, both, state)
    new, after = optimizer.step(params, {"a": torch.ones(2)}, state)
    assert torch.equal(new["b"], params["b"])
    assert not torch.equal(new["a"], params["a"])
    assert all(torch.equal(after[slot]["b"], state[slot]["b"]) for slot in state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_moved_in_place(name):
    optimizer = OPTIMIZERS[name](**CASES[name][-1])
    params, grads = {"a": torch.ones(2)}, {"a": torch.full((2,), 0.5)}
    state = optimizer.init(params)
    kept = {slot: values["a"].clone() for slot, values in state.items()}
    optimizer.step(params, grads, state)
    assert torch.equal(params["a"], torch.ones(2))
    assert torch.equal(grads["a"], torch.full((2,), 0.5))
    assert all(torch.equal(state[slot]["a"], kept[slot]) for slot in state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scale_is_a_factor_on_the_learning_rate(name):
    options = {**CASES[name][-1]}
    half = OPTIMIZERS[name](**{**options, "lr": options["lr"] / 2})
    assert run(OPTIMIZERS[name](**options), 0.7, GRADS, 0.5) == pytest.approx(run(half, 0.7, GRADS), rel=1e-12)
    assert run(OPTIMIZERS[name](**options), 0.7, GRADS, {"w": 0.5}) == pytest.approx(run(half, 0.7, GRADS), rel=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("lr", [-1.0, math.inf, math.nan])
def test_a_learning_rate_that_cannot_be_is_refused(name, lr):
    with pytest.raises(ValueError, match="lr"):
        OPTIMIZERS[name](lr=lr)


def test_schedules_begin_at_one_and_fall():
    for name, schedule in SCHEDULES.items():
        values = [schedule(i / 10) for i in range(10)]
        assert values[0] == 1.0, name
        assert all(a >= b > 0 for a, b in pairwise(values)), name
    assert SCHEDULES["linear"](0.25) == 0.75
    assert SCHEDULES["cosine"](0.5) == pytest.approx(0.5)
