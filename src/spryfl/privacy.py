"""Differential privacy of what a run makes public: each client's answer clipped, Gaussian noise on their sum.

    d_i = answer_i min(1, C / |answer_i|)         one client's whole answer, over all of its names
    g   = (sum_i d_i + z C n) / m,  n ~ N(0, I)   m the clients that were asked for a name; all weigh alike

(McMahan et al. 2018, arXiv 1710.06963, DP-FedAvg.) The answer is what the client moves its values by, its gradient, or,
with shared seeds, its scalars: few dimensions, so little noise. Neighbours are runs in which one client's data are
others: an answer then moves the sum by up to 2 C, so the Gaussian mechanism's multiplier is z / 2. A cohort is drawn
without replacement; epsilon is that of dp-accounting's Renyi accountant (Wang, Balle, Kasiviswanathan 2019, arXiv
1808.00087, Theorem 27).

Trusted is the server: it sees the answers. The noise follows from a key that the server draws and keeps in its state,
so that a resumed run ends in the same bits; it is a counter generator's, in float32, and not built against who knows
how floating point rounds. Cost: a pass over the answers and one draw.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from spryfl import noise
from spryfl.types import Params


class Privacy(NamedTuple):
    """What is promised, and how."""

    clip: float  # C, the largest norm of a client's answer, in its own units
    noise: float  # z: the noise on the sum has the standard deviation z C
    delta: float  # the chance that the promise of epsilon fails
    key: int = 0  # what the noise follows from; 0 = drawn by the server and kept by it


def drawn_key(promised: Privacy | None) -> int:
    """The key of a new run's noise: the one given, else one that nobody can know.

    Raises:
        ValueError: there is a promise, and no accountant installed to say what it is.
    """
    if promised is None:
        return 0
    if importlib.util.find_spec("dp_accounting") is None:
        raise ValueError('[privacy] needs an accountant that is not installed: pip install "spryfl[dp]"')
    return promised.key or secrets.randbelow(2**62 - 1) + 1


def clipped(answer: Params, most: float) -> dict[str, Tensor]:
    """An answer of norm `most` at the most, over all its names; a shorter one as it is.

    >>> import torch
    >>> clipped({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0)
    {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    length = math.sqrt(sum(float(value.double().square().sum()) for value in answer.values()))
    factor = min(1.0, most / length) if length else 1.0
    return {name: (value.double() * factor).to(value.dtype) for name, value in answer.items()}


def noisy_mean(
    answers: Sequence[Params], asked: Mapping[str, int], like: Params, promised: Privacy, seed: int
) -> dict[str, Tensor]:
    """g of this file's head: every asked name has a result, whoever answered, or absence would tell.

    Args:
        answers: what each client answered, under some of the names.
        asked: how many clients were asked for a name.
        like: shapes and types by name.
        promised: C and z.
        seed: of this round's noise.
    """
    near = [clipped(answer, promised.clip) for answer in answers]
    shapes = {name: like[name] for name in asked}
    drawn = noise.direction(seed, shapes)
    out = {}
    for name, count in asked.items():
        total = drawn[name].double() * (promised.noise * promised.clip)
        for answer in near:
            if name in answer:
                total = total + answer[name].double()
        out[name] = (total / count).to(like[name].dtype)
    return out


# (answers, how many were asked for a name, shapes and types by name) -> g
PrivateMean = Callable[[Sequence[Params], Mapping[str, int], Params], dict[str, Tensor]]


def private_mean(promised: Privacy, key: int, round_: int) -> PrivateMean:
    """`noisy_mean` with the noise of one round."""
    seed = noise.child_seed(key, "privacy", round_)
    return lambda answers, asked, like: noisy_mean(answers, asked, like, promised, seed)


@functools.lru_cache(maxsize=8)
def _accountant(multiplier: float, clients: int, cohort: int) -> Callable[[int, float], float]:
    """(rounds, delta) -> epsilon, for one kind of round."""
    import dp_accounting as dp  # heavy, and most runs promise nothing

    def spent(rounds: int, delta: float) -> float:
        book = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
        gaussian_ = dp.GaussianDpEvent(multiplier)
        one = gaussian_ if cohort >= clients else dp.SampledWithoutReplacementDpEvent(clients, cohort, gaussian_)
        return float(book.compose(one, rounds).get_epsilon(delta))

    return functools.lru_cache(maxsize=None)(spent)


def epsilon(promised: Privacy, rounds: int, clients: int, cohort: int) -> float:
    """What so many rounds have spent: values of a run in which one client's data were others differ by no more.

    >>> epsilon(Privacy(clip=1.0, noise=0.0, delta=1e-5), rounds=1, clients=10, cohort=5)
    inf
    """
    if promised.noise == 0:
        return math.inf if rounds else 0.0
    return _accountant(promised.noise / 2, clients, cohort)(rounds, promised.delta) if rounds else 0.0
