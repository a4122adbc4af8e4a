"""Run folders into table.json; results.json and the picture: accuracy on the test rows against what a step holds.

python experiments/t1_sst2/picture.py runs/t1-dirichlet/*          # into table.json; results.json, curve.png
python experiments/t1_sst2/picture.py iid.json runs/t1-iid/*       # that file alone
python experiments/t1_sst2/picture.py                              # the picture alone
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import curves  # noqa: E402

MEMORY = {  # label -> the row of memory.json
    "forward": "forward, last 2, 1 tangents at once",
    "head": "head alone",
    "top1_alone": "fedavg_checkpointed, last 1",
    "top2_alone": "fedavg_checkpointed, last 2",
    "backprop": "fedavg, all blocks",
    "checkpointed": "fedavg_checkpointed, all blocks",
}
SAID = {  # label -> what stands beside its point, and where
    "forward": ("forward mode, last two blocks,\none tangent at a time", (7, -4)),
    "head": ("head alone, same rounds", (7, -4)),
    "top1_alone": ("exact top alone, b = 1", (-4, -14)),
    "top2_alone": ("b = 2", (7, 2)),
    "backprop": ("backprop", (-20, 8)),
    "checkpointed": ("checkpointed", (-36, 8)),
}


def main() -> None:
    """The table if run folders are given, and the picture."""
    words = sys.argv[1:]
    if words and words[0].endswith(".json"):
        curves.write(HERE / words[0], curves.results(curves.table(words[1:]), {}))
        return
    if words:
        known = curves.read(HERE / "table.json")
        curves.write(HERE / "table.json", curves.merged(known, curves.table(words)))
    found, memory, head = (curves.read(HERE / name) for name in ("table.json", "memory.json", "head.json"))
    held = {label: memory[place]["measured_mb"] for label, place in MEMORY.items()}
    curves.write(HERE / "results.json", curves.results(found, held))
    drawn = {**found, "checkpointed": found["backprop"], "forward": found["twin"]}  # the same steps, on more seeds
    points = [curves.Point(label, held[label], *SAID[label]) for label in MEMORY]
    curves.picture(drawn, points, head["chosen"]["test"], 64, HERE / "curve.png")


if __name__ == "__main__":
    main()
