"""Gradients as seeds and scalars: made small by a client, made into the same values again by whoever holds the start.

    step t of a client:  w -= step(g_t),  g_t = sum_k c_k direction(seed_k)      a trace is all c_k; the seeds follow

`replay` runs a trace through the client's own optimizer, step by step, and ends in the client's bits. `rebuild` sums a
pool of seeds, w = w_0 - sum_s a_s direction(s) (FedKSeed, arXiv 2312.06353). Cost: four bytes a term on the way, and a
draw of the directions' values where they are made again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from spryfl import noise, tree
from spryfl.optimizers import Optimizer
from spryfl.types import Directional, Layout, Params, Pool, Trace

Step = tuple[Directional, ...]  # the terms of one local step
_NO_SEEDS = torch.empty(0, dtype=torch.int64)


class Source(Protocol):
    """What the seeds of a trace follow from: an instruction or a share."""

    @property
    def seed(self) -> int: ...
    @property
    def pool(self) -> Pool | None: ...


def step_seed(source: Source, step: int) -> int:
    """The seed of a local step: of its own, or drawn from the pool."""
    if source.pool is None:
        return noise.child_seed(source.seed, "step", step)
    return pool_seed(source.pool, pool_index(source, step))


def pool_seed(pool: Pool, index: int) -> int:
    """The seed with that number in the pool."""
    return noise.child_seed(pool.seed, "pool", index)


def pool_index(source: Source, step: int) -> int:
    """Which seed of the pool a local step uses: drawn with the pool's chances, the same wherever it is asked."""
    assert source.pool is not None
    draw = random.Random(noise.child_seed(source.seed, "draw", step))
    return draw.choices(range(source.pool.size), source.pool.chances.tolist() or None)[0]


def term_seeds(seed: int, count: int) -> list[int]:
    """The seeds of a step's terms, by the convention that all estimators here keep."""
    return [noise.child_seed(seed, "direction", k) for k in range(count)]


def compress(steps: Sequence[Step], seeded: Sequence[str], names: Sequence[str], source: Source) -> Trace:
    """The trace of some local steps.

    Args:
        steps: each step's terms.
        seeded: those of `names` that have no dense part.
        names: the instruction's.
        source: what the seeds follow from; seeds that do not are sent, eight bytes each.
    """
    shapes = [_layout(step, seeded, names) for step in steps]
    distinct = tuple(dict.fromkeys(shapes))
    follow = all([t.seed for t in s] == term_seeds(step_seed(source, i), len(s)) for i, s in enumerate(steps))
    terms = [term for step in steps for term in step]
    return Trace(
        scalars=torch.tensor([term.coefficient for term in terms], dtype=torch.float32),
        layouts=distinct,
        steps=tuple(distinct.index(shape) for shape in shapes),
        seeds=_NO_SEEDS if follow else torch.tensor([term.seed for term in terms], dtype=torch.int64),
    )


def _layout(step: Step, seeded: Sequence[str], names: Sequence[str]) -> Layout:
    place, whole = {name: i for i, name in enumerate(names)}, tuple(seeded)
    runs = []
    for (block, distribution), group in itertools.groupby(step, key=lambda t: (t.block, t.distribution)):
        places = () if block == whole else tuple(place[name] for name in block)
        runs.append((places, distribution, len(list(group))))
    return tuple(runs)


def steps_of(trace: Trace, seeded: Sequence[str], names: Sequence[str], source: Source) -> Iterator[Step]:
    """Each step's terms again.

    Args:
        trace: as `compress` made it.
        seeded: the names that a run without places means: those without a dense part.
        names: the instruction's.
        source: what the seeds follow from.
    """
    scalars, start = trace.scalars.tolist(), 0
    for i, which in enumerate(trace.steps):
        layout = trace.layouts[which]
        count = terms_in(layout)
        own = slice(start, start + count)
        seeds = trace.seeds[own].tolist() if len(trace.seeds) else term_seeds(step_seed(source, i), count)
        yield tuple(_terms(layout, seeds, scalars[own], seeded, names))
        start += count


def _terms(
    layout: Layout, seeds: Sequence[int], scalars: Sequence[float], seeded: Sequence[str], names: Sequence[str]
) -> Iterator[Directional]:
    pairs = iter(zip(seeds, scalars, strict=True))
    for places, distribution, count in layout:
        block = tuple(names[i] for i in places) or tuple(seeded)
        for seed, scalar in itertools.islice(pairs, count):
            yield Directional(seed, scalar, block, distribution)


def terms_in(layout: Layout) -> int:
    """How many terms a step of this layout has."""
    return sum(count for _, _, count in layout)


def objection(trace: Trace, names: Sequence[str], dense: Params) -> str:
    """What is wrong with a trace that a client claims, or an empty text."""
    counts = [terms_in(layout) for layout in trace.layouts]
    places = [i for layout in trace.layouts for run in layout for i in run[0]]
    if not trace.steps or any(not 0 <= which < len(counts) for which in trace.steps):
        return "returns a trace without steps, or of steps without a layout"
    if any(not 0 <= i < len(names) or names[i] in dense for i in places):
        return "returns scalars for values that were not its own"
    if any(kind not in noise.DISTRIBUTIONS or count < 1 for layout in trace.layouts for _, kind, count in layout):
        return "returns scalars of an unknown distribution"
    total = sum(counts[which] for which in trace.steps)
    if trace.scalars.shape != (total,) or trace.seeds.shape not in ((total,), (0,)):
        return f"returns {trace.scalars.numel()} scalars for {total} terms"
    return "" if bool(torch.isfinite(trace.scalars).all()) else "returns scalars that are not finite"


def replay(
    steps: Iterator[Step], start: Params, optimizer: Optimizer, scale: float | Mapping[str, float]
) -> dict[str, Tensor]:
    """The values that a client ends in: its local steps again, from the same start with the same optimizer.

    Args:
        steps: each step's terms.
        start: the values that they move.
        optimizer, scale: the client's.

    Returns:
        new values of all names of `start`: the client's bits on the same machine with the same number of threads.
    """
    params, state = dict(start), optimizer.init(start)
    for terms in steps:
        params, state = optimizer.step(params, noise.expand(terms, params), state, scale)
    return params


def mean_gradient(steps: Iterator[Step], like: Params) -> dict[str, Tensor]:
    """The mean over the steps of the gradients that their terms stand for."""
    total: dict[str, Tensor] = {}
    count = 0
    for terms in steps:
        total, count = tree.add(total, noise.expand(terms, like)), count + 1
    return tree.scale(total, 1 / count)


def rebuild(origin: Params, summed: Tensor, layout: Layout, pool: Pool) -> dict[str, Tensor]:
    """w = w_0 - sum_s a_s direction(s) over a pool of seeds.

    Args:
        origin: the values before round 1 that the pool moves, in the order of the instruction's names.
        summed: a, (pool, terms of a step); a seed never drawn has zeros and costs nothing.
        layout: of a step's terms.
        pool: the pool.
    """
    names, count = list(origin), terms_in(layout)
    total = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in origin.items()}
    for index in summed.abs().sum(1).nonzero().flatten().tolist():
        seeds = term_seeds(pool_seed(pool, index), count)
        terms = _terms(layout, seeds, summed[index].tolist(), names, names)
        for name, moved in noise.expand(terms, origin).items():
            total[name] += moved
    return {name: (value.double() - total[name]).to(value.dtype) for name, value in origin.items()}


def fingerprint() -> str:
    """What this machine draws for a probe seed, in eight hex digits: equal wherever directions are equal.

    Signs are equal everywhere; normals may differ between versions of a mathematics library, and a distribution of
    one's own may be missing on one side: this turns both into an error in place of silent nonsense.
    """
    return _probed(tuple(sorted(noise.DISTRIBUTIONS.items())))


@functools.lru_cache(maxsize=4)
def _probed(distributions: tuple[tuple[str, Callable[..., dict[str, Tensor]]], ...]) -> str:
    like = {"probe": torch.empty(257)}
    drawn = [draw([7, 8], like)["probe"] for _, draw in distributions]
    whole = torch.stack(drawn).contiguous().numpy().tobytes()
    return hashlib.blake2b(whole, digest_size=4).hexdigest()
