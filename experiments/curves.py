"""What run folders reached, as result files; and accuracy against the memory of a step, as a picture.

    table      label -> what its complete runs ended with, by seed
    merged     two tables as one
    results    a line a label: means, each seed's accuracy, passes, bytes, memory
    picture    a point a label, with the range over its seeds

The scripts of experiments/ share it; alone it writes the lines where a page needs no more:

    python experiments/curves.py experiments/quickstart/results.json runs/quickstart/*-seed*

A run folder is LABEL-seedSEED, as `spryfl compare` names it. Reads records alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from spryfl import report

Seeds = dict[str, list[float]]  # name -> a number a seed


class Point(NamedTuple):
    """A label of the picture."""

    label: str  # of the table
    megabytes: float
    said: str  # beside it
    where: tuple[float, float] = (7, -4)  # in points from it
    color: str | None = None


def table(folders: Iterable[str | Path]) -> dict[str, Seeds]:
    """label -> what its complete runs ended with, in the order of the seeds."""
    out: dict[str, Seeds] = {}
    for path in sorted(map(Path, folders)):
        if not (path / "config.toml").is_file():
            continue
        run = report.read(path)
        if run.facts["state"] == "complete":
            label, _, seed = path.name.rpartition("-seed")
            for key, value in {"seed": int(seed), **_ended(run)}.items():
                out.setdefault(label, {}).setdefault(key, []).append(value)
    return out


def merged(known: Mapping[str, Seeds], found: Mapping[str, Seeds]) -> dict[str, Seeds]:
    """Both, a label's seeds in order. Of a seed of both, the found run; of numbers, those that all runs have."""
    out = dict(known)
    for label, one in found.items():
        runs = {
            int(seed): {key: of[i] for key, of in each.items()}
            for each in (known.get(label, {"seed": []}), one)
            for i, seed in enumerate(each["seed"])
        }
        ordered = [runs[seed] for seed in sorted(runs)]
        out[label] = {key: [run[key] for run in ordered] for key in ordered[0] if all(key in run for run in ordered)}
    return out


def _ended(run: Any) -> dict[str, Any]:
    *before, last = report.scored(run)
    return {
        "accuracy": last["accuracy"],
        "before": before[-1]["accuracy"] if before else last["accuracy"],  # at the evaluation before the last
        "test_loss": last["test_loss"],
        "clients_loss": run.records[-1]["loss"],
        "rounds": last["round"],
        "value_passes": last["value_passes"],
        "tangent_passes": last["tangent_passes"],
        "backward_passes": last["backward_passes"],
        "mb_up": last["bytes_up"] / 1e6,
        "mb_down": last["bytes_down"] / 1e6,
        "peak_mb": report.peak(run),
        "seconds": last["seconds"],
    }


def results(found: Mapping[str, Seeds], held: Mapping[str, float]) -> list[dict[str, Any]]:
    """A line a label, as the pages show them; `held` is label -> MB of a step."""
    return [
        {
            "row": label,
            "seeds": ", ".join(str(int(seed)) for seed in one["seed"]),
            "accuracy": mean(one["accuracy"]),
            "each": ", ".join(f"{value:.4f}" for value in one["accuracy"]),
            "loss": mean(one["test_loss"]),
            **_more(one),
            "passes": mean(one["value_passes"]) + mean(one["tangent_passes"]) + mean(one["backward_passes"]),
            "up": mean(one["mb_up"]),
            "peak": mean(one["peak_mb"]),
            "seconds": mean(one["seconds"]),
            "held": f"{held[label]:.1f}" if label in held else "",
        }
        for label, one in found.items()
    ]


def _more(one: Seeds) -> dict[str, Any]:
    """What tables made before 23 November 2026 do not have."""
    if "before" not in one:
        return {}
    return {"before": ", ".join(f"{value:.3f}" for value in one["before"]), "clients": mean(one["clients_loss"])}


def read(path: Path) -> Any:
    """A result file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, what: Any) -> None:
    """The same."""
    path.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")


def picture(
    found: Mapping[str, Seeds],
    points: Iterable[Point],
    head: float,
    tokens: int,
    path: Path,
    wide: tuple[float, float] = (0.65, 30),
) -> None:
    """Accuracy on the test rows against what a step holds; `head` is the best converged head's accuracy."""
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    for point in points:
        if point.label not in found:
            continue
        seen = found[point.label]["accuracy"]
        x, y = point.megabytes, mean(seen)
        axes.errorbar(x, y, [[y - min(seen)], [max(seen) - y]], marker="o", capsize=3, color=point.color)
        axes.annotate(point.said, (x, y), xytext=point.where, textcoords="offset points", fontsize=8)
    axes.axhline(head, linestyle="--", linewidth=1, color="gray")
    axes.set_xscale("log")
    axes.set_xlim(*wide)
    ticks = [tick for tick in (0.7, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30) if wide[0] <= tick <= wide[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    said = "best converged head (mean of the tokens)"
    axes.annotate(said, (1.1 * wide[0], head), xytext=(0, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel(f"MB of a step above the model (one sequence of {tokens} tokens at a time)")
    axes.set_ylabel("accuracy on 872 test rows")
    axes.margins(y=0.12)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    write(Path(sys.argv[1]), results(table(sys.argv[2:]), {}))
