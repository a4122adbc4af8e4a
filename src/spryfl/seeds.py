"""What the directions of a federation's clients follow from: own seeds, shared ones, or a pool. Costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Seeds(NamedTuple):
    """What the clients' directions follow from."""

    shared: bool = False  # all clients of a round have the same
    pool: int = 0  # how many there are in the whole run; 0 = as many as are needed
    weighted: bool = False  # seeds of the pool whose scalars are large are drawn more often


def own_seeds() -> Seeds:
    """Each client, round and step has seeds of its own."""
    return Seeds()


def shared_seeds() -> Seeds:
    """All clients of a round share their seeds, so that the mean of their scalars is the mean of their models."""
    return Seeds(shared=True)


def seed_pool(size: int = 1024, weighted: bool = False) -> Seeds:
    """All steps of the run draw from a pool: the values are those of round 0 and one sum a seed.

    Args:
        size: how many seeds.
        weighted: draw a seed with the softmax of its mean |c|, scaled to [0, 1] (FedKSeed-Pro); else all alike.
    """
    if size < 1:
        raise ValueError(f"size = {size} of a pool of seeds; it must be 1 or more.")
    return Seeds(pool=size, weighted=weighted)


SEEDS: dict[str, Callable[..., Seeds]] = {"own": own_seeds, "shared": shared_seeds, "pool": seed_pool}
