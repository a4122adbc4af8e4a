"""Classes of clients: who belongs to which, and what the clients of one class do their own way.

    shares s_1 .. s_n        client i = 0, 1, 2, ... goes to the class furthest behind: argmax_j s_j (i + 1) - n_j
                             n_j its clients before i; equal ones to the class named first
    who is left              s_0 = 1 - s_1 - ... - s_n: those clients do as the method itself says

So a class has its share of the clients to within one of them, whatever their number, and a client's class hangs on its
number alone: not on a seed, a round or how many others there are. Costs nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

from spryfl.assign import Assignment
from spryfl.types import Estimator

REST = "rest"  # in records: the clients of no class
_NAME = re.compile(r"[A-Za-z0-9_.+-]+")
_NEAR = 1e-9  # sums of shares are taken for 1 within this


@dataclass(frozen=True)
class ClientClass:
    """What clients of one class do otherwise than the method says. What is left empty is as in the method.

    >>> ClientClass("phones", share=0.3, estimator={"kind": "forward", "directions": 4}, assignment={"kind": "few"})
    ... # doctest: +ELLIPSIS
    ClientClass(name='phones', share=0.3, ...)
    """

    name: str
    share: float = 0.0  # of the clients, in (0, 1]
    clients: tuple[int, ...] = ()  # or just these
    estimator: Mapping[str, Any] = field(default_factory=dict)
    assignment: Mapping[str, Any] = field(default_factory=dict)
    head: str = ""  # shared | exact
    lr: float = 1.0  # factor on the local learning rate
    micro_batch: int = 0  # rows at once; 0 = as train.micro_batch says
    stream: bool = False  # of a packed model one block in memory at a time
    memory: str = ""  # of a client's process, "2GB": what fits it is chosen when a run is set up
    chosen_for: str = ""  # the memory that the choices above were made for
    absent: bool = False  # never asked: what a federation is without them, on the same partition


class Group(NamedTuple):
    """A class as functions."""

    name: str  # empty: the clients of no class
    estimator: Estimator
    assign: Assignment
    lr: float = 1.0
    absent: bool = False


def check(classes: Sequence[ClientClass]) -> None:
    """A ValueError says what is wrong with classes by themselves, before the number of clients is known."""
    names = [one.name for one in classes]
    for one in classes:
        where = f"method.classes: {one.name!r}"
        if not _NAME.fullmatch(one.name) or one.name == REST:
            raise ValueError(f'{where} is no name of a class. Use letters, digits, _ . + - and not "{REST}".')
        if bool(one.clients) == (one.share != 0):
            given = "both share and clients" if one.clients else "neither share nor clients"
            raise ValueError(f"{where} has {given}. Give share (0.3 of the clients), or clients ([0, 5, 7]).")
        if one.share and not 0 < one.share <= 1:
            raise ValueError(f"{where} has share = {one.share}: a share of the clients is above 0 and at most 1.")
        if not one.lr > 0:
            raise ValueError(f"{where} has lr = {one.lr}: the factor on the local learning rate must be above 0.")
        if one.micro_batch < 0:
            raise ValueError(f"{where} has micro_batch = {one.micro_batch}: rows at once, or 0 as train.micro_batch.")
    _check_memory(classes)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"method.classes: {twice[0]!r} stands there twice. Give each class a name of its own.")
    _check_shares(classes)


def _check_memory(classes: Sequence[ClientClass]) -> None:
    """A budget chooses; what it chooses is not chosen beside it."""
    for one in classes:
        beside = [key for key in ("estimator", "head", "micro_batch", "stream", "chosen_for") if getattr(one, key)]
        if one.memory and beside:
            raise ValueError(
                f"method.classes: '{one.name}' has memory and {beside[0]}; the memory chooses estimator, head, "
                f"micro_batch and stream. Remove one of them."
            )


def _check_shares(classes: Sequence[ClientClass]) -> None:
    """Shares and lists of clients do not mix, and neither gives a client two classes."""
    shares, listed = [one.share for one in classes if one.share], [i for one in classes for i in one.clients]
    if shares and listed:
        raise ValueError("method.classes: some give a share and some their clients. Give shares, or clients, for all.")
    if sum(shares) > 1 + _NEAR:
        raise ValueError(f"method.classes: the shares {shares} sum to {sum(shares):g}. Together they are at most 1.")
    if shares == [1.0]:
        raise ValueError(
            f"method.classes: {classes[0].name!r} has share = 1: one class of all clients has no effect. "
            f"Set its choices in [method] itself, or give it a smaller share."
        )
    if twice := [client for client, count in Counter(listed).items() if count > 1]:
        raise ValueError(f"method.classes: client {twice[0]} is listed twice. A client belongs to one class.")
    if negative := [client for client in listed if client < 0]:
        raise ValueError(f"method.classes: client {negative[0]} is listed; clients have the numbers from 0 on.")


def asked(one: ClientClass) -> ClientClass:
    """A class as it was asked for: with its memory in place of what was chosen for it."""
    if not (one.memory or one.chosen_for):
        return one
    usual = ClientClass("")
    plain = {key: getattr(usual, key) for key in ("estimator", "assignment", "head", "micro_batch", "stream")}
    return replace(one, **plain, memory=one.memory or one.chosen_for, chosen_for="")


def present(classes: Sequence[ClientClass], clients: int) -> tuple[int, ...]:
    """The clients that may be asked.

    Args:
        classes: of the method.
        clients: how many there are.
    """
    of, absent = member(classes), {one.name for one in classes if one.absent}
    return tuple(client for client in range(clients) if of(client) not in absent)


def whole(classes: Sequence[ClientClass]) -> bool:
    """Whether the shares leave no client over."""
    return sum(one.share for one in classes) > 1 - _NEAR


def member(classes: Sequence[ClientClass]) -> Callable[[int], str]:
    """The class of a client by its number; empty for a client of none.

    >>> of = member([ClientClass("a", share=0.25), ClientClass("b", share=0.5)])
    >>> [of(client) for client in range(8)]
    ['b', 'a', '', 'b', 'b', 'a', '', 'b']
    """
    listed = {client: one.name for one in classes for client in one.clients}
    shares = tuple((one.name, one.share) for one in classes if one.share)
    if not shares:
        return lambda client: listed.get(client, "")
    left = () if whole(classes) else (("", 1 - sum(share for _, share in shares)),)
    return lambda client: _by_share((*shares, *left), client + 1)[client]


def _by_share(shares: tuple[tuple[str, float], ...], count: int) -> tuple[str, ...]:
    """The classes of the first so many clients, at least; counted up to a power of two, so that few are kept."""
    return _dealt(shares, 1 << (count - 1).bit_length())


@lru_cache(maxsize=64)
def _dealt(shares: tuple[tuple[str, float], ...], count: int) -> tuple[str, ...]:
    have, out = [0] * len(shares), []
    for client in range(count):
        behind = [round(share * (client + 1) - n, 9) for (_, share), n in zip(shares, have, strict=True)]
        chosen = behind.index(max(behind))
        have[chosen] += 1
        out.append(shares[chosen][0])
    return tuple(out)


def check_members(classes: Sequence[ClientClass], clients: int) -> None:
    """A ValueError if a class has no client among so many, or lists one that is not there, or nobody takes part.

    Args:
        classes: of the method.
        clients: how many there are.

    Raises:
        ValueError: which class does not fit.
    """
    for one in classes:
        if one.clients and max(one.clients) >= clients:
            raise ValueError(
                f"method.classes: {one.name!r} lists client {max(one.clients)}, and partition.clients = {clients}: "
                f"their numbers are 0 to {clients - 1}."
            )
    if not present(classes, clients):
        raise ValueError("method.classes: all clients are absent. Leave absent out for those that are to train.")
    of = member(classes)
    empty = {one.name for one in classes} - {of(client) for client in range(clients)}
    for one in classes:
        if one.name in empty:
            raise ValueError(
                f"method.classes: {one.name!r} with share = {one.share} has no client among {clients}. "
                f"Raise the share or partition.clients, or remove the class."
            )
