"""What estimators do at a cut: divide the values by its sides, and take the exact gradient of what lies above.

    loss = head(w_above, h), h = trunk(w_below)      delta = d loss / d h and g_above in one reverse pass

Cost: a value and a backward pass through the part above; memory: its activations, or one hidden state a block and one
block's activations where the cut was made to recompute them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spryfl import tree
from spryfl.types import Cut, Features, Params


class Above(NamedTuple):
    """Reverse mode above a cut."""

    loss: Tensor
    deltas: tuple[Tensor | None, ...]  # d loss / d feature, None where the loss does not depend on it
    dense: dict[str, Tensor]  # the exact gradient of the values above


def split(cut: Cut, params: Params) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(values below the cut, values above); a ValueError for a value that both parts read."""
    both = [name for name in params if name in cut.both]
    if both:
        raise ValueError(
            f"{both[0]} is read below the cut and above it ({len(both)} such of {len(params)} values: shared layers, "
            f"tied weights), so its gradient is the sum of two parts. Cut elsewhere (top = 0 is before the head), or "
            f"do not train it."
        )
    above = tree.select(params, [name for name in params if name in cut.above])
    return tree.without(params, above), above


def reverse(cut: Cut, params: Params, above: Params, features: Features) -> Above:
    """The loss, its gradient by the features and by the values above."""
    leaves = tuple(value.detach().requires_grad_() for value in features)
    own = {name: value.detach().requires_grad_() for name, value in above.items()}
    with torch.enable_grad():
        loss = cut.head({**params, **own}, leaves)
    grads = torch.autograd.grad(loss, [*leaves, *own.values()], allow_unused=True)
    deltas, exact = grads[: len(leaves)], grads[len(leaves) :]
    dense = {name: torch.zeros_like(own[name]) if g is None else g for name, g in zip(own, exact, strict=True)}
    return Above(loss.detach(), deltas, dense)


def answers(cut: Cut, params: Params) -> Features:
    """What the trunk hands over, without a graph."""
    with torch.no_grad():
        return cut.trunk(params)
