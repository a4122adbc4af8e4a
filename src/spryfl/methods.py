"""The table of methods: every row is a record of choices, and differs from its neighbours by choices alone.

Where a paper leaves a number open, or a row is in the form of another paper's comparison, `summary` and `paper` say
so. Make your own with `named("spry", head="exact")` or `Method(...)`. Costs nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from spryfl.choices import REGISTRIES, Built, ClientClass, Method, Seeds, build, builder, check_cohort
from spryfl.classes import check_members, present

__all__ = [
    "METHODS",
    "REGISTRIES",
    "Built",
    "ClientClass",
    "Method",
    "Seeds",
    "build",
    "builder",
    "check_cohort",
    "check_members",
    "fedavg",
    "named",
    "present",
    "spry",
]

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
_FEDMEZO = Method(
    "fedmezo",
    estimator={"kind": "central_difference", "directions": 1, "mu": 1e-3, "distribution": "gaussian"},
    local_optimizer={"kind": "sgd", "lr": 1e-3},
    summary="MeZO's central differences, local SGD, mean of weights",
    paper="Malladi et al., NeurIPS 2023, arXiv 2305.17333; Ling et al., KDD 2024, arXiv 2402.05926",
)
_DECOMFL = replace(
    _FEDMEZO,
    name="decomfl",
    estimator={"kind": "forward_difference", "directions": 10, "mu": 1e-3, "distribution": "gaussian"},
    seeds={"kind": "shared"},
    exchange="scalars",
    summary="shared seeds: the mean of scalars is the mean of models, and bytes do not hang on the model",
    paper="Li et al., ICLR 2025, arXiv 2405.15861",
)
_FEDKSEED = replace(
    _FEDMEZO,
    name="fedkseed",
    seeds={"kind": "pool", "size": 1024, "weighted": False},
    exchange="scalars",
    summary="all steps draw from a pool of seeds, one sum a seed is the whole model",
    paper="Qin et al., ICML 2024, arXiv 2312.06353",
)
_BAFFLE = replace(
    _FEDMEZO,
    name="baffle",
    estimator={"kind": "central_difference", "directions": 20, "mu": 1e-4, "distribution": "gaussian"},
    seeds={"kind": "shared"},
    exchange="scalars",
    local_optimizer={"kind": "none"},
    server_optimizer={"kind": "adam", "lr": 1e-3},
    average=0.995,
    summary="K shared directions, K scalars up, Adam on the server, weights averaged over time",
    paper="Feng et al., 2023, arXiv 2301.12195",
)
_ROWS = (
    _SPRY,
    replace(
        _SPRY,
        name="spry_per_iteration",
        exchange="scalars",
        local_optimizer={"kind": "none"},
        summary="Spry that sends scalars: the server makes the directions again and steps itself",
    ),
    replace(
        _SPRY,
        name="spry_plus",
        estimator={
            "kind": "forward",
            "directions": 16,
            "distribution": "orthogonal",
            "exact_top": 2,
            "checkpoint": True,
        },
        assignment={"kind": "everyone"},
        local_optimizer={"kind": "none"},
        server_optimizer={"kind": "adamw", "lr": 4e-3},
        schedule="linear",
        summary="the last two blocks exactly, forward mode below: with adapter graded, few values there",
        paper="ours, after arXiv 2405.15551; its evidence is in experiments/exact_top",
    ),
    replace(_SPRY, name="fedfgd", assignment={"kind": "everyone"}, summary="Spry without the split"),
    _FEDAVG,
    _FEDYOGI,
    replace(
        _FEDYOGI,
        name="fedadam",
        server_optimizer={"kind": "adam", "lr": 1e-2},
        summary="FedAvg with the Adam server",
    ),
    replace(
        _FEDAVG,
        name="fedsgd",
        local_optimizer={"kind": "none"},
        server_optimizer={"kind": "sgd", "lr": 0.1},
        summary="the mean of the clients' gradients, one step on the server",
    ),
    replace(
        _FEDAVG,
        name="fedavg_checkpointed",
        estimator={"kind": "backprop", "checkpoint": True},
        summary="FedAvg, activations recomputed: what a user would pick instead of forward mode",
        paper="Chen et al., 2016, arXiv 1604.06174",
    ),
    replace(
        _FEDYOGI,
        name="fedyogi_checkpointed",
        estimator={"kind": "backprop", "checkpoint": True},
        summary="FedYogi, activations recomputed",
        paper="Chen et al., 2016, arXiv 1604.06174",
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
    _FEDMEZO,
    replace(
        _FEDMEZO,
        name="fedzo",
        estimator={
            "kind": "forward_difference",
            "directions": 20,
            "mu": 1e-3,
            "distribution": "sphere",
            "length": "direction",
        },
        summary="forward differences on the unit sphere, local SGD, mean of weights",
        paper="Fang et al., IEEE TSP 2022, arXiv 2201.09531",
    ),
    _BAFFLE,
    replace(
        _BAFFLE,
        name="baffle_plus",
        seeds={"kind": "own"},
        exchange="weights",
        local_optimizer={"kind": "adamw", "lr": 1e-3},
        server_optimizer=_SPRY.server_optimizer,
        average=0.0,
        summary="BAFFLE with own directions, local AdamW and the mean of weights, as Spry's paper compares it",
        paper="arXiv 2301.12195, in the form of arXiv 2405.15551",
    ),
    replace(
        _FEDMEZO,
        name="fwdllm_plus",
        estimator={**_FEDMEZO.estimator, "mu": 1e-2, "candidates": 10},
        local_optimizer={"kind": "adamw", "lr": 1e-3},
        server_optimizer=_SPRY.server_optimizer,
        gate=5.0,
        guide=True,
        summary="the candidate nearest to the last gradient, and only clients whose estimate is steady",
        paper="Xu et al., USENIX ATC 2024, arXiv 2308.13894, in the form of arXiv 2405.15551",
    ),
    _DECOMFL,
    _FEDKSEED,
    replace(
        _FEDKSEED,
        name="fedkseed_pro",
        seeds={**_FEDKSEED.seeds, "weighted": True},
        summary="FedKSeed that draws seeds with large scalars more often",
    ),
    replace(
        _FEDMEZO,
        name="fedspzo",
        estimator={
            "kind": "two_block",
            "pairing": "joint",
            "top": 2,
            "p1": 1,
            "p2": 4,
            "scheme": "central",
            "mu": 1e-3,
            "distribution": "gaussian",
        },
        exchange="scalars",
        summary="more directions for the later blocks, the earlier ones' hidden states reused, scalars up",
        paper="arXiv 2502.10239",
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
    """The row `name` of the table, some choices changed: `named("fedavg", schedule="linear")`.

    Args:
        name: a row of METHODS.
        changes: choices of `Method` that are made otherwise.

    Raises:
        ValueError: there is no such row.

    >>> named("fedavg", schedule="linear").schedule
    'linear'
    """
    if name not in METHODS:
        raise ValueError(f'method "{name}" is unknown. Possible: {", ".join(METHODS)}.')
    return replace(METHODS[name], **changes)


def spry(directions: int = 1, **changes: Any) -> Method:
    """Spry with K directions a batch; other choices as keywords.

    Args:
        directions: K, directions a batch.
        changes: other choices of `Method`.

    >>> spry(directions=8, head="exact").estimator["directions"]
    8
    """
    return named("spry", **{"estimator": {**_SPRY.estimator, "directions": directions}, **changes})


def fedavg(**changes: Any) -> Method:
    """FedAvg by backprop; choices as keywords.

    Args:
        changes: choices of `Method` that are made otherwise.

    >>> fedavg(local_optimizer={"kind": "sgd", "lr": 0.1}).local_optimizer["kind"]
    'sgd'
    """
    return named("fedavg", **changes)
