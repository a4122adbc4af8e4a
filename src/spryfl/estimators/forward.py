"""The gradient along random directions by forward-mode differentiation: no backward pass, no stored activations.

    c_k = <grad loss(w), v_k>      one jvp, exact          g_hat = (1/K) sum_k c_k v_k

Unbiased, with E|g_hat - g|^2 = ((d+1)/K) |g|^2 for Gaussian v of d values (d-1 for signs and sphere, d-K for orthogonal
ones). Spry, Panchal et al. 2024 (arXiv 2405.15551); Baydin et al. 2022 (arXiv 2202.08587). Cost: one value pass and K
tangent passes, which only need what lies at or after the first perturbed value; memory: a layer's values and tangents
of one piece of the batch, and K directions, of both what a chunk has.

Exact top, b blocks: the network is cut below its last b blocks, 0 before the head. Reverse mode above the cut gives the
gradient there and delta = d loss / d h; the rest follows from the tangents at the cut, c_k = <delta, dh_k>. The same
scalars, no noise above, shorter tangents: 1 + K (1 - share) and a backward pass of `share`, the part of the blocks
above the cut; memory: their activations, or with `checkpoint` b hidden states and one block. b = all is backprop.

Guided: with u the guide's own direction, |u| = 1, one of the K directions is u, the others are at right angles to it:

    g_hat = <g, u> u + (1/(K-1)) sum_k c_k P v_k,  P = I - u u^T,  c_k = <g, P v_k> = <g, v_k> - <v_k, u> <g, u>

Unbiased whatever the guide is, E|g_hat - g|^2 = (d / (K-1)) |P g|^2 for Gaussian v: what the guide explains is exact.
The mix of evolutionary strategies by Maheswaranathan et al. 2019 (arXiv 1806.10230) is biased; this is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spryfl import noise
from spryfl.estimators import cuts, terms
from spryfl.estimators.pieces import summed
from spryfl.jvp import jvp
from spryfl.types import Batch, Cut, Estimate, Estimator, Features, LossFn, Params, Passes, Piece


def forward(
    directions: int = 1,
    distribution: str = "gaussian",
    chunk: int = 0,
    candidates: int = 1,
    clip: float = 0.0,
    exact_top: int = 0,
    checkpoint: bool = False,
    guided: bool = False,
    exact_head: bool = False,
) -> Estimator:
    """Forward mode: g_hat = (1/K) sum_k c_k v_k with c_k the exact directional derivative along v_k.

    Args:
        directions: K, the number of directions a batch.
        distribution: gaussian, rademacher, sphere, orthogonal or basis.
        chunk: directions at once, 0 for all: memory for `chunk` directions (all of them where they are joint or guided)
            and their tangents, and another value pass (below a cut) a chunk.
        candidates: directions drawn for each one kept, those nearest to the last aggregated gradient; 1 for no choice.
        clip: largest size of a directional derivative; 0 for none.
        exact_top: how many of the last blocks, and the head with them, have their gradient by reverse mode; -1 for all.
        checkpoint: those blocks' activations are computed again on the way back.
        guided: the guide (method.guide) is one of the K directions, the rest at right angles to it; all random where
            there is none yet.
        exact_head: take at least the head's gradient by reverse mode (the setting `head = "exact"` of a method).

    Raises:
        ValueError: an option out of its range or without effect; a value on both sides of the cut.

    >>> from spryfl.estimators import forward
    >>> estimator = forward(directions=4, distribution="rademacher", exact_top=2)
    """
    terms.check(directions, distribution, clip, candidates)
    _check(directions, chunk, candidates, exact_top, checkpoint, guided)

    def estimate(loss_fn: LossFn, params: Params, batch: Batch, seed: int) -> Estimate:
        pieces, exact = loss_fn.pieces(batch, seed), exact_head or exact_top
        at = [loss_fn.cut(one.batch, one.seed, exact_top, checkpoint) for one in pieces] if exact else []
        inside, above = cuts.split(at[0], params) if at else (dict(params), {})
        heading = terms.heading(loss_fn.guide, inside) if guided else {}
        count = directions if inside else 0
        seeds = terms.chosen(seed, count - bool(heading), inside, distribution, candidates, loss_fn.guide)
        drawn = _Directions(seeds, inside, distribution, chunk, heading)

        def linear(piece: Piece) -> _Slopes:
            if at:
                return _through_cut(at[piece.number], params, above, drawn)
            return _straight(lambda p: loss_fn(p, piece.batch, piece.seed), params, drawn)

        loss, slopes, dense = summed(pieces, linear)
        onto = drawn.onto
        kept = terms.guarded(terms.apart(slopes, onto), clip)
        made = terms.made(seeds, kept.mean(), tuple(inside), distribution)
        runs = -(-count // chunk) if chunk and count else 1
        dense = {**dense, **terms.along_heading(heading, slopes, onto, kept)}
        passes = _passes(at[0].share if at else 0.0, runs, count, checkpoint)
        return Estimate(loss, dense, made, passes, kept.scalars)

    return estimate


def _check(directions: int, chunk: int, candidates: int, exact_top: int, checkpoint: bool, guided: bool) -> None:
    """What only this estimator asks of its options."""
    if chunk < 0 or chunk >= directions > 0:
        raise ValueError(f"chunk = {chunk} with directions = {directions}: give less than that, or 0 for all at once.")
    if exact_top < -1:
        raise ValueError(f"exact_top = {exact_top}: give a number of blocks, or -1 for all of them.")
    if guided and (directions < 2 or candidates > 1):
        raise ValueError(
            f"guided with directions = {directions} and candidates = {candidates}: it takes one direction of at least "
            f"2, and leaves nothing to choose. Set directions to 2 or more, candidates to 1."
        )
    if checkpoint and not exact_top:
        raise ValueError("checkpoint has no effect with exact_top = 0: no block is run backwards. Remove it.")


class _Slopes(NamedTuple):
    """What is linear in the loss."""

    loss: float
    slopes: list[float]  # c_k
    dense: dict[str, Tensor]  # the exact gradient above the cut


def _passes(share: float, runs: int, tangents: int, checkpoint: bool) -> Passes:
    """`runs` value passes below the cut and one above, K tangents below, one pass back above."""
    above = share * (2 if checkpoint else 1)
    return Passes() + Passes(runs * (1 - share) + above, tangents * (1 - share), share)


class _Directions:
    """The directions of a step, in parts of at most `chunk`, 0 for all; one empty part where there are none.

    Several parts are drawn as they are asked for, once more for each piece of the batch, so that one is held. All are
    held where a law or a guide ties them to each other.
    """

    def __init__(self, seeds: list[int], like: Params, distribution: str, chunk: int, heading: Params) -> None:
        self.seeds, self.like, self.distribution = seeds, like, distribution
        self.size = chunk or len(seeds) + bool(heading) or 1
        apart = len(seeds) > self.size and distribution not in noise.JOINT and not heading
        random = noise.stack(seeds, like, distribution) if seeds and not apart else {}
        self.onto = terms.onto(heading, random)
        self.held = None if apart else terms.beside(heading, random)

    def __iter__(self) -> Iterator[Params]:
        if self.held is None:
            for i in range(0, len(self.seeds), self.size):
                yield noise.stack(self.seeds[i : i + self.size], self.like, self.distribution)
            return
        count = next((len(value) for value in self.held.values()), 0)
        for i in range(0, max(count, 1), self.size):
            yield {name: value[i : i + self.size] for name, value in self.held.items()}


def _straight(loss_fn: Callable[[Params], Tensor], params: Params, drawn: _Directions) -> _Slopes:
    """The loss and its slope along each direction, without a cut."""
    found = [jvp(loss_fn, params, part) for part in drawn]
    return _Slopes(float(found[0][0]), [slope for _, slopes in found for slope in slopes.tolist()], {})


def _through_cut(cut: Cut, params: Params, above: Params, drawn: _Directions) -> _Slopes:
    """The loss, c_k = <delta, d features_k> for each direction, and the exact gradient above.

    No part's tangents outlive it: the first one's until delta is known, the others' until they are contracted.
    """
    parts = iter(drawn)
    features, tangents = _features(cut, params, next(parts))
    exact = cuts.reverse(cut, params, above, features)
    slopes = _contracted(exact.deltas, tangents) if tangents else []
    del features, tangents
    for part in parts:
        slopes += _contracted(exact.deltas, jvp(cut.trunk, params, part)[1])
    return _Slopes(float(exact.loss), slopes, exact.dense)


def _features(cut: Cut, params: Params, drawn: Params) -> tuple[Features, Features]:
    if drawn:
        return jvp(cut.trunk, params, drawn)
    return cuts.answers(cut, params), ()


def _contracted(deltas: tuple[Tensor | None, ...], tangents: Features) -> list[float]:
    """<delta, tangent_k> for each direction."""
    used = [(delta, tangent) for delta, tangent in zip(deltas, tangents, strict=True) if delta is not None]
    return sum(((tangent * delta).flatten(1).sum(1) for delta, tangent in used), start=torch.zeros(())).tolist()
