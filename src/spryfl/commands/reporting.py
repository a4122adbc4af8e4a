"""The command that shows runs: `spryfl report`, tables, pictures and one page; `--watch` serves it while they go on.

Cost: reading them; with the foretold memory the imports and about a second for each different configuration.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spryfl.commands import Port, app, err, out
from spryfl.commands.training import compared
from spryfl.screen import table

if TYPE_CHECKING:
    from spryfl.page import Shown

_ENDS = (".png", ".svg")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or the folder of one comparison.")],
    to: Annotated[Path | None, typer.Option("--out", help="The page: a .html file, or a folder for it.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--to", help="The picture: .png, .svg or .pdf; .png and .svg without it.")
    ] = None,
    target: Annotated[float, typer.Option(help="Of the metric: what each run needs to come there. 0 = none.")] = 0.0,
    means: Annotated[
        bool, typer.Option("--mean", help="Mean and spread of runs that differ in seed; Markdown, no page.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Foretell each run's memory; takes seconds.")] = True,
    watch: Annotated[bool, typer.Option("--watch", help="Serve the page here while the runs go on.")] = False,
    port: Port = 0,
) -> None:
    """Runs side by side: where they differ, how they ended, pictures, and one page that needs no network."""
    from spryfl import page
    from spryfl import report as reports

    if means:
        _means(reports.by_seed([reports.read(folder) for folder in folders]), target)
        return
    shown = page.gather(folders)
    place = _place(folders, to)
    place.parent.mkdir(parents=True, exist_ok=True)
    if watch:
        _serve(folders, port)
        shown = page.gather(folders)
    if reports.is_comparison(folders[0]):
        compared(folders[0], picture, target)
    else:
        _side_by_side(shown.runs, [picture] if picture else [place.with_name(f"curves{end}") for end in _ENDS], target)
    page.write(with_memory(shown) if memory else shown, place)
    out.print(f"page    {place}", soft_wrap=True)


def _means(groups: Mapping[str, Any], target: float) -> None:
    """Mean and spread over seeds."""
    from spryfl import report as reports

    print(reports.markdown(*reports.summary(groups)), end="")
    if target:
        print("\n" + reports.markdown(*reports.target_table(groups, target)), end="")


def _side_by_side(runs: Sequence[Any], curves: Sequence[Path], target: float) -> None:
    """Tables of runs, their curves, and beside these what was seen with a probe."""
    from spryfl import pictures
    from spryfl import report as reports

    if len(runs) > 1:
        table(out, ("setting", *(r.name for r in runs)), reports.differences(runs))
    table(out, *reports.rows(runs))
    if target:
        table(out, *reports.target_table({run.name: [run] for run in runs}, target))
    for path in curves:
        pictures.curves(runs, path)
        out.print(f"picture {path}", soft_wrap=True)
    if seen := reports.probed(runs):
        beside = curves[0].with_name("alignment.png")
        pictures.alignment(seen, beside)
        out.print(f"probe   {beside}", soft_wrap=True)


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
