"""table.json and results.json from run folders, and the picture: accuracy on the test rows against what a step holds.

python experiments/exact_top/picture.py runs/exact-top/*           # into table.json; results.json, curve.png
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
    "top1, checkpointed": ("top1", "exact top alone, b = 1", (8, -4), ALONE),
    "top2, checkpointed": ("top2", "b = 2", (-36, 0), ALONE),
    "top3, checkpointed": ("top3", "b = 3", (-36, 2), ALONE),
    "below0": ("below0", "forward mode in the last block", (7, -4), BELOW),
    "below1": ("below1", "b = 1", (8, -4), BELOW),
    "below2": ("below2", "forward mode below it, b = 2", (8, -4), BELOW),
    "below3": ("below3", "b = 3", (-8, -26), BELOW),
    "backprop": ("backprop", "backprop", (-58, -3), ALL),
    "backprop, checkpointed": ("backprop", "backprop, checkpointed", (10, -3), ALL),
}


def main() -> None:
    """The tables if run folders are given, and the picture."""
    words = sys.argv[1:]
    memory = curves.read(HERE / "memory.json")
    held = {one["way"]: one["measured"] for one in memory}
    least: dict[str, float] = {}  # of a row's ways, the one that holds least
    for way, megabytes in held.items():
        row = way.split(",")[0]
        least[row] = min(megabytes, least.get(row, megabytes))
    least["fedavg_0p004"] = least["fedavg"]  # the same steps at another rate
    if words and words[0].endswith(".json"):
        curves.write(HERE / words[0], curves.results(curves.table(words[1:]), least))
        return
    if words:
        known = curves.read(HERE / "table.json")
        curves.write(HERE / "table.json", curves.merged(known, curves.table(words)))
    found = curves.read(HERE / "table.json")
    curves.write(HERE / "results.json", curves.results(found, least))
    head = curves.read(HERE.parent / "t1_sst2" / "head.json")["chosen"]["test"]
    points = [curves.Point(label, held[row], *rest) for row, (label, *rest) in POINTS.items()]
    curves.picture(found, points, head, 64, HERE / "curve.png", wide=(2, 15))


if __name__ == "__main__":
    main()
