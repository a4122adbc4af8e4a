"""The nouns of the package: what one layer hands to the next. Records without behaviour; this file costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Params = Mapping[str, Tensor]  # trainable values by name, float32; the backbone is frozen and apart
Batch = Mapping[str, Tensor]  # inputs by the model's argument names, "labels" among them
_NOTHING: Mapping[Any, Any] = MappingProxyType({})
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
        sums = (round(a + b, 6) for a, b in zip(self, other, strict=True))
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


class Piece(NamedTuple):
    """A part of a batch that is held in memory at once: the batch's loss is the weighted sum of its pieces' losses."""

    weight: float  # its terms of the loss, of the batch's
    batch: Batch
    seed: int | None  # of its dropout masks
    number: int = 0  # its place in the batch


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

    def pieces(self, batch: Batch, seed: int | None = None) -> tuple[Piece, ...]:
        """The parts that a batch is to be taken in, one after the other; the batch itself where it may be whole.

        Only a piece may be given to the functions beside; `spryfl.estimators.pieces.summed` adds up over them.
        """
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


# Runs of a step's terms: (places of the block, distribution, how many).
Layout = tuple[tuple[tuple[int, ...], str, int], ...]


class Trace(NamedTuple):
    """The seeded part of some local steps in few bytes: a scalar a term, and what its direction is made from.

    Places are positions in the instruction's names; none stand for all names that have no dense part. Terms whose seeds
    follow from the instruction, as those of every estimator here do, need no seed on the way.
    """

    scalars: Tensor  # float32 (terms of all steps,): the coefficients
    layouts: tuple[Layout, ...]  # the distinct ones
    steps: tuple[int, ...]  # the layout of each step
    seeds: Tensor  # int64 (terms of all steps,), or (0,) where they follow from the instruction


class Pool(NamedTuple):
    """A pool of seeds that all clients draw their steps' seeds from (FedKSeed)."""

    seed: int
    size: int
    chances: Tensor  # float32 (size,), or (0,) for equal ones


class Share(NamedTuple):
    """What moves the values in one round: a client's answer, or the answers of several that shared their seeds."""

    seed: int
    names: tuple[int, ...]  # places in the names of all values; none stand for all
    lr_scale: float
    weight: float
    params: Params  # its dense part
    trace: Trace | None
    pool: Pool | None = None
    merged: bool = False  # the mean over several clients is taken
    noise: tuple[float, ...] = ()  # relative variance of its estimate, by name, where answers are weighed by it


class Round(NamedTuple):
    """All shares of one round: they take the values of round `number - 1` to those of `number`."""

    number: int
    shares: tuple[Share, ...]
    size: int = 0  # bytes of its shares on the way


class CatchUp(NamedTuple):
    """How a client that holds older values gets the current ones, in place of the values themselves."""

    since: int  # the round whose values it holds
    missed: tuple[Round, ...] = ()  # to be replayed, oldest first
    summed: Tensor | None = None  # (pool, terms of a step): what the values of round 0 are moved by
    layout: Layout = ()  # of those terms, places in the names of all values


class Instruction(NamedTuple):
    """What the server tells one client in one round."""

    round: int  # 1 is the first
    client: int
    seed: int
    names: tuple[str, ...]  # the values that this client may move
    params: Params  # current values: those of `names` and the others that its forward pass needs
    lr_scale: float = 1.0  # the schedule's factor on the local learning rate
    evaluate: bool = False  # score the client's held-out part before and after
    guide: Params = _NOTHING  # the last aggregated pseudo-gradient, where the method sends it
    pool: Pool | None = None
    catch_up: CatchUp | None = None  # values come by replay; `params` holds what does not
    fingerprint: str = ""  # of the noise, where directions are made again elsewhere
    client_class: str = ""  # which of the method's classes this client belongs to; empty = none
    growth: float = 1.0  # factor on the directions of its estimator


class Update(NamedTuple):
    """What one client answers: its values or scalars, and what they cost."""

    round: int
    client: int
    params: Params  # new values of its names, gradients where no local step is taken; beside a trace the dense part
    examples: int  # distinct training examples used; the weight in the mean
    loss: float  # mean over the local batches
    passes: Passes
    peak_bytes: int  # most memory that a step held above the model; 0 = not measured
    seconds: float
    held_out: int = 0  # examples scored; 0 = not asked
    correct_before: float = 0  # the task's metric times the rows: for accuracy, the right ones
    correct_after: float = 0
    trace: Trace | None = None
    scalars: Scalars = Scalars()
    variance: float = 0.0  # of the client's mean gradient over its local batches, a value; 0 = not asked
    noise: tuple[float, ...] = ()  # predicted relative variance of its estimate, by name as told; empty = not asked


class Ledger(NamedTuple):
    """What the server knows of its clients' values, where they come by replay."""

    seen: Mapping[int, int] = _NOTHING  # client -> the round whose values it holds
    rounds: tuple[Round, ...] = ()  # the latest, as long as they are fewer bytes than the values
    origin: Params = _NOTHING  # values before round 1, with a pool of seeds
    summed: Tensor | None = None  # (pool, terms of a step)
    layout: Layout = ()
    sizes: Tensor | None = None  # (2, pool): how often each seed was drawn, and the sum of |c|


class ServerState(NamedTuple):
    """All that a run needs to go on: `finish` turns one into the next."""

    round: int  # rounds done
    params: Params
    optimizer: Mapping[str, Params]  # by slot (m, v, t), then by name
    average: Params = _NOTHING  # over the rounds, where the method asks for it
    guide: Params = _NOTHING  # the last pseudo-gradient, where the method sends it
    ledger: Ledger = Ledger()
    key: int = 0  # of the noise that keeps answers private; never sent
