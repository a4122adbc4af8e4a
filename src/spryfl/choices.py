"""A federated method as a record of choices, and the functions that its choices name.

    estimator          how a client gets a gradient                       estimators.ESTIMATORS
    assignment         which units a client may move this round           assign.ASSIGNMENTS
    seeds              what the clients' directions follow from           SEEDS
    exchange           weights | scalars: what a client answers with
    local_optimizer    the client's steps, or none: it answers with a gradient    optimizers.LOCAL
    aggregate          one answer from many                               aggregate.AGGREGATORS
    server_optimizer   what is done with it                               optimizers.OPTIMIZERS
    head               shared | split | exact: who trains the head, and how
    sharing            federated | pooled | alone: the two ends that a federation lies between
    classes            clients that have an estimator, an assignment, a head policy or a rate of their own

Nothing in the package asks for a method by its name. To make your own, call `Method` with other choices; the kind of a
choice is a registry's key or a builder of yours. Costs nothing.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from spryfl import classes as sorts
from spryfl.aggregate import AGGREGATORS, Aggregator, TooFewError
from spryfl.assign import ASSIGNMENTS, Assignment, no_unit
from spryfl.classes import ClientClass, Group
from spryfl.estimators import ESTIMATORS
from spryfl.optimizers import LOCAL, OPTIMIZERS, SCHEDULES, Optimizer, warmed
from spryfl.rules import check_together
from spryfl.seeds import SEEDS, Seeds
from spryfl.types import Estimator

Choice = Mapping[str, Any]  # {"kind": key or builder, option: value, ...}

HEADS = {
    "shared": "every client of a round trains the head with its estimator",
    "split": "the head is a unit like any other",
    "exact": "every client trains the head by reverse mode from the features, the rest by its estimator",
}
EXCHANGES = {
    "weights": "values, or dense gradients where no local step is taken",
    "scalars": "a scalar a direction, which the server makes again from its seed; dense parts beside them",
}
SHARING = {
    "federated": "clients share one model",
    "pooled": "all data in one place: one client, as many local steps a round as a cohort takes together",
    "alone": "each client keeps a model of its own and never shares it",
}


REGISTRIES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "estimator": ESTIMATORS,
    "assignment": ASSIGNMENTS,
    "seeds": SEEDS,
    "local_optimizer": LOCAL,
    "aggregate": AGGREGATORS,
    "server_optimizer": OPTIMIZERS,
}


def _choice(kind: str | Callable[..., Any], **options: Any) -> Any:
    return field(default_factory=lambda: {"kind": kind, **options})


@dataclass(frozen=True)
class Method:
    """A federated method: its choices, a schedule, and where it is from.

    >>> Method("mine", estimator={"kind": "forward", "directions": 8}, assignment={"kind": "cyclic"}).head
    'shared'
    """

    name: str
    estimator: Choice = _choice("backprop")
    assignment: Choice = _choice("everyone")
    seeds: Choice = _choice("own")
    exchange: str = "weights"
    local_optimizer: Choice = _choice("adamw")
    aggregate: Choice = _choice("mean")
    server_optimizer: Choice = _choice("sgd")
    average: float = 0.0  # decay of a mean of the values over the rounds, which is evaluated; 0 = the values themselves
    average_debiased: bool = False  # without the start's share in that mean
    gate: float = 0.0  # largest variance, a value, of a client's mean gradient that is aggregated; 0 = any
    guide: bool = False  # send the last pseudo-gradient, for an estimator with candidates or a guided one
    guide_decay: float = 0.0  # of what is sent: guide = decay guide + pseudo-gradient; 0 = the last one alone
    head: str = "shared"
    head_lr: float = 1.0  # factor on the head's local learning rate
    schedule: str = "constant"  # of the local learning rate over the rounds, of the server's without local steps
    warmup: float = 0.0  # share of the run in which that rate rises, from a tenth of it
    server_schedule: str = "constant"  # of the server's learning rate, beside local steps
    server_warmup: float = 0.0
    growth: float = 1.0  # directions a batch at the end of the run, of those at its start
    shrink: bool = False  # local rates times 1 / (1 + relative variance of the estimate): K / (d + K + 1)
    sharing: str = "federated"
    classes: tuple[ClientClass, ...] = ()  # of clients that do something otherwise; empty = all are alike
    summary: str = ""
    paper: str = ""


class Built(NamedTuple):
    """A method's choices as functions."""

    estimator: Estimator
    assign: Assignment
    seeds: Seeds
    scalars: bool  # what is exchanged
    local: Optimizer | None
    aggregate: Aggregator
    server: Optimizer
    average: float
    gate: float
    guide: bool
    split_head: bool
    head_lr: float
    schedule: Callable[[float], float]
    alone: bool
    server_schedule: Callable[[float], float] | None = None  # None = constant
    growth: float = 1.0
    grown: Callable[[str, float], Estimator] | None = None  # (class, factor) -> its estimator with more directions
    shrink: bool = False
    guide_decay: float = 0.0
    average_debiased: bool = False
    by_noise: bool = False  # answers are weighed by the relative variance of their estimates
    classes: tuple[Group, ...] = ()  # of clients; empty = all are alike
    member: Callable[[int], str] = lambda client: ""  # client -> the name of its class

    @property
    def groups(self) -> tuple[Group, ...]:
        """The classes of clients, or the one that all are."""
        return self.classes or (Group("", self.estimator, self.assign),)

    def present(self, clients: int) -> tuple[int, ...]:
        """Of so many clients those that take part."""
        absent = {one.name for one in self.classes if one.absent}
        return tuple(client for client in range(clients) if not absent or self.member(client) not in absent)

    @property
    def moves(self) -> bool:
        """Whether any client ever moves a unit, not the head alone."""
        return any(one.assign is not no_unit for one in self.groups)

    def of(self, name: str, growth: float = 1.0) -> Built:
        """The method as the clients of one class know it, with so many times as many directions."""
        known = next((one for one in self.classes if one.name == name), None)
        own = self._replace(estimator=known.estimator, assign=known.assign, classes=()) if known else self
        return own._replace(estimator=self.grown(name, growth)) if self.grown and growth != 1 else own

    def decay(self, round_: int) -> float:
        """Of the mean over the rounds: in round t b (1 - b^(t-1)) / (1 - b^t) where it holds nothing of the start."""
        b, t = self.average, round_
        return b * (1 - b ** (t - 1)) / (1 - b**t) if self.average_debiased else b

    @property
    def follows(self) -> bool:
        """Whether a client can bring old values up to date by replay: the server keeps nothing that it would lack."""
        return self.scalars and self.server.rate is not None and not self.alone


def builder(what: str, kind: str | Callable[..., Any]) -> Callable[..., Any]:
    """The builder of a choice: the registry's, or the callable itself; a ValueError if there is no such name.

    Args:
        what: a key of REGISTRIES: "estimator", "assignment" ...
        kind: a name in that registry, or a builder of one's own.
    """
    if callable(kind):
        return kind
    registry = REGISTRIES[what]
    if kind not in registry:
        raise ValueError(f'{what} = "{kind}" is unknown. Possible: {", ".join(registry)}.')
    return registry[kind]


def build(method: Method) -> Built:
    """The functions that a method's choices name; a ValueError says which choice does not fit.

    Args:
        method: the record.
    """
    _check(method)
    built = Built(
        estimator=_estimator(method.estimator, method.head),
        assign=_made("assignment", method.assignment),
        seeds=_made("seeds", method.seeds),
        scalars=method.exchange == "scalars",
        local=_made("local_optimizer", method.local_optimizer),
        aggregate=_made("aggregate", method.aggregate),
        server=_made("server_optimizer", method.server_optimizer),
        average=method.average,
        gate=method.gate,
        guide=method.guide,
        split_head=method.head == "split",
        head_lr=method.head_lr,
        schedule=warmed(SCHEDULES[method.schedule], method.warmup),
        server_schedule=_server_schedule(method),
        growth=method.growth,
        grown=_grower(method) if method.growth > 1 else None,
        shrink=method.shrink,
        guide_decay=method.guide_decay,
        average_debiased=method.average_debiased,
        alone=method.sharing == "alone",
        by_noise=method.aggregate.get("weigh") == "variance",
        classes=tuple(_group(one) for one in parties(method)) if method.classes else (),
        member=sorts.member(method.classes),
    )
    check_together(method, built, parties(method))
    return built


def parties(method: Method) -> tuple[ClientClass, ...]:
    """Who there is, each with all its choices: the classes, and the clients of none where there can be any."""
    rest = ClientClass("", estimator=method.estimator, assignment=method.assignment, head=method.head)
    named = tuple(
        replace(
            one,
            estimator=one.estimator or method.estimator,
            assignment=one.assignment or method.assignment,
            head=one.head or method.head,
        )
        for one in method.classes
    )
    return named if sorts.whole(method.classes) else (*named, rest)


def _group(one: ClientClass) -> Group:
    estimator = _estimator(one.estimator, one.head)
    return Group(one.name, estimator, _made("assignment", one.assignment), one.lr, one.absent)


def _server_schedule(method: Method) -> Callable[[float], float] | None:
    plain = method.server_schedule == "constant" and not method.server_warmup
    return None if plain else warmed(SCHEDULES[method.server_schedule], method.server_warmup)


def grown(choice: Choice, factor: float) -> Choice:
    """An estimator's choice with so many times as many directions a batch; one without directions as it is."""
    many = {"directions": max(1, round(choice["directions"] * factor))} if "directions" in choice else {}
    return {**choice, **many}


def evenly(method: Method) -> Method:
    """The method with its mean number of directions all along: growth is (g - 1) / ln g of the start in the mean."""
    if method.growth <= 1:
        return method
    factor = (method.growth - 1) / math.log(method.growth)
    classes = tuple(replace(one, estimator=grown(one.estimator, factor)) for one in method.classes)
    return replace(method, estimator=grown(method.estimator, factor), classes=classes, growth=1.0)


def _grower(method: Method) -> Callable[[str, float], Estimator]:
    by_name = {one.name: one for one in parties(method)}

    @functools.lru_cache(maxsize=64)
    def made(name: str, factor: float) -> Estimator:
        return _estimator(grown(by_name[name].estimator, factor), by_name[name].head)

    return made


def _estimator(choice: Choice, head: str) -> Estimator:
    return _made("estimator", choice, **({"exact_head": True} if head == "exact" else {}))


def _check(method: Method) -> None:
    """Each plain choice by itself."""
    if odd := [one for one in method.classes if not isinstance(one, ClientClass)]:
        raise ValueError(f"method.classes holds {odd[0]!r}: from Python give spryfl.ClientClass(name, share=0.3, ...).")
    sorts.check(method.classes)
    heads = {"": "as in the method", "shared": "", "exact": ""} if method.head != "split" else {"": "split, for all"}
    for one in method.classes:
        if one.head not in heads:
            raise ValueError(
                f'method.classes: "{one.name}" has head = "{one.head}"; with method.head = "{method.head}" possible: '
                f"{', '.join(repr(head) for head in heads)}."
            )
    for what, given, known in (
        ("head", method.head, HEADS),
        ("exchange", method.exchange, EXCHANGES),
        ("schedule", method.schedule, SCHEDULES),
        ("server_schedule", method.server_schedule, SCHEDULES),
        ("sharing", method.sharing, SHARING),
    ):
        if given not in known:
            raise ValueError(f'method.{what} = "{given}" is unknown. Possible: {", ".join(known)}.')
    if not method.head_lr > 0:
        raise ValueError(f"method.head_lr = {method.head_lr}: the factor on the head's learning rate must be above 0.")
    for what, share in (("warmup", method.warmup), ("server_warmup", method.server_warmup)):
        if not 0 <= share <= 1:
            raise ValueError(f"method.{what} = {share}: the share of the run in which the rate rises is in [0, 1].")
    if not 1 <= method.growth < math.inf:
        raise ValueError(f"method.growth = {method.growth}: the factor on the directions must be 1 or more.")
    if not 0 <= method.guide_decay < 1:
        raise ValueError(f"method.guide_decay = {method.guide_decay}: the decay of the guide must be in [0, 1).")
    if not 0 <= method.average < 1:
        raise ValueError(f"method.average = {method.average}: the decay of the mean over the rounds must be in [0, 1).")
    if not method.gate >= 0:
        raise ValueError(f"method.gate = {method.gate}: the largest variance must be above 0, or 0 for any.")


def check_cohort(method: Method, cohort: int) -> None:
    """A ValueError if so few clients a round, all of them answering, are too few for the method's aggregate.

    Args:
        method: the record.
        cohort: clients a round.
    """
    robust = builder("aggregate", method.aggregate["kind"])(
        **{k: v for k, v in method.aggregate.items() if k != "kind"}
    )
    try:
        robust([{"x": torch.zeros(1)}] * cohort, [1.0] * cohort)
    except TooFewError as error:
        raise ValueError(f"train.cohort = {cohort}: {error}") from None


def _made(what: str, choice: Choice, **more: Any) -> Any:
    options = {key: value for key, value in choice.items() if key != "kind"}
    make = builder(what, choice["kind"])
    try:
        return make(**options, **more)
    except TypeError as error:
        if more and "exact_head" not in inspect.signature(make).parameters:
            able = [key for key, one in ESTIMATORS.items() if "exact_head" in inspect.signature(one).parameters]
            raise ValueError(
                f'head = "exact" needs an estimator that leaves the head out; "{choice["kind"]}" does not '
                f"(backprop's gradient of the head is exact already). "
                f'Use head = "shared", or one of: {", ".join(able)}.'
            ) from error
        raise ValueError(f"method.{what}: {error}") from error
