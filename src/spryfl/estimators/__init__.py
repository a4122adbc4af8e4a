"""Ways to get a gradient. Each builder returns `estimate(loss_fn, params, batch, seed) -> Estimate`.

An estimator sees a loss function, the values to move, one batch and a seed: no model, task, client, round or device.
To add one, write a file beside these and name its builder here, or pass the builder itself to `Method`.
"""

from __future__ import annotations

from collections.abc import Callable

from spryfl.estimators.backprop import backprop
from spryfl.estimators.finite import central_difference, forward_difference
from spryfl.estimators.forward import forward
from spryfl.estimators.twoblock import two_block
from spryfl.types import Estimator

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "backprop": backprop,
    "forward": forward,
    "central_difference": central_difference,
    "forward_difference": forward_difference,
    "two_block": two_block,
}
DENSE = frozenset({"backprop"})  # keys of estimators without seeded terms: nothing in them could travel as scalars

__all__ = ["DENSE", "ESTIMATORS", "backprop", "central_difference", "forward", "forward_difference", "two_block"]
