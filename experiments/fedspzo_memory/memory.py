"""What one client's step holds at 32 and 256 tokens: FedAvg with LoRA at batch 4, FedSPZO at batch 8.

    python experiments/fedspzo_memory/memory.py            writes memory.json; two minutes and 2.5 GB of memory

RoBERTa-Large's shape with random weights, whose memory is that of any others, LoRA r = 1 on query and value and the
head. Each row is one step in a fresh process, its tensors counted as they are made and freed, beside the prediction.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from spryfl import methods
from spryfl.footprint.measure import Request, measured, predicted

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

from shapes import config  # noqa: E402

BATCHES = {"fedavg": 4, "fedavg_checkpointed": 4, "fedspzo": 8}


def main() -> None:
    """All rows at both lengths."""
    out = []
    with tempfile.TemporaryDirectory() as folder:
        config("roberta-large").save_pretrained(folder)
        for tokens in (32, 256):
            for name, rows in BATCHES.items():
                found, foretold = measured(asked := request(folder, name, rows, tokens)), predicted(asked)
                step = {"measured": found.counted / 1e6, "predicted": foretold.step / 1e6}
                out.append({"row": name, "batch": str(rows), "tokens": str(tokens), **step, "peak": found.peak / 1e9})
                print(out[-1], flush=True)
    (HERE / "memory.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


def request(folder: str, name: str, rows: int, tokens: int) -> Request:
    """One step of a row of the table of methods."""
    plain = {"adapter": {"kind": "lora", "r": 1}, "task": {"kind": "classification"}, "labels": ("0", "1")}
    method = asdict(methods.named(name))
    return Request(folder, method, rows=rows, tokens=tokens, threads=1, split=False, **plain)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
