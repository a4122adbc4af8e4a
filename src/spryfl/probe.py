"""How a round's direction stands to the true gradient: alignment, energy and steps by unit, on a probe batch.

    w       the values that the round began with; all gradients below are taken there
    g       grad of the mean loss of the probe rows, reverse mode, over the values that the round moved
    g_hat   mean over the answering clients, by examples and by value, of their estimates on those same rows: one batch,
            the client's own values and estimator, seeds of the probe's own
    cos     <g_hat, g> / (|g_hat| |g|)
    law     |g| / sqrt(|g|^2 + e), e = E|g_hat - g|^2 by theory: a Gaussian estimate of d values by K directions has
            e = (d + 1) / K |g|^2, spread evenly over its d values; the mean over M owners a sum of p^2 of theirs.
            So law^2 = MK / (d + 1 + MK) where all train all, and the sum over blocks where units are split.
    round_cos, round_law    the same of what the round aggregated (old minus mean of new values, or the mean gradient):
            local steps on the clients' own rows. Its law counts all directions of all steps, as if w stood still.
    step_cos                of the change that the server made of it, with the sign of a gradient
    seeded_cos, seeded_law  cos and law over those values alone that are estimated along directions: an exact head has
                            most of the gradient, and hides the rest

Shared seeds draw once for all owners. An exact gradient adds nothing to e. Chosen candidates and directions
along a guide are taken for free draws. Probe rows are drawn once from all clients' training rows; no dropout. State and
the other records stay as they are, to the bit. Cost of a look: a value and a backward pass of the probe rows, a batch
of them for each answering client (so rows / (batch size x local steps) of a round), with exchange by scalars a replay.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from spryfl import ledger, models, noise, tasks, train, tree
from spryfl.estimators import backprop
from spryfl.models import Model
from spryfl.tasks import Rows
from spryfl.types import Batch, Estimate, Estimator, Instruction, LossFn, Params, ServerState, Unit, Update

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
Record = dict[str, Any]


class Probe(NamedTuple):
    """What a look needs of the run."""

    plan: train.Plan
    bind: Callable[[Instruction, Params], LossFn]  # (whose model, values that stay as they are) -> the loss of others
    exact: Callable[[Params], LossFn]  # the same loss for reverse mode, in pieces
    batch: Batch
    every: int = 0  # rounds; 0 = with each evaluation


class Estimated(NamedTuple):
    """One client's estimate on the probe rows."""

    update: Update  # what it answered in the round
    made: Estimate
    gradient: dict[str, Tensor]
    variance: dict[str, float]  # E|g_hat - g|^2 / |g|^2 of its block by theory, by name
    steps: int  # local steps of the round


def drawn(parts: Sequence[Sequence[int]], count: int, seed: int) -> list[int]:
    """The probe's rows: `count` of all clients' training rows, the same all along a run."""
    rows = sorted(row for part in parts for row in part)
    return sorted(random.Random(noise.child_seed(seed, "probe")).sample(rows, min(count, len(rows))))


def watch(
    plan: train.Plan,
    rows: Rows,
    parts: Sequence[Sequence[int]],
    held: Callable[[str], tuple[Model, int]],
    asked: tuple[int, int, int],
) -> train.Watch:
    """What the loop asks after a round.

    Args:
        plan: the run's.
        rows: the training rows.
        parts: each client's.
        held: a class of clients -> (its model, rows at once; 0 = whole batches).
        asked: (rows of the probe, rounds between two looks or 0 for each evaluation, rows of a batch).
    """
    count, every, size = asked
    model, most = held("")
    batch = tasks.collate(rows, drawn(parts, count, plan.seed), model.device)

    def bind(told: Instruction, fixed: Params) -> LossFn:
        own, pieces = held(told.client_class)
        return models.loss_fn(own, fixed, tree.to(told.guide, own.device), micro_batch=pieces)

    def exact(fixed: Params) -> LossFn:
        return models.loss_fn(model, fixed, micro_batch=most or size)

    probe = Probe(plan, bind, exact, batch, every)

    def look(
        before: ServerState, told: Sequence[Instruction], kept: Sequence[Update], after: ServerState, due: bool
    ) -> Record:
        since = time.perf_counter()
        if not kept or not (after.round % every == 0 if every else due):
            return {}
        found = alignment(probe, before, told, kept, after)
        return {"alignment": found, "probe_seconds": time.perf_counter() - since}

    return look


def alignment(
    probe: Probe, before: ServerState, told: Sequence[Instruction], kept: Sequence[Update], after: ServerState
) -> Record:
    """The numbers of one round; None where a norm is 0 or a number is not finite.

    Args:
        probe: rows and losses.
        before: the state that the round began with.
        told: its instructions.
        kept: the answers that counted.
        after: the state that it made.
    """
    asked = {one.client: one for one in told}
    owners = sorted(kept, key=lambda update: update.client)
    device = next(iter(probe.batch.values())).device
    values = tree.to(before.params, device)
    made = [estimated(probe, values, asked[update.client], update) for update in owners]
    names = [name for name in before.params if any(name in one.gradient for one in made)]
    truth = _exact(probe, values, names)
    mean = mean_of(made, names)
    aggregated = tree.select(_aggregated(probe, before, asked, owners, after), names)
    change = tree.select(tree.subtract(before.params, after.params), names)
    shared = probe.plan.method.seeds.shared
    scalars = [c for one in made for c in slopes(one.made)]
    along = {name for one in made for term in one.made.terms for name in term.block}
    seeded = tree.select(truth, [name for name in names if name in along])
    expected = errors(made, truth, shared)
    return {
        "cos": _cosine(mean, truth),
        "law": law(truth, expected),
        "seeded_cos": _cosine(tree.select(mean, seeded), seeded),
        "seeded_law": law(seeded, expected),
        "round_cos": _cosine(aggregated, truth),
        "round_law": law(truth, errors(made, truth, shared, steps=True)),
        "step_cos": _cosine(change, truth),
        "values": tree.size(truth),
        "seeded_values": tree.size(seeded),
        "gradient": _finite(tree.norm(truth)),
        "scalars": spread(scalars),
        "units": _by_unit(probe.plan.units, mean, truth, change, before.params),
    }


def law(truth: Params, errors: float) -> float | None:
    """The alignment that theory expects: |g| / sqrt(|g|^2 + e), e the expected squared error of the estimate.

    >>> import torch
    >>> round(law({"w": torch.ones(99)}, 99 * 100 / 25) ** 2, 6)  # d = 99, M K = 25: MK / (d + 1 + MK)
    0.2
    """
    square = tree.norm(truth) ** 2
    return math.sqrt(square / (square + errors)) if square and math.isfinite(square + errors) else None


def errors(made: Sequence[Estimated], truth: Params, shared: bool, steps: bool = False) -> float:
    """E|g_hat - g|^2 of the mean by theory: sum_n sum_m p^2 v_b |g_b|^2 d_n / d_b; p in place of p^2 on shared seeds.

    Args:
        made: the owners' estimates.
        truth: g.
        shared: whether all draw on one seed.
        steps: the directions of all local steps count.
    """
    total = 0.0
    for one, weights in zip(made, _weights(made, list(truth)), strict=True):
        for block in {term.block for term in one.made.terms}:
            own = tree.select(truth, block)
            even = tree.norm(own) ** 2 / tree.size(own) / (one.steps if steps else 1)
            sizes = {name: own[name].numel() * one.variance[name] * even for name in block}
            total += sum(size * weights[name] ** (1 if shared else 2) for name, size in sizes.items())
    return total


def slopes(estimate: Estimate) -> list[float]:
    """The directional derivatives behind an estimate's terms: each coefficient times the terms of its block.

    Of `normalize` and of joint blocks these are the derivatives as they are weighed.
    """
    blocks = [term.block for term in estimate.terms]
    return [term.coefficient * blocks.count(term.block) for term in estimate.terms]


def spread(values: Sequence[float]) -> Record:
    """How many, mean, standard deviation, and the quantiles 0, 5, 25, 50, 75, 95, 100 %."""
    if not values:
        return {"count": 0}
    ordered, last = sorted(values), len(values) - 1
    at = [(ordered[math.floor(q * last)], ordered[math.ceil(q * last)], q * last % 1) for q in _QUANTILES]
    return {
        "count": len(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if last else 0.0,
        "quantiles": [low + (high - low) * part for low, high, part in at],
    }


def estimated(probe: Probe, values: Params, told: Instruction, update: Update) -> Estimated:
    """What a client's estimator makes of the probe rows at these values."""
    own = tree.select(values, told.names)
    estimator: Estimator = probe.plan.method.of(told.client_class, told.growth).estimator
    loss_fn = probe.bind(told, tree.without(values, told.names))
    made = estimator(loss_fn, own, probe.batch, noise.child_seed(told.seed, "probe"))
    each = made.scalars[0]
    steps = max(1, round(update.scalars[0] / each)) if each else 1
    gradient = tree.add(made.dense, noise.expand(made.terms, own))
    return Estimated(update, made, gradient, noise.relative_variance(made.terms, own), steps)


def _exact(probe: Probe, values: Params, names: Sequence[str]) -> dict[str, Tensor]:
    """The gradient by reverse mode, on the CPU."""
    estimate = backprop()(probe.exact(tree.without(values, names)), tree.select(values, names), probe.batch, 0)
    return tree.to(estimate.dense, "cpu")


def _weights(made: Sequence[Estimated], names: Sequence[str]) -> list[dict[str, float]]:
    """Each client's weight in the mean of each value that it owns."""
    whole = {name: sum(one.update.examples for one in made if name in one.gradient) for name in names}
    return [{name: one.update.examples / whole[name] for name in names if name in one.gradient} for one in made]


def mean_of(made: Sequence[Estimated], names: Sequence[str]) -> dict[str, Tensor]:
    """The mean of the owners' estimates, by examples and by value."""
    total: dict[str, Tensor] = {}
    for one, weights in zip(made, _weights(made, names), strict=True):
        total = tree.add(total, {name: weight * one.gradient[name].cpu() for name, weight in weights.items()})
    return tree.select(total, names)


def _aggregated(
    probe: Probe, before: ServerState, asked: Mapping[int, Instruction], kept: Sequence[Update], after: ServerState
) -> Params:
    """What the round's answers come to, before the server's optimizer; sums over a pool of seeds have no such thing."""
    method = probe.plan.method
    if method.seeds.pool:
        return tree.subtract(before.params, after.params)
    shares = ledger.shares(asked, kept, method, before.params)
    _, _, grads = ledger.advance(before.params, before.optimizer, shares, method, train.head(probe.plan))
    return {**tree.zeros(before.params), **grads}


def _by_unit(units: Sequence[Unit], mean: Params, truth: Params, change: Params, old: Params) -> dict[str, Record]:
    """By unit that moved: alignment, its share of the estimate's and of the gradient's energy, |change| / |value|."""
    energy, true_energy = tree.norm(mean) ** 2, tree.norm(truth) ** 2
    out = {}
    for unit in units:
        names = [name for name in unit.params if name in truth]
        if names:
            g_hat, g, moved, value = (tree.select(one, names) for one in (mean, truth, change, old))
            out[unit.name] = {
                "cos": _cosine(g_hat, g),
                "energy": _ratio(tree.norm(g_hat) ** 2, energy),
                "gradient": _ratio(tree.norm(g) ** 2, true_energy),
                "step": _ratio(tree.norm(moved), tree.norm(value)),
            }
    return out


def _cosine(one: Params, other: Params) -> float | None:
    product = sum(float((value.double() * other[name].double()).sum()) for name, value in one.items())
    return _ratio(product, tree.norm(one) * tree.norm(other))


def _ratio(one: float, other: float) -> float | None:
    return _finite(one / other) if other else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
