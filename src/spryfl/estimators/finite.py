"""The gradient along random directions by finite differences of the loss: forward passes alone, no derivative at all.

    central   c = [loss(w + mu v) - loss(w - mu v)] / 2mu      2 passes a direction, error O(mu^2)
    forward   c = [loss(w + mu v) - loss(w)] / mu              1 pass a direction and one for all, error O(mu)
    estimate  g_hat = (1/K) sum_k c_k v_k

MeZO, Malladi et al. 2023 (arXiv 2305.17333): central, K = 1. FedZO, Fang et al. 2022 (arXiv 2201.09531): forward on
the unit sphere, g_hat = (d / (mu P)) sum_k [loss(w + mu u_k) - loss(w)] u_k: `sphere` with `length = "direction"`.
FZOO, Dang et al. 2025 (arXiv 2506.09034): forward with random signs, the estimate divided by the standard deviation of
the K losses. Both sides of a difference share the dropout masks. Values are perturbed in a copy, never where they
stand: adding and taking away again drifts. Memory: an inference pass of one piece of the batch, one copy of the moved
values and one direction; in pieces each direction is drawn again for each of them.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from spryfl import tree
from spryfl.estimators import cuts, terms
from spryfl.estimators.pieces import summed
from spryfl.types import Batch, Cut, Estimate, Estimator, LossFn, Params, Passes, Piece

LENGTHS = ("value", "direction")


def central_difference(
    *,
    directions: int = 1,
    mu: float = 1e-3,
    distribution: str = "gaussian",
    length: str = "value",
    candidates: int = 1,
    clip: float = 0.0,
    exact_head: bool = False,
) -> Estimator:
    """Central differences: c_k = [loss(w + mu v_k) - loss(w - mu v_k)] / 2mu, g_hat = (1/K) sum_k c_k v_k.

    The loss it reports is the mean of all 2K, which is the loss up to O(mu^2).

    Args:
        directions: K, the number of directions a batch.
        mu: the perturbation's size, in units of the values.
        distribution: gaussian, rademacher, sphere, orthogonal or basis.
        length: "value": mu is each value's, w + mu v; "direction": the whole perturbation's, w + (mu / sqrt(d)) v.
        candidates: directions drawn for each one kept, those nearest to the last aggregated gradient; 1 for no choice.
        clip: largest size of a directional derivative; 0 for none.
        exact_head: take the head's gradient by reverse mode from the features at w: one pass more.

    Raises:
        ValueError: an option out of its range.

    >>> from spryfl.estimators import central_difference
    >>> estimator = central_difference(directions=1, mu=1e-3)
    """
    drawn = _drawing(mu, length, directions, distribution, clip, candidates)

    def estimate(loss_fn: LossFn, params: Params, batch: Batch, seed: int) -> Estimate:
        start = _start(loss_fn, params, batch, seed, exact_head)
        seeds, step = drawn(start, seed), _step(mu, length, start.inside)
        along = partial(terms.along, seeds, start.inside, distribution)
        seen = _losses(start, lambda: ((v, side) for v in along() for side in (step, -step)))
        pairs = zip(seen.losses[::2], seen.losses[1::2], strict=True)
        kept = terms.guarded([(up - down) / (2 * step) for up, down in pairs], clip)
        made = terms.made(seeds, kept.mean(), tuple(start.inside), distribution)
        loss = seen.exact if exact_head else _mean(seen.losses)
        return Estimate(loss, seen.dense, made, Passes(2 * len(seeds) + exact_head), kept.scalars)

    return estimate


def forward_difference(
    *,
    directions: int = 1,
    mu: float = 1e-3,
    distribution: str = "gaussian",
    length: str = "value",
    candidates: int = 1,
    clip: float = 0.0,
    normalize: bool = False,
    exact_head: bool = False,
) -> Estimator:
    """Forward differences: c_k = [loss(w + mu v_k) - loss(w)] / mu, g_hat = (1/K) sum_k c_k v_k.

    Args:
        directions: K, the number of directions a batch.
        mu: the perturbation's size, in units of the values.
        distribution: gaussian, rademacher, sphere, orthogonal or basis.
        length: "value": mu is each value's, w + mu v; "direction": the whole perturbation's, w + (mu / sqrt(d)) v.
        candidates: directions drawn for each one kept, those nearest to the last aggregated gradient; 1 for no choice.
        clip: largest size of a directional derivative; 0 for none.
        normalize: divide the estimate by the standard deviation (K - 1 in the divisor) of the K losses: FZOO. Not the
            exact part of the head.
        exact_head: take the head's gradient by reverse mode from the features at w, whose pass is the base pass.

    Raises:
        ValueError: an option out of its range.

    >>> from spryfl.estimators import forward_difference
    >>> estimator = forward_difference(directions=8, distribution="rademacher", normalize=True)
    """
    drawn = _drawing(mu, length, directions, distribution, clip, candidates)
    if normalize and directions < 2:
        raise ValueError(f"normalize with directions = {directions}: a standard deviation needs at least 2.")

    def estimate(loss_fn: LossFn, params: Params, batch: Batch, seed: int) -> Estimate:
        start = _start(loss_fn, params, batch, seed, exact_head)
        seeds, step = drawn(start, seed), _step(mu, length, start.inside)
        along = partial(terms.along, seeds, start.inside, distribution)
        seen = _losses(start, lambda: itertools.chain([] if exact_head else [({}, 0.0)], ((v, step) for v in along())))
        base, losses = (seen.exact, seen.losses) if exact_head else (seen.losses[0], seen.losses[1:])
        kept = terms.guarded([(loss - base) / step for loss in losses], clip)
        means = kept.mean(_over_deviation(losses) if normalize else 1.0)
        made = terms.made(seeds, means, tuple(start.inside), distribution)
        return Estimate(base, seen.dense, made, Passes(1 + len(seeds)), kept.scalars)

    return estimate


class _Start(NamedTuple):
    """The point that is perturbed."""

    loss_fn: LossFn
    params: Params
    pieces: tuple[Piece, ...]
    at: list[Cut]  # each piece's cut before the head, where the head is exact
    inside: dict[str, Tensor]  # the values that are perturbed
    above: dict[str, Tensor]  # the head's


class _Seen(NamedTuple):
    """What is linear in the loss."""

    exact: float  # the loss at the point itself, where reverse mode gave it
    dense: dict[str, Tensor]  # the head's gradient, where it is exact
    losses: list[float]  # at each moved point


def _start(loss_fn: LossFn, params: Params, batch: Batch, seed: int, exact_head: bool) -> _Start:
    pieces = loss_fn.pieces(batch, seed)
    at = [loss_fn.cut(one.batch, one.seed) for one in pieces] if exact_head else []
    return _Start(loss_fn, params, pieces, at, *(cuts.split(at[0], params) if at else (dict(params), {})))


def _losses(start: _Start, moves: Callable[[], Iterable[tuple[Params, float]]]) -> _Seen:
    """The losses at w + step direction, for each (direction, step) of `moves`, which are drawn anew for each piece."""
    loss_fn, params = start.loss_fn, start.params

    def linear(piece: Piece) -> _Seen:
        loss, dense, losses = 0.0, {}, []
        if start.at:
            cut = start.at[piece.number]
            exact = cuts.reverse(cut, params, start.above, cuts.answers(cut, params))
            loss, dense = float(exact.loss), exact.dense
        for direction, step in moves():
            moved = {name: params[name] + step * value for name, value in direction.items()}
            with torch.no_grad():
                losses.append(float(loss_fn({**params, **moved}, piece.batch, piece.seed)))
        return _Seen(loss, dense, losses)

    return summed(start.pieces, linear)


def _drawing(
    mu: float, length: str, directions: int, distribution: str, clip: float, candidates: int
) -> Callable[[_Start, int], list[int]]:
    """Checks the options that both differences share; what it gives draws the seeds of an estimate's directions."""
    if not 0 < mu < math.inf:
        raise ValueError(f"mu = {mu}: the size of a perturbation must be above 0.")
    if length not in LENGTHS:
        raise ValueError(f"length = {length!r}; possible: {', '.join(LENGTHS)}.")
    terms.check(directions, distribution, clip, candidates)

    def drawn(start: _Start, seed: int) -> list[int]:
        count = directions if start.inside else 0
        return terms.chosen(seed, count, start.inside, distribution, candidates, start.loss_fn.guide)

    return drawn


def _step(mu: float, length: str, inside: Params) -> float:
    """The factor on a direction whose values are of size 1 in the mean."""
    return mu if length == "value" or not inside else mu / math.sqrt(tree.size(inside))


def _mean(losses: Sequence[float]) -> float:
    """Over those that are finite; a loss that is not is already refused as a scalar."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan


def _over_deviation(losses: Sequence[float]) -> float:
    """1 / standard deviation of the losses; 0 where they do not differ, as they show no direction then."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    deviation = statistics.stdev(finite) if len(finite) > 1 else 0.0
    return 1 / deviation if deviation else 0.0
