"""The nouns of the package: what one layer hands to the next. Records without behaviour; this file costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

Params = Mapping[str, Tensor]  # trainable values by name, float32; the backbone is frozen and apart
Batch = Mapping[str, Tensor]  # inputs by the model's argument names, "labels" among them
Features = tuple[Tensor, ...]  # what the frozen trunk hands to the head, in the order the model computes it


class Unit(NamedTuple):
    """Names that are trained together: LoRA's A and B of one map, an IA3 vector, a layer's biases, a head linear."""

    name: str
    params: tuple[str, ...]
    size: int  # number of values
    head: bool = False  # part of the task's head, not of an adapter


class Directional(NamedTuple):
    """One term of a gradient estimate: `coefficient * direction(seed)` over the names of `block`."""

    seed: int
    coefficient: float  # rounded to float32; 1/K is in it
    block: tuple[str, ...]
    distribution: str  # a key of noise.DISTRIBUTIONS


class Passes(NamedTuple):
    """Work done, in passes through the network of one batch. A tangent pass costs about what a value pass costs."""

    value: int = 0
    tangent: int = 0
    backward: int = 0

    def __add__(self, other: tuple) -> Passes:  # type: ignore[override]
        return Passes(*(a + b for a, b in zip(self, other, strict=True)))


class Estimate(NamedTuple):
    """A gradient estimate: a dense part by name and seeded terms; either may be empty."""

    loss: float
    dense: Params
    terms: tuple[Directional, ...] = ()
    passes: Passes = Passes()


class LossFn(Protocol):
    """A client's loss as a function of its trainable values, and what of the model's inside an estimator may ask for.

    `seed` chooses the dropout mask; `None` is evaluation mode. Both calls of one seed share the mask.
    """

    head: frozenset[str]  # names of the head's values

    def __call__(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor: ...

    def features(self, params: Params, batch: Batch, seed: int | None = None) -> Features: ...

    def head_loss(self, params: Params, features: Features, batch: Batch, seed: int | None = None) -> Tensor: ...

    def checkpointed(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor: ...


Estimator = Callable[[LossFn, Params, Batch, int], Estimate]
