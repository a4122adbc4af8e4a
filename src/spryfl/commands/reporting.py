"""The command that shows runs: `spryfl report`, tables, pictures and one page; `--watch` serves it while they go on.

Cost: reading them; with the foretold memory the imports and about a second for each different configuration.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spryfl.commands import Port, app, err, out
from spryfl.commands.training import compared
from spryfl.screen import table

if TYPE_CHECKING:
    from spryfl.page import Shown


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or the folder of one comparison.")],
    to: Annotated[Path | None, typer.Option("--out", help="The page: a .html file, or a folder for it.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--to", help="The picture: .png, .svg or .pdf; .png and .svg without it.")
    ] = None,
    means: Annotated[
        bool, typer.Option("--mean", help="Mean and spread of runs that differ in seed; Markdown, no page.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Foretell each run's memory; takes seconds.")] = True,
    watch: Annotated[bool, typer.Option("--watch", help="Serve the page here while the runs go on.")] = False,
    port: Port = 0,
) -> None:
    """Runs side by side: where they differ, how they ended, pictures, and one page that needs no network."""
    from spryfl import page, pictures
    from spryfl import report as reports

    if means:
        read = [reports.read(folder) for folder in folders]
        print(reports.markdown(*reports.summary(reports.by_seed(read))), end="")
        return
    shown = page.gather(folders)
    place = _place(folders, to)
    place.parent.mkdir(parents=True, exist_ok=True)
    if watch:
        _serve(folders, port)
        shown = page.gather(folders)
    if reports.is_comparison(folders[0]):
        compared(folders[0], picture)
    else:
        if len(shown.runs) > 1:
            table(out, ("setting", *(r.name for r in shown.runs)), reports.differences(shown.runs))
        table(out, *reports.rows(shown.runs))
        for path in [picture] if picture else [place.with_name(f"curves{end}") for end in (".png", ".svg")]:
            pictures.curves(shown.runs, path)
            out.print(f"picture {path}", soft_wrap=True)
    page.write(with_memory(shown) if memory else shown, place)
    out.print(f"page    {place}", soft_wrap=True)


def _place(folders: Sequence[Path], asked: Path | None) -> Path:
    """Where the page goes: into the run's folder, or beside the runs."""
    from spryfl import page

    if asked is None:
        return (folders[0] if len(folders) == 1 else folders[0].parent) / page.NAME
    if asked.suffix.lower() in (".html", ".htm"):
        return asked
    if asked.suffix and not asked.is_dir():
        raise ValueError(f"--out {asked}: the page is HTML. Give a .html file, or a folder; --to is for the picture.")
    return asked / page.NAME


def with_memory(shown: Shown) -> Shown:
    """With what each run's step was foretold to hold."""
    with out.status("foretelling memory"):
        from spryfl import footprint, foretold

        footprint.measure_here()
        return shown._replace(foretold=foretold.steps(shown.runs))


def _serve(folders: Sequence[Path], port: int) -> None:
    """Until no run goes on any more, or an interruption."""
    from spryfl.page.live import EVERY, Live

    with Live(folders, port) as live:
        out.print(f"live    {live.address} until the runs have ended, or Ctrl-C", soft_wrap=True)
        try:
            while not live.ended:
                time.sleep(EVERY / 2)
        except KeyboardInterrupt:
            err.print("no longer served; the runs go on", soft_wrap=True)
