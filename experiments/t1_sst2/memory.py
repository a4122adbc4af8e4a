"""One client's peak of a step, one sequence of the maximum length at a time: every way to a gradient, side by side.

Run in a fresh process for the client of a round that needs most (the allocator's count above the loaded model), and
predicted by the planner where it can. Writes memory.json. Cost: ten seconds a row.

    python experiments/t1_sst2/memory.py --out experiments/t1_sst2
"""

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

from spryfl import config
from spryfl.footprint import measure

TARGETS = ["query", "value", "intermediate.dense", "output.dense"]
LORA = {"kind": "lora", "r": 8, "alpha": 16.0, "targets": TARGETS}
XS = {"kind": "lora_xs", "r": 4, "alpha": 4.0, "targets": TARGETS}


def rows() -> dict[str, dict[str, Any]]:
    """label -> changes of an experiment; blocks are counted from the end, of six."""
    out: dict[str, dict[str, Any]] = {"head alone": {"method": {"name": "head_only"}, "adapter": {"kind": "head"}}}
    for name, layers in (("all blocks", []), ("last 2", [4, 5]), ("last 1", [5])):
        for method in ("fedavg", "fedavg_checkpointed"):
            out[f"{method}, {name}"] = {"method": {"name": method}, "adapter": {**LORA, "layers": layers}}
    for name, layers in (("all blocks", []), ("last 2", [4, 5])):
        for chunk in (1, 0):
            out[f"forward, {name}, {chunk or 16} tangents at once"] = _forward(layers, 0, chunk)
    for top in (1, 2):
        out[f"forward, all blocks, exact top {top}, 1 tangent at once"] = _forward([], top, 1)
    return out


def _forward(layers: list[int], top: int, chunk: int) -> dict[str, Any]:
    """Forward mode along a unit's 16 axes, below a checkpointed exact top."""
    estimator = {"kind": "forward", "directions": 16, "distribution": "orthogonal", "chunk": chunk, "exact_top": top}
    return {
        "method": {
            "name": "spry",
            "head": "exact",
            "estimator": {**estimator, "checkpoint": top > 0},
            "assignment": {"kind": "few", "units": 1},
        },
        "adapter": {**XS, "layers": layers},
    }


def main() -> None:
    """All rows, predicted for each client of a round; the largest measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args()
    common = {
        "data": {"max_length": asked.tokens},
        "partition": {"clients": 100},
        "train": {"cohort": 10, "batch_size": 8, "micro_batch": 1},
        "threads": 1,
    }
    found = {}
    for label, changes in rows().items():
        experiment = config.parse(config.merge(common, changes))
        request = measure.requested(experiment)  # the first client, who has the earliest unit
        seen = measure.measured(request)
        found[label] = {"measured_mb": seen.counted / 1e6, "process_mb": seen.peak / 1e6, "passes": seen.passes}
        with contextlib.suppress(ValueError):  # the planner refuses adapters in some layers alone
            found[label]["predicted_mb"] = measure.predicted(request).step / 1e6
        print(label, found[label], flush=True)
    (asked.out / "memory.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
