"""Classification of one text or two by a head on the model.

loss = - log softmax(logits)[label], the mean over the batch, in float32        metric: accuracy
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from spryfl.tasks.record import Task, wide
from spryfl.tasks.rows import encode
from spryfl.types import Batch


def classification() -> Task:
    """Classes of a text or of a pair of texts; the model is any that AutoModelForSequenceClassification opens.

    >>> classification().metric
    'accuracy'
    """
    return Task(
        auto="AutoModelForSequenceClassification",
        metric="accuracy",
        encode=encode,
        loss=class_loss,
        answers=shares,
        score=accuracy,
        say=say_classes,
        outputs=lambda classes: classes,
    )


def class_loss(output: Any, batch: Batch) -> Tensor:
    """Cross entropy in float32, the mean over the batch."""
    return F.cross_entropy(wide(output.logits), batch["labels"])


def shares(output: Any, batch: Batch) -> list[list[float]]:
    """The probabilities of the classes, row by row."""
    return wide(output.logits).softmax(-1).tolist()


def best(answer: Sequence[float]) -> int:
    """The class of the highest probability; the first of equal ones."""
    return max(range(len(answer)), key=answer.__getitem__)


def accuracy(answers: Sequence[Sequence[float]], truths: Sequence[int]) -> dict[str, float]:
    """The share of rows whose label is the likeliest class."""
    right = sum(best(answer) == truth for answer, truth in zip(answers, truths, strict=True))
    return {"accuracy": right / len(truths)}


def say_classes(answer: Sequence[float], truth: Any, names: Sequence[str]) -> str:
    """The likeliest class, a tab, and all classes with their probabilities."""
    order = sorted(zip(answer, names, strict=True), reverse=True)
    return "\t".join([order[0][1], " ".join(f"{name}={share:.3f}" for share, name in order)])
