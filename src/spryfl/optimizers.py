"""Optimizers as pairs of pure functions, the same for clients and server; and learning-rate schedules.

    state = optimizer.init(params)
    params, state = optimizer.step(params, grads, state, scale)

Every optimizer descends. A client's gradient is an estimate; a server's is a pseudo-gradient, old minus mean of new.
Only names that have a gradient move, and only their state does: a unit that nobody returned keeps both. `scale`
multiplies the learning rate, of all values or by name (a schedule's factor, the head's own). Server Adam, Yogi and
Adagrad: Reddi et al. 2021 (arXiv 2003.00295), no bias correction. AdamW is torch's. Cost: at most two more copies of
the trainable values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from spryfl.types import Params

State = Mapping[str, Params]  # by slot, then by name
Leaf = dict[str, Tensor]  # one value's slots


class Optimizer(NamedTuple):
    """`init(params) -> state` and `step(params, grads, state, scale=1.0) -> (params, state)`."""

    init: Callable[[Params], dict[str, dict[str, Tensor]]]
    step: Callable[..., tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]]
    rate: float | None = None  # lr, where a step is w - lr scale g and nothing else: such steps may be summed


def _by_leaf(init: Callable[[Tensor], Leaf], step: Callable[[Tensor, Tensor, Leaf, float], Tensor]) -> Optimizer:
    """An optimizer from what it does to one tensor: `step` fills the slots anew and returns the new value."""

    def init_all(params: Params) -> dict[str, dict[str, Tensor]]:
        leaves = {name: init(value) for name, value in params.items()}
        slots = next(iter(leaves.values()), {})
        return {slot: {name: leaf[slot] for name, leaf in leaves.items()} for slot in slots}

    def step_all(
        params: Params, grads: Params, state: State, scale: float | Mapping[str, float] = 1.0
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        new, slots = dict(params), {slot: dict(values) for slot, values in state.items()}
        for name, grad in grads.items():
            leaf = {slot: values[name] for slot, values in slots.items()}
            new[name] = step(params[name], grad, leaf, scale[name] if isinstance(scale, Mapping) else scale)
            for slot, value in leaf.items():
                slots[slot][name] = value
        return new, slots

    return Optimizer(init_all, step_all)


def sgd(lr: float = 1.0, momentum: float = 0.0) -> Optimizer:
    """m = momentum m + g; w -= lr m. On the server lr = 1 without momentum is the plain mean (FedAvg).

    Args:
        lr: learning rate.
        momentum: in [0, 1); 0 keeps no state.

    Raises:
        ValueError: an option is out of its range.

    >>> optimizer = sgd(lr=0.5)
    >>> params = {"w": torch.tensor([1.0])}
    >>> optimizer.step(params, {"w": torch.tensor([2.0])}, optimizer.init(params))[0]
    {'w': tensor([0.])}
    """
    _check(lr=lr, momentum=momentum)

    def init(value: Tensor) -> Leaf:
        return {"m": torch.zeros_like(value)} if momentum else {}

    def step(value: Tensor, grad: Tensor, leaf: Leaf, scale: float) -> Tensor:
        if momentum:
            leaf["m"] = grad = momentum * leaf["m"] + grad
        return value - (lr * scale) * grad

    return _by_leaf(init, step)._replace(rate=None if momentum else lr)


def adamw(
    lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> Optimizer:
    """AdamW with bias correction, as torch.optim.AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
        lr: learning rate.
        beta1, beta2: decays of the two moments, in [0, 1).
        eps: beside the root in the divisor.
        weight_decay: share of a value that a step of rate 1 takes off.

    Raises:
        ValueError: an option is out of its range.
    """
    _check(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def init(value: Tensor) -> Leaf:
        return {"m": torch.zeros_like(value), "v": torch.zeros_like(value), "t": torch.zeros((), dtype=torch.int64)}

    def step(value: Tensor, grad: Tensor, leaf: Leaf, scale: float) -> Tensor:
        leaf["t"] = leaf["t"] + 1
        leaf["m"] = beta1 * leaf["m"] + (1 - beta1) * grad
        leaf["v"] = beta2 * leaf["v"] + (1 - beta2) * grad.square()
        t = int(leaf["t"])
        denominator = (leaf["v"] / (1 - beta2**t)).sqrt() + eps
        decayed = value * (1 - lr * scale * weight_decay)
        return decayed - (lr * scale / (1 - beta1**t)) * leaf["m"] / denominator

    return _by_leaf(init, step)


def _adaptive(lr: float, beta1: float, tau: float, v0: float, second: Callable[[Tensor, Tensor], Tensor]) -> Optimizer:
    """m = b1 m + (1-b1) g; v = second(v, g^2); w -= lr m / (sqrt(v) + tau)."""
    _check(lr=lr, beta1=beta1, tau=tau, v0=v0)

    def init(value: Tensor) -> Leaf:
        return {"m": torch.zeros_like(value), "v": torch.full_like(value, v0)}

    def step(value: Tensor, grad: Tensor, leaf: Leaf, scale: float) -> Tensor:
        leaf["m"] = beta1 * leaf["m"] + (1 - beta1) * grad
        leaf["v"] = second(leaf["v"], grad.square())
        return value - (lr * scale) * leaf["m"] / (leaf["v"].sqrt() + tau)

    return _by_leaf(init, step)


def adagrad(lr: float = 1e-2, tau: float = 1e-3, v0: float = 0.0) -> Optimizer:
    """Server Adagrad: v += g^2; w -= lr g / (sqrt(v) + tau).

    Args:
        lr: learning rate.
        tau: beside the root in the divisor.
        v0: the start of v.

    Raises:
        ValueError: an option is out of its range.
    """
    return _adaptive(lr, 0.0, tau, v0, lambda v, square: v + square)


def adam(lr: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3, v0: float = 0.0) -> Optimizer:
    """Server Adam: m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; w -= lr m / (sqrt(v) + tau). No bias correction.

    Args:
        lr: learning rate.
        beta1, beta2: decays of the two moments, in [0, 1).
        tau: beside the root in the divisor.
        v0: the start of v.

    Raises:
        ValueError: an option is out of its range.
    """
    _check(beta2=beta2)
    return _adaptive(lr, beta1, tau, v0, lambda v, square: beta2 * v + (1 - beta2) * square)


def yogi(lr: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3, v0: float = 0.0) -> Optimizer:
    """Server Yogi: as Adam with v -= (1-b2) g^2 sign(v - g^2).

    Args:
        lr, beta1, beta2, tau: Spry's constants by default.
        v0: the start of v; 0 as Spry runs it, tau^2 in Reddi et al.

    In the first round the step of a value is lr 0.1 g / (0.1 |g| + tau): it amplifies small updates.
    """
    _check(beta2=beta2)
    return _adaptive(lr, beta1, tau, v0, lambda v, square: v - (1 - beta2) * square * torch.sign(v - square))


def none() -> None:
    """No local step: the client answers with the mean of its gradients at the values that it was sent."""
    return


def _check(**values: float) -> None:
    """Learning rates and tau positive or zero, betas and momentum in [0, 1)."""
    for name, value in values.items():
        if not math.isfinite(value) or value < 0 or (name in ("beta1", "beta2", "momentum") and value >= 1):
            bound = "in [0, 1)" if name.startswith("beta") or name == "momentum" else "0 or more"
            raise ValueError(f"{name} = {value} of an optimizer; it must be {bound}.")


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "adagrad": adagrad,
    "adam": adam,
    "yogi": yogi,
}

LOCAL: dict[str, Callable[..., Optimizer | None]] = {**OPTIMIZERS, "none": none}


def warmed(schedule: Callable[[float], float], share: float) -> Callable[[float], float]:
    """A schedule that first rises: times min(1, 0.1 + 0.9 done / share).

    Args:
        schedule: share of the run done, in [0, 1) -> factor on the rate.
        share: of the run in which it rises; 0 leaves the schedule as it is.

    >>> rising = warmed(SCHEDULES["constant"], 0.5)
    >>> [round(rising(done), 2) for done in (0.0, 0.25, 0.5, 0.75)]
    [0.1, 0.55, 1.0, 1.0]
    """
    if not share:
        return schedule
    return lambda done: min(1.0, 0.1 + 0.9 * done / share) * schedule(done)


# A schedule maps the share of rounds done, in [0, 1), to a factor on the local learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
