"""What `spryfl plan` answers: rows of settings with their costs, best first, and a recommendation with its reason.

Every method asked for is taken with each useful setting of its estimator, beside it backprop plain and checkpointed:
they are what a user would pick instead. Cost: some steps without storage, see plan.py; no weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from spryfl import train
from spryfl.choices import Method
from spryfl.costs import Costs
from spryfl.footprint import Outline, held
from spryfl.plan import Client, Planned, heaviest, placed, ranked, said, shown, too_small, variants, ways
from spryfl.types import Passes


class Row(NamedTuple):
    """One setting and its costs."""

    method: str
    planned: Planned
    up: float | None  # bytes a client and round
    down: float | None


class Advice(NamedTuple):
    """The whole answer."""

    rows: list[Row]
    text: str
    fits: bool


def advise(
    of: Outline,
    methods: Sequence[Method],
    *,
    rows: int,
    tokens: int,
    budget: int = 0,
    stream: bool = True,
    clients: int = 100,
    cohort: int = 10,
    steps: int = 10,
    every: bool = False,
) -> Advice:
    """Settings of methods, best first, and what to take.

    Args:
        of: the model.
        methods: those asked for.
        rows, tokens: of a local batch.
        budget: bytes of a client's process; 0 for no limit.
        stream: whether blocks may be read from the disk; only a packed model can.
        clients, cohort, steps: in all, of a round, local batches of one in a round.
        every: the methods' own settings alone, all of them; else also the ways to a gradient beside them.
    """
    found: list[Row] = []
    tried = []
    for method in methods:
        client = Client(of, heaviest(method, of, cohort), rows, tokens, cohort, budget, stream)
        for way in variants(method, of) if every else ways(method, of):
            for setting in placed(client, way):
                tried.append(setting)
                if budget and held(of, setting.stream).total > budget:
                    continue  # the model alone is above it: no step need be run
                up, down = _traffic(way, client, clients, cohort, steps)
                found.append(Row(method.name, client.planned(setting), up, down))
    order = ranked([row.planned for row in found])
    done = sorted(found, key=lambda row: order.index(row.planned))
    fits = bool(done) and done[0].planned.fits
    return Advice(done, reason(done, client) if fits else too_small(client, tried), fits)


def _traffic(
    method: Method, client: Client, clients: int, cohort: int, steps: int
) -> tuple[float | None, float | None]:
    """Bytes up and down of a client and round."""
    scalars = method.estimator["kind"] == "backprop" and method.exchange == "scalars"
    sent: Costs = train.predicted(
        replace(method, exchange="weights") if scalars else method, client.shapes, clients, cohort, steps
    )
    each = max(sent.clients, 1)
    return (sent.round.up / each, sent.round.down / each) if sent.round else (None, None)


def exact(planned: Planned) -> bool:
    """Whether a step has the whole gradient."""
    return planned.progress == 1


def reason(rows: Sequence[Row], client: Client) -> str:
    """The recommendation in two or three sentences."""
    best, within = rows[0].planned, f" of {shown(client.budget)}" if client.budget else ""
    said_ = f"Take {said(best.setting)}: {shown(best.footprint.total)}{within}."
    seeded = [row.planned for row in rows if not exact(row.planned) and row.planned.score]
    dense = [row.planned for row in rows if exact(row.planned)]
    if exact(best):
        against = f", where {said(seeded[0].setting)} makes {_share(seeded[0])} of it" if seeded else ""
        backprop = "Checkpointed backprop" if best.setting.method.estimator.get("checkpoint") else "Backprop"
        return (
            f"{said_} {backprop} fits and is the better choice: its gradient is exact, and makes all the progress "
            f"that a step can make{against}."
        )
    least = min(dense, key=lambda one: one.footprint.total, default=None)
    beyond = f" Backprop does not fit: with least memory it needs {shown(least.footprint.total)}." if least else ""
    return (
        f"{said_}{beyond} Of what fits it makes the most progress for its operations: {_share(best)} of an exact step."
    )


def _share(planned: Planned) -> str:
    """Progress in words."""
    return f"{planned.progress:.2g}" if planned.progress is not None else "an unknown part"


def plain(row: Row) -> dict[str, Any]:
    """A row as plain values, for JSON."""
    p = row.planned
    choice: Mapping[str, Any] = p.setting.method.estimator
    return {
        "method": row.method,
        "setting": said(p.setting),
        "estimator": {key: getattr(value, "__name__", value) for key, value in choice.items()},
        "head": p.setting.method.head,
        "micro_batch": p.setting.micro_batch,
        "stream": p.setting.stream,
        "bytes": {**p.footprint._asdict(), "total": p.footprint.total},
        "passes": (p.passes or Passes())._asdict() if p.passes else None,
        "flops": p.flops,
        "up": row.up,
        "down": row.down,
        "progress": p.progress,
        "fits": p.fits,
    }


def cells(row: Row) -> tuple[str, ...]:
    """A row as the table shows it."""
    p = row.planned
    work = "".join(f"{value:.3g}{sign}" for value, sign in zip(p.passes or (), "vtb", strict=False) if value)
    numbers = (shown(size) if size else "-" for size in (p.footprint.total, *p.footprint))
    sent = (shown(size) if size is not None else "?" for size in (row.up, row.down))
    flops = f"{p.flops / 1e12:.3g}" if p.flops else "?"
    progress = f"{p.progress:.2g}" if p.progress is not None else "?"
    return "yes" if p.fits else "no", row.method, said(p.setting), *numbers, work or "?", flops, progress, *sent
