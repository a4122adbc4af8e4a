"""What the commands show: facts before a run, a live table in a terminal and plain lines elsewhere while it goes on.

Costs next to nothing.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from spryfl.job import Job

_COLUMNS = ("round", "loss", "{metric}", "MB up", "MB down", "peak MB", "seconds", "left")


def table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table without lines."""
    shown = Table(*head, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def classes(console: Console, labels: Sequence[str], statistics: Any) -> None:
    """A bar of classes for each client, from the statistics of a partition."""
    shades = ("cyan", "magenta", "yellow", "green", "blue", "red", "white")
    letters = string.ascii_uppercase + string.ascii_lowercase
    signs = [(letters[c % len(letters)], shades[c % len(shades)]) for c in range(len(labels))]
    for client, counts in enumerate(statistics.counts):
        widths = [round(60 * n / statistics.largest) for n in counts]
        bar = [(sign * width, shade) for (sign, shade), width in zip(signs, widths, strict=True)]
        console.print(Text.assemble(f"{client:4d} {sum(counts):6d} ", *bar), soft_wrap=True)
    names = [(f"{sign} {name}  ", shade) for (sign, shade), name in zip(signs, labels, strict=True)]
    console.print(Text.assemble("\n", *names), soft_wrap=True)
    console.print(
        f"{statistics.smallest} to {statistics.largest} rows a client, median {statistics.median:g}; mean distance of "
        f"a client's classes from the whole {statistics.distance:.2f} (0: alike, near 1: one class each)",
        soft_wrap=True,
    )


def head(console: Console, made: Job, folder: Path) -> None:
    """Before the first round: what is about to happen."""
    from spryfl import config, job
    from spryfl.methods import METHODS

    e, m = made.experiment, made.model
    adapter = sum(u.size for u in m.units if not u.head)
    head = sum(u.size for u in m.units if u.head)
    notes(console, made.corpus)
    rows, test = made.rows, made.test
    cut = f"; {rows.cut} and {test.cut} texts were cut at {e.data.max_length} tokens" if rows.cut + test.cut else ""
    console.print(
        f"data    {len(rows.labels)} training rows, {len(test.labels)} test rows, {len(m.labels)} classes{cut}"
    )
    units = sum(not u.head for u in m.units)
    console.print(f"model   {e.model.name}: {adapter} adapter values in {units} units, {head} in the head")
    traffic = job.predicted(made).first
    console.print(f"clients {made.plan.clients}, {made.plan.cohort} a round, {made.plan.rounds} rounds")
    said = f"{traffic.down / 1e3:.0f} kB down and {traffic.up / 1e3:.0f} kB up" if traffic else "unknown"
    console.print(f"traffic {said} in the first round, predicted, without the messages' headers")
    row = METHODS.get(e.method.name)
    usual = config.parse({"method": e.method.name}).method if row else e.method  # the row with all its options
    changed = [
        f"{key} {shown(value)} (row: {shown(getattr(row, key))})"
        for key, value in vars(e.method).items()
        if key not in ("summary", "paper", "classes") and value != getattr(usual, key)
    ]
    console.print(f"method  {e.method.name}" + (f", but {'; '.join(changed)}" if changed else ""), soft_wrap=True)
    for line in classed(made):
        console.print(f"class   {line}", soft_wrap=True)
    console.print(f"folder  {folder}\n", soft_wrap=True)


def classed(made: Job) -> list[str]:
    """A line a class of clients: how many they are, and what they do otherwise than the method says."""
    usual, lines = {"name": "", "share": 0.0, "clients": (), "lr": 1.0}, []
    of = [made.plan.method.member(client) for client in range(made.plan.clients)]
    for one in made.experiment.method.classes:
        own = {key: value for key, value in vars(one).items() if value and usual.get(key) != value}
        said = "; ".join(
            f"{key} {shown(value)}" for key, value in own.items() if key not in ("name", "share", "clients")
        )
        lines.append(f"{one.name}: {of.count(one.name)} of {len(of)} clients; {said or 'as the method says'}")
    return lines


def shown(value: Any) -> str:
    """A choice with its options, as `kind(option=value)`."""
    if isinstance(value, dict):
        options = ", ".join(f"{key}={item}" for key, item in value.items() if key != "kind")
        return f"{value['kind']}({options})"
    return str(value)


def notes(console: Console, corpus: Any) -> None:
    """What was guessed or changed while the data were read."""
    for line in corpus.notes:
        console.print(f"note    {line}", soft_wrap=True)


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


class Turns:
    """What a comparison shows. Use as a context: `show(seed, label, record)` after each turn, None where a run ended.

    In a terminal a table with a row a method; elsewhere a line a round, with the newest score of each.
    """

    def __init__(self, console: Console, labels: Sequence[str], metric: str) -> None:
        self._console, self._labels, self._metric = console, labels, metric
        self._seed, self._round, self._fresh = -1, -1, False  # of the line that is being filled
        self._records: dict[str, dict[str, Any]] = {}
        self._ended: set[str] = set()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.__enter__()
        else:
            self._print(("seed", "round", *self._labels, "seconds"))
        return self

    def __exit__(self, *args: Any) -> None:
        self._line()
        if self._live:
            self._live.__exit__(*args)

    def show(self, seed: int, label: str, record: Mapping[str, Any] | None) -> None:
        """Adds one run's round."""
        if seed != self._seed or (record and record["round"] != self._round):
            self._line()
        if seed != self._seed:
            self._seed, self._records, self._ended = seed, {}, set()
        if record is None:
            self._ended.add(label)
        else:
            self._round, self._fresh = record["round"], True
            self._records[label] = {**self._records.get(label, {}), **record}
        if self._live:
            self._live.update(self._table(), refresh=True)

    def _line(self) -> None:
        """Prints the round that is over."""
        if self._fresh and not self._live:
            seconds = sum(record["seconds"] for record in self._records.values())
            scores = (self._score(label) + ("." if label in self._ended else " ") for label in self._labels)
            self._print((str(self._seed), str(self._round), *scores, f"{seconds:.1f}"))
        self._fresh = False

    def _print(self, cells: Sequence[str]) -> None:
        widths = [6, 6, *(max(8, len(label)) for label in self._labels), 8]
        line = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        self._console.print(line, highlight=False, soft_wrap=True)

    def _score(self, label: str) -> str:
        value = self._records.get(label, {}).get(self._metric)
        return "" if value is None else f"{value:.4f}"

    def _table(self) -> Table:
        head = (
            f"seed {self._seed}",
            "",
            "round",
            "loss",
            self._metric,
            "best",
            "MB up",
            "MB down",
            "peak MB",
            "seconds",
        )
        table = Table(*head, box=None, header_style="bold", pad_edge=False)
        for label in self._labels:
            if record := self._records.get(label):
                loss = record.get("loss")
                table.add_row(
                    label,
                    "ended" if label in self._ended else "",
                    str(record["round"]),
                    "" if loss is None else f"{loss:.4f}",
                    self._score(label),
                    f"{record['best']:.4f}",
                    f"{record['bytes_up'] / 1e6:.2f}",
                    f"{record['bytes_down'] / 1e6:.2f}",
                    f"{record.get('peak_bytes', 0) / 1e6:.1f}",
                    f"{record['seconds']:.1f}",
                )
        return table
