"""Finetune a model of your own on a file of your own, across simulated clients, and use it.

    python examples/own_model.py MODEL FILE [FOLDER]

MODEL is a folder or a hub name (any that AutoModelForSequenceClassification opens), FILE a .csv, .jsonl or .parquet
with a text and a label column. Without arguments: MiniLM, and a file of forty sentences that this script writes.
"""

import csv
import sys
import tempfile
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import spryfl
from spryfl.models import resolve


def forty_sentences() -> str:
    path = Path(tempfile.mkdtemp()) / "weather.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for place in ("the coast", "the hills", "town", "the lake", "the north"):
            for warm, cold in (("sunny", "freezing"), ("warm", "snowy"), ("hot", "icy"), ("mild", "frosty")):
                writer.writerow([f"It will be {warm} in {place} today.", "warm"])
                writer.writerow([f"It will be {cold} in {place} today.", "cold"])
    return str(path)


def main(name: str = "minilm", file: str = "", folder: str = "") -> None:
    file = file or forty_sentences()
    kind = {"csv": "csv", "jsonl": "json", "parquet": "parquet"}[file.rpartition(".")[2]]
    rows = datasets.load_dataset(kind, data_files=file, split="train")
    where, _ = resolve(name)
    tokenizer = AutoTokenizer.from_pretrained(where)
    model = AutoModelForSequenceClassification.from_pretrained(where, num_labels=len(rows.unique("label")))
    history = spryfl.finetune(
        model,
        rows,
        tokenizer=tokenizer,
        method=spryfl.methods.spry(directions=4, head="exact", head_lr=30.0, server_optimizer={"kind": "sgd"}),
        partition={"clients": 4, "split": {"kind": "iid"}},
        train={"rounds": 15, "cohort": 4, "epochs": 1, "eval_every": 5},
        folder=folder or None,
        on_record=lambda r: print(f"round {r['round']:2d}  loss {r.get('loss', '')}  accuracy {r.get('accuracy', '')}"),
    )

    batch = tokenizer(rows["text"][:2], padding=True, return_tensors="pt")
    with torch.no_grad():  # history.model.module is a PEFT model: call it, save it, merge it
        answers = history.model.module(**batch).logits.argmax(-1)
    print([(text, history.model.labels[int(answer)]) for text, answer in zip(rows["text"][:2], answers, strict=True)])


if __name__ == "__main__":
    main(*sys.argv[1:])
