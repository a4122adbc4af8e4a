"""The exact gradient by reverse mode, plain or with activation checkpointing.

    g = grad loss(w)

Cost: one value pass and a backward pass of about the same price (frozen weights need no gradient of their own);
memory: the activations of every layer after the first moved value. Checkpointed: one more value pass, and the
activations of one block beside the hidden state of each (Chen et al. 2016, arXiv 1604.06174). In pieces: those of one
piece, and the sum of the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spryfl.estimators.pieces import summed
from spryfl.jvp.memory import return_freed
from spryfl.types import Batch, Estimate, Estimator, LossFn, Params, Passes, Piece


def backprop(checkpoint: bool = False) -> Estimator:
    """Reverse mode: g = grad loss(w), exactly.

    Args:
        checkpoint: keep only each block's input and compute its activations again on the way back.

    >>> from spryfl.estimators import backprop
    >>> estimator = backprop(checkpoint=True)
    """

    def estimate(loss_fn: LossFn, params: Params, batch: Batch, seed: int) -> Estimate:
        return_freed()
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        call = loss_fn.checkpointed if checkpoint else loss_fn

        def reverse(piece: Piece) -> tuple[float, dict[str, Tensor]]:
            loss = call(leaves, piece.batch, piece.seed)
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
            return float(loss.detach()), dict(zip(leaves, grads, strict=True))

        loss, dense = summed(loss_fn.pieces(batch, seed), reverse)
        return Estimate(loss, dense, (), Passes(value=2 if checkpoint else 1, backward=1))

    return estimate
