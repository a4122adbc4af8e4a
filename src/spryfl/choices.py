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

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from spryfl import classes as sorts
from spryfl.aggregate import AGGREGATORS, Aggregator, TooFewError
from spryfl.assign import ASSIGNMENTS, Assignment, no_unit
from spryfl.classes import ClientClass, Group
from spryfl.estimators import DENSE, ESTIMATORS
from spryfl.optimizers import LOCAL, OPTIMIZERS, SCHEDULES, Optimizer
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
    gate: float = 0.0  # largest variance, a value, of a client's mean gradient that is aggregated; 0 = any
    guide: bool = False  # send the last pseudo-gradient, for an estimator with candidates
    head: str = "shared"
    head_lr: float = 1.0  # factor on the head's local learning rate
    schedule: str = "constant"  # of the local learning rate over the rounds, of the server's without local steps
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

    def of(self, name: str) -> Built:
        """The method as the clients of one class know it."""
        for one in self.classes:
            if one.name == name:
                return self._replace(estimator=one.estimator, assign=one.assign, classes=())
        return self

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
        schedule=SCHEDULES[method.schedule],
        alone=method.sharing == "alone",
        by_noise=method.aggregate.get("weigh") == "variance",
        classes=tuple(_group(one) for one in parties(method)) if method.classes else (),
        member=sorts.member(method.classes),
    )
    _check_together(method, built)
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


def _estimator(choice: Choice, head: str) -> Estimator:
    return _made("estimator", choice, **({"exact_head": True} if head == "exact" else {}))


def _dense(choice: Choice) -> bool:
    """Whether an estimator draws no direction; one of the user's own may."""
    return choice["kind"] in DENSE if isinstance(choice["kind"], str) else False


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
        ("sharing", method.sharing, SHARING),
    ):
        if given not in known:
            raise ValueError(f'method.{what} = "{given}" is unknown. Possible: {", ".join(known)}.')
    if not method.head_lr > 0:
        raise ValueError(f"method.head_lr = {method.head_lr}: the factor on the head's learning rate must be above 0.")
    if not 0 <= method.average < 1:
        raise ValueError(f"method.average = {method.average}: the decay of the mean over the rounds must be in [0, 1).")
    if not method.gate >= 0:
        raise ValueError(f"method.gate = {method.gate}: the largest variance must be above 0, or 0 for any.")


def _check_together(method: Method, built: Built) -> None:
    """What two choices together must not be: each line says what, and what to do."""
    all_ = parties(method)
    estimators = [one.estimator for one in all_]
    dense = all(_dense(one) for one in estimators)
    kinds = ", ".join(f'"{one["kind"]}"' for one in estimators)
    everyone = all(one.assignment["kind"] == "everyone" for one in all_)
    for wrong, why in (
        *_of_estimators(method, built, estimators, dense, kinds),
        *_of_classes(method, built, dense, everyone),
        (
            method.aggregate["kind"] == "krum" and not everyone,
            'aggregate = "krum" compares whole answers: it needs assignment "everyone".',
        ),
        (
            built.local is None and method.head_lr != 1,
            'head_lr has no effect with local_optimizer "none": no local step is taken. Remove it.',
        ),
        (
            built.alone and (built.scalars or method.average or method.guide or method.aggregate["kind"] != "mean"),
            'sharing = "alone" leaves nothing to exchange: it takes exchange "weights", aggregate "mean", no average '
            "and no guide.",
        ),
    ):
        if wrong:
            raise ValueError(why)


Rule = tuple[bool, str]  # (what must not be, what to say)


def _of_estimators(
    method: Method, built: Built, estimators: Sequence[Choice], dense: bool, kinds: str
) -> tuple[Rule, ...]:
    """What estimators, exchange, seeds and guide must not be together."""
    seeded = ", ".join(key for key in ESTIMATORS if key not in DENSE)
    guided = ", ".join(key for key, one in ESTIMATORS.items() if "candidates" in inspect.signature(one).parameters)
    linear = built.local is not None and built.local.rate is not None and built.server.rate is not None
    plain = (
        method.aggregate["kind"] == "mean"
        and not built.by_noise
        and method.assignment["kind"] == "everyone"
        and method.head_lr == 1
        and not method.classes
    )
    candidates = max(one.get("candidates", 1) for one in estimators)
    return (
        (
            built.scalars and dense,
            f'exchange = "scalars" needs a seeded estimator; {kinds} returns a dense gradient.\n'
            f'    Use exchange = "weights", or one of: {seeded}.',
        ),
        (
            (candidates > 1) != method.guide,
            f"method.guide = {method.guide} and estimator.candidates = {candidates} go "
            f"together: the last pseudo-gradient is sent so that an estimator may choose among candidates. Set both, "
            f"for {guided}; or neither.",
        ),
        (
            bool(built.seeds.pool) and not (built.scalars and linear and plain),
            f'seeds = "pool" sums scalars over the whole run: it needs exchange "scalars", sgd without momentum on '
            f'both sides, aggregate "mean" weighed by examples, assignment "everyone", head_lr = 1 and no classes of '
            f"clients; here {', '.join(_of_pool(method))}.",
        ),
        (
            built.seeds.shared and dense,
            f'seeds = "shared" has no effect with estimator {kinds}: it draws no direction. Remove it.',
        ),
    )


def _of_classes(method: Method, built: Built, dense: bool, everyone: bool) -> tuple[Rule, ...]:
    """What classes of clients and the weights of their answers must not be."""
    rated = next((one.name for one in method.classes if one.lr != 1), "")
    idle = next((one for one in parties(method) if one.assignment["kind"] == "nobody"), None)
    return (
        (
            bool(method.classes) and method.sharing == "pooled",
            'method.classes with sharing = "pooled": all data are in one place, there are no clients. Remove one.',
        ),
        (
            bool(rated) and built.local is None,
            f'method.classes: lr of "{rated}" has no effect with local_optimizer "none": no local step is taken.',
        ),
        (
            bool(method.classes) and idle is not None and built.split_head,
            f'method.classes: "{idle and idle.name}" has assignment "nobody", and head = "split" leaves it nothing to '
            f'train. Use head = "shared".',
        ),
        (
            built.by_noise and (dense or (not method.classes and everyone)),
            'aggregate.weigh = "variance" has no effect where all answers are of equal variance: here '
            + ("every gradient is exact." if dense else "all clients train everything by one estimator.")
            + ' Use weigh = "examples".',
        ),
        (
            built.alone and any(one.absent for one in method.classes),
            'method.classes: absent clients with sharing = "alone" would be scored untrained. Remove absent.',
        ),
        (
            built.by_noise and built.alone,
            'aggregate.weigh = "variance" has no effect with sharing = "alone". Remove one of them.',
        ),
    )


def _of_pool(method: Method) -> list[str]:
    """What a pool of seeds asks of a method, as it is there."""
    choices = {what: vars(method)[what] for what in ("local_optimizer", "server_optimizer", "aggregate", "assignment")}
    said = [
        f'{what} "{one["kind"]}"' + (f" with momentum {one['momentum']:g}" if one.get("momentum") else "")
        for what, one in choices.items()
    ]
    return [f'exchange "{method.exchange}"', *said, f"head_lr = {method.head_lr:g}", f"{len(method.classes)} classes"]


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
