"""Do forward mode along all axes of a unit, central differences along the same ones, and backprop take the same steps?

The row `forward` of the comparison, some rounds long, beside the same row with central differences and with backprop
under the same split. Writes agree.json. Cost: a minute of one core.

    python experiments/t1_sst2/agree.py --data ../shared/data/sst2 --out experiments/t1_sst2
"""

import argparse
import json
import time
import tomllib
from pathlib import Path
from typing import Any

from spryfl import compare, config, finetune, tree

HERE = Path(__file__).parent


def main() -> None:
    """All three, and how far apart they end, beside how far they went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    asked = parser.parse_args()
    whole = compare.parse(tomllib.loads((HERE / "dirichlet.toml").read_text(encoding="utf-8")))
    base = whole.runs["forward", 0].as_dict()
    base["method"].pop("classes", None)
    small = {
        "data": {"name": asked.data, "train_rows": 1000, "test_rows": 100},
        "train": {"rounds": asked.rounds, "eval_every": asked.rounds},
    }
    differences = {"kind": "central_difference", "directions": 16, "distribution": "orthogonal", "mu": 1e-3}
    ways: dict[str, dict[str, Any]] = {
        "forward": {},
        "central differences": {"method": {"estimator": differences}},
        "backprop": {"method": {"estimator": {"kind": "backprop"}, "head": "shared"}},
    }
    ends, seconds = {}, {}
    for name, more in ways.items():
        start = time.process_time()
        ends[name] = finetune(config.parse(config.merge(config.merge(base, small), more)))
        seconds[name] = time.process_time() - start
    exact = ends["backprop"].params
    found = {
        "rounds": asked.rounds,
        "moved": tree.norm(tree.subtract(exact, ends["backprop"].model.params)),
        "start_loss": ends["forward"].records[0]["test_loss"],
        "rows": [
            {
                "way": name,
                "apart_from_backprop": tree.norm(tree.subtract(end.params, exact)),
                "test_loss": end.records[-1]["test_loss"],
                "processor_seconds": seconds[name],
            }
            for name, end in ends.items()
        ],
    }
    (asked.out / "agree.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
