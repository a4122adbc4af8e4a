"""The server's two moves in a round: `begin` writes the instructions, `finish` turns the answers into the next state.

    begin(state) -> instructions        finish(state, instructions, updates) -> (state, refused)

The server takes names and shapes from its own instruction, never from what a client claims. Cost: some copies of the
trainable values, and with exchange by scalars the clients' directions once more; needs torch alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from spryfl import assign, ledger, noise, trace, tree, wire
from spryfl.aggregate import TooFewError
from spryfl.choices import Built
from spryfl.privacy import Privacy, PrivateMean, private_mean
from spryfl.types import CatchUp, Instruction, Ledger, Params, Pool, Round, ServerState, Unit, Update


class Refused(NamedTuple):
    """Answers that change nothing: those that do not fit, and those too noisy for the method's gate."""

    failed: dict[int, str]
    gated: dict[int, float]  # client -> its variance
    note: str = ""  # why nothing moved though there were answers


def init(params: Params, method: Built, clients: int, key: int = 0) -> ServerState:
    """The state before the first round. Clients that never share get a copy of the start each."""
    if method.alone:
        params = {_own(client, name): value for client in range(clients) for name, value in params.items()}
    return ServerState(
        0,
        dict(params),
        method.server.init(params),
        average=dict(params) if method.average else {},
        ledger=Ledger(origin=dict(params)) if method.seeds.pool else Ledger(),
        key=key,
    )


def begin(
    state: ServerState,
    units: Sequence[Unit],
    cohort: Sequence[int],
    method: Built,
    seed: int,
    lr_scale: float = 1.0,
    evaluate: bool = False,
    growth: float = 1.0,
) -> list[Instruction]:
    """An instruction for each client of the cohort: its units, the head unless it is split, all current values."""
    round_ = state.round + 1
    dealt = deal(units, cohort, method, round_)
    rate = {one.name: one.lr for one in method.groups}
    sent = tuple(name for unit in needed(units, method) for name in unit.params)
    pool = _pool(state, method, seed)
    told = [
        Instruction(
            round=round_,
            client=client,
            seed=noise.child_seed(seed, "round", round_, *(() if method.seeds.shared else ("client", client))),
            names=tuple(name for unit in mine for name in unit.params),
            params=tree.select(personal(state.params, client, method), sent),
            lr_scale=lr_scale * rate[method.member(client)],
            evaluate=evaluate,
            guide={name: value for name, value in state.guide.items() if name in sent},
            pool=pool,
            fingerprint=trace.fingerprint() if method.scalars else "",
            client_class=method.member(client),
            growth=growth,
        )
        for client, mine in dealt.items()
        if mine
    ]
    return [_cheapest(one, state, method) for one in told]


def _pool(state: ServerState, method: Built, seed: int) -> Pool | None:
    if not method.seeds.pool:
        return None
    chances = ledger.chances(state.ledger) if method.seeds.weighted else torch.empty(0)
    return Pool(noise.child_seed(seed, "pool"), method.seeds.pool, chances)


def _cheapest(told: Instruction, state: ServerState, method: Built) -> Instruction:
    """The instruction in the fewest bytes: with the values, or with what makes them from those the client holds."""
    if not method.follows:
        return told
    whole = told._replace(params=dict(state.params))
    if method.seeds.pool:
        return _by_sums(whole, state)
    since, rounds = state.ledger.seen.get(told.client), state.ledger.rounds
    missed = tuple(one for one in rounds if since is not None and one.number > since)
    if since is None or len(missed) != state.round - since:  # never seen, or too long ago
        return whole
    replayed = told._replace(params={}, catch_up=CatchUp(since, missed))
    return min(whole, replayed, key=lambda way: len(wire.encode(way)))


def _by_sums(whole: Instruction, state: ServerState) -> Instruction:
    """The sums of the pool where they are fewer bytes than what they move: at first with the values of round 0."""
    book, names = state.ledger, list(state.params)
    moved = {names[i] for places, _, _ in book.layout for i in places}
    if book.summed is None or book.summed.numel() >= tree.size(tree.select(state.params, moved)):
        return whole
    rest = tree.without(state.params, moved)
    origin = {} if whole.client in book.seen else tree.select(book.origin, moved)
    params = {name: {**rest, **origin}[name] for name in names if name in rest or name in origin}
    return whole._replace(params=params, catch_up=CatchUp(0, (), book.summed, book.layout))


def deal(units: Sequence[Unit], cohort: Sequence[int], method: Built, round_: int) -> dict[int, tuple[Unit, ...]]:
    """Each client's units of this round, dealt class by class; a head that is not split goes to all."""
    whole = () if method.split_head else tuple(unit for unit in units if unit.head)
    split = [unit for unit in units if unit not in whole]
    out: dict[int, tuple[Unit, ...]] = {}
    owners: Counter[Unit] = Counter()
    for group in method.groups:
        own = [client for client in cohort if method.member(client) == group.name]
        dealt = assign.dealt(group.assign, split, own, round_, owners) if own else {}
        owners.update(unit for mine in dealt.values() for unit in mine)
        out |= dealt
    return {client: out[client] + whole for client in cohort if client in out}


def personal(params: Params, client: int, method: Built) -> Params:
    """The values that `client` works on: everyone's, or its own where nobody shares."""
    if not method.alone:
        return params
    prefix = _own(client, "")
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def served(state: ServerState) -> Params:
    """The values to evaluate and to hand out: the average over the rounds where the method keeps one."""
    return state.average or state.params


def finish(
    state: ServerState,
    told: Sequence[Instruction],
    updates: Iterable[Update],
    method: Built,
    head: frozenset[str] = frozenset(),
    promised: Privacy | None = None,
    scale: float = 1.0,
) -> tuple[ServerState, Refused]:
    """The next state, and which answers changed nothing: one that does not fit its instruction is as if absent.

    Args:
        state: the state that `begin` was given.
        told: its instructions.
        updates: the answers, in any order.
        method: the method.
        head: names of the head's values, which have a local rate of their own.
        promised: answers count clipped, in a noisy sum.
    """
    mean = private_mean(promised, state.key, state.round + 1) if promised else None
    asked = {one.client: one for one in told}
    answers = list(updates)
    failed = {
        one.client: why
        for one in answers
        if (why := objection(one, asked.get(one.client), personal(state.params, one.client, method)))
    }
    if method.seeds.pool:
        failed |= ledger.strange(state.ledger, asked, [u for u in answers if u.client not in failed], state.params)
    fitting = [one for one in answers if one.client not in failed]
    gated = {one.client: one.variance for one in fitting if method.gate and not one.variance <= method.gate}
    kept = [one for one in fitting if one.client not in gated]
    if method.alone:
        kept = [one._replace(params={_own(one.client, n): v for n, v in one.params.items()}) for one in kept]
        asked = {i: one._replace(names=tuple(_own(i, n) for n in one.names)) for i, one in asked.items()}
    note = ""
    try:
        after = _moved(state, asked, kept, method, head, scale, mean)
    except TooFewError as error:
        after, note = _moved(state, asked, [], method, head, scale), str(error)
    reached = [one for one in told if one.client in {update.client for update in fitting}]
    return _seen(after, reached, method), Refused(failed, gated, note)


def _moved(
    state: ServerState,
    asked: Mapping[int, Instruction],
    kept: Sequence[Update],
    method: Built,
    head: frozenset[str],
    scale: float,
    mean: PrivateMean | None = None,
) -> ServerState:
    """The state after the accepted answers; what moved it stands in the ledger, where clients follow by replay."""
    number = state.round + 1
    shares = ledger.shares(asked, kept, method, state.params, mean)
    if method.seeds.pool:
        params, optimizer, book = ledger.pooled(state, shares, method, head)
        grads: Params = {}
    else:
        params, optimizer, grads = ledger.advance(state.params, state.optimizer, shares, method, head, scale)
        book = ledger.recorded(state.ledger, Round(number, shares), params) if method.follows else state.ledger
    decay = method.decay(number) if state.average else 0.0
    average = {name: decay * v + (1 - decay) * params[name] for name, v in state.average.items()}
    guide = _guide(state.guide, grads, method.guide_decay) if method.guide else {}
    return ServerState(number, params, optimizer, average, guide, book, state.key)


def _guide(old: Params, grads: Params, decay: float) -> Params:
    """What is sent for a guide: the last pseudo-gradient, or a sum of all of them that decays."""
    return tree.add(tree.scale(old, decay), grads) if decay else grads or old


def _seen(state: ServerState, reached: Iterable[Instruction], method: Built) -> ServerState:
    """Those that answered hold the values they were sent; with a pool, those of round 0 if they were sent those."""
    if not method.follows:
        return state
    now = {one.client: 0 if method.seeds.pool else one.round - 1 for one in reached if _keeps(one, method)}
    return state._replace(ledger=state.ledger._replace(seen={**state.ledger.seen, **now}))


def forget(state: ServerState, clients: Collection[int]) -> ServerState:
    """The state in which nothing is thought to be held by these clients: they are sent all values next."""
    seen = {client: round_ for client, round_ in state.ledger.seen.items() if client not in clients}
    return state._replace(ledger=state.ledger._replace(seen=seen))


def _keeps(told: Instruction, method: Built) -> bool:
    return not method.seeds.pool or told.catch_up is not None or told.round == 1


def objection(update: Update, told: Instruction | None, values: Params) -> str:
    """What is wrong with an update, or an empty text; `values` are those that the round began with."""
    if told is None:
        return "this client was not asked"
    if update.round != told.round:
        return f"answers round {update.round}, asked in round {told.round}"
    if bool(told.fingerprint) != (update.trace is not None):
        return "returns values where scalars were asked for" if told.fingerprint else "returns scalars, not values"
    if update.examples < 1:
        return f"claims {update.examples} examples"
    if not (math.isfinite(update.loss) and tree.is_finite(update.params)):
        return "returns values that are not finite"
    if update.noise and not (len(update.noise) == len(told.names) and all(0 <= v < math.inf for v in update.noise)):
        return "claims variances that are not one of each of its values, 0 or more"
    return _unasked(update, told, values) or (
        trace.objection(update.trace, told.names, update.params) if update.trace else ""
    )


def _unasked(update: Update, told: Instruction, values: Params) -> str:
    """Whether the dense part holds other names or shapes than were asked for."""
    names, asked = set(update.params), set(told.names)
    if not names <= asked or (update.trace is None and names != asked):
        return "returns other names than it was told to train"
    if any(value.shape != values[name].shape for name, value in update.params.items()):
        return "returns other shapes than it was sent"
    wrong = any(value.dtype != values[name].dtype for name, value in update.params.items())
    return "returns values of another type than it was sent" if wrong else ""


def needed(units: Sequence[Unit], method: Built) -> list[Unit]:
    """Units that must travel: all, unless only the head ever moves; the rest then is as the model starts."""
    return [unit for unit in units if unit.head or method.moves]


def _own(client: int, name: str) -> str:
    return f"client {client}/{name}"
