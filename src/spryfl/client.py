"""One client's share of one round: local steps on its own data, and an honest account of what they cost.

    for each local batch: estimate = estimator(loss_fn, params, batch, seed); params = local step; return the new values

Needs torch alone. Cost: the estimator's, times the number of local batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from spryfl import noise, tree
from spryfl.costs import peak_memory
from spryfl.optimizers import Optimizer
from spryfl.types import Batch, Estimate, Estimator, Instruction, LossFn, Params, Passes, Update


class Local(NamedTuple):
    """A client's own side: its data and its model, which never leave it."""

    bind: Callable[[Params], LossFn]  # values that stay as they are -> the loss as a function of the others
    batches: Callable[[int], Iterator[Batch]]  # a seed for the order -> the local batches of one round
    examples: int
    held_out: Callable[[], Any]  # what `score` looks at
    score: Callable[[Params, Any], tuple[float, int]]  # (the task's metric, times the rows scored; rows)
    device: torch.device


def run(told: Instruction, estimator: Estimator, optimizer: Optimizer, local: Local, head_lr: float = 1.0) -> Update:
    """Takes the local steps that an instruction asks for; `head_lr` is a factor on the head's learning rate.

    Raises:
        FloatingPointError: a loss or an estimate is not finite; the client then counts as failed.
    """
    start = time.perf_counter()
    current = tree.to(told.params, local.device)
    score = lambda values: local.score(values, local.held_out()) if told.evaluate else (0, 0)  # noqa: E731
    before, _ = score(current)
    params, losses, passes, peak = _steps(told, current, estimator, optimizer, local, head_lr)
    after, scored = score({**current, **params})
    return Update(
        round=told.round,
        client=told.client,
        params=tree.to(params, "cpu"),
        examples=local.examples,
        loss=sum(losses) / len(losses),
        passes=passes,
        peak_bytes=peak,
        seconds=time.perf_counter() - start,
        held_out=scored,
        correct_before=before,
        correct_after=after,
    )


def _steps(
    told: Instruction, current: Params, estimator: Estimator, optimizer: Optimizer, local: Local, head_lr: float
) -> tuple[dict[str, torch.Tensor], list[float], Passes, int]:
    """The local loop. The first step's memory is measured, the batch left out."""
    params = tree.select(current, told.names)
    loss_fn = local.bind(tree.without(current, told.names))
    scale = {name: told.lr_scale * (head_lr if name in loss_fn.head else 1.0) for name in params}
    state, losses, passes, peak = optimizer.init(params), [], Passes(), 0
    for step, batch in enumerate(local.batches(noise.child_seed(told.seed, "order"))):
        seed = noise.child_seed(told.seed, "step", step)
        if step == 0:
            with peak_memory(local.device) as measured:
                estimate = estimator(loss_fn, params, batch, seed)
            peak = measured()
        else:
            estimate = estimator(loss_fn, params, batch, seed)
        params, state = optimizer.step(params, gradient(estimate, params, told, step), state, scale)
        losses.append(estimate.loss)
        passes += estimate.passes
    return params, losses, passes, peak


def gradient(estimate: Estimate, params: Params, told: Instruction, step: int = 0) -> dict[str, torch.Tensor]:
    """The dense part plus the seeded terms; a FloatingPointError if it is not finite."""
    total = tree.add(estimate.dense, noise.expand(estimate.terms, params))
    if not (math.isfinite(estimate.loss) and tree.is_finite(total)):
        raise FloatingPointError(
            f"client {told.client}, round {told.round}, step {step + 1}: the loss or its gradient is not finite "
            f"(loss {estimate.loss}). Lower the local learning rate."
        )
    return total
