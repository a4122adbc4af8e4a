"""The commands of `spryfl`, one file a group: what all of them share, the app, the two consoles, options in common.

A new group is a file here that registers its commands on `app`, and a line in GROUPS of cli.py. What loads torch is
imported inside of the commands that need it, so that --help and a typo are answered at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="Finetune language models across clients whose data stays private and whose memory is small.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# Texts and paths may hold brackets: no markup. Piped output is not folded to the width of a terminal that is not there.
out = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True, markup=False)

Config = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file of an experiment.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any setting: --set train.rounds=10. May be repeated.")]
Method = Annotated[str | None, typer.Option("--method", "-m", help="A row of `spryfl methods`.")]
Data = Annotated[str | None, typer.Option(help="A file, a folder with train and test, a hub name, docstrings.")]
Seed = Annotated[int | None, typer.Option(help="Everything random follows from it.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps ...")]
Threads = Annotated[int | None, typer.Option(help="Threads of PyTorch on the CPU.")]
Runs = Annotated[Path, typer.Option("--out", help="Where run folders are made.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Of this machine, for --watch; any free one without it.")]


def changed_by(flags: dict[str, Any], set_: list[str] | None) -> dict[str, Any]:
    """The flags that were given and every --set, nested."""
    from spryfl import config as settings

    changes: dict[str, Any] = {}
    for key, value in flags.items():
        if value is not None:
            changes = settings.merge(changes, settings.nested(key, value))
    for one in set_ or []:
        changes = settings.merge(changes, settings.assignment(one))
    return changes
