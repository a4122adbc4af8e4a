"""What a round's answers do to the values, for the server and for a client that catches up: one function for both.

    share      what moves the values: dense values, scalars, or both         advance: values of round r-1 -> of round r
    ledger     the latest rounds' shares, and which round's values each client holds

Each share is replayed from the round's values with the client's own optimizer, so that exchange by scalars ends in the
bits of exchange by weights. Answers on shared seeds are merged first, the mean of their scalars for the mean of their
models (DeComFL, arXiv 2405.15861); a pool of seeds is summed from the values of round 0 (FedKSeed, arXiv 2312.06353).
Merged and summed values agree with the mean of the models to rounding. Cost: the directions once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from spryfl import noise, trace, tree, wire
from spryfl.aggregate import TooFewError
from spryfl.choices import Built
from spryfl.privacy import PrivateMean
from spryfl.types import (
    Directional,
    Instruction,
    Layout,
    Ledger,
    Params,
    Pool,
    Round,
    ServerState,
    Share,
    Trace,
    Update,
)

Head = frozenset[str]
_NONE: Mapping[str, float] = MappingProxyType({})
_SCALARS = " scalars"  # beside names of values, none of which begins like this


class LostError(ValueError):
    """A client does not hold what the server thinks it does."""


class Held(NamedTuple):
    """What a client keeps between rounds: the values of one round, with a pool those of round 0."""

    round: int
    params: Params


def shares(
    asked: Mapping[int, Instruction],
    updates: Sequence[Update],
    method: Built,
    values: Params,
    private: PrivateMean | None = None,
) -> tuple[Share, ...]:
    """Accepted answers, in the order of client ids, as what moves the values; merged where their seeds are shared.

    Args:
        asked: each client's instruction.
        updates: the accepted answers.
        values: all of them, as the round began.
        private: takes the place of the method's aggregate, and single answers go no further.
    """
    own = [_share(asked[one.client], one, list(values)) for one in sorted(updates, key=lambda u: u.client)]
    if private:
        return _private(own, asked, method, values, private)
    return (_merged(own, method, values),) if method.seeds.shared and _alike(own) and _linear(method) else tuple(own)


def _share(told: Instruction, update: Update, names: Sequence[str]) -> Share:
    place = {name: i for i, name in enumerate(names)}
    mine = () if tuple(told.names) == tuple(names) else tuple(place[name] for name in told.names)
    share = Share(told.seed, mine, told.lr_scale, update.examples, update.params, update.trace, told.pool)
    return share._replace(noise=update.noise)


def _linear(method: Built) -> bool:
    """Whether a local step is w - rate g and nothing else, so that steps may be summed before they are taken."""
    return method.local is None or method.local.rate is not None


def _alike(own: Sequence[Share]) -> bool:
    """Whether the shares differ in nothing but their scalars and dense parts."""
    kinds = {(s.seed, s.names, s.lr_scale, s.trace and (s.trace.layouts, s.trace.steps)) for s in own}
    seeds = [s.trace.seeds for s in own if s.trace is not None]
    return len(kinds) == 1 and len(seeds) == len(own) and all(torch.equal(one, seeds[0]) for one in seeds)


def _merged(own: Sequence[Share], method: Built, values: Params) -> Share:
    """One share with the mean, or the robust mean, of the scalars and of the dense parts."""
    weights, kind = [share.weight for share in own], next(iter(values.values())).dtype
    tables: list[Params] = [{"scalars": _trace(share).scalars.to(kind)} for share in own]
    scalars = method.aggregate(tables, weights)["scalars"]
    dense = method.aggregate([share.params for share in own], weights) if own[0].params else {}
    return own[0]._replace(
        weight=sum(weights), params=dense, trace=_trace(own[0])._replace(scalars=scalars), merged=True
    )


def _private(
    own: Sequence[Share], asked: Mapping[int, Instruction], method: Built, values: Params, mean: PrivateMean
) -> tuple[Share, ...]:
    """One share, of the noisy mean of the answers. Without one to all that were asked, noise alone moves the values."""
    if method.scalars and not (own and method.seeds.shared and _alike(own) and _linear(method)):
        raise TooFewError("no answers that could be added up: with privacy they must have the same seeds and steps.")
    answers = [_moves(share, method, values) for share in own]
    like = {**values, **({_SCALARS: answers[0][_SCALARS]} if method.scalars else {})}
    counts = Counter(name for one in asked.values() for name in one.names)
    names = dict.fromkeys(answers[0], len(asked)) if method.scalars else {n: counts[n] for n in values if counts[n]}
    moved = mean(answers, names, like)
    scalars = moved.pop(_SCALARS, None)
    dense = {name: values[name] - g for name, g in moved.items()} if method.local else moved
    if scalars is not None:
        return (own[0]._replace(weight=1, params=dense, trace=_trace(own[0])._replace(scalars=scalars), merged=True),)
    places = tuple(i for i, name in enumerate(values) if name in dense)
    scale = next(iter(asked.values())).lr_scale if asked else 1.0
    return (Share(0, places, scale, 1, dense, None, merged=True),) if dense else ()


def _moves(share: Share, method: Built, values: Params) -> dict[str, Tensor]:
    """All that a client answered, as what is to be added up: what it moves its values by, or gradients, and scalars."""
    dense = {n: values[n] - v for n, v in share.params.items()} if method.local else dict(share.params)
    return {**dense, **({_SCALARS: share.trace.scalars} if share.trace else {})}


def advance(
    params: Params,
    optimizer: Mapping[str, Params],
    moved: Sequence[Share],
    method: Built,
    head: Head,
    scale: float = 1.0,
) -> tuple[dict[str, Tensor], Mapping[str, Params], dict[str, Tensor]]:
    """(values, the server's optimizer state, pseudo-gradient) after one round's shares.

    `scale` is the factor on the server's rate beside local steps.
    """
    if not moved:
        return dict(params), optimizer, {}
    results = [_result(share, params, method, head) for share in moved]
    more = {"noise": [_noise(share, list(params)) for share in moved]} if method.by_noise else {}
    whole = results[0] if moved[0].merged else method.aggregate(results, [share.weight for share in moved], **more)
    grads = whole if method.local is None else {name: params[name] - value for name, value in whole.items()}
    scale = moved[0].lr_scale if method.local is None else scale
    new, state = method.server.step(params, grads, optimizer, scale)
    return new, state, dict(grads)


def _noise(share: Share, names: Sequence[str]) -> dict[str, float]:
    """The relative variance of a share's estimate by name."""
    own = [names[i] for i in share.names] or names
    return dict(zip(own, share.noise, strict=True)) if share.noise else {}


def _result(share: Share, params: Params, method: Built, head: Head) -> Params:
    """A share's values after its local steps, or its gradient where none is taken."""
    if share.trace is None:
        return share.params
    names = [list(params)[i] for i in share.names] or list(params)
    seeded = [name for name in names if name not in share.params]
    steps, start = list(trace.steps_of(share.trace, seeded, names, share)), tree.select(params, seeded)
    factors = shrunk(steps[0], start) if method.shrink else {}
    if method.local is None:
        return {**scaled(trace.mean_gradient(iter(steps), start), factors), **share.params}
    scale = rates(names, share.lr_scale, method, head, factors)
    return {**trace.replay(iter(steps), start, method.local, scale), **share.params}


def rates(
    names: Sequence[str], lr_scale: float, method: Built, head: Head, factors: Mapping[str, float] = _NONE
) -> dict[str, float]:
    """The factor on the local learning rate of each value: the schedule's, times the head's own, times `factors`."""
    return {name: lr_scale * (method.head_lr if name in head else 1.0) * factors.get(name, 1.0) for name in names}


def shrunk(terms: Sequence[Directional], like: Params) -> dict[str, float]:
    """1 / (1 + v) by name, v the relative variance of an estimate: K / (d + K + 1) of K Gaussian directions.

    It is the factor f for which E|f g_hat - g|^2 is least; 1 for what is exact.

    >>> terms = [Directional(k, 0.5, ("w",), "gaussian") for k in range(2)]
    >>> shrunk(terms, {"w": torch.zeros(5), "head": torch.zeros(3)})
    {'w': 0.25, 'head': 1.0}
    """
    return {name: 1 / (1 + v) for name, v in noise.relative_variance(terms, like).items()}


def scaled(gradient: Params, factors: Mapping[str, float]) -> dict[str, Tensor]:
    """A gradient, each value times its factor."""
    return {name: value * factors[name] if name in factors else value for name, value in gradient.items()}


def recorded(ledger: Ledger, moved: Round, params: Params) -> Ledger:
    """The ledger with one more round.

    Rounds are kept as long as they are fewer bytes together than the values: older ones would never be sent.
    """
    rounds = (*ledger.rounds, moved._replace(size=len(wire.dump(moved.shares))))
    total, limit = sum(one.size for one in rounds), 4 * tree.size(params)
    while rounds and total > limit:
        total -= rounds[0].size
        rounds = rounds[1:]
    return ledger._replace(rounds=rounds)


def pooled(
    state: ServerState, moved: Sequence[Share], method: Built, head: Head
) -> tuple[Params, Mapping[str, Params], Ledger]:
    """(values, the server's optimizer state, ledger) after one round on a pool of seeds: dense parts, then the sums."""
    if not moved:
        return state.params, state.optimizer, state.ledger
    dense = [share._replace(trace=None) for share in moved]
    params, optimizer, _ = advance(state.params, state.optimizer, dense, method, head)
    names = list(params)
    book = sum_up(state.ledger, moved, names, method)
    summed = {names[i] for places, _, _ in book.layout for i in places}
    origin = {name: book.origin[name] if name in summed else value for name, value in params.items()}
    return trace.rebuild(origin, _present(book.summed), book.layout, _pool(moved[0])), optimizer, book


def _present(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def sum_up(ledger: Ledger, moved: Sequence[Share], names: Sequence[str], method: Built) -> Ledger:
    """The pool's sums after a round: a_s += server rate x local rate x p_i c for each step that drew seed s.

    And, for the choice of later seeds, how often each was drawn and the sum of its |c|.
    """
    if not moved:
        return ledger
    layout = _spelled_out(moved[0], names)
    width, size = trace.terms_in(layout), _pool(moved[0]).size
    summed = torch.zeros(size, width) if ledger.summed is None else ledger.summed.clone()
    sizes = torch.zeros(2, size) if ledger.sizes is None else ledger.sizes.clone()
    whole, rate = sum(share.weight for share in moved), _rate(method)
    for share in moved:
        for step, scalars in enumerate(_trace(share).scalars.reshape(-1, width)):
            index = trace.pool_index(share, step)
            summed[index] += rate * share.lr_scale * (share.weight / whole) * scalars
            sizes[:, index] += torch.stack((torch.ones(()), scalars.abs().mean()))
    return ledger._replace(summed=summed, sizes=sizes, layout=layout)


def strange(
    ledger: Ledger, asked: Mapping[int, Instruction], updates: Sequence[Update], values: Params
) -> dict[int, str]:
    """Answers that the pool's sums have no place for: other seeds, or other terms than all steps before them.

    In the first round those of the client with the lowest number count.
    """
    own = {u.client: _share(asked[u.client], u, list(values)) for u in sorted(updates, key=lambda u: u.client)}
    fit = {i: s for i, s in own.items() if len(_trace(s).layouts) == 1 and not len(_trace(s).seeds)}
    layouts = {i: _spelled_out(share, list(values)) for i, share in fit.items()}
    known = ledger.layout or next(iter(layouts.values()), ())
    return {i: "returns scalars that are not of the pool's seeds and terms" for i in own if layouts.get(i) != known}


def _spelled_out(share: Share, names: Sequence[str]) -> Layout:
    """The layout of a share's steps, the places of its blocks written out."""
    rest = tuple(i for i, name in enumerate(names) if name not in share.params)
    return tuple((places or rest, distribution, count) for places, distribution, count in _trace(share).layouts[0])


def _pool(share: Share) -> Pool:
    assert share.pool is not None
    return share.pool


def _trace(share: Share) -> Trace:
    assert share.trace is not None
    return share.trace


def _rate(method: Built) -> float:
    rates = method.local and method.local.rate, method.server.rate
    assert rates[0] is not None
    assert rates[1] is not None
    return rates[0] * rates[1]


def chances(ledger: Ledger) -> Tensor:
    """Each seed's chance to be drawn: softmax of its mean |c|, scaled to [0, 1]; a seed never drawn has the mean."""
    if ledger.sizes is None:
        return torch.empty(0)
    drawn, total = ledger.sizes
    seen = drawn > 0
    size = torch.where(seen, total / drawn.clamp(min=1), 0.0)
    size = torch.where(seen, size, size[seen].mean())
    spread = (size.max() - size.min()).clamp(min=1e-30)
    return torch.softmax((size - size.min()) / spread, 0)


def held_by_all(state: ServerState, method: Built) -> Held | None:
    """What those clients hold that were brought up to date last: equal bits, so that one copy serves all of them."""
    if not (method.follows and state.ledger.seen):
        return None
    return Held(0, state.ledger.origin) if method.seeds.pool else Held(state.round, state.params)


def restored(told: Instruction, held: Held | None, method: Built, head: Head) -> tuple[Params, Held]:
    """(current values, what the client keeps) from an instruction and from what it kept before.

    Raises:
        LostError: the client holds older values than the server thinks, or none.
    """
    catch = told.catch_up
    if catch is None:
        return told.params, Held(told.round - 1, told.params)
    if catch.summed is not None and told.pool is not None:
        origin = {**(held.params if held else {}), **told.params}
        if not set(told.names) <= set(origin):
            raise _lost(told, "the values of round 0", "no values")
        return trace.rebuild(origin, catch.summed, catch.layout, told.pool), Held(0, origin)
    if held is None or held.round < catch.since:
        holds = "no values" if held is None else f"the values of round {held.round}"
        raise _lost(told, f"those of round {catch.since}", holds)
    params: Params = held.params
    for one in catch.missed:
        if one.number > held.round:
            params, _, _ = advance(params, {}, one.shares, method, head)
    return params, Held(told.round - 1, params)


def _lost(told: Instruction, expected: str, holds: str) -> LostError:
    return LostError(
        f"client {told.client} was sent in round {told.round} what makes current values from {expected}, but it holds "
        f"{holds}. Its memory was lost: let it say so, and the server will send the values."
    )
