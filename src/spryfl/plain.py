"""Estimators in a training loop of one's own: `backward` stands where `loss.backward()` stood, any `torch.optim` steps.

    p.grad += g_hat(p)        g_hat by any estimator, of any module and any loss

The module is called with other values in the place of its parameters (`torch.func.functional_call`), so it stays as it
is. What needs a network cut in two (exact_head, exact_top, two_block) is not here: a plain loss has no blocks. Cost:
the estimator's, and a copy of the gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from spryfl import noise, tree
from spryfl.hooks import seeded
from spryfl.types import Batch, Estimator, Params, Piece

Loss = Callable[[Any, Any], Tensor]  # (module, batch) -> the loss, a scalar


class _Called(nn.Module):
    """The loss as a module, whose parameters are the user's."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.module, batch)


class PlainLoss:
    """A module's loss as estimators ask for it, in the mode (training or not) that the module is in.

    Args:
        module: any; those of its parameters that require a gradient are moved.
        loss: (module, batch) -> the loss, a scalar; it calls the module as it likes.

    >>> import torch
    >>> layer = nn.Linear(2, 1)
    >>> loss_fn = PlainLoss(layer, lambda module, batch: module(batch["x"]).square().mean())
    >>> torch.allclose(loss_fn(loss_fn.params, {"x": torch.zeros(3, 2)}), layer.bias.square())
    True
    """

    head: frozenset[str] = frozenset()
    guide: Params = {}  # noqa: RUF012

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        self.module, self._called = module, _Called(module, loss)

    @property
    def params(self) -> dict[str, Tensor]:
        """The values that are moved, without their graph; the very memory of the module's."""
        return {name: value.detach() for name, value in self.module.named_parameters() if value.requires_grad}

    def __call__(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        """The loss with these values; `seed` chooses the dropout masks."""
        values = {f"module.{name}": value for name, value in params.items()}
        with contextlib.nullcontext() if seed is None else seeded(seed):
            loss: Tensor = functional_call(self._called, values, (batch,), strict=False)
        return loss

    def pieces(self, batch: Batch, seed: int | None = None) -> tuple[Piece, ...]:
        """The batch itself, whole."""
        return (Piece(1.0, batch, seed),)

    def cut(self, batch: Batch, seed: int | None = None, top: int = 0, checkpoint: bool = False) -> NoReturn:
        """Not possible: nothing is known of the module's blocks."""
        raise ValueError(
            "a plain loss cannot be cut in two, which exact_head, exact_top and two_block ask for. Use an estimator "
            "without them: forward(), central_difference(), forward_difference(), backprop()."
        )

    def checkpointed(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        """The same loss, all of its activations computed again on the way back."""
        loss: Tensor = checkpoint(lambda: self(params, batch, seed), use_reentrant=False)
        return loss


def backward(estimator: Estimator, loss_fn: PlainLoss, batch: Any, seed: int) -> float:
    """Adds a gradient estimate to the `.grad` of each moved parameter, as `loss.backward()` would the gradient.

    Args:
        estimator: what a builder made, for example `spryfl.estimators.forward(directions=8)`.
        loss_fn: the module and its loss.
        batch: what the loss takes.
        seed: of the directions and the dropout masks, 0 to 2^63 - 1; another one each step.

    Returns:
        The loss at the module's values; for central differences up to O(mu^2).

    Raises:
        ValueError: the estimator wants the loss cut in two, or no parameter requires a gradient.

    >>> import torch
    >>> from spryfl.estimators import backprop
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> loss_fn = PlainLoss(layer, lambda module, batch: module(batch).sum())
    >>> _ = backward(backprop(), loss_fn, torch.full((2, 1), 3.0), seed=0)
    >>> layer.weight.grad
    tensor([[6.]])
    """
    params = loss_fn.params
    if not params:
        raise ValueError("no parameter of the module requires a gradient, so there is nothing to move.")
    made = estimator(loss_fn, params, batch, seed)
    found = tree.add(made.dense, noise.expand(made.terms, params))
    for name, value in loss_fn.module.named_parameters():
        if name in found:
            own = found[name].to(value)
            value.grad = own.clone() if value.grad is None else value.grad + own
    return made.loss
