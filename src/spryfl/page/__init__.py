"""One page of runs: tables, charts and settings in a single HTML file that needs no network; and the same page, live.

    write(shown, path)      the file
    render(shown)           its text
    live.serving(...)       the page over loopback, drawn anew as records come

The charts are drawn in the reader's browser by uPlot (MIT, its licence beside it), which is put into the page with its
data; the rest is HTML without a script. Templates are filled by Jinja2, which escapes what it is given. It reads what
`report` read and nothing else. Cost: about 90 kB and what the records hold; some ms for each thousand records.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from spryfl import report
from spryfl.page import clients, lines, parts
from spryfl.report import Foretold, Groups, Run

NAME = "report.html"
_DASHES = ("", "7 4", "2 3", "9 3 2 3")
_MARKS = ("circle", "square", "triangle", "diamond", "cross", "down")
_COLOURS = 8


class Shown(NamedTuple):
    """What a page is about."""

    title: str
    groups: Groups
    foretold: Mapping[str, Foretold]
    notes: Sequence[str] = ()

    @property
    def runs(self) -> list[Run]:
        return [run for own in self.groups.values() for run in own]


def gather(folders: Sequence[Path]) -> Shown:
    """Runs, or one comparison, as a page shows them; runs that differ in seed alone are one line with a band.

    Raises:
        ValueError: a folder is neither.
    """
    if len(folders) == 1 and report.is_comparison(folders[0]):
        compared = report.read_comparison(folders[0])
        there = {label: runs for label, runs in compared.groups.items() if runs}
        return Shown(compared.name, there, {}, report.notes(compared))
    read = _apart([report.read(folder) for folder in folders], folders)
    groups = report.by_seed(read)
    if all(len(own) == 1 for own in groups.values()):
        groups = {run.name: [run] for run in read}
    return Shown(" · ".join(list(groups)[:4]) + (" …" if len(groups) > 4 else ""), groups, {})


def _apart(runs: Sequence[Run], folders: Sequence[Path]) -> list[Run]:
    """Names that tell the runs apart: with the folder above them where two have the same."""
    names = [run.name for run in runs]
    places = [f"{folder.resolve().parent.name}/{run.name}" for run, folder in zip(runs, folders, strict=True)]
    named = [place if names.count(run.name) > 1 else run.name for run, place in zip(runs, places, strict=True)]
    more = [f"{name} ({named[:i].count(name) + 1})" if named.count(name) > 1 else name for i, name in enumerate(named)]
    return [run._replace(name=name) for run, name in zip(runs, more, strict=True)]


def write(shown: Shown, path: Path) -> None:
    """Writes the page, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(render(shown), encoding="utf-8")
    os.replace(beside, path)


def render(shown: Shown, live: Mapping[str, Any] | None = None) -> str:
    """The page as text.

    Args:
        shown: the runs.
        live: for a page that is drawn anew: {"every": seconds, "ended": bool, "kept": where the page will lie}.
    """
    runs, bars = shown.runs, parts.held(shown.groups, shown.foretold)
    pictures, beyond = clients.dealt(shown.groups)
    seeds = any(len(own) > 1 for own in shown.groups.values())
    charts, inner = lines.charts(runs), lines.diagnostics(runs)
    failed = parts.failures(runs)
    looks = [_look(i) for i in range(len(shown.groups))]
    return _template().render(
        title=shown.title,
        names=list(shown.groups),
        state=_state(runs),
        facts=_facts(runs),
        progress=[_progress(run) for run in runs] if live else [],
        notes=[*shown.notes, *(said for run in runs if (said := lines.broken(run)))],
        differing=parts.differing(shown.groups),
        results=parts.dense(parts.Table(*(report.summary(shown.groups) if seeds else report.rows(runs)))),
        each=parts.dense(parts.Table(*report.rows(runs))) if seeds else None,
        head=_head(runs) if len(runs) == 1 else [],
        charts=charts,
        diagnostics=inner,
        axes=lines.AXES,
        looks=list(zip(shown.groups, looks, strict=True)),
        every=lines.every(shown.groups),
        seeds=seeds,
        memory=parts.memory(bars),
        kinds=[kind for kind in (*parts.STEP, "measured") if _drawn(kind, bars)],
        unforetold=parts.unforetold(shown.groups, shown.foretold),
        traffic=parts.traffic(shown.groups),
        dealt=pictures,
        beyond=beyond,
        answered=parts.answered(runs),
        failures=failed._replace(rows=failed.rows[: parts.LISTED]),
        unlisted=len(failed.rows[parts.LISTED :]),
        inside=parts.inside(shown.groups),
        settings=parts.settings(shown.groups),
        provenance=parts.provenance(runs),
        data={
            "lines": [{**line, "look": look} for line, look in zip(lines.drawn(shown.groups), looks, strict=True)],
            "charts": {chart.id: {"title": chart.title, "log": chart.log} for chart in (*charts, *inner)},
            "axes": lines.AXES,
            "live": live,
        },
        live=live,
    )


def _drawn(kind: str, rows: Sequence[parts.Held]) -> bool:
    return any(row.measured if kind == "measured" else row.parts.get(kind) for row in rows)


def _look(index: int) -> dict[str, Any]:
    """How a line is told from others: its colour, its dashes and its marks, no two the same in 96."""
    turn = index // _COLOURS
    return {
        "colour": index % _COLOURS,
        "dash": _DASHES[(index + turn) % len(_DASHES)],
        "mark": _MARKS[(index + turn) % len(_MARKS)],
    }


def _state(runs: Sequence[Run]) -> str:
    states = [str(run.facts.get("state", "unknown")) for run in runs]
    if len(set(states)) == 1:
        return states[0]
    return f"{states.count('complete')} of {len(states)} complete"


def _facts(runs: Sequence[Run]) -> list[str]:
    """What all runs have in common, for the page's head."""
    each = [
        ("{}", [run.config.get("model", {}).get("name") for run in runs]),
        ("{}", [run.facts.get("data", {}).get("source") for run in runs]),
        ("{} clients", [run.config.get("partition", {}).get("clients") for run in runs]),
        ("{} a round", [run.config.get("train", {}).get("cohort") for run in runs]),
    ]
    made = [words.format(own[0]) for words, own in each if own and own[0] is not None and own.count(own[0]) == len(own)]
    begun = min((str(run.facts.get("started", "")) for run in runs), default="")
    return [*made, begun[:16].replace("T", " ") + " UTC"] if begun else made


def _head(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The few numbers of a single run that are looked for first."""
    (run,) = runs
    head, rows = report.rows(runs)
    cells = dict(zip(head, rows[0], strict=True))
    wanted = (report.metric(run), "best", "round", "passes", "MB up", "MB down", "peak MB", "seconds")
    return [(name, cells[name]) for name in dict.fromkeys(wanted) if cells.get(name, "-") != "-"]


def _progress(run: Run) -> tuple[str, int, int, str]:
    """(name, round, rounds, time left) of a run that goes on; no time where it is not known."""
    rounds = int(run.config.get("train", {}).get("rounds", 0))
    if not run.records:
        return run.name, 0, rounds, ""
    first, last = run.records[0], run.records[-1]
    done = last["round"] - first["round"]
    if run.facts.get("state") != "running" or not done:
        return run.name, last["round"], rounds, ""
    left = int((last["seconds"] - first["seconds"]) / done * (rounds - last["round"]))
    return run.name, last["round"], rounds, f"about {left // 60}:{left % 60:02d} left"


@functools.cache
def _template() -> Any:
    loader = PackageLoader("spryfl.page", "files")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.globals["asset"] = lambda name: (Path(__file__).parent / "files" / name).read_text(encoding="utf-8")
    return made.get_template(NAME)
