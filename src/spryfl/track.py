"""A run's records as TensorBoard's events, through its own library; what goes wrong with them never stops a run.

    every number of a record becomes a scalar at the round's step: "loss", "bytes_up", "alignment/cos", "failed" counted

Cost: a line of some hundred bytes a number and round.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

FOLDER = "events"
_LEFT_OUT = ("schema", "round", "cohort")


class Events:
    """Use as a context: `show(record)` after each round. They lie in the folder `events` of a run folder.

    Raises:
        ValueError: the library is not there.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.summary import Writer
        except ImportError:
            raise ValueError(
                "events for TensorBoard need its library, which is not installed. pip install 'spryfl[track]'"
            ) from None
        self._make, self._folder, self._off = Writer, folder / FOLDER, False
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Writes what is left."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._safely(writer.close)

    def show(self, record: Mapping[str, Any]) -> None:
        """Adds one round."""
        self._safely(lambda: self._add(record))

    def _add(self, record: Mapping[str, Any]) -> None:
        self._writer = self._writer or self._make(str(self._folder))
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, step=record["round"])
        self._writer.flush()

    def _safely(self, do: Any) -> None:
        """A full disk or a library of another version ends the events, not the run."""
        if self._off:
            return
        try:
            do()
        except Exception as error:
            self._off = True
            warnings.warn(f"no more TensorBoard events: {error}. The run goes on.", stacklevel=3)


def numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a record by name; nested ones after a slash; of failures how many there were.

    >>> numbers({"round": 1, "loss": 0.5, "failed": {"3": "gone"}, "alignment": {"cos": 0.1}})
    {'loss': 0.5, 'failed': 1, 'alignment/cos': 0.1}
    """
    out: dict[str, float] = {}
    for key, value in record.items():
        if key in _LEFT_OUT and not prefix:
            continue
        if key in ("failed", "repeated") and not prefix:
            out[key] = len(value)
        elif isinstance(value, Mapping):
            out |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            out[prefix + key] = value
    return out
