"""Which column of a table is what: what a task needs, what was asked for, what has a usual name. Costs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from spryfl.data.tables import Table

PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
)
TEXTS = (
    "text",
    "sentence",
    "sentence1",
    "premise",
    "question",
    "review",
    "content",
    "comment",
    "tweet",
    "body",
    "title",
)
LABELS = ("label", "labels", "class", "target", "sentiment", "category", "topic", "intent", "emotion", "answer")
GROUPS = ("group",)


class Needs(NamedTuple):
    """The columns that a task reads, under their usual names; the first that is there is taken."""

    texts: tuple[str, ...] = TEXTS
    pairs: tuple[tuple[str, str], ...] = PAIRS  # of a text and a second one
    label: bool = True  # rows have classes; without, all rows count as one class
    extra: Mapping[str, tuple[str, ...]] = {}  # name in Examples.extra -> usual columns
    optional: tuple[str, ...] = ()  # names of `extra` that may be missing
    whole: str = ""  # a name of `extra`: rows of one value of it are never split, and counted together


CLASSES = Needs()
ALL = "all"  # the one class of rows without classes


class Columns(NamedTuple):
    """Which column is what; "" is none."""

    text: str
    pair: str
    label: str
    group: str
    extra: Mapping[str, str] = {}


def choose(table: Table, asked: Columns, needs: Needs) -> tuple[Columns, list[str]]:
    """The columns asked for, or the first with a usual name; and a note on each guess."""
    check(table, asked)
    usual = {name.strip().lower(): name for name in table.names}
    both = next((p for p in needs.pairs if p[0] in usual and p[1] in usual), ("", ""))
    chosen = Columns(
        asked.text or _first(usual, (both[0], *needs.texts)),
        asked.pair or ("" if asked.text else _first(usual, both[1:])),
        (asked.label or _first(usual, LABELS)) if needs.label else "",
        asked.group or _first(usual, GROUPS),
        {name: _first(usual, names) for name, names in needs.extra.items()},
    )
    wanted = [("text", chosen.text)] + ([("label", chosen.label)] if needs.label else [])
    for option, name in wanted:
        if not name:
            raise ValueError(
                f"{table.source}: which column holds the {option}? Columns: {', '.join(table.names)}.\n"
                f'    Name it: data.{option} = "...", or --{option}. (The first line of a .csv or .tsv file must name '
                f"the columns.)"
            )
    _refuse_missing(table, chosen, needs)
    named = [*zip(Columns._fields[:4], asked[:4], chosen[:4], strict=True)]
    guessed = [(option, name) for option, given, name in named if name and not given]
    # An extra with a single usual name was named by the task's own options.
    guessed += [(option, name) for option, name in chosen.extra.items() if name and len(needs.extra[option]) > 1]
    return chosen, [f"{option} column: {name!r} (guessed)" for option, name in guessed]


def _refuse_missing(table: Table, chosen: Columns, needs: Needs) -> None:
    for name, column in chosen.extra.items():
        if not column and name not in needs.optional:
            usual = ", ".join(needs.extra[name])
            raise ValueError(
                f"{table.source}: this task needs a column for {name}, and none of these is there: {usual}.\n"
                f"    Columns: {', '.join(table.names)}. Rename one, or name it in [task]."
            )


def check(table: Table, columns: Columns) -> None:
    """A ValueError if a column that was named is not there."""
    named = [*zip(Columns._fields[:4], columns[:4], strict=True), *columns.extra.items()]
    for option, name in named:
        if name and name not in table.names:
            raise ValueError(f'{table.source} has no column "{name}" ({option}). Columns: {", ".join(table.names)}.')


def _first(usual: dict[str, str], names: Iterable[str]) -> str:
    return next((usual[name.lower()] for name in names if name.lower() in usual), "")
