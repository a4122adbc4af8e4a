"""The nouns of the package: what one layer hands to the next. Records without behaviour; this file costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

Params = Mapping[str, Tensor]  # trainable values by name, float32; the backbone is frozen and apart
Batch = Mapping[str, Tensor]  # inputs by the model's argument names, "labels" among them
Features = tuple[Tensor, ...]  # what the frozen trunk hands to the head


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

    def __add__(self, other: tuple) -> Passes:
        return Passes(*(a + b for a, b in zip(self, other, strict=True)))


class Estimate(NamedTuple):
    """A gradient estimate: a dense part by name and seeded terms; either may be empty."""

    loss: float
    dense: Params
    terms: tuple[Directional, ...] = ()
    passes: Passes = Passes()


class Cut(NamedTuple):
    """A loss cut between the frozen trunk and the head: `head(params, trunk(params))` is the loss."""

    trunk: Callable[[Params], Features]
    head: Callable[[Params, Features], Tensor]


class LossFn(Protocol):
    """A client's loss as a function of its trainable values, and what of the model's inside an estimator may ask for.

    `seed` chooses the dropout masks, `None` is evaluation mode; two calls with one seed share their masks.
    """

    @property
    def head(self) -> frozenset[str]:
        """Names of the head's values."""
        ...

    def __call__(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        """The loss of one batch, a float32 scalar."""
        ...

    def cut(self, batch: Batch, seed: int | None = None) -> Cut:
        """The same loss in two parts, cut before the head."""
        ...

    def checkpointed(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        """The same loss, each block's activations recomputed on the way back."""
        ...


Estimator = Callable[[LossFn, Params, Batch, int], Estimate]


class Instruction(NamedTuple):
    """What the server tells one client in one round."""

    round: int  # 1 is the first
    client: int
    seed: int
    names: tuple[str, ...]  # the values that this client may move
    params: Params  # current values: those of `names` and the others that its forward pass needs
    lr_scale: float = 1.0  # the schedule's factor on the local learning rate
    evaluate: bool = False  # score the client's held-out part before and after


class Update(NamedTuple):
    """What one client answers: its values, and what they cost."""

    round: int
    client: int
    params: Params  # new values of the instruction's names
    examples: int  # distinct training examples used; the weight in the mean
    loss: float  # mean over the local batches
    passes: Passes
    peak_bytes: int  # most memory that a step held above the model; 0 = not measured
    seconds: float
    held_out: int = 0  # examples scored; 0 = not asked
    correct_before: float = 0  # the task's metric times the rows: for accuracy, the right ones
    correct_after: float = 0


class ServerState(NamedTuple):
    """All that a run needs to go on: `finish` turns one into the next."""

    round: int  # rounds done
    params: Params
    optimizer: Mapping[str, Params]  # by slot (m, v, t), then by name
