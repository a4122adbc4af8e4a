"""Were the numbers made again? Run folders of today beside the committed results, a line a run.

    python experiments/again.py exact_top/table.json runs/exact-top/*
    python experiments/again.py spry_figures/table.json#iid runs/fig/* runs/fig-one/*      a part of a file
    python experiments/again.py --write exact_top/table.json runs/exact-top/*              again.json, a line a file

A run folder is LABEL-seedSEED, as `spryfl compare` names it; a label or seed that the file does not have is left out,
and said so. The difference is in points of accuracy, again less committed. On the processor that made a result it is
zero; on another one sums end in other bits, and after many rounds some rows near the border fall to the other side.
With --write a file's line keeps the runs that it knew before.
Reads records alone; ends with 1 where no run has its place in the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import curves  # noqa: E402

Runs = dict[tuple[str, int], float]  # (label, seed) -> accuracy


class Pair(NamedTuple):
    """A run and its committed twin."""

    label: str
    seed: int
    committed: float
    again: float


def points(committed: float, again: float) -> float:
    """Again less committed, in points of accuracy, both as the pages show them."""
    return 100 * (round(again, 4) - round(committed, 4))


def committed(where: str) -> Runs:
    """The accuracies of a result file or of a part of it: FILE or FILE#PART, beside this script."""
    name, _, part = where.partition("#")
    found = curves.read(HERE / name)
    if isinstance(found, list):
        return _listed(found, part)
    if "methods" in found:
        return {(label, run["seed"]): run["accuracy"] for label, one in found["methods"].items() for run in one["runs"]}
    return _tabled(found[part] if part else found)


def _listed(rows: Iterable[dict[str, Any]], part: str) -> Runs:
    """Of `curves.results`, or of experiments/tasks (what has an accuracy there), whose part is the data's name."""
    out = {}
    for row in rows:
        if "each" in row:
            out |= {
                (row["row"], int(seed)): float(value)
                for seed, value in zip(row["seeds"].split(","), row["each"].split(","), strict=True)
            }
        elif row["data"] == part:
            scores = dict(one.split() for one in row["after"].split(", "))
            out[row["row"], row["seed"]] = float(scores["accuracy"])
    return out


def _tabled(found: dict[str, curves.Seeds]) -> Runs:
    """Of `curves.table`."""
    return {
        (label, int(seed)): value
        for label, one in found.items()
        for seed, value in zip(one["seed"], one["accuracy"], strict=True)
    }


def pairs(known: Runs, folders: Iterable[str]) -> list[Pair]:
    """The runs that have a place in the file."""
    made = _tabled(curves.table(folders))
    for label, seed in sorted(made.keys() - known.keys()):
        print(f"left out: {label}, seed {seed}, is not in the file", file=sys.stderr)
    return [Pair(*run, known[run], value) for run, value in made.items() if run in known]


def line(where: str, found: list[Pair], folders: Iterable[str], before: dict[str, Any]) -> dict[str, Any]:
    """What again.json says of a file: these runs, and those that it knew before."""
    new = {f"{pair.label}-seed{pair.seed}": [pair.committed, pair.again] for pair in found}
    each = {**before.get("each", {}), **new}
    apart = {name: change for name, two in each.items() if (change := points(*two))}
    facts = [curves.read(path / "run.json") for path in map(Path, folders) if path.name in new]
    hardware, commits = {", ".join(one["hardware"].values()) for one in facts}, {one["commit"] for one in facts}
    return {
        "file": where,
        "runs": len(each),
        "same": len(each) - len(apart),
        "apart": ", ".join(f"{name.replace('-seed', ' ')} {change:+.2f}" for name, change in apart.items()),
        "which": ", ".join(which(each)),
        "each": each,
        "hardware": sorted(hardware | set(before.get("hardware", []))),
        "commits": sorted(commits | set(before.get("commits", []))),
        "date": max(one["started"][:10] for one in facts),
    }


def which(names: Iterable[str]) -> list[str]:
    """LABEL-seedSEED, .. -> "LABEL SEED SEED", .."""
    seeds: dict[str, list[str]] = {}
    for name in names:
        label, _, seed = name.rpartition("-seed")
        seeds.setdefault(label, []).append(seed)
    return [" ".join([label, *sorted(of)]) for label, of in seeds.items()]


def main() -> int:
    """The lines, and with --write again.json."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--write", action="store_true")
    ask.add_argument("file")
    ask.add_argument("folders", nargs="+")
    given = ask.parse_args()
    found = pairs(committed(given.file), given.folders)
    for pair in found:
        change = points(pair.committed, pair.again)
        print(f"{pair.label:22s} seed {pair.seed}  {pair.committed:.4f}  {pair.again:.4f}  {change:+.2f}")
    if found and given.write:
        kept = curves.read(HERE / "again.json") if (HERE / "again.json").is_file() else []
        before = next((one for one in kept if one["file"] == given.file), {})
        kept = [one for one in kept if one is not before] + [line(given.file, found, given.folders, before)]
        curves.write(HERE / "again.json", sorted(kept, key=lambda one: one["file"]))
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
