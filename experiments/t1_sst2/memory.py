"""One client's peak of a step, one sequence of the maximum length at a time: every way to a gradient, side by side.

Predicted by the planner for the client of a round that needs most, and measured for that client in a fresh process (the
allocator's count above the loaded model). Writes memory.json. Cost: seconds a row.

    python experiments/t1_sst2/memory.py --out experiments/t1_sst2
"""

import argparse
import json
from pathlib import Path
from typing import Any

from spryfl import config
from spryfl.footprint import measure

LATE = [3, 4, 5]
XS = {"kind": "lora_xs", "r": 4, "alpha": 4.0, "targets": ["query", "value", "intermediate.dense", "output.dense"]}
LORA = {"kind": "lora", "r": 8, "alpha": 16.0, "targets": XS["targets"]}


def rows() -> dict[str, dict[str, Any]]:
    """label -> changes of an experiment; blocks are counted from the end."""
    out: dict[str, dict[str, Any]] = {"head alone": {"method": {"name": "head_only"}, "adapter": {"kind": "head"}}}
    for name, adapter in (("LoRA r = 8", LORA), ("LoRA-XS r = 4", XS)):
        out[f"backprop, {name}"] = {"method": {"name": "fedavg"}, "adapter": adapter}
        out[f"backprop checkpointed, {name}"] = {"method": {"name": "fedavg_checkpointed"}, "adapter": adapter}
    for top in (1, 2, 3):
        layers = list(range(6 - top, 6))
        out[f"exact top alone, b = {top}"] = _top(top, LORA, layers, False)
        out[f"exact top alone, b = {top}, checkpointed"] = _top(top, LORA, layers, True)
    for top in (0, 1, 2, 3):
        for chunk in (1, 4, 0) if not top else (1, 0):
            out[f"forward, b = {top}, {chunk or 'all'} at once"] = _forward(top, chunk, top > 0)
    out["central differences"] = {
        "method": {
            "name": "fedavg_split",
            "head": "exact",
            "estimator": {"kind": "central_difference", "directions": 16, "distribution": "orthogonal"},
            "assignment": {"kind": "few", "units": 1},
        },
        "adapter": XS,
    }
    return out


def _top(top: int, adapter: dict[str, Any], layers: list[int], checkpoint: bool) -> dict[str, Any]:
    """Reverse mode over the last blocks, which alone have adapters."""
    return {
        "method": {"name": "fedavg", "estimator": {"kind": "backprop", "checkpoint": checkpoint}},
        "adapter": {**adapter, "layers": layers},
    }


def _forward(top: int, chunk: int, checkpoint: bool) -> dict[str, Any]:
    """Forward mode along a unit's 16 axes below an exact top."""
    return {
        "method": {
            "name": "spry",
            "head": "exact",
            "estimator": {
                "kind": "forward",
                "directions": 16,
                "distribution": "orthogonal",
                "chunk": chunk,
                "exact_top": top,
                "checkpoint": checkpoint,
            },
            "assignment": {"kind": "few", "units": 1},
        },
        "adapter": XS,
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
        slots = [measure.requested(experiment, slot=slot) for slot in range(10)]
        of = measure.planned(slots[0])
        predicted = [measure.predicted(one, of) for one in slots]
        worst = max(range(10), key=lambda slot: predicted[slot].step)
        seen = measure.measured(slots[worst])
        found[label] = {
            "predicted_mb": predicted[worst].step / 1e6,
            "mean_over_clients_mb": sum(one.step for one in predicted) / 10e6,
            "measured_mb": seen.counted / 1e6,
            "process_mb": seen.peak / 1e6,
            "passes": seen.passes,
        }
        print(label, found[label], flush=True)
    (asked.out / "memory.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
