"""What a client can run in so many bytes, best first.

    progress      sum over the moved units of w_u (1 if its gradient is exact, else cos^2), w_u one unit's share of them
    cos^2         M K / (d + M K)      K directions over d values, M clients that move them with directions of their own
    score         progress / operations of a step

The law is E cos^2 of an estimate to the gradient (Gaussian directions, estimators/forward.py): the share of the best
possible step that an estimate of so few scalars makes. It takes every unit for equally useful and counts no time but
operations, so it ranks ways to a gradient on one client and foretells no accuracy. What fits comes first; among equals
what is not streamed, then the larger micro-batch. Cost: some steps on tensors without storage, 2 to 5 s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from spryfl.choices import Method
from spryfl.costs import passes, step_flops, work
from spryfl.footprint import Footprint, Outline, footprint, shapes
from spryfl.types import Passes, Unit


class Setting(NamedTuple):
    """How one client takes its steps."""

    method: Method  # its estimator and head
    micro_batch: int = 0  # rows at once; 0 = the whole batch
    stream: bool = False

    @property
    def words(self) -> str:
        """What is particular, in words."""
        return ""


class Planned(NamedTuple):
    """A setting and what is foretold of it."""

    setting: Setting
    footprint: Footprint
    passes: Passes | None  # of a step
    flops: float | None
    progress: float | None  # of a step, 1 is the exact gradient's


def fitting(
    budget: int,
    of: Outline,
    method: Method,
    mine: Sequence[Unit] | None = None,
    *,
    rows: int,
    tokens: int,
    clients: int = 1,
    stream: bool = True,
) -> Planned:
    """The best setting of a client that fits its memory, the method's local optimizer kept.

    Args:
        budget: bytes of anonymous memory of the client's process, its imports included.
        of: the model, from `footprint.outline`.
        method: whose choices hold but for the estimator and the head.
        mine: the units that the client moves; all without.
        rows, tokens: of a local batch.
        clients: that move these units in a round.
        stream: whether blocks may be read from the disk as they are needed; only a packed model can.

    Returns:
        the setting: `planned.setting.method.estimator`, `.head`, `.micro_batch`, `.stream`. The same for the same
        arguments, on machines whose processes are equally large after the imports.

    Raises:
        ValueError: nothing fits; it says the smallest need and what would lower it.
    """
    raise NotImplementedError
