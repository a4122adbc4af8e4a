"""One gradient for the server from the clients' answers. Cost: one copy of the trainable values.

    g[n] = w[n] - sum_i p_i w_i[n] / sum_i p_i      over the clients i that were told to train n, p_i their examples

A name that nobody returned has no gradient: it keeps its value and its optimizer state. Updates are reduced in the
order of client ids, in float64, so that the result does not depend on who answered first.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from spryfl.types import Params, Update


def mean_by_name(updates: Iterable[Update]) -> dict[str, Tensor]:
    """The mean of each name over those who returned it, weighted by their examples."""
    total: dict[str, Tensor] = {}
    weight: dict[str, float] = {}
    for update in sorted(updates, key=lambda u: u.client):
        for name, value in update.params.items():
            share = value.double() * update.examples
            total[name] = total[name] + share if name in total else share
            weight[name] = weight.get(name, 0.0) + update.examples
    return {name: (value / weight[name]).float() for name, value in total.items()}


def pseudo_gradient(params: Params, updates: Iterable[Update]) -> dict[str, Tensor]:
    """Old values minus the mean of the new ones, for the names that came back."""
    return {name: params[name] - value.to(params[name].device) for name, value in mean_by_name(updates).items()}
