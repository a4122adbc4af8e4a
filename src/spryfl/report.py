"""Run folders as tables and pictures. Reads result files alone and imports nothing of the package.

Cost: a second for a picture.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]


class Run(NamedTuple):
    """What a run folder says."""

    name: str
    config: dict[str, Any]
    facts: dict[str, Any]
    records: list[Record]


# Horizontal axes of the picture: title, and what of a record it is.
_AXES: tuple[tuple[str, Callable[[Record], float]], ...] = (
    ("rounds", lambda r: r["round"]),
    ("MB up and down", lambda r: (r["bytes_up"] + r["bytes_down"]) / 1e6),
    ("seconds", lambda r: r["seconds"]),
)


def read(folder: Path) -> Run:
    """A run folder's configuration, facts and records."""
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        file = folder / "records.jsonl"  # not there before the first round
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
        return Run(folder.resolve().name, config, facts, [json.loads(line) for line in lines])
    except OSError as error:
        raise ValueError(
            f"{folder} is not a run folder: {Path(error.filename).name} is missing. Give runs/<name>."
        ) from None
    except ValueError as error:
        raise ValueError(f"a file of {folder} is damaged: {error}.") from None


def scored(run: Run) -> list[Record]:
    """The records at which the test rows were scored."""
    return [record for record in run.records if metric(run) in record]


def metric(run: Run) -> str:
    """The name of the number by which the run's models are compared."""
    return run.facts.get("metric", "accuracy")


def rows(runs: Sequence[Run]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A table of runs: its head, and a row each."""
    names = ", ".join(dict.fromkeys(metric(run) for run in runs))
    head = ("run", "state", "round", names, "best", "personal", "MB up", "MB down", "passes", "peak MB", "seconds")
    return head, [_row(run) for run in runs]


def _row(run: Run) -> tuple[str, ...]:
    if not scored(run):  # killed before its first record
        return (run.name, run.facts["state"], *("-",) * 9)
    last, at = run.records[-1], scored(run)[-1]
    passes = last["value_passes"] + last["tangent_passes"] + last["backward_passes"]
    peak = max(record.get("peak_bytes", 0) for record in run.records)
    personal = [record["personal_after"] for record in run.records if "personal_after" in record]
    return (
        run.name,
        run.facts["state"],
        str(last["round"]),
        f"{at[metric(run)]:.4f}",
        f"{last['best']:.4f}",
        f"{personal[-1]:.4f}" if personal else "-",
        f"{last['bytes_up'] / 1e6:.2f}",
        f"{last['bytes_down'] / 1e6:.2f}",
        str(passes),
        f"{peak / 1e6:.1f}",
        f"{last['seconds']:.0f}",
    )


def differences(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Settings in which the runs differ: the key, then each run's value."""
    flat = [_flat(run.config) for run in runs]
    keys = sorted({key for one in flat for key in one} - {"name"})
    return [
        (key, *(str(one.get(key, "-")) for one in flat)) for key in keys if len({str(f.get(key)) for f in flat}) > 1
    ]


def curves(runs: Sequence[Run], path: Path) -> None:
    """The metric on the test rows and training loss, against rounds, bytes and seconds."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    grid = figure.subplots(2, len(_AXES), sharey="row")
    for column, (title, along) in enumerate(_AXES):
        for run in runs:
            _line(grid[0][column], run.name, along, scored(run), metric(run))
            _line(grid[1][column], run.name, along, [r for r in run.records if r.get("loss") is not None], "loss")
        grid[1][column].set_xlabel(title)
    grid[0][0].set_ylabel(f"{', '.join(dict.fromkeys(metric(run) for run in runs))} on the test rows")
    grid[1][0].set_ylabel("training loss")
    grid[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def _line(axes: Axes, name: str, along: Callable[[Record], float], records: Sequence[Record], what: str) -> None:
    axes.plot([along(r) for r in records], [r[what] for r in records], marker="o", markersize=3, label=name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out
