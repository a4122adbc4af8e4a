"""Two consecutive blocks with directions of their own; what block 1 computes is used again for block 2. FedSPZO.

    joint       for p: z1_p; for q: z2_pq; c_pq along (z1_p, z2_pq)     g1 = mean_pq c_pq z1_p, g2 = mean_pq c_pq z2_pq
    decoupled   c1_p along z1_p alone, c2_q along z2_q alone            g1 = mean_p c1_p z1_p,  g2 = mean_q c2_q z2_q

FedSPZO, arXiv 2502.10239: two blocks, more directions on the second, activations reused; the place of the cut, the
numbers and the scheme are not public, so they are options. "decoupled" is ours: in "joint" each block carries the
noise of the other's g.z. Joint with P1 = P2 = 1 is one step of MeZO, and so is a cut with nothing on one of its sides.
Cost in forward passes F, f2 the part of the blocks in block 2, f1 = 1 - f2 (jvp: tangent passes beside value passes):

                central               forward              jvp
    joint       2 P1 (f1 + P2 f2)     1 + P1 (f1 + P2 f2)  1 and P1 f1 + P1 P2 f2
    decoupled   f1 + 2 P1 + 2 P2 f2   1 + P1 + P2 f2       1 and P1 + P2 f2

With a budget the numbers are chosen in the call: after P1 + P2 pilot directions the rest is dealt by P2/P1 =
sqrt((d2 E2 / f2) / (d1 E1)), E_b the mean c_b^2, which makes the estimate's error least. Pilot and rest are averaged
with weights fixed beforehand, so that the estimate stays unbiased though the numbers depend on the pilot's scalars.
Memory: an inference pass of one piece of the batch and two hidden states; jvp: as many tangents as directions; with a
budget the hidden state of the whole batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spryfl import noise, tree
from spryfl.estimators import cuts, terms
from spryfl.estimators.pieces import summed
from spryfl.jvp import jvp
from spryfl.types import Batch, Cut, Directional, Estimate, Estimator, Features, LossFn, Params, Passes, Piece, Scalars

PAIRINGS = ("joint", "decoupled")
SCHEMES = ("central", "forward", "jvp")


def two_block(
    *,
    top: int = 1,
    pairing: str = "joint",
    p1: int = 1,
    p2: int = 4,
    scheme: str = "central",
    mu: float = 1e-3,
    distribution: str = "gaussian",
    clip: float = 0.0,
    budget: float = 0.0,
) -> Estimator:
    """Directions for two consecutive blocks of the network, the first block's hidden states reused.

    Args:
        top: how many of the network's blocks are in block 2, the head with them; 0 the head alone, -1 all.
        pairing: joint or decoupled.
        p1: directions of block 1 a batch.
        p2: directions of block 2; in "joint" for each one of block 1.
        scheme: central, forward or jvp: how a directional derivative is taken.
        mu: the perturbation's size, in units of the values; without effect in jvp.
        distribution: gaussian, rademacher, sphere, orthogonal or basis.
        clip: largest size of a directional derivative; 0 for none.
        budget: passes (value and tangent) that one estimate may take: p1 and p2 are then the pilot, and the rest is
            dealt by what they showed. 0: just p1 and p2. Only in "decoupled".

    Raises:
        ValueError: an option out of its range; a value that both blocks read; a budget below the pilot's cost.

    >>> from spryfl.estimators import two_block
    >>> estimator = two_block(top=2, pairing="decoupled", p1=1, p2=8)
    """
    _check(top, pairing, p1, p2, scheme, mu, budget)
    terms.check(min(p1, p2), distribution, clip)

    def estimate(loss_fn: LossFn, params: Params, batch: Batch, seed: int) -> Estimate:
        pieces = loss_fn.pieces(batch, seed)
        at = [loss_fn.cut(one.batch, one.seed, top) for one in pieces]
        run = _Run(pieces, at, params, scheme, mu, bool(budget))
        sizes = [tree.size(block) for block in run.blocks]
        law = _Law(seed, distribution, clip)
        if not all(sizes):
            parts = [_drawn(run, law, _one_sided(run, pairing, p1, p2, budget), 0)]
        elif budget:
            parts = _within(run, law, p1, p2, budget)
        else:
            parts = [_drawn(run, law, _joint(p1, p2) if pairing == "joint" else _decoupled(p1, p2), 0)]
        made = tuple(term for part in parts for term in part.terms)
        scalars = sum((part.scalars for part in parts), start=Scalars())
        return Estimate(run.mean_loss(), {}, made, Passes() + Passes(run.value, run.tangent), scalars)

    return estimate


def _check(top: int, pairing: str, p1: int, p2: int, scheme: str, mu: float, budget: float) -> None:
    for what, given, known in (("pairing", pairing, PAIRINGS), ("scheme", scheme, SCHEMES)):
        if given not in known:
            raise ValueError(f"{what} = {given!r}; possible: {', '.join(known)}.")
    if top < -1:
        raise ValueError(f"top = {top}: give a number of blocks, 0 for the head alone, or -1 for all.")
    if not 0 < mu < math.inf:
        raise ValueError(f"mu = {mu}: the size of a perturbation must be above 0.")
    if min(p1, p2) < 1:
        raise ValueError(f"p1 = {p1}, p2 = {p2}: each block needs at least 1 direction.")
    if budget < 0 or (budget and pairing != "decoupled"):
        raise ValueError(f'budget = {budget} with pairing = "{pairing}": only "decoupled" deals directions; else 0.')
    if budget and not top:
        raise ValueError("budget with top = 0: directions of the head cost nothing, so there is nothing to deal.")


class _Law(NamedTuple):
    """Where directions come from and which scalars are allowed."""

    seed: int
    distribution: str
    clip: float


class _Plan(NamedTuple):
    """Which directions are drawn, and along which of them derivatives are taken."""

    blocks: tuple[int, ...]  # of each term in order: 0 or 1
    pairs: tuple[tuple[int | None, int | None], ...]  # a derivative along (term of block 1, term of block 2)
    means: tuple[tuple[int, int], ...]  # the pairs from .. to that are averaged together


class _Part(NamedTuple):
    """What a plan gave."""

    terms: tuple[Directional, ...]
    scalars: Scalars
    squares: tuple[float, ...]  # the mean c^2 of each mean


def _joint(p1: int, p2: int) -> _Plan:
    """Each direction of block 1, then those of block 2 that go with it."""
    firsts = [p * (1 + p2) for p in range(p1)]
    pairs = tuple((first, first + 1 + q) for first in firsts for q in range(p2))
    return _Plan((0, *[1] * p2) * p1, pairs, ((0, p1 * p2),))


def _decoupled(p1: int, p2: int) -> _Plan:
    """The directions of block 1, then those of block 2."""
    pairs = (*((p, None) for p in range(p1)), *((None, p1 + q) for q in range(p2)))
    return _Plan((0,) * p1 + (1,) * p2, pairs, ((0, p1), (p1, p1 + p2)))


def _one_sided(run: _Run, pairing: str, p1: int, p2: int, budget: float) -> _Plan:
    """One block has no values: all directions are the other's, as many as the numbers or the budget allow."""
    second = bool(run.blocks[1])
    count = p1 if not second else p1 * p2 if pairing == "joint" else p2
    if budget:
        fixed, costs = run.costs()
        # Central differences along block 1 alone need no pass at the point itself.
        fixed = fixed if second or run.scheme != "central" else 0.0
        count = math.floor((budget - fixed) / costs[second] + 1e-9)
        if count < 1:
            raise ValueError(f"budget = {budget} passes; one direction takes {fixed + costs[second]:g}. Raise it.")
    return _decoupled(0, count) if second else _decoupled(count, 0)


def _within(run: _Run, law: _Law, p1: int, p2: int, budget: float) -> list[_Part]:
    """A pilot, and what is left of the budget dealt by its scalars."""
    fixed, costs = run.costs()
    fixed *= 2 if run.scheme == "jvp" else 1  # the rest runs the values anew
    spent = p1 * costs[0] + p2 * costs[1]
    left = budget - fixed - spent
    if left < sum(costs) - 1e-9:
        raise ValueError(
            f"budget = {budget} passes, but a pilot of {p1} + {p2} directions and one more of each take "
            f"{fixed + spent + sum(costs):g}. Raise the budget or lower p1 and p2."
        )
    pilot = _drawn(run, law, _decoupled(p1, p2), 0)
    energy = [tree.size(block) * square for block, square in zip(run.blocks, pilot.squares, strict=True)]
    n1, n2 = dealt((p1, p2), energy, costs, left)
    rest = _drawn(run, law, _decoupled(n1, n2), p1 + p2)
    weight = spent / (spent + left)
    return [_weighed(pilot, weight), _weighed(rest, 1 - weight)]


def _weighed(part: _Part, weight: float) -> _Part:
    scaled = terms.rounded([term.coefficient * weight for term in part.terms])
    return part._replace(terms=tuple(t._replace(coefficient=c) for t, c in zip(part.terms, scaled, strict=True)))


def dealt(done: Sequence[int], energy: Sequence[float], costs: Sequence[float], left: float) -> tuple[int, int]:
    """How many more directions each block gets: P2/P1 = sqrt((d2 E2 / e2) / (d1 E1 / e1)) over all, at least 1 each.

    Args:
        done: directions drawn so far.
        energy: d_b E_b, the values of each block times its mean squared scalar.
        costs: e_b, passes a direction.
        left: passes that may still be spent, at least one direction of each.
    """
    total = left + sum(n * cost for n, cost in zip(done, costs, strict=True))
    share = [math.sqrt(max(e, 1e-300) / cost) for e, cost in zip(energy, costs, strict=True)]
    first = total * share[0] / sum(s * cost for s, cost in zip(share, costs, strict=True)) - done[0]
    n1 = max(1, min(math.floor(first + 1e-9), math.floor((left - costs[1]) / costs[0] + 1e-9)))
    return n1, max(1, math.floor((left - n1 * costs[0]) / costs[1] + 1e-9))


def _drawn(run: _Run, law: _Law, plan: _Plan, start: int) -> _Part:
    """Carries a plan out; its terms are numbered from `start`."""
    seeds = [noise.child_seed(law.seed, "direction", start + k) for k in range(len(plan.blocks))]
    slopes = run.slopes(plan, _directions(run, law, plan, seeds))
    values, scalars, squares = [0.0] * len(seeds), Scalars(), []
    for begin, end in plan.means:
        kept = terms.guarded(slopes[begin:end], law.clip)
        for pair, value in zip(plan.pairs[begin:end], kept.mean(), strict=True):
            for k in pair:
                if k is not None:
                    values[k] += value
        scalars += kept.scalars
        squares.append(kept.scalars.squares / max(kept.kept, 1))
    names = [tuple(block) for block in run.blocks]
    made = tuple(
        Directional(seed, value, names[block], law.distribution)
        for seed, value, block in zip(seeds, terms.rounded(values), plan.blocks, strict=True)
    )
    return _Part(made, scalars, tuple(squares))


def _directions(run: _Run, law: _Law, plan: _Plan, seeds: Sequence[int]) -> Callable[[int], Params]:
    """The direction of each term. Those of a joint law are drawn as `noise.expand` does: what follows in one block."""
    if law.distribution not in noise.JOINT:
        return lambda k: noise.direction(seeds[k], run.blocks[plan.blocks[k]], law.distribution)
    held: list[dict[str, Tensor]] = []
    for block, group in itertools.groupby(range(len(seeds)), key=lambda k: plan.blocks[k]):
        held += terms.along([seeds[k] for k in group], run.blocks[block], law.distribution)
    return lambda k: held[k]


class _Work(NamedTuple):
    """What one piece adds to a plan: all of it linear in the loss, or the same for every piece."""

    base: float  # the loss at the point itself, where it is known
    losses: list[list[float]]  # of each pair, at each of its sides
    slopes: list[float]  # of each pair, where tangents give it
    value: float  # passes
    tangent: float


class _Run:
    """The two blocks of one batch, and an account of what was run."""

    def __init__(
        self, pieces: Sequence[Piece], at: Sequence[Cut], params: Params, scheme: str, mu: float, again: bool
    ) -> None:
        self.pieces, self.at, self.params, self.scheme, self.mu = pieces, at, params, scheme, mu
        self.again = again  # another plan comes, for which block 1's answers at the point itself are kept
        self.share = at[0].share
        self.blocks = cuts.split(at[0], params)
        self.value = self.tangent = 0.0
        self.losses: list[float] = []
        self.h0: dict[int, Features] = {}  # by the piece's number
        self.sides = (mu, -mu) if scheme == "central" else (mu,)

    def costs(self) -> tuple[float, tuple[float, float]]:
        """Passes of "decoupled": once, and for each direction of either block."""
        each = 2.0 if self.scheme == "central" else 1.0
        return 1 - self.share if self.scheme == "central" else 1.0, (each, each * self.share)

    def mean_loss(self) -> float:
        """The loss at the point itself, or the mean over the sides of the differences, finite ones alone."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        return sum(finite) / len(finite) if finite else math.nan

    def slopes(self, plan: _Plan, direction: Callable[[int], Params]) -> list[float]:
        """The directional derivative of each pair, from the sums over all pieces."""
        linear = self._exact if self.scheme == "jvp" else self._differences
        work = summed(self.pieces, lambda piece: linear(piece, plan, direction))
        self.value += work.value
        self.tangent += work.tangent
        if self.scheme == "central":
            self.losses += itertools.chain(*work.losses)
            return [(up - down) / (2 * self.mu) for up, down in work.losses]
        if self.scheme == "jvp" or not self.losses:
            self.losses.append(work.base)
        return work.slopes or [(loss - self.losses[0]) / self.mu for (loss,) in work.losses]

    def _hidden(self, cut: Cut, shift: Params, step: float) -> Features:
        return cuts.answers(cut, {**self.params, **_moved(self.params, shift, step)})

    def _loss(self, cut: Cut, hidden: Features, shift: Params, step: float) -> float:
        with torch.no_grad():
            return float(cut.head({**self.params, **_moved(self.params, shift, step)}, hidden))

    def _differences(self, piece: Piece, plan: _Plan, direction: Callable[[int], Params]) -> _Work:
        cut, h0, lower, upper = self.at[piece.number], self.h0.get(piece.number), 0, 0
        if h0 is None and (self.scheme == "forward" or any(first is None for first, _ in plan.pairs)):
            h0, lower = self._hidden(cut, {}, 0.0), 1
            if self.again:
                self.h0[piece.number] = h0
        base = 0.0
        if self.scheme == "forward" and not self.losses:
            base, upper = self._loss(cut, h0 or (), {}, 0.0), 1
        losses, hidden, last = [], [h0 or ()] * len(self.sides), None
        for first, second in plan.pairs:
            if first != last:  # block 1 runs once for each of its directions and sides
                along = direction(first) if first is not None else {}
                hidden = [self._hidden(cut, along, side) if along else h0 or () for side in self.sides]
                lower += len(self.sides) if along else 0
                last = first
            along = direction(second) if second is not None else {}
            losses.append([self._loss(cut, h, along, side) for h, side in zip(hidden, self.sides, strict=True)])
        upper += len(self.sides) * len(plan.pairs)
        return _Work(base, losses, [], lower * (1 - self.share) + upper * self.share, 0.0)

    def _exact(self, piece: Piece, plan: _Plan, direction: Callable[[int], Params]) -> _Work:
        """One run of both blocks for all pairs: tangents of h by the directions of block 1, then all of them on."""
        cut = self.at[piece.number]
        firsts = [k for k, block in enumerate(plan.blocks) if block == 0]
        hidden, tangents = self._tangents(cut, [direction(k) for k in firsts])
        rows = [firsts.index(first) if first is not None else len(firsts) for first, _ in plan.pairs]
        names = [f"feature {i}" for i in range(len(hidden))]
        along: dict[str, Tensor] = {}
        if firsts:
            for name, h, own in zip(names, hidden, tangents, strict=True):
                along[name] = torch.cat([own, torch.zeros_like(h)[None]])[rows]
        seconds = [direction(second) if second is not None else {} for _, second in plan.pairs]
        for name, value in self.blocks[1].items() if any(seconds) else ():
            none = torch.zeros_like(value, dtype=torch.float32)
            along[name] = torch.stack([one.get(name, none) for one in seconds])
        point = {**self.params, **dict(zip(names, hidden, strict=True))}
        head = lambda p: cut.head(tree.without(p, names), tuple(p[name] for name in names))  # noqa: E731
        loss, slopes = jvp(head, point, along)
        lower, upper = len(firsts) * (1 - self.share), len(rows) * self.share
        return _Work(float(loss), [], slopes.tolist(), 1.0, lower + upper)

    def _tangents(self, cut: Cut, drawn: Sequence[Params]) -> tuple[Features, Features]:
        if drawn:
            stacked = {name: torch.stack([one[name] for one in drawn]) for name in self.blocks[0]}
            return jvp(cut.trunk, self.params, stacked)
        hidden = cuts.answers(cut, self.params)
        return hidden, tuple(h.new_zeros((0, *h.shape)) for h in hidden)


def _moved(params: Params, shift: Params, step: float) -> dict[str, Tensor]:
    return {name: params[name] + step * value for name, value in shift.items()}
