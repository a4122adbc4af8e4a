"""What a run shows while it goes on: a live table in a terminal, plain lines elsewhere. Costs next to nothing."""

from __future__ import annotations

from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

_COLUMNS = ("round", "loss", "{metric}", "MB up", "MB down", "peak MB", "seconds", "left")


class Screen:
    """Use as a context: `show(record)` after each round."""

    def __init__(self, console: Console, rounds: int, metric: str = "accuracy") -> None:
        self._console, self._rounds, self._metric = console, rounds, metric
        self._columns = [name.format(metric=metric) for name in _COLUMNS]
        self._rows: list[tuple[str, ...]] = []
        self._start: tuple[int, float] | None = None
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.__enter__()
        else:
            self._console.print("  ".join(f"{name:>8}" for name in self._columns), highlight=False)
        return self

    def __exit__(self, *args: Any) -> None:
        if self._live:
            self._live.__exit__(*args)

    def show(self, record: dict[str, Any]) -> None:
        """Adds one round."""
        row = self._row(record)
        if not self._live:
            self._console.print("  ".join(f"{cell:>8}" for cell in row), highlight=False, soft_wrap=True)
            return
        self._rows.append(row)
        table = Table(*self._columns, box=None, header_style="bold", pad_edge=False)
        for shown in self._rows[-max(5, self._console.height - 12) :]:
            table.add_row(*shown)
        self._live.update(table, refresh=True)

    def _row(self, record: dict[str, Any]) -> tuple[str, ...]:
        if self._start is None:
            self._start = record["round"], record["seconds"]
        loss, metric = record.get("loss"), record.get(self._metric)
        failed = f" -{len(record['failed'])}" if record.get("failed") else ""
        return (
            f"{record['round']}/{self._rounds}{failed}",
            "" if loss is None else f"{loss:.4f}",
            "" if metric is None else f"{metric:.4f}",
            f"{record['bytes_up'] / 1e6:.2f}",
            f"{record['bytes_down'] / 1e6:.2f}",
            f"{record.get('peak_bytes', 0) / 1e6:.1f}",
            f"{record['seconds']:.1f}",
            self._left(record),
        )

    def _left(self, record: dict[str, Any]) -> str:
        """Estimated time left, from the rounds seen so far."""
        assert self._start is not None
        done, since = record["round"] - self._start[0], record["seconds"] - self._start[1]
        if not done:
            return ""
        left = int(since / done * (self._rounds - record["round"]))
        return f"{left // 60}:{left % 60:02d}"
