"""results.json from the lines that run.sh wrote: `python experiments/adapters/collect.py runs/adapters/table.txt`.

A line: NAME seed SEED | D adapter values | held out RATE:ACCURACY ... | RUN | accuracy A, loss L on N rows; ...
Where an adapter has several lines, the last one counts.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

SAID = {  # what run.sh calls it -> what the page calls it, and the maps it is on
    "head": ("head alone", ""),
    "lora-1": ("LoRA, r = 1", "q, v"),
    "lora_fa-1": ("LoRA-FA, r = 1", "q, v"),
    "lora_xs-8": ("LoRA-XS, r = 8", "q, v, f"),
    "lora_xs-16": ("LoRA-XS, r = 16", "q, v, f"),
    "vera-256": ("VeRA, r = 256", "q, v"),
    "tiny_lora-16": ("TinyLoRA, u = 16", "q, v, f"),
    "uni_lora-256": ("Uni-LoRA, d = 256, r = 4", "q, v"),
    "vb_lora-16": ("VB-LoRA, 16 vectors of 64, r = 2", "q, v"),
    "fourierft-100": ("FourierFT, n = 100", "q, v"),
}
LINE = re.compile(
    r"(\S+) seed (\d+) \| (\d+) adapter values \| held out (.*) \| \S+-lr(\S+)-\d+ \| accuracy (\S+), loss (\S+) "
)


def row(found: re.Match[str]) -> dict[str, Any]:
    """What the page shows of one adapter."""
    name, seed, values, tried, rate, accuracy, loss = found.groups()
    said, on = SAID[name]
    held_out = ", ".join(f"{float(score):.3f} ({lr})" for lr, _, score in (one.partition(":") for one in tried.split()))
    numbers = {"values": int(values), "rate": rate, "accuracy": float(accuracy), "loss": float(loss), "seed": int(seed)}
    return {"adapter": said, "on": on, "held_out": held_out, **numbers}


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    rows = {found[1]: row(found) for line in lines if (found := LINE.match(line))}
    ordered = sorted(rows.values(), key=lambda one: one["values"])
    Path(__file__).with_name("results.json").write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
