"""The squared norm of the true gradient against rounds, from runs with a probe: gradient.json and gradient.png.

    python experiments/spry_figures/theory.py runs/probe/*-seed*     # their lines in the file anew, and the picture
    python experiments/spry_figures/theory.py                        # the picture alone

The gradient is that of the probe rows' mean loss in all values that move, at the round's start (spryfl/probe.py). Reads
records alone.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import curves  # noqa: E402
import picture  # noqa: E402
from curves import plt  # noqa: E402

from spryfl import report  # noqa: E402

SHOWN = (6, 12, 24, 36, 48, 60)


def main() -> None:
    """The file if run folders are given, and the picture."""
    path = HERE / "gradient.json"
    if folders := sys.argv[1:]:
        dealt = picture.by_partition(folders)
        kept = {which(one): one for one in (curves.read(path) if path.is_file() else [])}
        ended = [(path, alpha) for alpha, of in dealt.items() for path in of if complete(path)]
        kept |= {which(one): one for one in (line(*run) for run in ended)}
        curves.write(path, [kept[key] for key in sorted(kept, key=lambda key: (key[0] != "iid", key))])
    draw(curves.read(path))


def complete(folder: Path) -> bool:
    """Whether a run has all its rounds."""
    return report.read(folder).facts["state"] == "complete"


def which(one: dict[str, Any]) -> tuple[str, str, int]:
    """What a line is known by."""
    return one["alpha"], one["row"], one["seed"]


def line(folder: Path, alpha: str) -> dict[str, Any]:
    """What one run's looks saw: |g|^2 by round, and means of squared cosines over the looks."""
    run = report.read(folder)
    looks = {one["round"]: one["alignment"] for one in run.records if "alignment" in one}
    squares = {str(number): look["gradient"] ** 2 for number, look in looks.items()}
    label, _, seed = folder.name.rpartition("-seed")
    return {
        "row": label,
        "alpha": alpha,
        "seed": int(seed),
        "squares": squares,
        "lowest": min(squares.values()),
        "accuracy": report.scored(run)[-1]["accuracy"],
        **{f"at{number}": squares[str(number)] for number in SHOWN},
        **{name: square(look[name] for look in looks.values()) for name in ("seeded_cos", "seeded_law", "round_cos")},
    }


def square(values: Iterable[float | None]) -> str:
    """The mean of the squares with three digits; nothing where there is no such value."""
    known = [value**2 for value in values if value]
    return f"{mean(known):.3f}" if known else ""


def draw(lines: list[dict[str, Any]]) -> None:
    """A curve a run, and the slope 1/R beside them."""
    figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    for i, one in enumerate(lines):
        rounds = [int(number) for number in one["squares"]]
        said = f"{one['row']}, {'IID' if one['alpha'] == 'iid' else 'Dirichlet ' + one['alpha']}"
        axes.plot(rounds, list(one["squares"].values()), marker="o", markersize=3, color=f"C{i}", label=said)
    first = max(one["at6"] for one in lines)
    axes.plot([6, 60], [first, first / 10], linestyle="--", linewidth=1, color="gray", label="1 / R")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(SHOWN, [str(number) for number in SHOWN])
    axes.minorticks_off()
    axes.set_xlabel("round R")
    axes.set_ylabel("|g|² on the probe rows")
    figure.legend(loc="outside upper center", ncols=5, fontsize=8)
    figure.savefig(HERE / "gradient.png", dpi=130)


if __name__ == "__main__":
    main()
