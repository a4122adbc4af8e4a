"""How far an estimate along random directions points the right way, on a real model: measured beside MK / (d + MK).

    python benchmarks/alignment.py            writes docs/pictures/alignment.svg and benchmarks/alignment_2026-11.json

MiniLM with adapters of three sizes d, the head left out; the quickstart's texts, 4 rows of at most 32 tokens a client.
The truth is the gradient of the mean loss over the M clients' batches, by backprop. Estimates are those of
`spryfl.estimators.forward`, one a client with a seed of its own, and their mean. Once all clients hold the same batch,
which is the law's case, and once each holds its own. Cost: minutes on one core.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import torch

import spryfl
from spryfl import adapters, data, estimators, models, noise, tasks, tree
from spryfl.testing import gradient

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
ADAPTERS = {
    "TinyLoRA, u = 4": {"kind": "tiny_lora", "u": 4},
    "LoRA-XS, r = 8": {"kind": "lora_xs", "r": 8},
    "LoRA, r = 1": {"kind": "lora", "r": 1},
}
CASES = [(1, 1), (4, 1), (1, 8), (4, 16)]  # (M, K)
SEEDS = 4


def cosine(one, other) -> float:
    product = sum(float((one[name].double() * other[name].double()).sum()) for name in other)
    return product / (tree.norm(one) * tree.norm(other))


def measured(choice, corpus) -> list[dict]:
    """Rows (d, M, K, same batch or own, mean cos^2 over seeds)."""
    base, tokenizer = models.load("minilm", corpus.labels, seed=0)
    model = models.prepare(base, tokenizer, corpus.labels, adapters.build(choice), source="minilm", seed=0)
    rows = model.task.encode(model.tokenizer, corpus.train, 32)
    names = [name for unit in model.units if not unit.head for name in unit.params]
    # With B = 0 the gradient of LoRA's A is zero: every value is moved a little, as after some training.
    draw = torch.Generator().manual_seed(0)
    moved = {name: value + 0.02 * torch.randn(value.shape, generator=draw) for name, value in model.params.items()}
    loss_fn, params = models.loss_fn(model, tree.without(moved, names)), tree.select(moved, names)
    exact, out = estimators.backprop(), []
    for clients, directions in CASES:
        forward = estimators.forward(directions=directions)
        for own in (False, True):
            found = []
            for seed in range(SEEDS):
                starts = [4 * (seed * 4 + (i if own else 0)) for i in range(clients)]
                batches = [tasks.collate(rows, range(start, start + 4)) for start in starts]
                truth = mean([gradient(exact(loss_fn, params, batch, 0), params) for batch in batches])
                seeds = [noise.child_seed(seed, "client", i) for i in range(clients)]
                each = [gradient(forward(loss_fn, params, b, s), params) for b, s in zip(batches, seeds, strict=True)]
                found.append(cosine(mean(each), truth) ** 2)
            size = tree.size(params)
            out.append({"d": size, "M": clients, "K": directions, "own": own, "cos2": sum(found) / SEEDS})
            print(out[-1], flush=True)
    return out


def mean(all_: list) -> dict:
    return {name: sum(one[name] for one in all_) / len(all_) for name in all_[0]}


def picture(rows: list[dict], to: Path) -> None:
    pyplot.rcParams.update({"svg.hashsalt": "spryfl", "font.size": 10})
    figure, axes = pyplot.subplots(figsize=(6.6, 4.2), layout="constrained")
    law = [row["M"] * row["K"] / (row["d"] + row["M"] * row["K"]) for row in rows]
    for own, mark, label in ((False, "o", "all clients hold one batch"), (True, "x", "each holds its own")):
        chosen = [(x, row["cos2"]) for x, row in zip(law, rows, strict=True) if row["own"] is own and row["M"] > own]
        axes.plot(*zip(*chosen, strict=True), mark, label=label, markersize=6)
    ends = [min(law) / 2, max(law) * 2]
    axes.plot(ends, ends, "-", color="0.5", linewidth=1, label="the law")
    axes.set(xscale="log", yscale="log", xlabel="MK / (d + MK)", ylabel="cos² with the gradient, measured")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(to, metadata={"Date": None})


def main() -> None:
    torch.set_num_threads(1)
    corpus = data.load("docstrings", train_rows=1000, test_rows=100, seed=0)
    rows = [{"adapter": name, **row} for name, choice in ADAPTERS.items() for row in measured(choice, corpus)]
    (ROOT / "benchmarks" / "alignment_2026-11.json").write_text(
        json.dumps({"spryfl": spryfl.__version__, "torch": torch.__version__, "seeds": SEEDS, "rows": rows}, indent=1)
        + "\n"
    )
    picture(rows, ROOT / "docs" / "pictures" / "alignment.svg")


if __name__ == "__main__":
    main()
