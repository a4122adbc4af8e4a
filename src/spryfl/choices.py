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

Nothing in the package asks for a method by its name. To make your own, call `Method` with other choices; the kind of a
choice is a registry's key or a builder of yours. Costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from spryfl.aggregate import AGGREGATORS, Aggregator, TooFewError
from spryfl.assign import ASSIGNMENTS, Assignment
from spryfl.estimators import DENSE, ESTIMATORS
from spryfl.optimizers import LOCAL, OPTIMIZERS, SCHEDULES, Optimizer
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


class Seeds(NamedTuple):
    """What the clients' directions follow from."""

    shared: bool = False  # all clients of a round have the same
    pool: int = 0  # how many there are in the whole run; 0 = as many as are needed
    weighted: bool = False  # seeds of the pool whose scalars are large are drawn more often


def own_seeds() -> Seeds:
    """Each client, round and step has seeds of its own."""
    return Seeds()


def shared_seeds() -> Seeds:
    """All clients of a round share their seeds, so that the mean of their scalars is the mean of their models."""
    return Seeds(shared=True)


def seed_pool(size: int = 1024, weighted: bool = False) -> Seeds:
    """All steps of the run draw from a pool: the values are those of round 0 and one sum a seed.

    Args:
        size: how many seeds.
        weighted: draw a seed with the softmax of its mean |c|, scaled to [0, 1] (FedKSeed-Pro); else all alike.
    """
    if size < 1:
        raise ValueError(f"size = {size} of a pool of seeds; it must be 1 or more.")
    return Seeds(pool=size, weighted=weighted)


SEEDS: dict[str, Callable[..., Seeds]] = {"own": own_seeds, "shared": shared_seeds, "pool": seed_pool}
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

    @property
    def follows(self) -> bool:
        """Whether a client can bring old values up to date by replay: the server keeps nothing that it would lack."""
        return self.scalars and self.server.rate is not None and not self.alone


def builder(what: str, kind: str | Callable[..., Any]) -> Callable[..., Any]:
    """The builder of a choice: the registry's, or the callable itself."""
    if callable(kind):
        return kind
    registry = REGISTRIES[what]
    if kind not in registry:
        raise ValueError(f'{what} = "{kind}" is unknown. Possible: {", ".join(registry)}.')
    return registry[kind]


def build(method: Method) -> Built:
    """The functions that a method's choices name; a ValueError says which choice does not fit."""
    _check(method)
    exact = {"exact_head": True} if method.head == "exact" else {}
    built = Built(
        estimator=_made("estimator", method.estimator, **exact),
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
    )
    _check_together(method, built)
    return built


def _check(method: Method) -> None:
    """Each plain choice by itself."""
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
    dense = method.estimator["kind"] in DENSE if isinstance(method.estimator["kind"], str) else False
    seeded = ", ".join(key for key in ESTIMATORS if key not in DENSE)
    guided = ", ".join(key for key, one in ESTIMATORS.items() if "candidates" in inspect.signature(one).parameters)
    linear = built.local is not None and built.local.rate is not None and built.server.rate is not None
    plain = method.aggregate["kind"] == "mean" and method.assignment["kind"] == "everyone" and method.head_lr == 1
    for wrong, why in (
        (
            built.scalars and dense,
            f'exchange = "scalars" needs a seeded estimator; "{method.estimator["kind"]}" returns a dense gradient.\n'
            f'    Use exchange = "weights", or one of: {seeded}.',
        ),
        (
            (method.estimator.get("candidates", 1) > 1) != method.guide,
            f"method.guide = {method.guide} and estimator.candidates = {method.estimator.get('candidates', 1)} go "
            f"together: the last pseudo-gradient is sent so that an estimator may choose among candidates. Set both, "
            f"for {guided}; or neither.",
        ),
        (
            bool(built.seeds.pool) and not (built.scalars and linear and plain),
            f'seeds = "pool" sums scalars over the whole run: it needs exchange "scalars", sgd without momentum on '
            f'both sides, aggregate "mean", assignment "everyone" and head_lr = 1; here {", ".join(_of_pool(method))}.',
        ),
        (
            built.seeds.shared and dense,
            f'seeds = "shared" has no effect with estimator "{method.estimator["kind"]}": it draws no direction. '
            f"Remove it.",
        ),
        (
            method.aggregate["kind"] == "krum" and method.assignment["kind"] != "everyone",
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


def _of_pool(method: Method) -> list[str]:
    """What a pool of seeds asks of a method, as it is there."""
    choices = {what: vars(method)[what] for what in ("local_optimizer", "server_optimizer", "aggregate", "assignment")}
    said = [
        f'{what} "{one["kind"]}"' + (f" with momentum {one['momentum']:g}" if one.get("momentum") else "")
        for what, one in choices.items()
    ]
    return [f'exchange "{method.exchange}"', *said, f"head_lr = {method.head_lr:g}"]


def check_cohort(method: Method, cohort: int) -> None:
    """A ValueError if so few clients a round, all of them answering, are too few for the method's aggregate."""
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
