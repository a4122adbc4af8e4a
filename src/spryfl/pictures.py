"""Pictures of runs and of comparisons, from what `report` read.

    curves(runs, path)           metric and training loss along each run
    parts(rows, path)            bytes of a client's step by part, a stacked bar a setting
    comparison(compared, path)   the same metric of many methods against rounds, passes, bytes, seconds; peak memory

Cost: a second a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from spryfl.report import ALONG, Compared, Groups, Record, Run, columns, metric, peak, scored

_PLAIN = {"text.parse_math": False}  # names are no formulas


@rc_context(_PLAIN)
def curves(runs: Sequence[Run], path: Path) -> None:
    """The metric on the test rows and training loss, against rounds, passes, bytes and seconds."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    grid = figure.subplots(2, len(ALONG), sharey="row")
    for column, (title, along) in enumerate(ALONG.items()):
        for run in runs:
            _line(grid[0][column], run.name, along, scored(run), metric(run))
            _line(grid[1][column], run.name, along, [r for r in run.records if r.get("loss") is not None], "loss")
        grid[1][column].set_xlabel(title)
    grid[0][0].set_ylabel(f"{columns(runs)[1].name} on the test rows")
    grid[1][0].set_ylabel("training loss")
    grid[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def _line(axes: Axes, name: str, along: Callable[[Record], float], records: Sequence[Record], what: str) -> None:
    axes.plot([along(r) for r in records], [r[what] for r in records], marker="o", markersize=3, label=_shown(name))
    _plain(axes)


def _shown(name: str) -> str:
    """A name as a legend shows it: a first "_" would leave it out."""
    return f" {name}" if name.startswith("_") else name


def _plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


# Twelve colours that are told apart, also by most who do not see all colours; a marker each. Then both begin again.
_COLOURS: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222", "#8B5A2B")
_COLOURS += ("#7B3FBF", "#8C8C8C", "#9AA61D", "#B2182B")
_MARKERS = "os^DvPX*<>hp"


@rc_context(_PLAIN)
def comparison(compared: Compared, path: Path) -> None:
    """The metric against rounds, passes, bytes and seconds; peak memory; every run's end."""
    groups = {label: done for label, runs in compared.groups.items() if (done := [run for run in runs if scored(run)])}
    if not groups:
        raise ValueError(
            f"no run of {compared.name} has been evaluated yet, so there is nothing to draw. Go on with it."
        )
    low = 0.28 * len(groups)
    figure = Figure(figsize=(14, 6 + low), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(4.6, 1.4 + low))
    above, (left, right) = parts[0].subplots(1, len(ALONG), sharey=True), parts[1].subplots(1, 2, sharey=True)
    name = columns([run for runs in groups.values() for run in runs])[1].name
    for axes, (title, along) in zip(above, ALONG.items(), strict=True):
        _panel(axes, title, along, groups)
    above[0].set_ylabel(f"{name} on the test rows")
    handles = [Line2D([], [], label=_shown(label), linewidth=2, **_look(i)) for i, label in enumerate(groups)]
    said = {"title": f"{compared.name}: {_over(groups)}", "title_fontsize": 10}
    parts[0].legend(handles=handles, loc="outside upper center", ncols=min(6, len(groups)), frameon=False, **said)
    _bars(left, groups)
    _dots(right, groups, name)
    figure.savefig(path, dpi=120)


def _over(groups: Groups) -> str:
    most = max(len(runs) for runs in groups.values())
    return "one seed" if most == 1 else f"mean over {most} seeds, bands from the lowest to the highest"


def _panel(axes: Axes, title: str, along: Callable[[Record], float], groups: Groups) -> None:
    """All methods along one cost; logarithmic where their ends are far apart, so that none is a line on the axis."""
    ends = [max(along(run.records[-1]) for run in runs) for runs in groups.values()]
    log = max(ends) > 4 * min(ends) > 0
    for index, runs in enumerate(groups.values()):
        _band(axes, runs, along, index, log)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=max(ends) > 4))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.set_xlabel(title)
    _plain(axes)


def _short(value: float, _: int | None = None) -> str:
    return next((f"{value / size:g}{sign}" for sign, size in (("M", 1e6), ("k", 1e3)) if value >= size), f"{value:g}")


def _band(axes: Axes, runs: Sequence[Run], along: Callable[[Record], float], index: int, log: bool = False) -> None:
    """The mean of a group as a line, lowest to highest as a band, as far as all its runs go; no 0 on a log scale."""
    curves = [([along(r) for r in scored(run)], [r[metric(run)] for r in scored(run)]) for run in runs]
    end = min(x[-1] for x, _ in curves)
    grid = [value for value in sorted({min(value, end) for x, _ in curves for value in x}) if value or not log]
    heights = np.array([np.interp(grid, x, y) for x, y in curves])
    look = _look(index)
    axes.fill_between(grid, heights.min(0), heights.max(0), color=look["color"], alpha=0.13, linewidth=0)
    every = max(1, len(grid) // 7)
    axes.plot(grid, heights.mean(0), **look, linewidth=1.7, markersize=5, markevery=(index % every, every), alpha=0.95)


def _bars(axes: Axes, groups: Groups) -> None:
    """Peak memory of a step, a bar a method."""
    for index, runs in enumerate(groups.values()):
        found = [value for run in runs if (value := peak(run)) is not None]
        width = mean(found) if found else 0.0
        axes.barh(index, width, color=_look(index)["color"], alpha=0.9, height=0.66)
        _beside(axes, f"{width:.1f}" if found else "-", width, index)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlabel("peak memory of a client's step above the model, MB")
    axes.margins(x=0.1)
    _plain(axes)
    axes.grid(visible=False, axis="y")


def _dots(axes: Axes, groups: Groups, name: str) -> None:
    """How each run ended, and the mean."""
    for index, runs in enumerate(groups.values()):
        ends, look = [scored(run)[-1][metric(run)] for run in runs], _look(index)
        axes.plot(ends, [index] * len(ends), linestyle="", marker=look["marker"], color=look["color"], alpha=0.5)
        axes.plot([mean(ends)] * 2, [index - 0.3, index + 0.3], color=look["color"], linewidth=2.5)
        _beside(axes, f"{mean(ends):.3f}", max(ends), index)
    axes.set_xlabel(f"{name} at the end: each seed, and the mean")
    axes.margins(x=0.1)
    _plain(axes)


def _beside(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), (7, 0), textcoords="offset points", va="center", fontsize=9)


def _look(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % 12],
        "marker": _MARKERS[index % 12],
        "linestyle": ("-", "--", ":")[index // 12 % 3],
    }


@rc_context(_PLAIN)
def parts(rows: Sequence[tuple[str, Mapping[str, int]]], path: Path, budget: int = 0) -> None:
    """A stacked bar a setting: (its words, bytes by part); `budget` is a line."""
    figure = Figure(figsize=(11, 1.8 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    most = max(sum(sizes.values()) for _, sizes in rows)
    unit, sign = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    for number, part in enumerate(rows[0][1]):
        left = [sum(list(sizes.values())[:number]) / unit for _, sizes in rows]
        width = [sizes[part] / unit for _, sizes in rows]
        axes.barh(range(len(rows)), width, left=left, height=0.66, color=_COLOURS[number % 12], label=part)
    for row, (_, sizes) in enumerate(rows):
        total = sum(sizes.values()) / unit
        _beside(axes, f"{total:.3g}", total, row)
    if budget:
        axes.axvline(budget / unit, color="#222222", linestyle="--", linewidth=1.2)
        axes.annotate("budget", (budget / unit, -0.7), (4, 0), textcoords="offset points", fontsize=9, va="center")
    axes.set_yticks(range(len(rows)), [words for words, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -1.0 if budget else -0.6)
    axes.set_xlabel(f"predicted peak of one client's step, {sign}")
    axes.margins(x=0.08)
    _plain(axes)
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=8, frameon=False)
    figure.savefig(path, dpi=120)


def alignment(runs: Sequence[Run], path: Path) -> None:
    """What the probe saw: alignment beside its law, the scalars, and of the first run steps and energy by unit.

    Raises:
        ValueError: no run has a look in its records.
    """
    seen = {run.name: found for run in runs if (found := [r for r in run.records if "alignment" in r])}
    if not seen:
        raise ValueError("no run has a look at its gradient in its records. Run with --set train.probe=32.")
    figure = Figure(figsize=(13, 9), layout="constrained")
    (left, right), (low, energy) = figure.subplots(2, 2)
    for index, (name, records) in enumerate(seen.items()):
        _cosines(left, records, name, index)
        _scalars(right, records, name, index)
    first = next(iter(seen))
    _units(low, seen[first], "step", f"{first}: change of a unit in a round / its norm")
    _units(energy, seen[first], "energy", f"{first}: share of the estimate's energy (dashed: of the gradient's)")
    for x in _crossed(seen[first], "gradient"):
        energy.plot(*x, linestyle="--")
    for axes in (left, right, low, energy):
        axes.set_xlabel("round")
        _plain(axes)
    figure.savefig(path, dpi=110)


def _cosines(axes: Axes, records: Sequence[Record], name: str, index: int) -> None:
    """Alignment of estimate and round with the gradient, and what theory expects of them."""
    colour, x = _look(index)["color"], [r["round"] for r in records]
    for key, style in (("seeded_cos", "-"), ("seeded_law", "--"), ("round_cos", "-."), ("cos", ":")):
        y = [np.nan if r["alignment"][key] is None else r["alignment"][key] for r in records]
        axes.plot(x, y, linestyle=style, color=colour, label=f"{name}: {key}", marker="o", markersize=3)
    axes.set_ylabel("cosine with the gradient on the probe rows")
    axes.legend(frameon=False, fontsize=8)


def _scalars(axes: Axes, records: Sequence[Record], name: str, index: int) -> None:
    """The scalars' median as a line, quartiles and 5 to 95 % as bands."""
    drawn = [
        (r["round"], r["alignment"]["scalars"]["quantiles"]) for r in records if r["alignment"]["scalars"]["count"]
    ]
    if drawn:
        x, q = [one for one, _ in drawn], np.array([quantiles for _, quantiles in drawn])
        colour = _look(index)["color"]
        axes.fill_between(x, q[:, 1], q[:, 5], color=colour, alpha=0.12, linewidth=0)
        axes.fill_between(x, q[:, 2], q[:, 4], color=colour, alpha=0.25, linewidth=0)
        axes.plot(x, q[:, 3], color=colour, label=name)
    axes.set_ylabel("directional derivatives c: median, quartiles, 5 to 95 %")


def _crossed(records: Sequence[Record], key: str) -> list[tuple[list[int], list[float]]]:
    """A number of each unit over the rounds in which it moved."""
    names = list(dict.fromkeys(name for r in records for name in r["alignment"]["units"]))
    lines = []
    for name in names:
        own = [(r["round"], r["alignment"]["units"][name][key]) for r in records if name in r["alignment"]["units"]]
        known = [(x, y) for x, y in own if y is not None]
        lines.append(([x for x, _ in known], [y for _, y in known]))
    return lines


def _units(axes: Axes, records: Sequence[Record], key: str, title: str) -> None:
    for x, y in _crossed(records, key):
        axes.plot(x, y, marker=".", alpha=0.8)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
