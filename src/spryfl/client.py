"""One client's share of one round: local steps on its own data, and an honest account of what they cost.

    for each local batch: estimate = estimator(loss_fn, params, batch, seed); params = local step
    answer with the new values, or with the scalars that make them; without local steps with the mean gradient

Needs torch alone. Cost: the estimator's, times the number of local batches.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spryfl import ledger, noise, trace, tree
from spryfl.choices import Built
from spryfl.costs import peak_memory
from spryfl.types import Batch, Directional, Estimate, Instruction, LossFn, Params, Passes, Scalars, Trace, Update


class Local(NamedTuple):
    """A client's own side: its data and its model, which never leave it."""

    bind: Callable[[Params, Params], LossFn]  # (values that stay as they are, guide) -> the loss of the others
    batches: Callable[[int], Iterator[Batch]]  # a seed for the order -> the local batches of one round
    examples: int
    held_out: Callable[[], Any]  # what `score` looks at
    score: Callable[[Params, Any], tuple[float, int]]  # (the task's metric, times the rows scored; rows)
    device: torch.device


@dataclass
class Walk:
    """What the local steps of one round leave."""

    params: dict[str, Tensor]  # the values so far
    steps: list[tuple[Directional, ...]] = field(default_factory=list)
    dense: dict[str, Tensor] = field(default_factory=dict)  # sum of the dense gradients
    total: dict[str, Tensor] = field(default_factory=dict)  # sum of the gradients, where one is asked for
    squares: float = 0.0  # sum of their squared norms
    losses: list[float] = field(default_factory=list)
    passes: Passes = Passes()
    scalars: Scalars = Scalars()
    noise: tuple[float, ...] = ()  # relative variance of the first estimate, by name
    factors: dict[str, float] = field(default_factory=dict)  # on the steps of each value, where they are shrunk
    peak: int = 0

    def add(self, estimate: Estimate, scalars: bool) -> None:
        """Counts one estimate; what exchange by scalars sends is kept for it alone."""
        if scalars:
            self.steps.append(estimate.terms)
            self.dense = tree.add(self.dense, estimate.dense)
        self.losses.append(estimate.loss)
        self.passes += estimate.passes
        self.scalars += estimate.scalars


def run(told: Instruction, method: Built, local: Local) -> Update:
    """Takes the local steps that an instruction asks for.

    Args:
        told: the instruction, with all values that the model needs.
        method: the method's functions; of classes of clients those of the instruction's.
        local: the client's data and model.

    Raises:
        FloatingPointError: a loss or an estimate is not finite; the client then counts as failed.
        ValueError: directions made here are not those that the server makes.
    """
    start, method = time.perf_counter(), method.of(told.client_class, told.growth)
    _same_noise(told)
    current = tree.to(told.params, local.device)
    score = lambda values: local.score(values, local.held_out()) if told.evaluate else (0, 0)  # noqa: E731
    before, _ = score(current)
    walk = _walk(told, current, method, local)
    after, scored = score({**current, **walk.params})
    params, made = _answer(told, walk, method)
    return Update(
        round=told.round,
        client=told.client,
        params=tree.to(params, "cpu"),
        examples=local.examples,
        loss=sum(walk.losses) / len(walk.losses),
        passes=walk.passes,
        peak_bytes=walk.peak,
        seconds=time.perf_counter() - start,
        held_out=scored,
        correct_before=before,
        correct_after=after,
        trace=made,
        scalars=walk.scalars,
        variance=_variance(walk) if method.gate else 0.0,
        noise=walk.noise,
    )


def _walk(told: Instruction, current: Params, method: Built, local: Local) -> Walk:
    """The local loop. The first step's memory is measured, the batch left out."""
    walk = Walk(tree.select(current, told.names))
    loss_fn = local.bind(tree.without(current, told.names), tree.to(told.guide, local.device))
    scale = ledger.rates(told.names, told.lr_scale, method, loss_fn.head)
    state = method.local.init(walk.params) if method.local else {}
    for step, batch in enumerate(local.batches(noise.child_seed(told.seed, "order"))):
        seed = trace.step_seed(told, step)
        with contextlib.nullcontext() if step else peak_memory(local.device) as measured:
            estimate = method.estimator(loss_fn, walk.params, batch, seed)
        walk.peak = measured() if measured else walk.peak
        grads = gradient(estimate, walk.params, told, step)
        if method.by_noise and not step:
            predicted = noise.relative_variance(estimate.terms, walk.params)
            walk.noise = tuple(predicted[name] for name in told.names)
        if method.shrink and not step:
            walk.factors = ledger.shrunk(estimate.terms, walk.params)
            scale = ledger.rates(told.names, told.lr_scale, method, loss_fn.head, walk.factors)
        walk.add(estimate, method.scalars)
        if method.gate or method.local is None:
            walk.total, walk.squares = tree.add(walk.total, grads), walk.squares + tree.norm(grads) ** 2
        if method.local:
            walk.params, state = method.local.step(walk.params, grads, state, scale)
    return walk


def _answer(told: Instruction, walk: Walk, method: Built) -> tuple[Params, Trace | None]:
    """(the dense part, the trace) of the answer: new values, or the mean gradient where no local step was taken."""
    count = len(walk.losses)
    if not method.scalars:
        mean = ledger.scaled(tree.scale(walk.total, 1 / count), walk.factors)
        return (walk.params if method.local else mean), None
    seeded = [name for name in told.names if name not in walk.dense]
    made = trace.compress(walk.steps, seeded, told.names, told)
    dense = tree.select(walk.params, walk.dense) if method.local else tree.scale(walk.dense, 1 / count)
    return dense, made


def _variance(walk: Walk) -> float:
    """Of the mean of n gradients of d values, a value: (sum |g_i|^2 - n |mean|^2) / (d n (n - 1)); NaN for n < 2."""
    n, size = len(walk.losses), tree.size(walk.total)
    spread = walk.squares - tree.norm(walk.total) ** 2 / n
    return max(spread, 0.0) / (size * n * (n - 1)) if n > 1 else math.nan


def _same_noise(told: Instruction) -> None:
    """Scalars mean nothing to a server whose directions are others."""
    if told.fingerprint and told.fingerprint != trace.fingerprint():
        raise ValueError(
            f"directions made on this machine are not the server's: fingerprint {trace.fingerprint()} here, "
            f"{told.fingerprint} there. Install the server's version of torch, or use distribution "
            f'"rademacher" with versions that agree, or exchange = "weights". A distribution of your own must be in '
            f"noise.DISTRIBUTIONS on both sides."
        )


def gradient(estimate: Estimate, params: Params, told: Instruction, step: int = 0) -> dict[str, Tensor]:
    """The dense part plus the seeded terms; a FloatingPointError if it is not finite."""
    total = tree.add(estimate.dense, noise.expand(estimate.terms, params))
    if not (math.isfinite(estimate.loss) and tree.is_finite(total)):
        raise FloatingPointError(
            f"client {told.client}, round {told.round}, step {step + 1}: the loss or its gradient is not finite "
            f"(loss {estimate.loss}). Lower the local learning rate."
        )
    return total
