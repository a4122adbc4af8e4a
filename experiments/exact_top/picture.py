"""table.json and results.json from run folders, and the picture: accuracy on the test rows against what a step holds.

python experiments/exact_top/picture.py runs/exact-top/*           # table.json, results.json, curve.png
python experiments/exact_top/picture.py iid.json runs/iid/*        # a results file alone
python experiments/exact_top/picture.py                            # results.json and the picture alone
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import curves  # noqa: E402

ALONE, BELOW, ALL = "C0", "C1", "C2"
POINTS = {  # row of memory.json -> (label of the table, what stands beside its point, where, colour)
    "head": ("head", "head, same rounds", (7, -4), "gray"),
    "top1, checkpointed": ("top1", "b = 1", (-6, -13), ALONE),
    "top2, checkpointed": ("top2", "exact top alone, b = 2", (-100, -13), ALONE),
    "top3, checkpointed": ("top3", "b = 3", (-30, 4), ALONE),
    "below0": ("below0", "forward mode in the last block", (7, -4), BELOW),
    "below1": ("below1", "b = 1", (6, -8), BELOW),
    "below2": ("below2", "forward mode below b = 2", (7, -12), BELOW),
    "below3": ("below3", "b = 3", (-10, 8), BELOW),
    "backprop": ("backprop", "backprop", (-20, 8), ALL),
    "backprop, checkpointed": ("backprop", "backprop, checkpointed", (6, 6), ALL),
}


def main() -> None:
    """The tables if run folders are given, and the picture."""
    words = sys.argv[1:]
    memory = curves.read(HERE / "memory.json")
    held = {row: one["measured_mb"] for row, one in memory.items()}
    least = {row.split(",")[0]: min(held[other] for other in held if other.split(",")[0] == row) for row in held}
    if words and words[0].endswith(".json"):
        curves.write(HERE / words[0], curves.results(curves.table(words[1:]), least))
        return
    if words:
        curves.write(HERE / "table.json", curves.table(words))
    found = curves.read(HERE / "table.json")
    curves.write(HERE / "results.json", curves.results(found, least))
    head = curves.read(HERE.parent / "t1_sst2" / "head.json")["chosen"]["test"]
    points = [curves.Point(label, held[row], *rest) for row, (label, *rest) in POINTS.items()]
    curves.picture(found, points, head, 64, HERE / "curve.png")


if __name__ == "__main__":
    main()
