"""From short forms of a model to the whole one: each phase's peak is linear in how often each kind of block comes.

    peak(phase) = peak in the short form + sum over kinds (blocks left out) (what one more block of the kind adds)

The short form has one block of each kind, or two (`outline.kinds`), in their order. Phases are continued one by one
and the largest is taken at the end: where directions are drawn nothing grows with the blocks, where a graph is kept it
does, and the one may be above the other in a short model and below it in a long one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from spryfl import tree
from spryfl.choices import Method, build
from spryfl.costs import work
from spryfl.footprint.outline import Kind, Outline, Skeleton, kinds, original, sample, shapes, skeleton
from spryfl.footprint.phantom import fill, phantoms
from spryfl.footprint.process import process
from spryfl.footprint.step import prefix_bytes, step, values
from spryfl.layout import forget
from spryfl.loss import ModelLoss, Prefix
from spryfl.types import Unit

_TOPS = ("exact_top", "top")  # options of estimators that count blocks from the end


class Footprint(NamedTuple):
    """Bytes of each part of one client's step at its peak."""

    process: int
    backbone: int
    adapters: int
    activations: int
    tangents: int
    gradients: int
    prefix: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)

    @property
    def step(self) -> int:
        """What the step holds above the loaded model: the allocator's peak."""
        return self.activations + self.tangents + self.gradients + self.prefix


class _Asked(NamedTuple):
    """What is to be run."""

    of: Outline
    method: Method
    mine: frozenset[str]  # names of the units that are moved
    exact: frozenset[str] | None  # of those whose gradient is by reverse mode; None where there is none
    rows: int  # at once
    tokens: int
    dropout: bool
    keep: int  # bytes


class _Held(NamedTuple):
    """What a run held."""

    peaks: tuple[int, ...]  # by phase
    prefix: int
    state: int  # gradient and optimizer state

    @property
    def most(self) -> int:
        return max(self.peaks)


def footprint(
    of: Outline,
    method: Method,
    mine: Sequence[Unit] | None = None,
    *,
    rows: int,
    tokens: int,
    micro_batch: int = 0,
    stream: bool = False,
    dropout: bool = False,
    keep_prefix: float = 0.0,
    parts: bool = True,
) -> Footprint:
    """The predicted peak of one local step of one client, by part.

    Args:
        of: the model, from `outline`.
        method: its estimator, head and local optimizer are looked at.
        mine: the units that the client moves; all without.
        rows, tokens: of a local batch; for tasks with several sequences a row, of its sequences.
        micro_batch: rows at once; 0 for all.
        stream: blocks are read from the disk as they are needed.
        dropout: the model's own dropout is on.
        keep_prefix: MB of hidden states kept over local epochs.
        parts: False for the total alone, in less time: what the step holds beside state and prefix is not divided, and
            stands under activations.

    Raises:
        ValueError: the method does not fit the model, or a number is out of its range.

    >>> from spryfl import methods
    >>> from spryfl.footprint import footprint, outline
    >>> one = footprint(outline("minilm"), methods.spry(), rows=8, tokens=64)
    >>> one.activations < one.total
    True
    """
    asked, units = _asked(of, method, mine, rows, tokens, micro_batch, dropout, keep_prefix)
    whole = _whole(asked, units, bool(0 < micro_batch < rows))
    room = whole.most - whole.state - whole.prefix
    activations = room  # with reverse mode alone nothing is drawn
    if parts and asked.exact != asked.mine:
        alone = _continued(asked, "values", units)
        activations = min(alone.most - alone.prefix, room)
    return held(of, stream)._replace(
        activations=activations, tangents=room - activations, gradients=whole.state, prefix=whole.prefix
    )


def held(of: Outline, stream: bool = False) -> Footprint:
    """What is held before a step begins: the process, the model, buffers for streamed blocks.

    Raises:
        ValueError: a model that is not packed cannot be streamed.
    """
    if stream and not of.blocks:
        raise ValueError(
            f'model "{of.name}" is not packed, so it cannot be streamed. Give a precision, or a packed folder.'
        )
    return Footprint(
        process=process(),
        backbone=of.backbone - (sum(of.blocks) if stream else 0),
        adapters=of.adapters,
        activations=0,
        tangents=0,
        gradients=0,
        prefix=0,
        buffers=min(2, len(of.blocks)) * max(of.blocks) if stream else 0,
    )


def _asked(
    of: Outline,
    method: Method,
    mine: Sequence[Unit] | None,
    rows: int,
    tokens: int,
    micro_batch: int,
    dropout: bool = False,
    keep_prefix: float = 0.0,
) -> tuple[_Asked, Sequence[Unit]]:
    for name, value in (("rows", rows), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name} = {value}; a step needs at least 1.")
    own = frozenset(unit.name for unit in (of.units if mine is None else mine))
    units = [unit for unit in of.units if unit.name in own]
    rows = micro_batch if 0 < micro_batch < rows else rows
    return _Asked(of, method, own, _reverse(of, method, units), rows, tokens, dropout, int(keep_prefix * 1e6)), units


def _whole(asked: _Asked, units: Sequence[Unit], pieces: bool) -> _Held:
    """A step; where the batch comes in pieces their dense gradients are summed in memory of their own.

    In the last phase, the update, the sum is the gradient, and no piece's own is left.
    """
    whole = _continued(asked, "step", units)
    summed = 4 * sum(unit.size for unit in units if unit.name in (asked.exact or ())) if pieces else 0
    *passes, update = whole.peaks
    return whole._replace(state=whole.state + summed, peaks=(*(most + summed for most in passes), update))


def _reverse(of: Outline, method: Method, units: Sequence[Unit]) -> frozenset[str] | None:
    """Names of the units whose gradient is by reverse mode; None where there is no reverse mode."""
    made = work(method, shapes(of))(units)
    if made is None or not (made.below.backward or made.above.backward):
        return None
    return frozenset(unit.name for unit in made.dense)


def _continued(asked: _Asked, what: str, units: Sequence[Unit]) -> _Held:
    """What a run holds in the whole model."""
    top = _top(asked.method)
    if top > asked.of.layers:
        raise ValueError(
            f"{asked.method.name} is cut below the last {top} blocks, and there are {asked.of.layers}. Lower its top."
        )
    places: dict[Kind, list[int]] = {}
    for i, kind in enumerate(kinds(asked.of, units, top)):
        places.setdefault(kind, []).append(i)
    base = _base(asked, places)
    start = _short(asked, what, base)
    left: dict[Kind, float] = {kind: more for kind, own in places.items() if (more := len(set(own) - set(base)))}
    graph = {kind: more for kind, more in left.items() if _in_graph(asked, kind)}
    rest = {kind: more for kind, more in left.items() if kind not in graph}
    grow = {**graph, **(_by_values(rest) if what == "step" else {})}
    longer = [(more, _short(asked, what, _grown(base, places[kind]))) for kind, more in grow.items()]

    def on(pick: Callable[[_Held], int]) -> int:
        return round(pick(start) + sum(more * (pick(held) - pick(start)) for more, held in longer))

    peaks = tuple(on(lambda held, i=i: held.peaks[i]) for i in range(len(start.peaks)))  # type: ignore[misc]
    return _Held(peaks, on(lambda held: held.prefix), on(lambda held: held.state))


def _base(asked: _Asked, places: Mapping[Kind, Sequence[int]]) -> tuple[int, ...]:
    """The blocks of the short form: the first of each kind, and where kinds differ in what a graph keeps the last one.

    The way back begins at the last block, when most is held: which kind lies there counts.
    """
    kept = _kept(places, asked.exact is not None)
    chosen = {i for kind, own in places.items() for i in own[: kept[kind]]}
    if sum(_in_graph(asked, kind) for kind in places) > 1:
        chosen.add(asked.of.layers - 1)
    return tuple(sorted(chosen))


def _in_graph(asked: _Asked, kind: Kind) -> bool:
    """Whether reverse mode keeps something of such blocks: all that is behind the first moved value, or the cut."""
    if asked.exact is None:
        return False
    return kind.moved or kind.above if asked.exact == asked.mine else kind.above


def _by_values(left: dict[Kind, float]) -> dict[Kind, float]:
    """Where no graph is kept a pass lets go of every block, and a step grows with the moved values alone.

    So one kind of block stands for all such, as often as the others' values are in its own.
    """
    values = {kind: sum(size for _, size in kind.units) for kind in left}
    largest = max(values, key=lambda kind: values[kind], default=None)
    if largest is None or not values[largest]:
        return {}
    return {largest: sum(left[kind] * values[kind] for kind in left) / values[largest]}


def _top(method: Method) -> int:
    """How many of the last blocks lie above the cut; -1 for all."""
    return next((method.estimator[key] for key in _TOPS if method.estimator.get(key)), 0)


def _kept(places: Mapping[Kind, Sequence[int]], reverse: bool) -> dict[Kind, int]:
    """How many blocks of each kind a short form has.

    Of those that tangents run through there are two in all, on either side of a cut: what comes into the first has none
    yet. With reverse mode above the cut there are none there. Where nothing of any block is moved there are two of
    each kind: a block whose input another block made holds one hidden state more than the first.
    """
    if not any(kind.moved for kind in places):
        return dict.fromkeys(places, 2)
    sides = [[k for k in places if k.moved and k.above == above] for above in (False, True)]
    alone = [side[0] for side in sides[: 1 if reverse else 2] if len(side) == 1]
    return {kind: 2 if kind in alone else 1 for kind in places}


def _grown(base: tuple[int, ...], own: Sequence[int]) -> tuple[int, ...]:
    """A short form with one more block of a kind beside its others, so that the rest stands as it stood."""
    new = next(i for i in own if i not in base)
    after = base.index(max(i for i in base if i in own and i < new)) + 1
    return *base[:after], new, *base[after:]


def _short(asked: _Asked, what: str, chosen: tuple[int, ...]) -> _Held:
    """What a run holds in a short form of the model; done once for all short forms that are alike."""
    form = skeleton(asked.of, chosen)
    top = _top(asked.method)
    if top > 0:
        above = sum(i >= asked.of.layers - top for i in chosen)
        estimator = {key: above if key in _TOPS and value else value for key, value in asked.method.estimator.items()}
        asked = asked._replace(method=dataclasses.replace(asked.method, estimator=estimator))
    mine, exact = (
        None if names is None else frozenset(u.name for u in form.units if original(u.name, chosen) in names)
        for names in (asked.mine, asked.exact)
    )
    asked = asked._replace(mine=mine or frozenset(), exact=exact)
    choices = asked.method.estimator, asked.method.local_optimizer, asked.method.head
    plain = what == "values" and exact is None
    key = (what, "" if plain else repr(choices), form.types, tuple((u.name, u.size) for u in form.units), *asked[2:])
    known = asked.of.known
    if key not in known:
        known[key] = _run(asked, what, form)
    return known[key]


def _run(asked: _Asked, what: str, form: Skeleton) -> _Held:
    """A run on tensors without storage."""
    made = build(asked.method)
    batch = sample(asked.of.task, asked.of.config, asked.rows, asked.tokens)
    with phantoms() as count:
        forget(form.module)  # what a first step looks up once
        fill(form.module, count)
        params = {name: count.like(value) for name, value in form.params.items()}
        moved = asked.mine if what == "step" or asked.exact is None else asked.exact
        names = [name for unit in form.units if unit.name in moved for name in unit.params]
        head = frozenset(name for unit in form.units if unit.head for name in unit.params)
        own, fixed = tree.select(params, names), tree.without(params, names)
        guide = own if made.guide else {}
        loss = ModelLoss(form.module, head, fixed, asked.dropout, Prefix(asked.keep), guide, asked.of.task)
        state = made.local.init(own) if made.local else {}
        held = sum(value.nbytes for values in (own, *state.values()) for value in values.values())
        del state
        if what == "step":
            step(made, loss, own, batch, mark=count.mark)
        else:
            values(None if asked.exact is None else made.estimator, loss, own, batch, mark=count.mark)
    return _Held(tuple(most for _, most in count.peaks), prefix_bytes(loss), held)
