"""A derivative held against differences of the loss, on the first batch: for models whose code is not known here.

    c  against  n(h) = (L(w + h v) - L(w - h v)) / 2h    and    n(h/2)

A layer of another library may lose a tangent or a gradient in silence, or round its activations, so that the loss is a
staircase and c, however it was computed, says nothing. Where n(h) and n(h/2) disagree, h grows until they do not; a
loss of which that is never true has no derivative to be had. Cost: four passes of values, more for coarse arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spryfl import noise, tree
from spryfl.estimators.pieces import summed
from spryfl.types import Batch, Estimate, Estimator, LossFn, Params

STEP = 1e-2  # first h |v|, in units of |w| + 1
GROWTH, TRIES = 4.0, 4
CLOSE = 0.2  # how far two slopes may be apart, as a part of the larger


class Slope(NamedTuple):
    """What an estimate says of the loss along one direction."""

    along: Params
    value: float


def rehearsed(
    estimator: Estimator, loss_fn: LossFn, params: Params, batch: Batch, seed: int, doubted: bool
) -> Estimate:
    """One estimate, checked where the model is doubted."""
    made = estimator(loss_fn, params, batch, seed)
    if doubted:
        check(made, loss_fn, params, batch)
    return made


def check(estimate: Estimate, loss_fn: LossFn, params: Params, batch: Batch) -> None:
    """Compares one slope of an estimate with differences of the loss, in evaluation mode.

    Raises:
        ValueError: they disagree, or the loss has no slope to speak of.
    """
    said = _slope(estimate, params)
    if said is None:
        return
    h = STEP * (tree.norm(params) + 1) / tree.norm(said.along)
    for _ in range(TRIES):
        wide, narrow = (_difference(loss_fn, params, batch, said.along, step) for step in (h, h / 2))
        noise_floor = 1e-6 * (abs(estimate.loss) + 1) / h  # float32's own rounding
        if abs(wide - narrow) <= CLOSE * max(abs(wide), abs(narrow)) + noise_floor:
            break
        h *= GROWTH
    else:
        raise ValueError(
            f"the loss of this quantized model is not smooth: over steps of {h / GROWTH:.1g} its slope is {wide:.3g}, "
            f"over half of that {narrow:.3g}. It rounds its activations, so there is no derivative. {_INSTEAD}"
        )
    if abs(said.value - wide) > CLOSE * max(abs(said.value), abs(wide)) + abs(wide - narrow) + noise_floor:
        raise ValueError(
            f"the derivative of this quantized model is lost on the way: {said.value:.3g} where the loss's slope is "
            f"{wide:.3g}. {_INSTEAD}"
        )


_INSTEAD = (
    "Quantize the weights alone (bitsandbytes in 4 or 8 bits, torchao's weight-only configurations), or use a finite "
    "difference as the estimator."
)


def _slope(estimate: Estimate, params: Params) -> Slope | None:
    """Along its first direction where it has been computed by forward mode, along a dense gradient otherwise."""
    if estimate.terms and estimate.passes.tangent and not estimate.scalars.clipped:
        first = estimate.terms[0]
        kept = estimate.scalars.count - estimate.scalars.refused
        drawn = noise.direction(first.seed, tree.select(params, first.block), first.distribution)
        return Slope(drawn, first.coefficient * kept)
    if estimate.dense and estimate.passes.backward:
        size = tree.norm(estimate.dense)
        drawn = noise.direction(0, estimate.dense) if not size else tree.scale(estimate.dense, 1 / size)
        return Slope(drawn, size)
    return None


def _difference(loss_fn: LossFn, params: Params, batch: Batch, along: Params, h: float) -> float:
    """(L(w + h v) - L(w - h v)) / 2h."""
    with torch.no_grad():
        points = [_moved(params, along, step) for step in (h, -h)]
        ahead, behind = summed(loss_fn.pieces(batch), lambda one: [float(loss_fn(at, one.batch)) for at in points])
    return (ahead - behind) / (2 * h)


def _moved(params: Params, along: Params, step: float) -> Params:
    return {name: v + step * along[name] if name in along else v for name, v in params.items()}
