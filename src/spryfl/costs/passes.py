"""Passes, scalars and operations of one estimate, predicted from the estimator's options and a client's units.

    passes = below (1 - share) + above share        share: the blocks above the estimator's cut, of all blocks

One predictor a kind, keyed like `ESTIMATORS`; an estimator of the user's own has none, and its cost is unknown. Costs
nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from spryfl.costs import flops
from spryfl.costs.shapes import Shapes, sides, size
from spryfl.estimators import ESTIMATORS
from spryfl.types import Passes, Unit


class Step(NamedTuple):
    """What one estimate does."""

    below: Passes  # times through what lies below the cut
    above: Passes  # times through what lies above it, the head among it
    top: int = 0  # blocks above the cut
    cut: bool = False  # whether reverse mode or tangents enter the upper part at the cut
    dense: tuple[Unit, ...] = ()  # units whose gradient is exact
    blocks: tuple[tuple[int, int], ...] = ()  # (how many scalars, over how many values each)
    again: bool = False  # blocks that are run backwards have their values computed again
    sure: bool = True  # False where the numbers depend on the data

    @property
    def terms(self) -> int:
        """Scalars of one estimate."""
        return sum(count for count, _ in self.blocks)

    @property
    def drawn(self) -> int:
        """Values of the directions that these scalars belong to."""
        return sum(count * values for count, values in self.blocks)


def passes(shapes: Shapes, step: Step) -> Passes:
    """Passes through the network, a pass through part of the blocks as that part of one."""
    share = step.top / shapes.layers
    return Passes() + Passes(*(b * (1 - share) + a * share for b, a in zip(step.below, step.above, strict=True)))


def step_flops(shapes: Shapes, step: Step, mine: Sequence[Unit]) -> float:
    """Operations of one estimate on a client that moves `mine`; its local update's few a value are left out."""
    at, last = shapes.layers - step.top, shapes.layers
    first = flops.first_moved(shapes, mine)
    once = 0 if shapes.shared else min(max(first, 0), at)  # blocks before the first moved one run once a batch
    below = flops.value(shapes, 0, once) + step.below.value * flops.value(shapes, once, at)
    head = step.above.value - (step.again and step.cut)
    above = step.above.value * flops.value(shapes, at, last) + head * flops.head_value(shapes)
    rerun = (step.top if step.cut else last - max(first, 0)) if step.again else 0
    moves = step.below.tangent + step.below.backward
    changes = moves * flops.change(shapes, mine, 0, at, first)
    first_above = -1 if step.cut else first
    fed = step.cut or first < last
    upper = flops.change(shapes, mine, at, last, first_above) + flops.head_change(shapes, mine, fed)
    above -= rerun * flops.unneeded(shapes)
    return below + above + changes + (step.above.tangent + step.above.backward) * upper


Predictor = Callable[..., Step]


def _backprop(shapes: Shapes, mine: Sequence[Unit], *, checkpoint: bool) -> Step:
    once = Passes(1, 0, 1)
    return Step(Passes(2, 0, 1) if checkpoint else once, once, dense=tuple(mine), again=checkpoint)


def _forward(
    shapes: Shapes,
    mine: Sequence[Unit],
    *,
    directions: int,
    chunk: int = 0,
    exact_top: int = 0,
    checkpoint: bool = False,
    exact_head: bool = False,
) -> Step:
    cut = bool(exact_head or exact_top)
    inside, exact = sides(shapes, mine, exact_top) if cut else (tuple(mine), ())
    count = directions if inside else 0
    below = Passes(math.ceil(count / chunk) if chunk and count else 1, count)
    above = Passes(2 if checkpoint else 1, 0, 1) if cut else below
    return Step(below, above, _blocks(shapes, exact_top), cut, exact, _drawn((count, inside)), checkpoint)


def _central(shapes: Shapes, mine: Sequence[Unit], *, directions: int, exact_head: bool = False) -> Step:
    return _differences(shapes, mine, 2, 0, directions, exact_head)


def _one_sided(shapes: Shapes, mine: Sequence[Unit], *, directions: int, exact_head: bool = False) -> Step:
    return _differences(shapes, mine, 1, 1, directions, exact_head)


def _differences(shapes: Shapes, mine: Sequence[Unit], each: int, base: int, directions: int, exact_head: bool) -> Step:
    inside, exact = sides(shapes, mine, 0) if exact_head else (tuple(mine), ())
    count = directions if inside else 0
    runs = each * count + (1 if exact_head else base)
    return Step(Passes(runs), Passes(runs, 0, int(exact_head)), 0, exact_head, exact, _drawn((count, inside)))


def _two_block(
    shapes: Shapes,
    mine: Sequence[Unit],
    *,
    top: int,
    pairing: str,
    p1: int,
    p2: int,
    scheme: str,
    budget: float = 0.0,
) -> Step:
    blocks, share = sides(shapes, mine, top), _blocks(shapes, top) / shapes.layers
    joint = pairing == "joint"
    if not all(blocks):  # all directions are the other's
        joint, p1, p2 = False, *((0, p1 * p2 if joint else p2) if blocks[1] else (p1, 0))
    if budget:
        p1, p2 = _within(budget, scheme, share, p1, p2, blocks)
    crossing, own = (p1 * p2, 0) if joint else (p1, p2)
    each = 2 if scheme == "central" else 1
    if scheme == "jvp":
        runs = 2 if budget and p1 and p2 else 1
        below, above = Passes(runs, p1), Passes(runs, crossing + own)
    else:
        base = 0 if scheme == "central" else 1
        below = Passes(each * p1 + (1 if base or own else 0))
        above = Passes(each * (crossing + own) + base)
    drawn = _drawn((p1, blocks[0]), (p1 * p2 if joint else p2, blocks[1]))
    return Step(
        below, above, _blocks(shapes, top), scheme == "jvp" and p1 > 0, (), drawn, sure=not (budget and p1 and p2)
    )


def _within(
    budget: float, scheme: str, share: float, p1: int, p2: int, blocks: Sequence[Sequence[Unit]]
) -> tuple[int, int]:
    """How many directions a budget of passes allows, if all derivatives are of one size."""
    each = 2.0 if scheme == "central" else 1.0
    costs = each, each * share
    fixed = 1 - share if scheme == "central" else 1.0
    if not p2:
        return math.floor((budget - (0.0 if scheme == "central" else fixed)) / costs[0] + 1e-9), 0
    if not p1:
        return 0, math.floor((budget - fixed) / costs[1] + 1e-9)
    left = budget - fixed * (2 if scheme == "jvp" else 1)
    weight = [math.sqrt(size(block) / cost) for block, cost in zip(blocks, costs, strict=True)]
    first = left * weight[0] / sum(w * cost for w, cost in zip(weight, costs, strict=True))
    n1 = max(p1 + 1, min(math.floor(first + 1e-9), math.floor((left - (p2 + 1) * costs[1]) / costs[0] + 1e-9)))
    return n1, max(p2 + 1, math.floor((left - n1 * costs[0]) / costs[1] + 1e-9))


def _blocks(shapes: Shapes, top: int) -> int:
    return shapes.layers if top == -1 else top


def _drawn(*parts: tuple[int, Sequence[Unit]]) -> tuple[tuple[int, int], ...]:
    return tuple((count, size(units)) for count, units in parts if count)


PREDICTED: dict[str, Predictor] = {
    "backprop": _backprop,
    "forward": _forward,
    "central_difference": _central,
    "forward_difference": _one_sided,
    "two_block": _two_block,
}


def predictor(kind: str | Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Step] | None:
    """`(shapes, mine) -> Step` of an estimator with these options; None where nothing is known of it."""
    names = [name for name, builder in ESTIMATORS.items() if kind in (name, builder)]
    if not names or names[0] not in PREDICTED:
        return None
    predict = PREDICTED[names[0]]
    usual = {n: p.default for n, p in inspect.signature(ESTIMATORS[names[0]]).parameters.items()}
    known = inspect.signature(predict).parameters
    given = {name: value for name, value in {**usual, **options}.items() if name in known}
    return lambda shapes, mine: predict(shapes, mine, **given)
