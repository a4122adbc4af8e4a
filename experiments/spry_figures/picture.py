"""A result file a figure from run folders, and the picture: accuracy on the test rows against what the law promises.

python experiments/spry_figures/picture.py runs/fig/* runs/fig-0.1/*     # into table.json; a file a figure, picture.png
python experiments/spry_figures/picture.py                               # files and picture from table.json

A run on clients of unequal classes is told by its configuration and stands in a file of its own, dirichlet.json.
"""

import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import curves  # noqa: E402
from curves import plt  # noqa: E402

DRAWN = {  # label -> (clients a round M, directions K)
    "k1": (10, 1),
    "k10": (10, 10),
    "k20": (10, 20),
    "k50": (10, 50),
    "k100": (10, 100),
    "m50_k1": (50, 1),
    "m50_k10": (50, 10),
    "m100_k1": (100, 1),
    "m100_k10": (100, 10),
}
BESIDE = {10: (6, -12), 50: (-34, 4), 100: (-4, -17)}  # M -> where a point's K stands, in points
VALUES = {  # label -> values of its adapter
    "xs4_k100": 384,
    "xs8_k100": 1536,
    "k100": 9216,
    "ia3_k100": 16_128,
    "bitfit_k100": 26_112,
    "lora4_k100": 36_864,
}
FIGURES = {
    "directions": ("head", "head_fast", *DRAWN, "backprop"),
    "agreement": ("k10", "forward_k10"),
    "split": ("k10", "split_k10", "k100", "split_k100", "backprop", "split_backprop"),
    "heads": ("split_k100", "shared_head", "split_head"),
    "adapters": tuple(VALUES),
    "steps": ("backprop", "steps_backprop", "split_k100", "steps_split_k100", "steps_k100"),
    "servers": (
        *("head", "yogi_head", "k1", "yogi_k1", "k10", "faster", "yogi", "momentum", "k100", "yogi_k100"),
        *("backprop", "yogi_backprop"),
    ),
    "levers": ("k10", "signs", "orthogonal", "guided", "guided_long", "growth", "constant", "average"),
    "few": ("xs4_k100", "xs4_orthogonal", "xs4_exact", "xs8_k100", "xs8_exact"),
}


def main() -> None:
    """The files and the picture."""
    if folders := sys.argv[1:]:
        dealt = curves.read(HERE / "table.json")
        for alpha, of in by_partition(folders).items():
            dealt[alpha] = curves.merged(dealt.get(alpha, {}), curves.table(of))
        curves.write(HERE / "table.json", dealt)
    dealt = curves.read(HERE / "table.json")
    found = dealt["iid"]
    for name, labels in FIGURES.items():
        own = {label: found[label] for label in labels if label in found}
        curves.write(HERE / f"{name}.json", rows(own if name == "directions" else at_common_seeds(own)))
    shared = [label for label in ("head", "k100", "backprop") if label in found]
    unequal = [
        {**row, "alpha": alpha} for alpha, of in dealt.items() for row in rows({k: of[k] for k in shared if k in of})
    ]
    curves.write(HERE / "dirichlet.json", sorted(unequal, key=lambda row: shared.index(row["row"])))
    picture(found, HERE / "picture.png")


def by_partition(folders: Iterable[str]) -> dict[str, list[Path]]:
    """Run folders by the rule that dealt their rows: "iid", or Dirichlet's alpha."""
    out: dict[str, list[Path]] = {}
    for folder in map(Path, folders):
        if (folder / "config.toml").is_file():
            rule = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))["partition"]["split"]
            out.setdefault(str(rule.get("alpha", "iid")), []).append(folder)
    return out


def at_common_seeds(found: dict[str, curves.Seeds]) -> dict[str, curves.Seeds]:
    """The seeds that all have, so that means are of the same."""
    common = set.intersection(*(set(one["seed"]) for one in found.values())) if found else set()
    kept = {label: [i for i, seed in enumerate(one["seed"]) if seed in common] for label, one in found.items()}
    return {label: {key: [of[i] for i in kept[label]] for key, of in one.items()} for label, one in found.items()}


def rows(found: dict[str, curves.Seeds]) -> list[dict[str, Any]]:
    """A line a label, with what the law says of it."""
    return [{**row, **law(row["row"])} for row in curves.results(found, {})]


def law(label: str) -> dict[str, Any]:
    """M, K, d and cos^2 of the mean of M estimates along K Gaussian directions each, where they see one batch."""
    if label not in DRAWN and label not in VALUES:
        return {"M": "", "K": "", "d": "", "law": ""}
    (clients, directions), size = DRAWN.get(label, (10, 100)), VALUES.get(label, VALUES["k100"])
    draws = clients * directions
    return {"M": str(clients), "K": str(directions), "d": str(size), "law": f"{draws / (size + 1 + draws):.3f}"}


def picture(found: dict[str, curves.Seeds], path: Path) -> None:
    """A point a pair of M and K, a bar over its seeds; the head and backprop as lines."""
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    for clients, color in {10: "C0", 50: "C1", 100: "C2"}.items():
        labels = [label for label, (m, _) in DRAWN.items() if m == clients and label in found]
        if not labels:
            continue
        seen = [found[label]["accuracy"] for label in labels]
        x, y = [float(law(label)["law"]) for label in labels], [mean(values) for values in seen]
        ends = [[a - min(v) for a, v in zip(y, seen, strict=True)], [max(v) - a for a, v in zip(y, seen, strict=True)]]
        axes.errorbar(x, y, ends, marker="o", capsize=3, color=color, label=f"M = {clients} clients a round")
        for label, at, value in zip(labels, x, y, strict=True):
            axes.annotate(
                f"K = {DRAWN[label][1]}",
                (at, value),
                BESIDE[clients],
                textcoords="offset points",
                fontsize=8,
                color=color,
            )
    for label, said in {"backprop": "backprop, M = 10", "head": "head alone, M = 10"}.items():
        level = mean(found[label]["accuracy"])
        axes.axhline(level, linestyle="--", linewidth=1, color="gray")
        axes.annotate(said, (0.025, level), (0, 3), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(0.0008, 0.2)
    axes.set_xlabel("cos² of estimate and gradient by the law, MK / (d + 1 + MK)")
    axes.set_ylabel("accuracy on 872 test rows after 60 rounds")
    axes.margins(y=0.12)
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
