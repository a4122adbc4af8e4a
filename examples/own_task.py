"""A task type of one's own: how alike two texts are, a number, learnt by regression; `top` is the largest number.

    loss = mean over the rows of (model(a, b) - score / top)^2, in float32        metric: Pearson's correlation

Run it: python examples/own_task.py [MODEL FILE], columns sentence1, sentence2 and score.
"""

import statistics
import sys

import datasets

import spryfl
from spryfl.tasks import Needs, Rows, Task, encode


def similarity(top: float = 5.0) -> Task:
    def rows(tokenizer, examples, max_length) -> Rows:
        plain = encode(tokenizer, examples, max_length)
        truths = tuple(float(s) / top for s in examples.extra.get("score", [float("nan")] * len(examples.text)))
        inputs = tuple(({**one, "labels": truth},) for (one,), truth in zip(plain.inputs, truths, strict=True))
        return Rows(inputs, truths, plain.cut, plain.pad)

    return Task(
        auto="AutoModelForSequenceClassification",
        metric="pearson",
        encode=rows,
        loss=lambda output, batch: (output.logits.float().squeeze(-1) - batch["labels"]).square().mean(),
        answers=lambda output, batch: output.logits.float().squeeze(-1).tolist(),
        score=measured,
        say=lambda answer, truth, names: f"{top * answer:.2f} of {top:g}",
        needs=Needs(label=False, extra={"score": ("score", "similarity", "label")}),
        outputs=lambda classes: ("score",),
    )


def measured(answers, truths) -> dict[str, float]:
    error = statistics.fmean((a - t) ** 2 for a, t in zip(answers, truths, strict=True))
    defined = len(set(answers)) > 1 and len(set(truths)) > 1
    return {"pearson": statistics.correlation(answers, truths) if defined else 0.0, "squared_error": error}


def main(model: str = "minilm", file: str = "") -> None:
    words = ("sun", "rain", "snow", "wind", "fog", "hail", "frost", "thaw")
    pairs = [{"sentence1": a, "sentence2": b, "score": 5 * (a == b)} for a in words for b in (*words, *[a] * 7)]
    spryfl.finetune(
        model,
        file or datasets.Dataset.from_list(pairs),
        task={"kind": similarity},
        method=spryfl.methods.fedavg(local_optimizer={"kind": "adamw", "lr": 1e-2}),
        partition={"clients": 4},
        train={"rounds": 5, "cohort": 4, "epochs": 3, "eval_every": 1},
        on_record=lambda r: print({key: r[key] for key in ("round", "pearson", "squared_error") if key in r}),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
