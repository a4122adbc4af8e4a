"""What a step of each row of compare.toml holds: one sequence at a time, one tangent at a time, blocks checkpointed.

Run in a fresh process for the client of a round that needs most (the allocator's count above the loaded model), and
predicted by the planner. Reverse mode is measured plain and checkpointed. Writes memory.json. Cost: ten seconds a row.

    python experiments/exact_top/memory.py
"""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spryfl import config
from spryfl.footprint import measure

HERE = Path(__file__).parent
REVERSE = ("top1", "top2", "top3", "top4", "backprop", "fedavg")
PLAIN, CHECKPOINTED = {"kind": "backprop"}, {"kind": "backprop", "checkpoint": True}


def ways(row: str, changes: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(label, changes) of each way to compute a row."""
    if row.startswith("below"):
        own = copy.deepcopy(changes)
        own["method"]["estimator"].update(chunk=1, checkpoint=row != "below0")
        yield row, own
    elif row not in REVERSE:
        yield row, changes
    else:
        yield row, config.merge(changes, {"method": {"estimator": PLAIN}})
        yield f"{row}, checkpointed", config.merge(changes, {"method": {"estimator": CHECKPOINTED}})


def main() -> None:
    """All rows, by all their ways."""
    common = tomllib.loads((HERE / "compare.toml").read_text(encoding="utf-8"))
    compare = common.pop("compare")
    common["train"]["micro_batch"] = 1
    out = []
    for row in compare["methods"]:
        for label, changes in ways(row, compare["changes"][row]):
            request = measure.requested(config.parse(config.merge(common, changes)))
            found, foretold = measure.measured(request), measure.predicted(request)
            out.append({"way": label, "measured": found.counted / 1e6, "predicted": foretold.step / 1e6})
            print(out[-1], flush=True)
    (HERE / "memory.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
