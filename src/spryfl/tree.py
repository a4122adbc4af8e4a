"""Arithmetic on named tensors: mappings from name to tensor in and out, nothing moved in place. What a name tells."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from spryfl.types import Params

BLOCK = re.compile(r"\.(\d+)(?=\.|$)")  # the first number in a name is that of the block it lies in


def block(name: str) -> int:
    """The number of the block that a value, a unit or a module lies in, by its name; -1 outside all blocks."""
    found = BLOCK.search(name)
    return int(found[1]) if found else -1


def select(tree: Params, names: Iterable[str]) -> dict[str, Tensor]:
    """The values of `names`, in that order."""
    return {name: tree[name] for name in names}


def without(tree: Params, names: Iterable[str]) -> dict[str, Tensor]:
    """All values but those of `names`."""
    left_out = set(names)
    return {name: value for name, value in tree.items() if name not in left_out}


def add(a: Params, b: Params) -> dict[str, Tensor]:
    """a + b by name; a name that one of them lacks counts as zero there."""
    both = {name: a[name] + b[name] for name in a if name in b}
    return {**a, **b, **both}


def subtract(a: Params, b: Params) -> dict[str, Tensor]:
    """a - b over the names of a; b must have them all."""
    return {name: value - b[name] for name, value in a.items()}


def scale(tree: Params, factor: float) -> dict[str, Tensor]:
    """factor * tree."""
    return {name: factor * value for name, value in tree.items()}


def zeros(tree: Params) -> dict[str, Tensor]:
    """Zeros of the same names, shapes, dtypes and devices."""
    return {name: torch.zeros_like(value) for name, value in tree.items()}


def norm(tree: Params) -> float:
    """The Euclidean norm over all names, accumulated in float64."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in tree.values()))


def size(tree: Params) -> int:
    """How many values it holds."""
    return sum(value.numel() for value in tree.values())


def to(tree: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """The same values on `device`."""
    return {name: value.to(device) for name, value in tree.items()}


def is_finite(tree: Params) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(torch.isfinite(value).all()) for value in tree.values())
