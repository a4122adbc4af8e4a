"""Token rows into batches: padded, shuffled, or sorted by length. A batch is padded to its longest sequence.

Cost: tokenization once at the start, some microseconds a row.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spryfl.data.examples import Examples
from spryfl.tasks.record import AT, OF, TARGETS, Rows
from spryfl.types import Batch


def encode(tokenizer: Any, examples: Examples, max_length: int) -> Rows:
    """Tokens of each example's text, or text and pair, cut at `max_length`; counts how many were cut.

    Args:
        tokenizer: of the model.
        examples: texts, pairs, labels.
        max_length: tokens.

    Returns:
        Rows: a sequence and a label each.
    """
    if not examples.text:
        return Rows((), (), 0, tokenizer.pad_token_id)
    texts = [list(examples.text)] + ([list(examples.pair)] if examples.pair is not None else [])
    whole = tokenizer(*texts, truncation=False, verbose=False)
    table = tokenizer(*texts, truncation=True, max_length=max_length)
    cut = sum(len(ids) > max_length for ids in whole["input_ids"])
    inputs = tuple(
        ({**{key: table[key][i] for key in table}, TARGETS: label},) for i, label in enumerate(examples.label)
    )
    return Rows(inputs, examples.label, cut, tokenizer.pad_token_id)


def collate(rows: Rows, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """The rows of `indices` as one batch of their sequences.

    Lists become int64 (sequences, longest), padded; numbers become (sequences,), "labels" among them. `labels_of`
    says which row of the batch a sequence is from.

    Args:
        rows: encoded examples.
        indices: which of them, in this order.
        device: of the tensors.
    """
    chosen = [(row, sequence) for row, i in enumerate(indices) for sequence in rows.inputs[i]]
    batch = {OF: torch.tensor([row for row, _ in chosen])}
    for key in chosen[0][1]:
        batch[key] = _column([sequence[key] for _, sequence in chosen], _padding(key, rows))
    return {key: value.to(device) for key, value in batch.items()}


def _padding(key: str, rows: Rows) -> int:
    """Of targets it is -1, which no target is."""
    return rows.pad if key == "input_ids" else -1 if key.startswith(TARGETS) and key != AT else 0


def _column(values: Sequence[Any], pad: int) -> Tensor:
    if not isinstance(values[0], Sequence):
        return torch.tensor(values)
    longest = max(len(row) for row in values)
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in values])


def count(batch: Batch) -> int:
    """The rows of a batch, of one sequence each or of several.

    Args:
        batch: as `collate` made it.
    """
    return int(batch[OF][-1]) + 1 if OF in batch else len(next(iter(batch.values())))


def parts(batch: Batch, rows: int) -> list[Batch]:
    """A batch in parts of at most so many rows, in order; the sequences of a row stay together, padding stays.

    Args:
        batch: as `collate` made it.
        rows: at most so many a part.
    """
    total = count(batch)
    if total <= rows:
        return [batch]
    of = batch[OF] if OF in batch else torch.arange(total)
    made: list[Batch] = []
    for first in range(0, total, rows):
        begin, end = (int(torch.searchsorted(of, edge)) for edge in (first, first + rows))
        part = {name: value[begin:end] for name, value in batch.items()}
        made.append({**part, OF: part[OF] - first} if OF in batch else part)
    return made


def inputs(batch: Batch) -> dict[str, Tensor]:
    """What of a batch the model is given: all but the targets.

    Args:
        batch: as `collate` made it.
    """
    return {name: value for name, value in batch.items() if not name.startswith(TARGETS)}


def shuffled(
    indices: Sequence[int], batch_size: int, seed: int, epochs: int = 1, steps: int = 0, same: bool = False
) -> Iterator[list[int]]:
    """The order of local training: `epochs` passes over the rows, or exactly `steps` batches if that is not 0.

    With `same` every epoch has the batches of the first, in another order.

    Args:
        indices: rows of a client.
        batch_size: rows a batch; the last of an epoch may be smaller.
        seed: of the order.
        epochs: passes over the rows.
        steps: batches in all, 0 for whole epochs.
        same: keep the first epoch's batches.
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
    """Batches of rows of like length, for scoring: little padding.

    Args:
        rows: encoded examples.
        indices: which of them.
        batch_size: rows a batch.
    """
    order = sorted(indices, key=lambda i: (length(rows.inputs[i]), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def length(sequences: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of an example's longest sequence."""
    return max(len(sequence["input_ids"]) for sequence in sequences)
