"""MultiRC: which of a question's candidate answers are right? Any number of them; each is a row of its own.

    loss: cross entropy of right and wrong, the mean over the rows
    metrics: f1a, the F1 of "right" over all rows; exact_match, the share of questions with every answer judged right

Khashabi et al., NAACL 2018; as SuperGLUE measures it. The rows of a question stay together when rows are split off or
limited, as exact_match is about whole questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from spryfl.data.columns import Needs
from spryfl.data.examples import Examples
from spryfl.tasks.classification import accuracy, best, class_loss, say_classes, shares
from spryfl.tasks.record import Rows, Task
from spryfl.tasks.rows import encode

_QUESTIONS = ("question_idx", "question_id", "question")


class Judged(NamedTuple):
    """A row's truth: whether its answer is right, and whose answer it is."""

    label: int
    question: tuple[str, str]


def multirc(question: str = "") -> Task:
    """Right and wrong answers to questions about a text, by any model that AutoModelForSequenceClassification opens.

    Args:
        question: the column that tells the questions of a text apart; empty is question_idx or question.
    """
    needs = Needs(
        texts=("text", "paragraph"),
        pairs=(("text", "text_pair"), ("paragraph", "question")),
        extra={"question": (question,) if question else _QUESTIONS, "answer": ("answer",)},
        optional=("answer",),
        whole="question",
    )
    return Task(
        auto="AutoModelForSequenceClassification",
        metric="f1a",
        encode=_encode,
        loss=class_loss,
        answers=shares,
        score=_score,
        say=say_classes,
        needs=needs,
        outputs=_two,
    )


def _two(classes: tuple[str, ...]) -> tuple[str, ...]:
    if len(classes) != 2:
        raise ValueError(f"multirc needs the labels wrong and right, and the data have: {', '.join(classes)}.")
    return classes


def _encode(tokenizer: Any, examples: Examples, max_length: int) -> Rows:
    pair = examples.pair or ("",) * len(examples.text)
    answers = examples.extra.get("answer", ("",) * len(pair))
    # Some files have question and answer in one column already.
    both = tuple(q if q.endswith(str(a)) else f"{q} {a}" for q, a in zip(pair, answers, strict=True))
    rows = encode(tokenizer, examples._replace(pair=both), max_length)
    questions = examples.extra.get("question", pair)
    truths = (
        Judged(label, (text, str(question)))
        for label, text, question in zip(examples.label, examples.text, questions, strict=True)
    )
    return rows._replace(labels=tuple(truths))


def _score(answers: Sequence[Sequence[float]], truths: Sequence[Judged]) -> dict[str, float]:
    said = [best(answer) for answer in answers]
    labels = [truth.label for truth in truths]
    hits = sum(s and label for s, label in zip(said, labels, strict=True))
    whole: dict[Any, bool] = {}
    for s, truth in zip(said, truths, strict=True):
        whole[truth.question] = whole.get(truth.question, True) and s == truth.label
    return {
        "f1a": 2 * hits / max(sum(said) + sum(labels), 1),
        "exact_match": sum(whole.values()) / len(whole),
        **accuracy(answers, labels),
    }
