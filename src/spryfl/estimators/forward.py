"""The gradient along random directions by forward-mode differentiation: no backward pass, no stored activations.

    c_k = <grad loss(w), v_k>      one jvp, exact          g_hat = (1/K) sum_k c_k v_k

Unbiased, with E|g_hat - g|^2 = ((d+1)/K) |g|^2 for Gaussian v of d values (d-1 for signs and sphere). Spry, Panchal
et al. 2024 (arXiv 2405.15551); Baydin et al. 2022 (arXiv 2202.08587). Cost: one value pass and K tangent passes, which
only need what lies at or after the first perturbed value; memory: one layer's values and tangents.

With `exact_head` the network is cut before the head. Reverse mode over the head alone gives its gradient and
delta = d loss / d features; the rest follows from the trunk's tangents, c_k = <delta, d features_k>. Same expectation,
and the head's values, often most of them, leave the random part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spryfl import noise, tree
from spryfl.jvp import jvp
from spryfl.types import Batch, Cut, Directional, Estimate, Estimator, Features, LossFn, Params, Passes


def forward(directions: int = 1, distribution: str = "gaussian", chunk: int = 0, exact_head: bool = False) -> Estimator:
    """Forward mode: g_hat = (1/K) sum_k c_k v_k with c_k the exact directional derivative along v_k.

    Args:
        directions: K, the number of directions a batch.
        distribution: gaussian, rademacher or sphere.
        chunk: directions at once, 0 for all: memory for `chunk` tangents, and another value pass a chunk.
        exact_head: take the head's gradient by reverse mode from the features, the rest by forward mode.

    Raises:
        ValueError: K < 1, chunk < 0 or without effect, or an unknown distribution.

    >>> from spryfl.estimators import forward
    >>> estimator = forward(directions=4, distribution="rademacher")
    """
    if directions < 1:
        raise ValueError(f"directions = {directions}: forward mode needs at least 1 direction a batch.")
    if chunk < 0 or chunk >= directions > 0:
        raise ValueError(f"chunk = {chunk} with directions = {directions}: give less than that, or 0 for all at once.")
    if distribution not in noise.DISTRIBUTIONS:
        raise ValueError(f"distribution = {distribution!r}; possible: {', '.join(noise.DISTRIBUTIONS)}.")

    def estimate(loss_fn: LossFn, params: Params, batch: Batch, seed: int) -> Estimate:
        cut = loss_fn.cut(batch, seed) if exact_head else None
        inside = tree.without(params, loss_fn.head) if cut else params
        seeds = [noise.child_seed(seed, "direction", k) for k in range(directions)] if inside else []
        along = noise.stack(seeds, inside, distribution) if inside else {}
        if cut is None:
            loss, slopes = jvp(lambda p: loss_fn(p, batch, seed), params, along, chunk=chunk or None)
            dense: Params = {}
        else:
            loss, slopes, dense = _through_cut(cut, params, along, loss_fn.head, chunk)
        terms = _terms(seeds, slopes, tuple(inside), distribution)
        passes = Passes(value=-(-len(seeds) // chunk) if chunk and seeds else 1, tangent=len(seeds))
        return Estimate(float(loss), dense, terms, passes)

    return estimate


def _through_cut(
    cut: Cut, params: Params, along: Params, head: frozenset[str], chunk: int
) -> tuple[Tensor, Tensor, Params]:
    """The loss, c_k = <delta, d features_k> for each direction, and the head's exact gradient."""
    features, tangents = _features(cut, params, along, chunk)
    leaves = tuple(value.detach().requires_grad_() for value in features)
    own = {name: params[name].detach().requires_grad_() for name in params if name in head}
    loss = cut.head({**params, **own}, leaves)
    grads = torch.autograd.grad(loss, [*leaves, *own.values()], allow_unused=True)
    deltas, exact = grads[: len(leaves)], grads[len(leaves) :]
    used = [(delta, tangent) for delta, tangent in zip(deltas, tangents, strict=True) if delta is not None]
    slopes = sum(((tangent * delta).flatten(1).sum(1) for delta, tangent in used), start=torch.zeros(()))
    dense = {name: torch.zeros_like(own[name]) if g is None else g for name, g in zip(own, exact, strict=True)}
    return loss.detach(), slopes, dense


def _features(cut: Cut, params: Params, along: Params, chunk: int) -> tuple[Features, Features]:
    if along:
        return jvp(cut.trunk, params, along, chunk=chunk or None)
    with torch.no_grad():
        features = cut.trunk(params)
    return features, tuple(torch.zeros((0, *value.shape), device=value.device) for value in features)


def _terms(seeds: list[int], slopes: Tensor, block: tuple[str, ...], distribution: str) -> tuple[Directional, ...]:
    """One term a direction; each scalar is rounded to float32, which is what four bytes on the wire can carry."""
    coefficients = (slopes.detach().float() / max(len(seeds), 1)).float().tolist() if seeds else []
    return tuple(Directional(s, c, block, distribution) for s, c in zip(seeds, coefficients, strict=True))
