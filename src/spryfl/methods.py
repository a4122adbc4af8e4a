"""A federated method is a record of choices; this file is the table of the named ones.

    estimator          how a client gets a gradient                       estimators.ESTIMATORS
    assignment         which units a client may move this round           assign.ASSIGNMENTS
    local_optimizer    the client's steps                                 optimizers.OPTIMIZERS
    server_optimizer   what is done with the mean of the answers          optimizers.OPTIMIZERS
    head               shared | split | exact: who trains the head, and how
    sharing            federated | pooled | alone: the two ends that a federation lies between

Nothing in the package asks for a method by its name. To make your own, call `Method` with other choices; the kind of a
choice is a registry's key or a builder of yours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from spryfl.assign import ASSIGNMENTS, Assignment
from spryfl.estimators import ESTIMATORS
from spryfl.optimizers import OPTIMIZERS, SCHEDULES, Optimizer
from spryfl.types import Estimator

Choice = Mapping[str, Any]  # {"kind": key or builder, option: value, ...}

HEADS = {
    "shared": "every client of a round trains the head with its estimator",
    "split": "the head is a unit like any other",
    "exact": "every client trains the head by reverse mode from the features, the rest by its estimator",
}
SHARING = {
    "federated": "clients share one model",
    "pooled": "all data in one place: one client, as many local steps a round as a cohort takes together",
    "alone": "each client keeps a model of its own and never shares it",
}
REGISTRIES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "estimator": ESTIMATORS,
    "assignment": ASSIGNMENTS,
    "local_optimizer": OPTIMIZERS,
    "server_optimizer": OPTIMIZERS,
}


def _choice(kind: str | Callable[..., Any], **options: Any) -> Any:
    return field(default_factory=lambda: {"kind": kind, **options})


@dataclass(frozen=True)
class Method:
    """A federated method: five choices, a schedule, and where it is from.

    >>> Method("mine", estimator={"kind": "forward", "directions": 8}, assignment={"kind": "cyclic"}).head
    'shared'
    """

    name: str
    estimator: Choice = _choice("backprop")
    assignment: Choice = _choice("everyone")
    local_optimizer: Choice = _choice("adamw")
    server_optimizer: Choice = _choice("sgd")
    head: str = "shared"
    head_lr: float = 1.0  # factor on the head's local learning rate
    schedule: str = "constant"  # of the local learning rate over the rounds
    sharing: str = "federated"
    summary: str = ""
    paper: str = ""


class Built(NamedTuple):
    """A method's choices as functions."""

    estimator: Estimator
    assign: Assignment
    local: Optimizer
    server: Optimizer
    split_head: bool
    head_lr: float
    schedule: Callable[[float], float]
    alone: bool


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
    for what, given, known in (
        ("head", method.head, HEADS),
        ("schedule", method.schedule, SCHEDULES),
        ("sharing", method.sharing, SHARING),
    ):
        if given not in known:
            raise ValueError(f'method.{what} = "{given}" is unknown. Possible: {", ".join(known)}.')
    if not method.head_lr > 0:
        raise ValueError(f"method.head_lr = {method.head_lr}: the factor on the head's learning rate must be above 0.")
    exact = {"exact_head": True} if method.head == "exact" else {}
    return Built(
        estimator=_made("estimator", method.estimator, **exact),
        assign=_made("assignment", method.assignment),
        local=_made("local_optimizer", method.local_optimizer),
        server=_made("server_optimizer", method.server_optimizer),
        split_head=method.head == "split",
        head_lr=method.head_lr,
        schedule=SCHEDULES[method.schedule],
        alone=method.sharing == "alone",
    )


def _made(what: str, choice: Choice, **more: Any) -> Any:
    options = {key: value for key, value in choice.items() if key != "kind"}
    make = builder(what, choice["kind"])
    try:
        return make(**options, **more)
    except TypeError as error:
        if more:
            raise ValueError(
                f'head = "exact" needs an estimator that leaves the head out; "{choice["kind"]}" does not '
                f'(backprop\'s gradient of the head is exact already). Use head = "shared", or estimator "forward".'
            ) from error
        raise ValueError(f"method.{what}: {error}") from error


_SPRY = Method(
    "spry",
    estimator={"kind": "forward", "directions": 1, "distribution": "gaussian"},
    assignment={"kind": "cyclic", "rotate": True},
    local_optimizer={"kind": "adamw", "lr": 1e-3},
    server_optimizer={"kind": "yogi", "lr": 1e-2},
    summary="units split among clients, forward-mode gradients, mean by unit",
    paper="Panchal et al., NeurIPS 2024, arXiv 2405.15551",
)
_FEDAVG = Method(
    "fedavg",
    local_optimizer={"kind": "adamw", "lr": 1e-3},
    summary="backprop, local epochs, mean of weights",
    paper="McMahan et al., AISTATS 2017, arXiv 1602.05629",
)
_FEDYOGI = replace(
    _FEDAVG,
    name="fedyogi",
    server_optimizer={"kind": "yogi", "lr": 1e-2},
    summary="FedAvg with the Yogi server",
    paper="Reddi et al., ICLR 2021, arXiv 2003.00295",
)
_ROWS = (
    _SPRY,
    replace(_SPRY, name="fedfgd", assignment={"kind": "everyone"}, summary="Spry without the split"),
    _FEDAVG,
    _FEDYOGI,
    replace(
        _FEDAVG,
        name="fedavg_checkpointed",
        estimator={"kind": "backprop", "checkpoint": True},
        summary="FedAvg, activations recomputed: what a user would pick instead of forward mode",
        paper="Chen et al. 2016, arXiv 1604.06174",
    ),
    replace(
        _FEDYOGI,
        name="fedyogi_checkpointed",
        estimator={"kind": "backprop", "checkpoint": True},
        summary="FedYogi, activations recomputed",
        paper="Chen et al. 2016, arXiv 1604.06174",
    ),
    replace(
        _FEDAVG,
        name="fedavg_split",
        assignment=_SPRY.assignment,
        summary="FedAvg under Spry's split",
        paper=_SPRY.paper,
    ),
    replace(
        _FEDYOGI,
        name="fedyogi_split",
        assignment=_SPRY.assignment,
        summary="FedYogi under Spry's split",
        paper=_SPRY.paper,
    ),
    replace(
        _FEDAVG,
        name="head_only",
        assignment={"kind": "nobody"},
        summary="only the head is trained, on frozen features",
        paper="a baseline",
    ),
    replace(
        _FEDAVG, name="pooled", sharing="pooled", summary="all data in one place, no federation", paper="a baseline"
    ),
    replace(
        _FEDAVG, name="alone", sharing="alone", summary="each client for itself, no federation", paper="a baseline"
    ),
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def named(name: str, **changes: Any) -> Method:
    """The row `name` of the table, some choices changed: `named("fedavg", schedule="linear")`."""
    if name not in METHODS:
        raise ValueError(f'method "{name}" is unknown. Possible: {", ".join(METHODS)}.')
    return replace(METHODS[name], **changes)


def spry(directions: int = 1, **changes: Any) -> Method:
    """Spry with K directions a batch; other choices as keywords.

    >>> spry(directions=8, head="exact").estimator["directions"]
    8
    """
    return named("spry", **{"estimator": {**_SPRY.estimator, "directions": directions}, **changes})


def fedavg(**changes: Any) -> Method:
    """FedAvg by backprop; choices as keywords."""
    return named("fedavg", **changes)
