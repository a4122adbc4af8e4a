"""The best head on frozen features: logistic regression, converged; pooling and decay chosen on held-out training rows.

    features    first token, the pooler of it (which the library's head reads), mean of the tokens

Writes head.json, here or to `--out`. Cost: half a minute of one core, more with more `--rows`.

    python experiments/t1_sst2/head.py --data ../shared/data/sst2
    python experiments/t1_sst2/head.py --data ../shared/data/sst2 --rows 22000 --out experiments/exact_top
    python experiments/t1_sst2/head.py --data ../shared/data/ag_news --out experiments/exact_top/ag_news
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from spryfl import models

POOLINGS = ("first token", "pooler", "mean of tokens")
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)
HELD = 2000


def features(texts: list[str], size: int = 64) -> Tensor:
    """(rows, poolings, width), batches of rows of like length."""
    where, _ = models.resolve("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(where), AutoModel.from_pretrained(where).eval()
    out = torch.empty(len(texts), len(POOLINGS), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(texts), size):
        chosen = order[start : start + size]
        batch = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.inference_mode():
            given = model(**batch)
            hidden, mask = given.last_hidden_state, batch["attention_mask"].unsqueeze(-1).float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            out[chosen] = torch.stack([hidden[:, 0], given.pooler_output, mean], 1)
    return out


def fitted(rows: Tensor, labels: Tensor, decay: float) -> Callable[[Tensor], Tensor]:
    """rows -> their classes: one logistic regression for two classes, else one a class against the rest."""
    middle, spread = rows.mean(0), rows.std(0) + 1e-6
    classes = int(labels.max()) + 1
    scaled, truth = (rows - middle) / spread, (labels.unsqueeze(1) if classes == 2 else F.one_hot(labels)).float()
    weight = torch.zeros(rows.shape[1], truth.shape[1], requires_grad=True)
    bias = torch.zeros(truth.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        misses = F.binary_cross_entropy_with_logits(scaled @ weight + bias, truth, reduction="none")
        loss = misses.sum(1).mean() + decay * weight.square().sum()
        loss.backward()
        return loss

    def classify(given: Tensor) -> Tensor:
        scores = (given - middle) / spread @ weight.detach() + bias.detach()
        return (scores > 0).long().squeeze(1) if classes == 2 else scores.argmax(1)

    optimizer.step(closure)
    return classify


def main() -> None:
    """All poolings and decays; the choice by the held-out rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8000, help="training rows, the held-out ones among them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    train, test = (pq.read_table(asked.data / f"{side}.parquet").to_pydict() for side in ("train", "test"))
    chosen = random.Random(7).sample(range(len(train["text"])), asked.rows)
    seen, labels = features([train["text"][i] for i in chosen]), torch.tensor([train["label"][i] for i in chosen])
    last, truth = features(test["text"]), torch.tensor(test["label"])
    rows = []
    for at, pooling in enumerate(POOLINGS):
        for decay in DECAYS:
            head = fitted(seen[HELD:, at], labels[HELD:], decay)
            held = float((head(seen[:HELD, at]) == labels[:HELD]).float().mean())
            rows.append({"pooling": pooling, "decay": decay, "held": held})
            rows[-1]["test"] = float((head(last[:, at]) == truth).float().mean())
            print(rows[-1], flush=True)
    told = {"rows": rows, "chosen": max(rows, key=lambda row: row["held"]), "train": asked.rows - HELD, "held": HELD}
    (asked.out / "head.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
