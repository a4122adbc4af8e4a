"""A streamed step against a resident one: by turns, in one process, the files in the page cache; medians.

    python benchmarks/streamed_time.py FOLDER --tokens 128 --repeat 5

Wall time, and beside it the processor time of the whole process (the reading thread's too), which other programs on the
machine disturb less. A step is Spry's with one unit, the first, K = 1; LoRA r = 1 on query and value.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch

from spryfl import models, opened
from spryfl.adapters import lora
from spryfl.estimators import backprop, forward

WAYS = {"forward": forward(), "exact": forward(exact_head=True), "checkpointed": backprop(checkpoint=True)}


def loaded(folder: str, stream: bool) -> models.Model:
    """The model with its adapter."""
    base, tokenizer = models.load(folder, ("a", "b"), stream=stream)
    return models.prepare(base, tokenizer, ("a", "b"), lora(r=1))


def taken(model: models.Model, way: str, batch: dict[str, torch.Tensor], seed: int) -> tuple[float, float, float]:
    """Wall and processor seconds of a step, and its loss."""
    unit = next(unit for unit in model.units if not unit.head)
    fixed = {name: value for name, value in model.params.items() if name not in unit.params}
    moved = {name: model.params[name] for name in unit.params}
    wall, processor = time.perf_counter(), time.process_time()
    made = WAYS[way](models.loss_fn(model, fixed), moved, batch, seed)
    return time.perf_counter() - wall, time.process_time() - processor, made.loss


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--way", default="forward", choices=WAYS)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    both = {stream: loaded(asked.folder, stream) for stream in (False, True)}
    ids = torch.randint(2, 900, (asked.batch, asked.tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(asked.batch).long()}
    rows: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
    for i in range(asked.repeat + 1):
        for stream, model in both.items():
            rows[stream].append(taken(model, asked.way, batch, i))
    assert [row[2] for row in rows[False]] == [row[2] for row in rows[True]], "streamed and resident disagree"
    medians = {
        s: [statistics.median(row[k] for row in rows[s][1:]) for k in (0, 1)] for s in rows
    }  # the first warms up
    backbone = opened.backbone_of(both[True].module)
    told = {
        "folder": asked.folder,
        "way": asked.way,
        "batch": [asked.batch, asked.tokens],
        "threads": asked.threads,
        "resident_seconds": round(medians[False][0], 3),
        "streamed_seconds": round(medians[True][0], 3),
        "wall_ratio": round(medians[True][0] / medians[False][0], 3),
        "processor_ratio": round(medians[True][1] / medians[False][1], 3),
        "pairwise_wall_ratios": [round(s[0] / r[0], 3) for r, s in zip(rows[False][1:], rows[True][1:], strict=True)],
        "read": vars(backbone.source.counts),
        "system_load": os.getloadavg()[0],
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
