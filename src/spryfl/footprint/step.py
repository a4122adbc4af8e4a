"""One local step of a client, with marks, and the shorter runs by which the parts of its memory are told apart.

    step      optimizer state, estimate, gradient, local update: what `client` does with a batch
    values    the part of it that is there without a direction: the value pass alone, or where the network is cut for
              reverse mode the value pass and the way back above the cut

The planner runs both on tensors without storage, `spryfl profile` on real ones: the same code under both counts. Cost:
a step, or its value pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spryfl import noise, tree
from spryfl.choices import Built
from spryfl.loss import ModelLoss
from spryfl.types import Batch, Cut, Estimate, Estimator, Features, LossFn, Params

Mark = Callable[[str], None]  # a phase begins


def quiet(name: str) -> None:
    """Marks nothing."""


def step(built: Built, loss_fn: LossFn, params: Params, batch: Batch, seed: int = 1, mark: Mark = quiet) -> Estimate:
    """One local step from a fresh optimizer state: estimate, gradient, update.

    Args:
        built: the method's functions.
        loss_fn: the loss with all that the client does not move.
        params: the values it moves.
        batch: one local batch.
        seed: of the directions.
        mark: called where a phase begins: before and after each call of the loss or of one of its parts, and before the
            update.

    Returns:
        the estimate.
    """
    mark("start")
    state = built.local.init(params) if built.local else {}
    estimate = built.estimator(Marked(loss_fn, mark), params, batch, seed)
    mark("update")
    grads = tree.add(estimate.dense, noise.expand(estimate.terms, params))
    if built.local:
        built.local.step(params, grads, state, 1.0)
    return estimate


def values(estimator: Estimator | None, loss_fn: LossFn, params: Params, batch: Batch, mark: Mark = quiet) -> None:
    """What of a step is there without a direction.

    Args:
        estimator: one whose exact part is wanted, or None for the value pass alone.
        loss_fn: the loss with all that does not move.
        params: the values whose gradient is exact, or all that the value pass reads.
        batch: one local batch.
        mark: as in `step`.
    """
    mark("start")
    if estimator is None:
        with torch.no_grad():
            for piece in loss_fn.pieces(batch):
                Marked(loss_fn, mark)(params, piece.batch)
    else:
        estimator(Marked(loss_fn, mark), params, batch, 1)


@dataclasses.dataclass(frozen=True)
class Marked:
    """A loss that marks the beginning and the end of each of its calls; else it is the one inside."""

    inner: Any
    mark: Mark

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        return self._during(self.inner, params, batch, seed)

    def checkpointed(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        return self._during(self.inner.checkpointed, params, batch, seed)

    def cut(self, batch: Batch, seed: int | None = None, top: int = 0, checkpoint: bool = False) -> Cut:
        made: Cut = self.inner.cut(batch, seed, top, checkpoint)

        def trunk(params: Params) -> Features:
            return self._during(made.trunk, params)

        def head(params: Params, features: Features) -> Tensor:
            return self._during(made.head, params, features)

        return made._replace(trunk=trunk, head=head)

    def _during(self, call: Callable[..., Any], *args: Any) -> Any:
        self.mark("pass")
        try:
            return call(*args)
        finally:
            self.mark("after")


def prefix_bytes(loss_fn: ModelLoss) -> int:
    """What the loss keeps of the blocks before the first moved value, for the next pass over the same batch."""
    latest = loss_fn.prefix.latest
    kept = [latest[1], *(answer for key, answer in loss_fn.prefix.answers.items() if key != latest[0])]
    return sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(kept) if isinstance(leaf, Tensor))
