"""Run folders made by hand: what a run leaves, with numbers that a test chooses."""

from __future__ import annotations

import json
import math
from pathlib import Path

from spryfl.config import parse

HOSTILE = """<script>alert(1)</script>"'&</title><img src=x onerror=alert(2)>{{ 7*7 }}$\\frac$"""


def record(round_, **more):
    """A round's record."""
    return {
        "schema": 1,
        "round": round_,
        "cohort": [0, 1],
        "failed": {},
        "loss": 1.0 / (1 + round_),
        "peak_bytes": 2_000_000 + round_,
        "best": 0.5,
        "best_round": 0,
        "bytes_down": 30_000 * round_,
        "bytes_up": 20_000 * round_,
        "value_passes": 4 * round_,
        "tangent_passes": 8 * round_,
        "backward_passes": 0,
        "seconds": 1.5 * round_,
        **more,
    }


def rounds(count, wave=0.0, every=1):
    """Records of so many rounds; each `every`-th is evaluated."""
    first = {"schema": 1, "round": 0, "accuracy": 0.25, "test_loss": 1.4, "best": 0.25, "best_round": 0}
    costs = ("bytes_down", "bytes_up", "value_passes", "tangent_passes", "backward_passes", "seconds")
    out = [{**first, **dict.fromkeys(costs, 0)}]
    for i in range(1, count + 1):
        scores = {"accuracy": 0.9 - 0.65 / (1 + i / 9) + wave * math.sin(i), "test_loss": 1.4 / (1 + i / 20)}
        scalars = {
            "scalars": 16,
            "scalars_refused": i % 2,
            "scalars_clipped": 0,
            "scalar_rms": 0.1 * i,
            "scalar_max": i,
        }
        out.append(record(i, **(scores if i % every == 0 else {}), **scalars))
    return out


def write(folder: Path, records, changes=None, **facts) -> Path:
    """A run folder of an ordinary configuration with these records."""
    folder.mkdir(parents=True)
    experiment = parse({"name": "x", **(changes or {})})
    (folder / "config.toml").write_text(experiment.toml(), encoding="utf-8")
    said = {
        "schema": 1,
        "state": "complete",
        "started": "2026-11-22T05:29:06+00:00",
        "ended": "2026-11-22T06:29:06+00:00",
        "versions": {"python": "3.11.7"},
        "hardware": {"machine": "x86_64", "device": "cpu"},
        "threads": 1,
        "commit": "",
        "seed": experiment.seed,
        "metric": "accuracy",
        "data": {"source": "reviews.csv", "fingerprint": "0", "train": 40, "test": 20, "cut": 0, "tokens": 12},
        "clients": {"labels": ["bad", "good"], "rows": ["10 0", "3 9", "0 4"]},
        **facts,
    }
    (folder / "run.json").write_text(json.dumps(said), encoding="utf-8")
    (folder / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return folder
