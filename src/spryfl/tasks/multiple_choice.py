"""Multiple choice by a head that gives every choice one number: (text, choice) -> score.

    loss = - log softmax over a row's choices (score)[right one], the mean over the rows, in float32   metric: accuracy

The head is a classifier with one output, so that encoders and decoders do it alike; rows may differ in how many choices
they have. Cost: a sequence for each choice, so a batch is that many times larger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spryfl.data.columns import Needs
from spryfl.data.examples import Examples
from spryfl.tasks.classification import accuracy, best
from spryfl.tasks.record import OF, TARGETS, Rows, Task, wide
from spryfl.types import Batch

FAR = -1e9  # the score of a choice that a row does not have
USUAL = ("choices", "endings", "options", "candidates")


class Chosen(NamedTuple):
    """A row's truth: its choices and which is right."""

    label: int
    choices: tuple[str, ...]


def multiple_choice(choices: tuple[str, ...] = ()) -> Task:
    """One of several texts that follow a text, or a text and a second one; the label is the number of the right one.

    Args:
        choices: the columns of the choices, one text each, in order; empty is one column that holds a list of texts.
    """
    return Task(
        auto="AutoModelForSequenceClassification",
        metric="accuracy",
        encode=lambda tokenizer, examples, max_length: _encode(
            tokenizer, examples, max_length, choices_of(examples, choices)
        ),
        loss=lambda output, batch: F.cross_entropy(by_row(_scores(output), batch), right(batch)),
        answers=lambda output, batch: softmaxed(by_row(_scores(output), batch), batch),
        score=chosen_accuracy,
        say=say_choice,
        needs=choice_needs(choices),
        outputs=lambda classes: ("score",),
        terms=lambda batch: len(right(batch)),
    )


def choice_needs(choices: Sequence[str], base: Needs = Needs()) -> Needs:  # noqa: B008
    """Columns for the choices, beside those of `base`."""
    own: Mapping[str, tuple[str, ...]] = {name: (name,) for name in choices} or {"choices": USUAL}
    return base._replace(extra={**base.extra, **own})


def choices_of(examples: Examples, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Each row's choices; a ValueError names the row whose label is not one of them."""
    named = columns or ("choices",)
    missing = [name for name in named if name not in examples.extra]
    if missing:
        raise ValueError(f"multiple choice needs {', '.join(missing)}, which is not there. Give its column, or --with.")
    if columns:
        made = list(zip(*(map(str, examples.extra[name]) for name in columns), strict=True))
    else:
        made = [tuple(map(str, row)) for row in examples.extra["choices"]]
    for row, (label, texts) in enumerate(zip(examples.label, made, strict=True), start=1):
        if len(texts) < 2 or label >= len(texts):
            raise ValueError(
                f"row {row} has {len(texts)} choices and the label {label}. Each row needs two choices or more, and a "
                f"label that counts them from 0."
            )
    return made


def _encode(tokenizer: Any, examples: Examples, max_length: int, choices: Sequence[tuple[str, ...]]) -> Rows:
    pairs = examples.pair or ("",) * len(examples.text)
    before = [f"{text} {pair}".strip() for text, pair in zip(examples.text, pairs, strict=True)]
    glue = "" if tokenizer.sep_token else " "  # a decoder's tokenizer puts nothing between two texts
    both = (
        [text for text, own in zip(before, choices, strict=True) for _ in own],
        [glue + choice for own in choices for choice in own],
    )
    whole = tokenizer(*both, truncation=False, verbose=False)["input_ids"] if before else []
    table = tokenizer(*both, truncation=True, max_length=max_length) if before else {}
    inputs, cut, at = [], 0, 0
    for own, label in zip(choices, examples.label, strict=True):
        places = range(at, at := at + len(own))
        cut += any(len(whole[i]) > max_length for i in places)
        inputs.append(tuple({**{key: table[key][i] for key in table}, TARGETS: label} for i in places))
    truths = tuple(Chosen(*both) for both in zip(examples.label, choices, strict=True))
    return Rows(tuple(inputs), truths, cut, tokenizer.pad_token_id)


def _scores(output: Any) -> Tensor:
    return wide(output.logits).squeeze(-1)


def by_row(scores: Tensor, batch: Batch) -> Tensor:
    """Scores of all sequences (sequences,) as (rows, most choices), `FAR` where a row has fewer."""
    of = batch[OF]
    counts = torch.bincount(of)
    there = torch.arange(int(counts.max()), device=of.device) < counts.unsqueeze(1)
    place = torch.zeros_like(there, dtype=torch.int64)
    place[there] = torch.arange(len(of), device=of.device)
    return scores.index_select(0, place.flatten()).view(place.shape).masked_fill(~there, FAR)


def right(batch: Batch) -> Tensor:
    """The number of the right choice, (rows,): every sequence of a row carries it."""
    starts = torch.bincount(batch[OF]).cumsum(0) - 1
    return batch[TARGETS][starts]


def softmaxed(scores: Tensor, batch: Batch) -> list[list[float]]:
    """The probabilities of each row's own choices."""
    counts = torch.bincount(batch[OF]).tolist() if len(batch[OF]) != len(scores) else None
    shares = scores.softmax(-1).tolist()
    return [row[:count] for row, count in zip(shares, counts, strict=True)] if counts else shares


def chosen_accuracy(answers: Sequence[Sequence[float]], truths: Sequence[Chosen]) -> dict[str, float]:
    """The share of rows whose right choice is the likeliest."""
    return accuracy(answers, [truth.label for truth in truths])


def say_choice(answer: Sequence[float], truth: Chosen, names: Sequence[str]) -> str:
    """The likeliest choice, a tab, and the probabilities in order."""
    return f"{truth.choices[best(answer)]}\t{' '.join(f'{share:.3f}' for share in answer)}"
