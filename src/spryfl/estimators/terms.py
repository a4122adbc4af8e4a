"""From directional derivatives to the terms of an estimate: seeds, guided choice, guards, coefficients.

    seed of the k-th term      child_seed(seed, "direction", k)          so that seeds need not travel
    coefficient of term k      float32(weight c_k / number kept)         0 where c_k is refused

A scalar that is not finite is refused and the mean is over the others; one above `clip` in size is cut to it. Guided
choice (FwdLLM, Xu et al. 2024, arXiv 2308.13894): of n K candidates those K with the largest cosine to the last
aggregated gradient. Cost: drawing the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spryfl import noise, tree
from spryfl.types import Directional, Params, Scalars


class Guarded(NamedTuple):
    """Scalars that may be used."""

    values: tuple[float, ...]  # 0 where refused, cut at the clip
    kept: int
    scalars: Scalars  # of the raw ones

    def mean(self, weight: float = 1.0) -> list[float]:
        """Each value's share in the weighted mean over those that were kept."""
        return [weight * value / max(self.kept, 1) for value in self.values]


def check(directions: int, distribution: str, clip: float, candidates: int = 1) -> None:
    """A ValueError that says which option does not fit."""
    if directions < 1:
        raise ValueError(f"directions = {directions}: an estimate needs at least 1 direction a batch.")
    if distribution not in noise.DISTRIBUTIONS:
        raise ValueError(f"distribution = {distribution!r}; possible: {', '.join(noise.DISTRIBUTIONS)}.")
    if not clip >= 0:
        raise ValueError(f"clip = {clip}: the largest size of a scalar must be above 0, or 0 for none.")
    if candidates < 1:
        raise ValueError(f"candidates = {candidates}: give 1 for no choice, or how many to draw for each one kept.")
    if candidates > 1 and distribution in noise.JOINT:
        raise ValueError(
            f"candidates = {candidates} with distribution = {distribution!r}: the choice would come before the "
            f"directions are made to fit each other. Use candidates = 1 or another distribution."
        )


def chosen(seed: int, directions: int, like: Params, distribution: str, candidates: int, guide: Params) -> list[int]:
    """The seeds of K directions: the first K, or of n K candidates those nearest to the guide, in the order drawn."""
    toward = tree.select(guide, [name for name in like if name in guide])
    if candidates == 1 or not tree.norm(toward):
        return [noise.child_seed(seed, "direction", k) for k in range(directions)]
    seeds = [noise.child_seed(seed, "direction", k) for k in range(directions * candidates)]
    near = [_cosine(noise.direction(one, like, distribution), toward) for one in seeds]
    best = sorted(range(len(seeds)), key=lambda k: -near[k])[:directions]
    return [seeds[k] for k in sorted(best)]


def _cosine(along: Params, toward: Params) -> float:
    """Up to the guide's own length, which is the same for all."""
    product = sum(float((along[name].double() * value.double()).sum()) for name, value in toward.items())
    return product / tree.norm(along)


def heading(guide: Params, like: Params) -> dict[str, Tensor]:
    """u, the guide's direction over a block, |u| = 1 and 0 where the guide has nothing; empty without a guide."""
    own = {name: guide[name] if name in guide else torch.zeros_like(value) for name, value in like.items()}
    length = tree.norm(own)
    return tree.scale(own, 1 / length) if 0 < length < math.inf else {}


def beside(heading: Params, random: Params) -> Params:
    """u in front of random directions, name -> (K, *shape)."""
    return {name: torch.cat([u[None].to(random[name]), random[name]]) for name, u in heading.items()} or random


def onto(heading: Params, random: Params) -> list[float]:
    """<v_k, u> of each random direction; nothing without u."""
    parts = [(random[name].flatten(1).double() @ u.flatten().double()) for name, u in heading.items()]
    return torch.stack(parts).sum(0).tolist() if parts else []


def apart(slopes: Sequence[float], onto: Sequence[float]) -> Sequence[float]:
    """The slopes along P v_k, P = I - u u^T, from <g, u> and the slopes along v_k; as they are without u."""
    return [c - part * slopes[0] for c, part in zip(slopes[1:], onto, strict=True)] if onto else slopes


def along_heading(heading: Params, slopes: Sequence[float], onto: Sequence[float], kept: Guarded) -> dict[str, Tensor]:
    """The estimate's part along u: (<g, u> - sum_k c_k <v_k, u> / K) u, as the terms are along v_k, not P v_k."""
    if not onto:
        return {}
    part = sum(c * one for c, one in zip(rounded(kept.mean()), onto, strict=True))
    return tree.scale(heading, slopes[0] - part)


def along(seeds: Sequence[int], like: Params, distribution: str) -> Iterator[dict[str, Tensor]]:
    """The directions one after the other; only those of a joint law are held all at once."""
    if distribution not in noise.JOINT:
        yield from (noise.direction(seed, like, distribution) for seed in seeds)
        return
    drawn = noise.stack(seeds, like, distribution)
    yield from ({name: value[k] for name, value in drawn.items()} for k in range(len(seeds)))


def guarded(slopes: Sequence[float], clip: float = 0.0) -> Guarded:
    """Refuses what is not finite, cuts what is larger than `clip`; 0 is no clip. In float32, which is what travels."""
    raw = rounded(slopes)
    finite = [c for c in raw if math.isfinite(c)]
    clipped = sum(abs(c) > clip for c in finite) if clip else 0
    values = tuple(_cut(c, clip) if math.isfinite(c) else 0.0 for c in raw)
    squares, largest = sum(c * c for c in finite), max(map(abs, finite), default=0.0)
    return Guarded(values, len(finite), Scalars(len(raw), len(raw) - len(finite), clipped, squares, largest))


def _cut(c: float, clip: float) -> float:
    return max(-clip, min(clip, c)) if clip else c


def rounded(values: Sequence[float]) -> list[float]:
    """In float32, as four bytes carry them."""
    return torch.tensor(list(values), dtype=torch.float64).float().tolist()


def made(
    seeds: Sequence[int], coefficients: Sequence[float], block: Sequence[str], distribution: str
) -> tuple[Directional, ...]:
    """One term a direction over one block; each coefficient is rounded to float32, the four bytes on the wire."""
    return tuple(
        Directional(s, c, tuple(block), distribution) for s, c in zip(seeds, rounded(coefficients), strict=True)
    )
