"""A method's costs at given shapes, put together: a step of a client, what travels in a round, the server's work.

The paper's operations of a step, Panchal et al. 2024 (arXiv 2405.15551), with c those of one block forward, w_l the
values of one unit, L blocks: backprop 3 L c; forward mode 2 max(own blocks, 1) (c + v) + w_l L, its v not given and
taken as 0; K central differences K L (2 c + w_l). It has none for the others. The true ones are those of `flops`.
Costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from spryfl import trace
from spryfl.choices import Built, Method, parties
from spryfl.classes import ClientClass, member
from spryfl.costs import flops, traffic
from spryfl.costs.passes import Step, passes, predictor, step_flops
from spryfl.costs.shapes import Shapes, size
from spryfl.costs.traffic import Dealt, Part, Traffic, Work
from spryfl.types import CatchUp, Instruction, Passes, Round, Share, Trace, Unit, Update

DRAW = 1e-7  # seconds to draw one value of a direction; measured on one core: normals 0.11 us, random signs 0.045 us


class Costs(NamedTuple):
    """One method at given shapes. A round's numbers are means over the second half of the rounds; None is unknown."""

    passes: Passes | None  # of a step
    sure: bool  # False where a step's numbers depend on the data
    flops: float | None  # of a step, the mean over the clients of the first round
    paper_flops: float | None
    paper: Traffic | None  # values of a round, all clients together, by the paper's count
    round: Part | None  # bytes of tensors of a round, all clients together
    first: Part | None  # the first round, in which no client holds anything
    headers: Traffic | None  # bytes of a message beside its tensors
    clients: int  # that answer in a round
    drawn: float | None  # values of directions that one client draws for its own steps in a round
    server: float | None  # operations of the server in a round: directions made again, the mean over the clients


def predict(method: Method, built: Built, shapes: Shapes, rounds: Sequence[Dealt], steps: int) -> Costs:
    """All costs of a method.

    Args:
        method: the method's choices.
        built: its functions.
        shapes: of the network, its trainable values and a batch.
        rounds: each round's clients and their units; enough of them for what a client misses to settle.
        steps: local batches of a client in a round.
    """
    one = work(method, shapes)
    asked = next((_asked(dealt) for dealt in rounds if _asked(dealt)), {})
    own = list(asked.values())
    made = [one(mine, client) for client, mine in asked.items()]
    known = [step for step in made if step is not None]
    parts = traffic.run(built, shapes.units, one, rounds, steps)
    late = parts[len(parts) // 2 :] if parts else []
    mean = Part(*(sum(column) / len(late) for column in zip(*late, strict=True))) if late else None
    each = [step_flops(shapes, step, mine) for step, mine in zip(known, own, strict=True)] if known else []
    values = sum(size(mine) for mine in own)
    return Costs(
        passes=_mean_passes(shapes, known) if known else None,
        sure=all(step.sure for step in known),
        flops=sum(each) / len(each) if each else None,
        paper_flops=None if method.classes else _paper_flops(method, shapes, own, known),
        paper=traffic.paper(built, asked, one, steps),
        round=mean,
        first=parts[0] if parts else None,
        headers=headers(built, shapes, rounds, one, steps) if parts and own else None,
        clients=len(own),
        drawn=steps * sum(step.drawn for step in known) / len(known) if known else None,
        server=2 * (mean.replayed + values) if mean else None,
    )


def _asked(dealt: Dealt) -> dict[int, tuple[Unit, ...]]:
    """Those with anything to train."""
    return {client: tuple(mine) for client, mine in dealt.items() if mine}


def work(method: Method, shapes: Shapes) -> Work:
    """What one estimate does, as a function of a client's units and its number; None where the estimator is unknown."""
    of = member(method.classes)
    made = {one.name: _predictor(one) for one in parties(method)}

    @cache
    def remembered(mine: tuple[Unit, ...], name: str) -> Step | None:
        predict = made[name]
        return predict(shapes, mine) if predict else None

    return lambda mine, client=0: remembered(tuple(mine), of(client))


def _predictor(one: ClientClass) -> Callable[..., Step] | None:
    options = {key: value for key, value in one.estimator.items() if key != "kind"}
    exact = {"exact_head": True} if one.head == "exact" else {}
    return predictor(one.estimator["kind"], {**options, **exact})


def _mean_passes(shapes: Shapes, steps: Sequence[Step]) -> Passes:
    """Over the clients: one without values below a cut draws no direction there."""
    columns = zip(*(passes(shapes, step) for step in steps), strict=True)
    return Passes() + Passes(*(sum(column) / len(steps) for column in columns))


def _paper_flops(method: Method, shapes: Shapes, own: Sequence[Sequence[Unit]], steps: Sequence[Step]) -> float | None:
    trunk = [unit for unit in shapes.units if not unit.head]
    if not (trunk and steps):
        return None
    held = sum(not unit.head for mine in own for unit in mine) / len(own)
    blocks = max(shapes.layers * held / len(trunk), 1)
    c, w = flops.value(shapes, 0, shapes.layers) / shapes.layers, size(trunk) / len(trunk)
    formulas: Mapping[Any, float] = {
        "backprop": 3 * shapes.layers * c,
        "forward": 2 * blocks * c + w * shapes.layers,
        "central_difference": steps[0].terms * shapes.layers * (2 * c + w),
    }
    return formulas.get(method.estimator["kind"])


def headers(
    method: Built,
    shapes: Shapes,
    rounds: Sequence[Dealt],
    one: Work,
    steps: int,
) -> Traffic:
    """Header bytes of one instruction and of one answer, measured on messages of these shapes in a late round."""
    client, mine = next((client, mine) for dealt in reversed(rounds) for client, mine in _asked(dealt).items())
    own = tuple(name for unit in mine for name in unit.params)
    made = _trace(one(mine, client), steps) if method.scalars else None
    back = _dense(one(mine, client)) if method.scalars else mine
    seen = max((i for i, dealt in enumerate(rounds[:-1], 1) if client in dealt), default=0)
    catch = None
    if method.follows and seen and not method.seeds.pool:
        missed = [Round(i, _shares(method, dealt, one, steps)) for i, dealt in enumerate(rounds[:-1], 1) if i >= seen]
        catch = CatchUp(seen - 1, tuple(missed))
    told = Instruction(
        len(rounds),
        client,
        2**62,
        own,
        {} if catch else _values(shapes.units),
        catch_up=catch,
        fingerprint=trace.fingerprint() if method.scalars else "",
        client_class=method.member(client),
    )
    noise = (2.5,) * len(own) if method.by_noise else ()
    done = Update(len(rounds), client, _values(back), 100, 1 / 3, Passes(steps, steps), 0, 0.0, trace=made, noise=noise)
    return Traffic(traffic.header(told), traffic.header(done))


def _shares(method: Built, dealt: Dealt, one: Work, steps: int) -> tuple[Share, ...]:
    own = tuple(
        Share(2**62 + i, (), 1.0, 100, _values(_dense(one(mine, client))), _trace(one(mine, client), steps))
        for i, (client, mine) in enumerate(_asked(dealt).items())
    )
    return own[:1] if method.seeds.shared else own


def _dense(step: Step | None) -> Sequence[Unit]:
    return step.dense if step else ()


def _trace(step: Step | None, steps: int) -> Trace | None:
    if step is None:
        return None
    layout = tuple(((), "gaussian", count) for count, _ in step.blocks)
    return Trace(torch.zeros(steps * step.terms), (layout,), (0,) * steps, torch.empty(0, dtype=torch.int64))


def _values(units: Sequence[Unit]) -> dict[str, torch.Tensor]:
    """A unit's values, dealt evenly to its names; all share one zero in memory."""
    zero = torch.zeros(())
    return {name: zero.expand(unit.size // len(unit.params)) for unit in units for name in unit.params}
