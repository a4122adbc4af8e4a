"""Do forward mode along all axes of a unit and backprop take the same steps? The row `forward` of a comparison, some
rounds long, beside the same row with backprop under the same split. Writes agree.json. Cost: half a minute.

    python experiments/t1_sst2/agree.py --data ../shared/data/sst2 --out experiments/t1_sst2
"""

import argparse
import json
import time
import tomllib
from pathlib import Path

from spryfl import compare, config, finetune, tree

HERE = Path(__file__).parent


def main() -> None:
    """Both runs, and how far apart they end, beside how far they went."""
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
    backprop = {"method": {"estimator": {"kind": "backprop"}, "head": "shared"}}
    ends, seconds = {}, {}
    for name, more in (("forward", {}), ("backprop", backprop)):
        start = time.process_time()
        ends[name] = finetune(config.parse(config.merge(config.merge(base, small), more)))
        seconds[name] = time.process_time() - start
    one, other = (ends[name].params for name in ("forward", "backprop"))
    found = {
        "rounds": asked.rounds,
        "apart": tree.norm(tree.subtract(one, other)),
        "length": tree.norm(one),
        "test_loss": {name: end.records[-1]["test_loss"] for name, end in ends.items()},
        "start_loss": ends["forward"].records[0]["test_loss"],
        "processor_seconds": seconds,
    }
    (asked.out / "agree.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
