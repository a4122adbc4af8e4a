"""One value for the server from the clients' values, name by name; plain, and robust against a few who lie.

    mean           sum_i p_i w_i / sum_i p_i        p_i the client's weight, its examples    (McMahan et al. 2017)
                   p_in = p_i / (1 + v_in)          weigh = "variance": v_in of client i's estimate of name n
    median         the middle value, by coordinate                                 (Yin et al. 2018, arXiv 1803.01498)
    trimmed_mean   the mean without the floor(share m) lowest and highest, by coordinate                 (the same)
    krum           the client nearest to its m - f - 2 nearest neighbours, f of m lying     (Blanchard et al. 2017)

m counts those who hold the name. The robust ones take no weights: who lies about values may lie about examples. All
move with their inputs, so that values, differences from the old values and tables of scalars are the same to them.
A name that nobody returned has no result: it keeps its value and its optimizer state. Clients come in the order of
their ids, and sums are in float64, so that the result does not depend on who answered first.

Cost: mean, one float64 copy of the values; median and trimmed_mean, m copies of one name; krum, m copies of one name
and m^2 passes over the values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from spryfl.types import Params

# By client: values, weight; and by client and name the relative variance of its estimate, where it is asked for.
Aggregator = Callable[..., dict[str, Tensor]]
Noise = Sequence[Mapping[str, float]]
WEIGHS = ("examples", "variance")


class TooFewError(ValueError):
    """Too few clients answered for what the aggregator promises: a round without a result, not the end of a run."""


def mean(weigh: str = "examples") -> Aggregator:
    """The weighted mean of each name over those who hold it: sum_i p_i w_i / sum_i p_i.

    By "variance" the weight of client i's answer for name n is p_i / (1 + v_in): v is the relative variance that its
    way to a gradient adds, E|g_hat - g|^2 = v |g|^2 (`noise.relative_variance`; 0 for an exact gradient). A batch's own
    gradient has a variance s^2 / p_i beside that, and an estimate of it (1 + v) s^2 / p_i where s^2, the variance from
    batch to batch, is large against |g|^2. These weights are its inverse: the mean of least variance of independent
    estimates. Equal v leave the weights by examples. They do not hang on the values, so the mean stays unbiased for
    clients whose data are alike; where they differ, it leans towards the data of those with the better estimates.

    Args:
        weigh: "examples", or "variance" as well.

    Raises:
        ValueError: the option is not possible.

    >>> from torch import tensor
    >>> mean()([{"a": tensor([1.0])}, {"a": tensor([5.0]), "b": tensor([2.0])}], [3, 1])
    {'a': tensor([2.]), 'b': tensor([2.])}
    """

    if weigh not in WEIGHS:
        raise ValueError(f"weigh = {weigh!r} of mean; possible: {', '.join(WEIGHS)}.")

    def aggregate(clients: Sequence[Params], weights: Sequence[float], noise: Noise = ()) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        weight: dict[str, float] = {}
        dtype = {name: value.dtype for params in clients for name, value in params.items()}
        variances = noise if noise and weigh == "variance" else [{}] * len(clients)
        for params, examples, variance in zip(clients, weights, variances, strict=True):
            for name, value in params.items():
                own = examples / (1 + variance.get(name, 0.0))
                share = value.double() * own
                total[name] = total[name] + share if name in total else share
                weight[name] = weight.get(name, 0.0) + own
        return {name: (value / weight[name]).to(dtype[name]) for name, value in total.items()}

    return aggregate


def median() -> Aggregator:
    """The middle value of each coordinate over those who hold it, the mean of the two middle ones of an even number.

    Fewer than half of the holders cannot move it beyond the others' values. Of one holder it is that one's value, so
    it protects nothing where each unit has one owner.

    >>> from torch import tensor
    >>> median()([{"a": tensor([1.0])}, {"a": tensor([2.0])}, {"a": tensor([9e9])}], [1, 1, 1])
    {'a': tensor([2.])}
    """

    def middle(values: Tensor) -> Tensor:
        low, high = (len(values) - 1) // 2, len(values) // 2
        ordered = values.sort(0).values
        return (ordered[low].double() + ordered[high]) / 2

    return _by_coordinate(middle)


def trimmed_mean(share: float = 0.2) -> Aggregator:
    """The mean of each coordinate without its lowest and highest values.

    Args:
        share: of the m holders of a name, floor(share m) are dropped at each end, in [0, 0.5). With fewer than
            1 / share holders that is nobody, and what is left is the plain unweighted mean.

    Raises:
        ValueError: the option is not possible.

    >>> from torch import tensor
    >>> trimmed_mean(0.25)([{"a": tensor([v])} for v in (1.0, -9e9, 3.0, 9e9)], [1, 1, 1, 1])
    {'a': tensor([2.])}
    """
    if not 0 <= share < 0.5:
        raise ValueError(
            f"share = {share} of trimmed_mean must be at least 0 and below 0.5: it is dropped at each end."
        )

    def trimmed(values: Tensor) -> Tensor:
        drop = int(share * len(values) + 1e-9)  # 0.29 of 100 are 29, not 28.999...
        return values.sort(0).values[drop : len(values) - drop].double().mean(0)

    return _by_coordinate(trimmed)


def krum(byzantine: int = 1, keep: int = 1) -> Aggregator:
    """The values of the client with the smallest sum of squared distances to its m - f - 2 nearest, over all names.

    Equal sums fall to the lower id. A client is judged as a whole, so all must hold the same names.

    Args:
        byzantine: f, how many of a round may lie.
        keep: how many of the best are taken, as their plain mean; above 1 it is Multi-Krum.

    Raises:
        TooFewError: a round with fewer than 2 f + 3 answers (or keep + f, so that those kept can all be honest) has no
            result. A smaller f for that round would promise less than was asked for.
        ValueError: two clients hold different names.

    >>> from torch import tensor
    >>> krum()([{"a": tensor([v])} for v in (1.0, 1.5, 9e9, 2.25, 1.75)], [1, 1, 1, 1, 1])
    {'a': tensor([1.5000])}
    """
    if byzantine < 0 or keep < 1:
        raise ValueError(
            f"byzantine = {byzantine} and keep = {keep} of krum: byzantine must be 0 or more, keep 1 or more."
        )
    fewest = max(2 * byzantine + 3, keep + byzantine)

    def aggregate(clients: Sequence[Params], weights: Sequence[float], noise: Noise = ()) -> dict[str, Tensor]:
        if not clients:
            return {}
        if any(params.keys() != clients[0].keys() for params in clients):
            raise ValueError(
                "krum needs every client to train the same values: assignment everyone. "
                "Or use median or trimmed_mean, which judge each value by itself."
            )
        if len(clients) < fewest:
            raise TooFewError(
                f"krum with byzantine = {byzantine} and keep = {keep} needs {fewest} clients, {len(clients)} answered. "
                f"Raise the cohort or lower byzantine or keep."
            )
        scores = _scores(clients, len(clients) - byzantine - 2)
        best = sorted(range(len(clients)), key=lambda i: scores[i])[:keep]
        return mean()([clients[i] for i in sorted(best)], [1.0] * keep)

    return aggregate


AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
}


def _by_coordinate(reduce: Callable[[Tensor], Tensor]) -> Aggregator:
    """An aggregator from what it does to one name: `reduce` takes the holders' values, (m, *shape), to float64."""

    def aggregate(clients: Sequence[Params], weights: Sequence[float], noise: Noise = ()) -> dict[str, Tensor]:
        names = dict.fromkeys(name for params in clients for name in params)
        held = {name: [params[name] for params in clients if name in params] for name in names}
        return {name: reduce(torch.stack(values)).float() for name, values in held.items()}

    return aggregate


def _scores(clients: Sequence[Params], nearest: int) -> list[float]:
    """Krum's score of each client: the sum of squared distances to its `nearest` nearest others, over all names."""
    distances = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    for name in clients[0]:
        rows = torch.stack([params[name] for params in clients]).double().reshape(len(clients), -1)
        distances += torch.stack([(rows - row).square().sum(1) for row in rows]).cpu()
    # Sorted sums, without the distance 0 to oneself, do not depend on the order of clients.
    return distances.sort(1).values[:, 1 : nearest + 1].sum(1).tolist()
