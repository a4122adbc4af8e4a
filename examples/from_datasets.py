"""A `datasets.DatasetDict` with columns of one's own, one of which says whose a row is; predictions go back into it.

    python examples/from_datasets.py MODEL FOLDER

FOLDER holds train.csv and test.csv with the columns text, label and site; here they get other names, as anybody's have.
"""

import sys

import datasets
import torch

import spryfl


def main(model: str, folder: str) -> None:
    files = {side: f"{folder}/{side}.csv" for side in ("train", "test")}
    data = datasets.load_dataset("csv", data_files=files)
    data = data.rename_columns({"text": "review", "label": "opinion", "site": "hospital"})

    history = spryfl.finetune(
        model,
        data,
        reading={"text": "review", "label": "opinion", "group": "hospital", "max_length": 64},
        partition={"clients": 6, "split": {"kind": "natural"}},  # a hospital's rows are one client's
        method=spryfl.methods.fedavg(local_optimizer={"kind": "adamw", "lr": 2e-2}),
        train={"rounds": 6, "cohort": 4, "epochs": 6},
    )
    print(f"accuracy {history.records[-1]['accuracy']:.4f} on {len(data['test'])} rows")

    made = history.model

    def answered(rows):
        batch = made.tokenizer(rows["review"], truncation=True, max_length=64, padding=True, return_tensors="pt")
        with torch.no_grad():
            return {"predicted": [made.labels[i] for i in made.module(**batch).logits.argmax(-1)]}

    said = data["test"].map(answered, batched=True, batch_size=64)
    right = sum(row["predicted"] == row["opinion"] for row in said) / len(said)
    print(f"accuracy {right:.4f} by the column {said.column_names[-1]!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
