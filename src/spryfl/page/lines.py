"""What the charts of the page are drawn from: plain numbers, small enough for a page of many runs.

    one run         x of every record along each axis, y of every record; null where there is none or it is not finite
    several seeds   mean, lowest and highest at common places of each axis, between two records by straight lines,
                    as far as all of them go

Numbers keep six digits. Above MOST records in all, curves show every n-th and all that were evaluated. Cost: linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spryfl.report import ALONG, Groups, Record, Run, metric

MOST = 8000  # records that are drawn, of all runs together
PLACES = 120  # of a mean over seeds
AXES = {"rounds": "Rounds", "passes": "Passes", "MB up and down": "Megabytes", "seconds": "Seconds"}


class Chart(NamedTuple):
    """A picture: what of a record it shows."""

    id: str
    title: str
    said: str  # what the number is, in a sentence
    of: Callable[[Record], Any]
    log: bool = False  # a logarithmic scale upwards


def charts(runs: Sequence[Run]) -> list[Chart]:
    """The pictures of how the model got on."""
    names = list(dict.fromkeys(metric(run) for run in runs))
    scores = [Chart(f"metric-{i}", name, "On the test rows.", _field(name)) for i, name in enumerate(names)]
    losses = [
        Chart("loss", "training loss", "The mean over a round's clients, weighted by their rows.", _field("loss")),
        Chart("test-loss", "loss on the test rows", "The same loss on rows that no client has.", _field("test_loss")),
        Chart(
            "personal",
            "clients' own rows",
            "The metric on rows that each client held out, after its local steps.",
            _field("personal_after"),
        ),
    ]
    return [chart for chart in (*scores, *losses) if _any(chart, runs)]


def diagnostics(runs: Sequence[Run]) -> list[Chart]:
    """The pictures of what a round looked like from inside."""
    seen = [Chart(f"align-{key}", title, said, _aligned(key)) for key, (title, said) in _ALIGNED.items()]
    made = [
        *seen,
        Chart("scalar-rms", "size of the scalars", "Root mean square of a round's directional derivatives.",
              _field("scalar_rms"), log=True),
        Chart("scalar-max", "largest scalar", "Spikes are how runs along random directions diverge.",
              _field("scalar_max"), log=True),
        Chart("variance", "variance at the gate", "Of a client's scalars; the mean over the clients of a round.",
              lambda record: _mean((record.get("variance") or {}).values())),
        Chart("epsilon", "privacy spent", "The epsilon that the rounds so far have cost.", _field("epsilon")),
    ]  # fmt: skip
    return [chart for chart in made if _any(chart, runs)]


# What a record's look at the true gradient says, by its key there.
_ALIGNED = {
    "cos": (
        "alignment",
        "Cosine of the estimate to the gradient on the probe rows: 1 is the gradient's own direction.",
    ),
    "law": ("alignment by its law", "What theory expects of so many directions over so many values."),
    "seeded_cos": ("alignment along directions", "Over those values alone that are estimated along random directions."),
    "round_cos": ("alignment of the round", "Of what the answers come to, after local steps on the clients' own rows."),
}


def _aligned(key: str) -> Callable[[Record], Any]:
    def of(record: Record) -> Any:
        found = record.get("alignment")
        return found.get(key) if isinstance(found, Mapping) else None

    return of


def _field(key: str) -> Callable[[Record], Any]:
    return lambda record: record.get(key)


def _mean(values: Any) -> float | None:
    found = [value for value in values if finite(value) is not None]
    return sum(found) / len(found) if found else None


def _any(chart: Chart, runs: Sequence[Run]) -> bool:
    return any(finite(chart.of(record)) is not None for run in runs for record in run.records)


def finite(value: Any) -> float | None:
    """A number that can be drawn."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def short(value: float | None) -> float | None:
    """Six digits of a number."""
    return None if value is None else float(f"{value:.6g}") if isinstance(value, float) else value


def along(axis: str, record: Record) -> float | None:
    """Where a record lies on an axis; None where it does not say."""
    try:
        return finite(ALONG[axis](record))
    except (KeyError, TypeError):
        return None


def drawn(groups: Groups) -> list[dict[str, Any]]:
    """Each line's label and numbers, as the page's script reads them."""
    runs = [run for own in groups.values() for run in own]
    every = -(-sum(len(run.records) for run in runs) // MOST) or 1
    shown = [*charts(runs), *diagnostics(runs)]
    return [_line(label, own, shown, every) for label, own in groups.items()]


def every(groups: Groups) -> int:
    """Every how many rounds a point is drawn."""
    return -(-sum(len(run.records) for own in groups.values() for run in own) // MOST) or 1


def _line(label: str, runs: Sequence[Run], shown: Sequence[Chart], step: int) -> dict[str, Any]:
    if len(runs) != 1:
        return {"label": label, "seeds": len(runs), "bands": _bands(runs, shown)}
    (run,) = runs
    kept = [r for i, r in enumerate(run.records) if i % step == 0 or r is run.records[-1] or metric(run) in r]
    x = {axis: [short(along(axis, record)) for record in kept] for axis in AXES}
    y = {chart.id: [short(finite(chart.of(record))) for record in kept] for chart in shown}
    return {"label": label, "seeds": 1, "x": x, "y": {k: v for k, v in y.items() if any(one is not None for one in v)}}


def _bands(runs: Sequence[Run], shown: Sequence[Chart]) -> dict[str, dict[str, Any]]:
    """chart -> axis -> mean, lowest, highest."""
    made = {chart.id: {axis: _band(runs, chart, axis) for axis in AXES} for chart in shown}
    return {chart: own for chart, own in made.items() if any(own.values())}


def _band(runs: Sequence[Run], chart: Chart, axis: str) -> dict[str, list[float | None]]:
    """A mean over runs along one axis, lowest and highest; of those runs that have any number there."""
    curves = [curve for run in runs if (curve := points(run, chart, axis))]
    if not curves:
        return {}
    begin, end = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    places = sorted({x for curve in curves for x, _ in curve if begin <= x <= end} | {end})
    picked = [places[i] for i in sorted({round(i) for i in np.linspace(0, len(places) - 1, PLACES)})]
    heights = np.array([np.interp(picked, [x for x, _ in one], [y for _, y in one]) for one in curves])
    rows = {"x": picked, "mean": heights.mean(0), "low": heights.min(0), "high": heights.max(0)}
    return {key: [short(float(value)) for value in row] for key, row in rows.items()}


def points(run: Run, chart: Chart, axis: str) -> list[tuple[float, float]]:
    """(x, y) of the records that have both, in the order of x; of several at one place the last."""
    found = {}
    for record in run.records:
        x, y = along(axis, record), finite(chart.of(record))
        if x is not None and y is not None:
            found[float(x)] = float(y)
    return sorted(found.items())


def broken(run: Run) -> str:
    """A sentence about losses that were no finite number; empty where all were."""
    bad = [r["round"] for r in run.records if isinstance(r.get("loss"), float) and not math.isfinite(r["loss"])]
    if not bad:
        return ""
    times = "in one round" if len(bad) == 1 else f"in {len(bad)} rounds"
    return f"{run.name}: the training loss was no finite number {times}, first in round {bad[0]}."
