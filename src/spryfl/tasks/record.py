"""What a task type is: a record of functions. Adding one is one file with a builder that returns it.

    encode   examples -> token rows, once                     loss     model output, batch -> a float32 scalar
    answers  model output, batch -> an answer for each row    score    all answers, all truths -> numbers by name

A builder's arguments are the options of the section [task]; its key in `spryfl.tasks.TASKS`, or the builder itself, is
the `kind`. Costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spryfl.data.columns import CLASSES, Needs
from spryfl.data.examples import Examples
from spryfl.types import Batch

# Names in a batch that start so are no input of the model. Two of them have a meaning everywhere:
TARGETS = "labels"
OF = "labels_of"  # (sequences,) the row of the batch that a sequence belongs to, ascending
AT = "labels_at"  # (sequences, length) 1 where the vocabulary's logits are wanted; the model then answers these alone


class Rows(NamedTuple):
    """Tokenized examples."""

    inputs: tuple[tuple[Mapping[str, Any], ...], ...]  # an example's sequences: one, or one a choice, or one a window
    labels: tuple[Any, ...]  # what an example's answer is compared with
    cut: int  # how many were longer than the maximum length
    pad: int  # the padding token


def lengths(rows: Rows) -> list[int]:
    """Tokens of every sequence of the rows.

    Args:
        rows: what `Task.encode` made.
    """
    return [len(one["input_ids"]) for row in rows.inputs for one in row]


def wide(logits: Tensor) -> Tensor:
    """Logits in float32 at least: a loss in half precision is too coarse for differences and derivatives."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _count(batch: Batch) -> int:
    return len(batch["input_ids"])


class Task(NamedTuple):
    """A task type; what an answer and a truth are is the task's own affair."""

    auto: str  # the class of transformers that opens its models
    metric: str  # the name in `score` by which models are compared; more is better
    encode: Callable[[Any, Examples, int], Rows]  # tokenizer, examples, most tokens a sequence
    loss: Callable[[Any, Batch], Tensor]  # the mean over the batch, in float32
    answers: Callable[[Any, Batch], list[Any]]  # small plain values, one for each row of the batch
    score: Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]  # answers, truths: over all rows at once
    say: Callable[[Any, Any, Sequence[str]], str]  # an answer, the row's truth, names of the classes -> a line of text
    needs: Needs = CLASSES  # the columns it reads
    outputs: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda classes: ()  # names of the head's; () = as it is
    head: bool = True  # what the model has outside its trunk is trained; False: it stays as it was pretrained
    terms: Callable[[Batch], int] = _count  # of how many terms the loss is the mean
