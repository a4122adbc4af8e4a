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
    """Work done, in passes through the network of one batch. A tangent pass costs about what a value pass costs.

    A pass through part of the blocks counts as that part of one.
    """

    value: float = 0
    tangent: float = 0
    backward: float = 0

    def __add__(self, other: tuple) -> Passes:
        sums = (a + b for a, b in zip(self, other, strict=True))
        return Passes(*(int(s) if s == int(s) else s for s in sums))  # 2, not 2.0: whole counts read as such


class Scalars(NamedTuple):
    """What the directional derivatives of some estimates looked like; spikes are how forward-mode runs diverge."""

    count: int = 0  # type: ignore[assignment]  # drawn; hides tuple.count
    refused: int = 0  # not finite, left out
    clipped: int = 0
    squares: float = 0.0  # sum of c^2 over those that were kept
    largest: float = 0.0  # max |c| of those

    def __add__(self, other: tuple) -> Scalars:
        count, refused, clipped, squares = (a + b for a, b in zip(self[:4], other[:4], strict=True))
        return Scalars(count, refused, clipped, squares, max(self.largest, other[4]))


class Estimate(NamedTuple):
    """A gradient estimate: a dense part by name and seeded terms; either may be empty."""

    loss: float
    dense: Params
    terms: tuple[Directional, ...] = ()
    passes: Passes = Passes()
    scalars: Scalars = Scalars()


class Cut(NamedTuple):
    """A loss cut in two: `head(params, trunk(params))` is the loss; what crosses is all that the head part needs."""

    trunk: Callable[[Params], Features]
    head: Callable[[Params, Features], Tensor]
    above: frozenset[str]  # names of the values that the head part reads; the trunk reads none of them
    share: float = 0.0  # of the network's blocks, those in the head part
    both: frozenset[str] = frozenset()  # names that both parts read: such a value cannot be moved


class LossFn(Protocol):
    """A client's loss as a function of its trainable values, and what of the model's inside an estimator may ask for.

    `seed` chooses the dropout masks, `None` is evaluation mode; two calls with one seed share their masks.
    """

    @property
    def head(self) -> frozenset[str]:
        """Names of the head's values."""
        ...

    @property
    def guide(self) -> Params:
        """The last aggregated pseudo-gradient, where the method sends it; else empty."""
        ...

    def __call__(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        """The loss of one batch, a float32 scalar."""
        ...

    def cut(self, batch: Batch, seed: int | None = None, top: int = 0, checkpoint: bool = False) -> Cut:
        """The same loss in two parts, cut below the last `top` blocks; 0 cuts before the head, -1 below all blocks.

        With `checkpoint` the head part computes each block's activations again on the way back.
        """
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
    correct_before: int = 0
    correct_after: int = 0


class ServerState(NamedTuple):
    """All that a run needs to go on: `finish` turns one into the next."""

    round: int  # rounds done
    params: Params
    optimizer: Mapping[str, Params]  # by slot (m, v, t), then by name
