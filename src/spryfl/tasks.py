"""What a task makes of its examples: token rows, batches, a loss, a count of right answers.

Here: classification of one text or two.

    loss = - log softmax(logits)[label], the mean over the batch, in float32

A batch is padded to its longest row. Cost: tokenization once at the start, some microseconds a row.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spryfl.data.examples import Examples
from spryfl.types import Batch


class Rows(NamedTuple):
    """Tokenized examples."""

    inputs: tuple[Mapping[str, Sequence[int]], ...]  # one mapping an example: input_ids, attention_mask, ...
    labels: tuple[int, ...]
    cut: int  # how many were longer than the maximum length
    pad: int  # the padding token


def encode(tokenizer: Any, examples: Examples, max_length: int) -> Rows:
    """Tokens of each example, cut at `max_length`; counts how many were cut."""
    if not examples.text:
        return Rows((), (), 0, tokenizer.pad_token_id)
    texts = [list(examples.text)] + ([list(examples.pair)] if examples.pair is not None else [])
    whole = tokenizer(*texts, truncation=False, verbose=False)
    table = tokenizer(*texts, truncation=True, max_length=max_length)
    cut = sum(len(ids) > max_length for ids in whole["input_ids"])
    inputs = tuple({key: table[key][i] for key in table} for i in range(len(examples.text)))
    return Rows(inputs, examples.label, cut, tokenizer.pad_token_id)


def collate(rows: Rows, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """The rows of `indices` as one batch: names -> int64 (rows, longest), and "labels" (rows,)."""
    chosen = [rows.inputs[i] for i in indices]
    longest = max(len(row["input_ids"]) for row in chosen)
    batch = {key: _padded([row[key] for row in chosen], longest, rows.pad * (key == "input_ids")) for key in chosen[0]}
    batch["labels"] = torch.tensor([rows.labels[i] for i in indices])
    return {key: value.to(device) for key, value in batch.items()}


def _padded(rows: Sequence[Sequence[int]], longest: int, pad: int) -> Tensor:
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])


def shuffled(
    indices: Sequence[int], batch_size: int, seed: int, epochs: int = 1, steps: int = 0, same: bool = False
) -> Iterator[list[int]]:
    """The order of local training: `epochs` passes over the rows, or exactly `steps` batches if that is not 0.

    With `same` every epoch has the batches of the first, in another order.
    """
    order, done = random.Random(seed), 0
    batches = _dealt(indices, batch_size, order)
    while steps or epochs > 0:
        for batch in batches:
            yield batch
            done += 1
            if steps and done == steps:
                return
        epochs -= 1
        if same:
            order.shuffle(batches)
        else:
            batches = _dealt(indices, batch_size, order)


def _dealt(indices: Sequence[int], batch_size: int, order: random.Random) -> list[list[int]]:
    rows = list(indices)
    order.shuffle(rows)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def by_length(rows: Rows, indices: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of rows of like length, for scoring: little padding."""
    order = sorted(indices, key=lambda i: (len(rows.inputs[i]["input_ids"]), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy in float32, the mean over the batch."""
    return F.cross_entropy(logits.float(), batch["labels"])


def correct(logits: Tensor, batch: Batch) -> int:
    """How many rows have their label as the largest logit."""
    return int((logits.argmax(-1) == batch["labels"]).sum())
