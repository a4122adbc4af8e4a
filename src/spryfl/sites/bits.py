"""Whether two runs ended in the same bits: the server's state, the adapter, the records of all rounds.

Times, memory and what hangs on the engine, its counts and bytes, may differ; nothing else may. Cost: both runs read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spryfl import journal, train
from spryfl.journal import Journal

_FREE = {*train.TIMED, "bytes_up", "bytes_down"}  # of a record: those of an engine


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two run folders, a line each; empty where they ended in the same bits."""
    both = journal.open_folder(one), journal.open_folder(other)
    return [*_states(*both), *_records(*both), *_adapters(one / "adapter", other / "adapter")]


def _states(one: Journal, other: Journal) -> Iterator[str]:
    (a, _), (b, _) = journal.load(one), journal.load(other)
    for field in ("round", "params", "optimizer", "average", "guide"):
        if not equal(getattr(a, field), getattr(b, field)):
            yield f"state: {field}"


def equal(one: Any, other: Any) -> bool:
    """Whether nested values are the same, tensors to the bit: type, shape, every byte, so -0.0 is not 0.0."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and _bits(one) == _bits(other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def _bits(value: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return value.dtype, value.shape, value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _records(one: Journal, other: Journal) -> Iterator[str]:
    a, b = journal.records(one), journal.records(other)
    if len(a) != len(b):
        yield f"records: {len(a)} and {len(b)} rounds"
    for mine, theirs in zip(a, b, strict=False):
        for key in sorted((mine.keys() | theirs.keys()) - _FREE):
            if mine.get(key) != theirs.get(key):
                yield f"round {mine['round']}: {key} {mine.get(key)} and {theirs.get(key)}"


def _adapters(one: Path, other: Path) -> Iterator[str]:
    names = [{str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} for folder in (one, other)]
    for name in sorted(names[0] | names[1]):
        if name not in names[0] & names[1]:
            yield f"adapter: {name} is there once"
        elif (one / name).read_bytes() != (other / name).read_bytes():
            yield f"adapter: {name}"
