"""Pictures of runs and of comparisons, from what `report` read.

    curves(runs, path)           metric and training loss along each run
    comparison(compared, path)   the same metric of many methods against rounds, passes, bytes, seconds; peak memory

Cost: a second a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spryfl.report import ALONG, Compared, Groups, Record, Run, columns, metric, peak, scored


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
    axes.plot([along(r) for r in records], [r[what] for r in records], marker="o", markersize=3, label=name)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


# Twelve colours that are told apart, also by most who do not see all colours; a marker each. Then both begin again.
_COLOURS: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222", "#8B5A2B")
_COLOURS += ("#7B3FBF", "#8C8C8C", "#9AA61D", "#B2182B")
_MARKERS = "os^DvPX*<>hp"


def _look(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % 12],
        "marker": _MARKERS[index % 12],
        "linestyle": ("-", "--", ":")[index // 12 % 3],
    }


def comparison(compared: Compared, path: Path) -> None:
    """The metric against rounds, passes, bytes and seconds; peak memory; every run's end."""
    groups = {label: runs for label, runs in compared.groups.items() if any(scored(run) for run in runs)}
    if not groups:
        raise ValueError(
            f"no run of {compared.name} has been evaluated yet, so there is nothing to draw. Go on with it."
        )
    low = 0.28 * len(groups)
    figure = Figure(figsize=(14, 5.6 + low), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(4.2, 1.4 + low))
    top, bottom = parts
    above = top.subplots(1, len(ALONG), sharey=True)
    name = columns([run for runs in groups.values() for run in runs])[1].name
    for axes, (title, along) in zip(above, ALONG.items(), strict=True):
        for index, runs in enumerate(groups.values()):
            _band(axes, [run for run in runs if scored(run)], along, index)
        _scale(axes, [_ends(runs, along) for runs in groups.values()])
        axes.set_xlabel(title)
        _plain(axes)
    above[0].set_ylabel(f"{name} on the test rows")
    handles = [Line2D([], [], label=label, linewidth=2, **_look(i)) for i, label in enumerate(groups)]
    top.legend(handles=handles, loc="outside upper center", ncols=min(6, max(1, len(groups))), frameon=False)
    left, right = bottom.subplots(1, 2, sharey=True)
    _bars(left, groups)
    _dots(right, groups, name)
    figure.savefig(path, dpi=120)


def _band(axes: Axes, runs: Sequence[Run], along: Callable[[Record], float], index: int) -> None:
    """The mean of a group as a line, lowest to highest as a band, as far as all its runs go."""
    curves = [([along(r) for r in scored(run)], [r[metric(run)] for r in scored(run)]) for run in runs]
    end = min(x[-1] for x, _ in curves)
    grid = sorted({min(value, end) for x, _ in curves for value in x})
    heights = np.array([np.interp(grid, x, y) for x, y in curves])
    look = _look(index)
    axes.fill_between(grid, heights.min(0), heights.max(0), color=look["color"], alpha=0.13, linewidth=0)
    every = max(1, len(grid) // 7)
    axes.plot(grid, heights.mean(0), **look, linewidth=1.7, markersize=5, markevery=(index % every, every), alpha=0.95)


def _ends(runs: Sequence[Run], along: Callable[[Record], float]) -> float:
    return max(along(run.records[-1]) for run in runs if scored(run))


def _scale(axes: Axes, ends: Sequence[float]) -> None:
    """Logarithmic where the runs' ends are far apart, so that none is a line on the axis."""
    ends = [end for end in ends if end > 0]
    if ends and max(ends) > 20 * min(ends):
        axes.set_xscale("symlog", linthresh=10 ** math.floor(math.log10(min(ends))), linscale=0.4)
    axes.set_xlim(left=0)


def _bars(axes: Axes, groups: Groups) -> None:
    """Peak memory of a step, a bar a method."""
    for index, runs in enumerate(groups.values()):
        found = [value for run in runs if (value := peak(run)) is not None]
        height = mean(found) if found else 0.0
        axes.barh(index, height, color=_look(index)["color"], alpha=0.85, height=0.66)
        axes.annotate(
            f"{height:.1f}" if found else "-", (height, index), (4, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlabel("peak memory of a client's step above the model, MB")
    axes.margins(x=0.1)
    _plain(axes)


def _dots(axes: Axes, groups: Groups, name: str) -> None:
    """How each run ended, and the mean."""
    for index, runs in enumerate(groups.values()):
        ends = [scored(run)[-1][metric(run)] for run in runs if scored(run)]
        look = _look(index)
        axes.plot(ends, [index] * len(ends), linestyle="", marker=look["marker"], color=look["color"], alpha=0.45)
        axes.plot([mean(ends)] * 2, [index - 0.33, index + 0.33], color=look["color"], linewidth=2.5)
        axes.annotate(
            f"{mean(ends):.3f}", (mean(ends), index - 0.33), (0, 1), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_xlabel(f"{name} at the end: each seed, and the mean")
    _plain(axes)
