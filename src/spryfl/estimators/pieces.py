"""A batch in pieces (micro-batches): what is linear in the loss is summed over them, so that memory is one piece's.

    loss(batch) = sum_i w_i loss(piece_i)      w_i = terms of piece i / terms of the batch; the loss is a mean of terms

So are its gradient, its directional derivatives and its differences. An estimator runs its linear core once a piece,
along the same directions, and does on the sums what is not linear: guards, clip, a deviation. A sum differs from the
whole batch's number by rounding alone; under dropout each piece has masks of its own, where the whole batch's would be
others. Cost: a piece is its share of a pass, so the passes are the batch's; a streamed model is read once a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map

from spryfl.noise import child_seed
from spryfl.types import Batch, Piece

Sum = TypeVar("Sum")  # floats and tensors, in any nest of tuples, lists and dicts


def summed(pieces: Sequence[Piece], linear: Callable[[Piece], Sum]) -> Sum:
    """sum_i w_i linear(piece_i), number by number; of a whole batch just what `linear` gives.

    Args:
        pieces: what `loss_fn.pieces(batch, seed)` gave.
        linear: a piece -> floats and tensors that are linear in the loss, in any nest. Lists must be of equal length.

    >>> summed([Piece(0.25, {}, None), Piece(0.75, {}, None)], lambda piece: {"c": [4.0]})
    {'c': [4.0]}
    """
    if len(pieces) == 1:
        return linear(pieces[0])
    total = tree_map(lambda leaf: pieces[0].weight * leaf, linear(pieces[0]))
    for piece in pieces[1:]:
        total = tree_map(lambda so_far, leaf, w=piece.weight: _added(so_far, leaf, w), total, linear(piece))
    return total


def _added(total: Tensor | float, own: Tensor | float, weight: float) -> Tensor | float:
    return total.add_(own, alpha=weight) if isinstance(total, Tensor) else total + weight * own


def weighed(batches: Sequence[Batch], terms: Sequence[int], seed: int | None) -> tuple[Piece, ...]:
    """Parts of a batch as pieces, by the terms that the loss of each is a mean of; a single one is the batch itself.

    >>> [piece.weight for piece in weighed([{}, {}], [3, 1], None)]
    [0.75, 0.25]
    """
    if len(batches) == 1:
        return (Piece(1.0, batches[0], seed),)
    total = sum(terms)
    shares = [n / total if total else 1 / len(terms) for n in terms]  # without any term all losses are 0
    seeds = [None if seed is None else child_seed(seed, "piece", i) for i in range(len(batches))]
    return tuple(Piece(*one) for one in zip(shares, batches, seeds, range(len(batches)), strict=True))
