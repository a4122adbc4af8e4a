"""What travels in a round: the paper's count in values, and the bytes of our messages, predicted.

                        up, a client                    down, all M clients
    paper, weights      its own values                  the sum of what they own
    paper, scalars      K a local step                  the same and a seed each
    ours, weights       4 (own values)                  4 M (all values): every forward pass needs them
    ours, scalars       4 (K a step + dense values)     4 M (all values), or where clients follow by replay the fewer
                                                        bytes of that and of all shares since the round they hold
    ours, a pool        the same                        4 M (sums of the pool + dense values), if fewer

Values owned are of Panchal et al. 2024 (arXiv 2405.15551) w_l max(L/M, 1), with the head beside them where all clients
train it. A guide travels down where the method sends one, and with it scalars need their seeds, 8 bytes each. These are
the bytes of tensors; headers (names, shapes, numbers) come on top, and `header` measures one. Costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from spryfl import wire
from spryfl.choices import Built
from spryfl.costs.passes import Step
from spryfl.costs.shapes import size
from spryfl.types import Instruction, Unit, Update

ACCOUNT = 16  # bytes: seconds and peak memory, in every answer
Dealt = Mapping[int, Sequence[Unit]]  # client -> its units in one round
Work = Callable[..., Step | None]  # (units, client's number): what one estimate of it does


class Traffic(NamedTuple):
    """What travels in one round, all clients together: values by the paper's count, bytes by ours."""

    down: float
    up: float


class Part(NamedTuple):
    """One round: bytes of tensors, and values of directions that are drawn to make gradients from scalars."""

    down: float
    up: float
    caught_up: float = 0  # drawn by clients that bring old values up to date
    replayed: float = 0  # drawn by the server


def header(message: Instruction | Update) -> int:
    """Bytes of a message beside its tensors."""
    data = wire.encode(message)
    return len(data) - sum(tensor.nbytes for tensor in wire.unpack(data)[1].values())


def paper(method: Built, dealt: Dealt, work: Work, steps: int) -> Traffic | None:
    """Values in one round by the paper's count; None where the scalars of an estimator are unknown."""
    own = sum(size(mine) for mine in dealt.values())
    if not method.scalars:
        return Traffic(own, own)
    made = [work(mine, client) for client, mine in dealt.items()]
    known = [step.terms for step in made if step is not None]
    return Traffic(own + len(dealt), steps * sum(known)) if len(known) == len(made) else None


class _Share(NamedTuple):
    """One client's answer, or that of several merged."""

    bytes: int
    drawn: int  # values of its directions


@dataclass
class _Book:
    """What the server knows that decides what it sends."""

    method: Built
    units: Sequence[Unit]  # all
    rounds: list[tuple[int, _Share]] = field(default_factory=list)  # (its number, all shares of it)
    seen: dict[int, int] = field(default_factory=dict)  # client -> the round whose values it holds
    moved: set[Unit] = field(default_factory=set)  # in the last round
    summed: tuple[int, int] = (0, 0)  # a pool's sums: (how many, values that they move)


def run(method: Built, units: Sequence[Unit], work: Work, rounds: Sequence[Dealt], steps: int) -> list[Part] | None:
    """Each round of a run, if all clients answer and none is gated; None where the scalars of an estimator are unknown.

    Args:
        method: the method's functions.
        units: all that is trainable.
        work: a client's units and its number -> what one estimate of its does.
        rounds: each round's clients and their units, from the first on.
        steps: local batches of a client in a round.
    """
    book, out = _Book(method, units), []
    for number, given in enumerate(rounds, start=1):
        dealt = {client: mine for client, mine in given.items() if mine}
        made = {client: work(mine, client) for client, mine in dealt.items()}
        if method.scalars and None in made.values():
            return None
        sent = [unit for unit in units if unit.head or method.moves]
        ways = [_told(book, number, client, sent) for client in dealt]
        shares = [_answer(method, mine, made[client], steps, bool(book.moved)) for client, mine in dealt.items()]
        kept = _kept(method, dealt, shares)
        _finish(book, number, dealt, made, kept)
        down, drawn = sum(way[0] for way in ways), sum(way[1] for way in ways)
        up = sum(share.bytes + ACCOUNT for share in shares)
        server = book.summed[0] * book.summed[1] if method.seeds.pool else kept.drawn
        out.append(Part(down, up, drawn, server))
    return out


def _told(book: _Book, number: int, client: int, sent: Sequence[Unit]) -> tuple[int, int]:
    """(bytes, values that the client draws) of one instruction."""
    method, whole = book.method, 4 * size(book.units)
    beside = 4 * size([unit for unit in sent if unit in book.moved]) if method.guide else 0
    if method.seeds.weighted and number > 1:
        beside += 4 * method.seeds.pool
    if not method.follows:
        return 4 * size(sent) + beside, 0
    if method.seeds.pool:
        sums, moved = book.summed
        if not sums or sums >= moved:
            return whole + beside, 0
        return whole - (4 * moved if client in book.seen else 0) + 4 * sums + beside, sums * moved
    since = book.seen.get(client)
    missed = [share for at, share in book.rounds if since is not None and at > since]
    replayed = sum(share.bytes for share in missed)
    if since is None or len(missed) != number - 1 - since or replayed >= whole:
        return whole + beside, 0
    return replayed + beside, sum(share.drawn for share in missed)


def _answer(method: Built, mine: Sequence[Unit], step: Step | None, steps: int, guided: bool) -> _Share:
    if not method.scalars or step is None:
        return _Share(4 * size(mine), 0)
    seeds = 8 if guided and method.guide else 0
    return _Share(steps * step.terms * (4 + seeds) + 4 * size(step.dense), steps * step.drawn)


def _kept(method: Built, dealt: Dealt, shares: Sequence[_Share]) -> _Share:
    """All shares of a round, as the ledger keeps them: one where they share their seeds and may be merged."""
    linear = method.local is None or method.local.rate is not None
    alike = len({tuple(mine) for mine in dealt.values()}) == 1
    if method.scalars and method.seeds.shared and linear and alike:
        return shares[0]
    return _Share(sum(share.bytes for share in shares), sum(share.drawn for share in shares))


def _finish(book: _Book, number: int, dealt: Dealt, made: Mapping[int, Step | None], kept: _Share) -> None:
    """The book after a round."""
    method = book.method
    book.moved = {unit for mine in dealt.values() for unit in mine}
    if not method.follows:
        return
    by_sums = bool(book.summed[0]) and book.summed[0] < book.summed[1]
    if not method.seeds.pool:
        book.rounds.append((number, kept))
        while sum(share.bytes for _, share in book.rounds) > 4 * size(book.units):
            book.rounds.pop(0)
    if not method.seeds.pool or by_sums or number == 1:
        book.seen.update(dict.fromkeys(dealt, 0 if method.seeds.pool else number - 1))
    step = next(iter(made.values()), None)
    if method.seeds.pool and step is not None:
        book.summed = method.seeds.pool * step.terms, size(book.units) - size(step.dense)
