"""From a `transformers` Trainer to a federation and back: the same model, tokenizer and data set, a few lines.

    python examples/from_trainer.py MODEL FILE

What a Trainer user has is MODEL, a tokenizer, data sets with a text and a label column, and TrainingArguments. Those go
into `finetune`; what comes out merges into a plain model, which the same Trainer evaluates and saves.
"""

import sys
import tempfile

import datasets
import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

import spryfl


def main(name: str, file: str) -> None:
    # As for a Trainer.
    set_seed(0)
    data = datasets.load_dataset("csv", data_files=file, split="train").train_test_split(0.25, seed=0)
    data = data.class_encode_column("label")
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=data["train"].features["label"].num_classes
    )
    arguments = TrainingArguments(tempfile.mkdtemp(), learning_rate=2e-2, per_device_train_batch_size=8, report_to=[])

    # In place of trainer.train(): the training rows stay with four clients.
    history = spryfl.finetune(
        model,
        (data["train"], data["test"]),
        tokenizer=tokenizer,
        method=spryfl.methods.fedavg(local_optimizer={"kind": "adamw", "lr": arguments.learning_rate}),
        adapter={"kind": "lora", "r": 4},
        partition={"clients": 4, "split": {"kind": "iid"}},
        train={"rounds": 6, "cohort": 4, "epochs": 5, "batch_size": arguments.per_device_train_batch_size},
    )
    print(f"federated: accuracy {history.records[-1]['accuracy']:.4f} on the test rows")

    # And back: a plain model again, for Trainer, pipeline, save_pretrained, push_to_hub.
    tokens = data["test"].map(lambda row: tokenizer(row["text"], truncation=True, max_length=128))
    trainer = Trainer(
        model=history.model.module.merge_and_unload(),
        args=arguments,
        eval_dataset=tokens,
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )
    print(f"by Trainer: accuracy {trainer.evaluate()['eval_accuracy']:.4f} on the same rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
