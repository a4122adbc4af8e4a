"""What a round's record says of the answers that counted: means, scalars, gate, classes of clients. Costs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from spryfl import server
from spryfl.choices import Built
from spryfl.classes import REST
from spryfl.types import Instruction, Scalars, Update

Record = dict[str, Any]


def personal(updates: Sequence[Update]) -> Record:
    """The metric on the clients' own held-out rows before and after local training, their mean weighted by rows."""
    rows = sum(u.held_out for u in updates)
    if not rows:
        return {}
    return {
        "personal_before": sum(u.correct_before for u in updates) / rows,
        "personal_after": sum(u.correct_after for u in updates) / rows,
    }


def gate(method: Built, updates: Sequence[Update], refused: server.Refused) -> Record:
    """What the gate looked at, each client's variance (None where one batch has none), and whom it left out."""
    if not method.gate:
        return {}
    variance = {str(u.client): u.variance if math.isfinite(u.variance) else None for u in updates}
    return {"variance": variance, "gated": list(refused.gated)}


def scalars(updates: Sequence[Update]) -> Record:
    """What the round's directional derivatives looked like: spikes are how such runs diverge."""
    whole = sum((update.scalars for update in updates), start=Scalars())
    drawn = whole[0]
    if not drawn:
        return {}
    kept = drawn - whole.refused
    return {
        "scalars": drawn,
        "scalars_refused": whole.refused,
        "scalars_clipped": whole.clipped,
        "scalar_rms": math.sqrt(whole.squares / kept) if kept else None,
        "scalar_max": whole.largest,
    }


def classes(method: Built, told: Sequence[Instruction], updates: Sequence[Update]) -> Record:
    """Of each class of clients: how many were asked and answered, their loss, their passes, the most memory of one."""
    if not method.classes:
        return {}
    told_of = {one.client: one.client_class or REST for one in told}
    out: dict[str, Record] = {}
    peaks: dict[str, int] = {}
    for name in (one.name or REST for one in method.classes):
        own = [update for update in updates if told_of[update.client] == name]
        out[name] = {
            "asked": list(told_of.values()).count(name),
            "answered": len(own),
            "loss": mean([(u.loss, u.examples) for u in own]),
            "passes": sum(sum(u.passes) for u in own),
        }
        peaks[name] = max((u.peak_bytes for u in own), default=0)
    return {"classes": out, "class_peak_bytes": peaks}


def mean(weighted: Sequence[tuple[float, int]]) -> float | None:
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / total if total else None
