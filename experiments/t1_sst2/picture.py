"""table.json from run folders; results.json and the picture: accuracy on the test rows against what a step holds.

python experiments/t1_sst2/picture.py runs/t1-dirichlet/*          # table.json, then curve.png from it and memory.json
python experiments/t1_sst2/picture.py                              # the picture alone
"""

import json
import sys
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from spryfl import report

HERE = Path(__file__).parent
MEMORY = {  # label -> the row of memory.json
    "forward": "forward, last 2, 1 tangents at once",
    "head": "head alone",
    "top1_alone": "fedavg_checkpointed, last 1",
    "top2_alone": "fedavg_checkpointed, last 2",
    "backprop": "fedavg, all blocks",
    "backprop, checkpointed": "fedavg_checkpointed, all blocks",
}
SAID = {  # label -> (what stands beside its point, where)
    "forward": ("forward mode, last two blocks,\none tangent at a time", (7, -4)),
    "head": ("head alone, same rounds", (7, -4)),
    "top1_alone": ("exact top alone, b = 1", (-4, -14)),
    "top2_alone": ("b = 2", (7, 2)),
    "backprop": ("backprop", (-20, 8)),
    "backprop, checkpointed": ("checkpointed", (-36, 8)),
}


def table(folders: list[str]) -> dict[str, dict[str, list[float]]]:
    """label -> what its runs reached, by seed, from complete runs."""
    out: dict[str, dict[str, list[float]]] = {}
    for folder in sorted(folders):
        path = Path(folder)
        if not (path / "config.toml").is_file():
            continue
        run = report.read(path)
        if run.facts["state"] != "complete":
            continue
        label, _, seed = path.name.rpartition("-seed")
        last = report.scored(run)[-1]
        row = {
            "seed": int(seed),
            "accuracy": last["accuracy"],
            "test_loss": last["test_loss"],
            "rounds": last["round"],
            "value_passes": last["value_passes"],
            "tangent_passes": last["tangent_passes"],
            "backward_passes": last["backward_passes"],
            "mb_up": last["bytes_up"] / 1e6,
            "mb_down": last["bytes_down"] / 1e6,
            "peak_mb": report.peak(run),
            "seconds": last["seconds"],
        }
        for key, value in row.items():
            out.setdefault(label, {}).setdefault(key, []).append(value)
    return out


def results(found: dict[str, dict[str, list[float]]], memory: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """A line a row, as README.md shows them."""
    out = []
    for label, one in found.items():
        place = MEMORY.get("forward" if label == "twin" else label, "")
        held = memory[place]["measured_mb"] if place in memory and label != "twin" else None
        out.append(
            {
                "row": label,
                "seeds": ", ".join(str(int(seed)) for seed in one["seed"]),
                "accuracy": mean(one["accuracy"]),
                "each": ", ".join(f"{value:.4f}" for value in one["accuracy"]),
                "loss": mean(one["test_loss"]),
                "passes": mean(one["value_passes"]) + mean(one["tangent_passes"]) + mean(one["backward_passes"]),
                "up": mean(one["mb_up"]),
                "seconds": mean(one["seconds"]),
                "held": f"{held:.1f}" if held else "",
            }
        )
    return out


def picture(found: dict[str, dict[str, list[float]]], memory: dict[str, dict[str, float]], head: float) -> None:
    """One point a row, with the range over its seeds."""
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    rows = {**found, "backprop, checkpointed": found["backprop"]} if "backprop" in found else found
    if "twin" in rows:  # the same steps by reverse mode, on more seeds
        rows = {**rows, "forward": rows["twin"]}
    for label, place in MEMORY.items():
        if label not in rows or place not in memory:
            continue
        seen = rows[label]["accuracy"]
        x, y = memory[place]["measured_mb"], mean(seen)
        axes.errorbar(x, y, [[y - min(seen)], [max(seen) - y]], marker="o", capsize=3)
        said, where = SAID[label]
        axes.annotate(said, (x, y), xytext=where, textcoords="offset points", fontsize=8)
    axes.axhline(head, linestyle="--", linewidth=1, color="gray")
    axes.annotate(
        "best converged head (mean of the tokens)",
        (0.72, head),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
    )
    axes.set_xscale("log")
    axes.set_xlabel("MB of a step above the model (one sequence of 64 tokens at a time)")
    axes.set_ylabel("accuracy on 872 test rows")
    axes.set_xlim(0.65, 30)
    axes.margins(y=0.12)
    figure.savefig(HERE / "curve.png", dpi=130)


def main() -> None:
    """The table if run folders are given, and the picture."""
    if sys.argv[1:] and sys.argv[1].endswith(".json"):
        rows = json.dumps(results(table(sys.argv[2:]), {}), indent=1)
        (HERE / sys.argv[1]).write_text(rows + "\n", encoding="utf-8")
        return
    if sys.argv[1:]:
        (HERE / "table.json").write_text(json.dumps(table(sys.argv[1:]), indent=1) + "\n", encoding="utf-8")
    found = json.loads((HERE / "table.json").read_text(encoding="utf-8"))
    memory = json.loads((HERE / "memory.json").read_text(encoding="utf-8"))
    rows = json.dumps(results(found, memory), indent=1)
    (HERE / "results.json").write_text(rows + "\n", encoding="utf-8")
    head = json.loads((HERE / "head.json").read_text(encoding="utf-8"))
    picture(found, memory, head["chosen"]["test"])


if __name__ == "__main__":
    main()
