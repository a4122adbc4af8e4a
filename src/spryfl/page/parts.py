"""The page's tables and bars: what differs, how it ended, memory, bytes, clients, failures, settings.

Everything is plain text and numbers here; the template escapes it. Cost: linear in the records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from spryfl.page import lines
from spryfl.report import Foretold, Groups, Record, Run, differences, flat, peak, plainly

STEP = ("activations", "tangents", "gradients", "prefix")  # of a prediction: what the step holds above the model
HELD = ("process", "backbone", "adapters", "buffers")  # and what is there before it
LISTED = 60  # clients that failed, most often first
FEW = 6  # settings that only some runs have, shown among the others


class Table(NamedTuple):
    """A head and rows of text; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Bar(NamedTuple):
    """A row of a bar chart: parts in per cent of the widest row, with their words."""

    label: str
    parts: Sequence[tuple[str, float, str]]  # kind, width, words
    words: str


def differing(groups: Groups) -> tuple[Table, Table]:
    """Settings in which the runs differ: those that all have, and those that only some have, where these are many.

    Of runs that differ in seed alone the first stands for all.
    """
    firsts = [own[0]._replace(name=label) for label, own in groups.items() if own]
    seeds = any(len(own) > 1 for own in groups.values())
    found = [row for row in differences(firsts) if not (seeds and row[0] == "seed")]
    drawn = [_seeds(own) for own in groups.values() if own]
    said = [("seed", *drawn)] if seeds and len(set(drawn)) > 1 else []
    head = ("setting", *(run.name for run in firsts))
    some = [row for row in found if "-" in row]
    if len(some) <= FEW:
        return Table(head, [*said, *found]), Table(head, [])
    return Table(head, [*said, *(row for row in found if row not in some)]), Table(head, some)


def _seeds(runs: Sequence[Run]) -> str:
    return ", ".join(str(run.config.get("seed", "-")) for run in runs)


def mb(value: float | None) -> str:
    """Bytes as MB with digits that fit their size."""
    if not value:
        return "-" if value is None else "0"
    number = value / 1e6
    digits = next((digits for least, digits in ((1000, 0), (10, 1), (1, 2), (0.1, 3)) if number >= least), 4)
    return f"{number:,.{digits}f}"


class Held(NamedTuple):
    """A client's step, by what was foretold and what was measured."""

    label: str
    parts: Mapping[str, int]  # foretold; empty without
    measured: int  # bytes above the model; 0 = never

    @property
    def step(self) -> int:
        return sum(self.parts.get(part, 0) for part in STEP)


def held(groups: Groups, foretold: Mapping[str, Foretold]) -> list[Held]:
    """A row for each run or mean of runs, and for each class of its clients."""
    out = []
    for label, runs in groups.items():
        said = next((foretold[run.name].parts for run in runs if run.name in foretold), {})
        classes = sorted({name for run in runs for r in run.records for name in r.get("class_peak_bytes", {})})
        for name in classes or [""]:
            parts = said.get("" if name == "rest" else name, said.get("", {}))
            out.append(Held(f"{label}, {name}" if name else label, parts, _peak(runs, name)))
    return out


def _peak(runs: Sequence[Run], name: str) -> int:
    """The most of any run, in all or of one class."""
    if name:
        return max((r.get("class_peak_bytes", {}).get(name, 0) for run in runs for r in run.records), default=0)
    return round(max((peak(run) or 0 for run in runs), default=0) * 1e6)


def memory(rows: Sequence[Held]) -> tuple[list[Bar], Table]:
    """Foretold and measured, as bars and as numbers."""
    most = max([1, *(row.step for row in rows), *(row.measured for row in rows)])
    bars = []
    for row in rows:
        if row.parts:
            own = [(part, 100 * row.parts.get(part, 0) / most, f"{part} {mb(row.parts.get(part))} MB") for part in STEP]
            bars.append(Bar(row.label, [one for one in own if one[1] > 0], f"{mb(row.step)} foretold"))
        if row.measured:
            wide = ("measured", 100 * row.measured / most, f"measured {mb(row.measured)} MB")
            bars.append(Bar("" if row.parts else row.label, [wide], f"{mb(row.measured)} measured"))
    head = ("MB", "foretold", "measured", "ratio", *STEP, *HELD)
    return bars, dense(Table(head, [_memory_row(row) for row in rows]))


def dense(table: Table) -> Table:
    """A table without the columns that say nothing in any row."""
    kept = [i for i in range(len(table.head)) if not i or any(row[i] != "-" for row in table.rows)]
    return Table([table.head[i] for i in kept], [[row[i] for i in kept] for row in table.rows])


def _memory_row(row: Held) -> tuple[str, ...]:
    cells = [mb(row.parts.get(part)) for part in (*STEP, *HELD)]
    step, measured = (mb(row.step) if row.parts else "-"), (mb(row.measured) if row.measured else "-")
    both = f"{row.step / row.measured:.2f}" if row.parts and row.measured else "-"
    return row.label, step, measured, both, *cells


def unforetold(groups: Groups, foretold: Mapping[str, Foretold]) -> list[str]:
    """Why some runs have no prediction, a reason once."""
    reasons: dict[str, list[str]] = {}
    for label, runs in groups.items():
        for why in {foretold[run.name].why for run in runs if run.name in foretold} - {""}:
            reasons.setdefault(why, []).append(label)
    return [f"No prediction for {', '.join(labels)}: {why}" for why, labels in reasons.items()]


def traffic(groups: Groups) -> tuple[list[Bar], Table]:
    """Bytes down and up as our messages count them, and as Flower counted what it carried; means over seeds."""
    ended = {label: own for label, runs in groups.items() if (own := [run for run in runs if run.records])}
    sent = {label: _mean([_bytes(run.records[-1]) for run in own]) for label, own in ended.items()}
    most = max([1, *(sum(both) for both in sent.values())])
    bars, rows = [], []
    for label, (down, up) in sent.items():
        ways = [("down", 100 * down / most, f"down {mb(down)} MB"), ("up", 100 * up / most, f"up {mb(up)} MB")]
        bars.append(Bar(label, ways, f"{mb(down + up)} MB"))
        counted = [one for run in ended[label] if (one := _flower(run))]
        flower = _mean(counted) if counted else (None, None)
        more = f"{100 * (sum(_mean(counted)) / (down + up) - 1):+.1f} %" if counted and down + up else "-"
        rows.append((label, mb(down), mb(up), mb(down + up), *(mb(one) for one in flower), more))
    head = ("MB", "down", "up", "together", "Flower, down", "Flower, up", "Flower above ours")
    return bars, dense(Table(head, rows))


def _mean(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(one for one, _ in pairs) / len(pairs), sum(other for _, other in pairs) / len(pairs)


def _flower(run: Run) -> tuple[float, float] | None:
    """Bytes down and up as Flower counted them; None where it did not."""
    told = [record["engine"] for record in run.records if isinstance(record.get("engine"), Mapping)]
    if not any("flower_bytes_up" in one for one in told):
        return None
    down, up = (sum(one.get(f"flower_bytes_{way}", 0) for one in told) for way in ("down", "up"))
    return down, up


def _bytes(record: Record) -> tuple[float, float]:
    return record.get("bytes_down", 0), record.get("bytes_up", 0)


def failures(runs: Sequence[Run]) -> Table:
    """A row for each client of each run that failed: how often, of how many, when, why."""
    rows = []
    for run in runs:
        asked: Counter[str] = Counter()
        failed: dict[str, list[tuple[int, str]]] = {}
        for record in run.records:
            for one in (*record.get("repeated", ()), record):
                asked.update(str(client) for client in one.get("cohort", ()))
                for client, why in one.get("failed", {}).items():
                    failed.setdefault(client, []).append((record["round"], str(why)))
        for client, times in sorted(failed.items(), key=lambda one: (len(one[0]), one[0])):
            reasons = Counter(plainly(why) for _, why in times)
            said = "; ".join(why + (f" ({count} times)" if count > 1 else "") for why, count in reasons.most_common(3))
            rows.append((run.name, client, str(len(times)), str(asked[client]), _rounds(r for r, _ in times), said))
    rows.sort(key=lambda row: -int(row[2]))
    return Table(("run", "client", "failed", "asked", "in rounds", "why"), rows)


def _rounds(numbers: Iterable[int]) -> str:
    own = sorted(set(numbers))
    return ", ".join(map(str, own[:8])) + (f" and {len(own) - 8} more" if len(own) > 8 else "")


def answered(runs: Sequence[Run]) -> str:
    """How many answers came, of all that were asked for."""
    asked = failed = 0
    for run in runs:
        for record in run.records:
            for one in (*record.get("repeated", ()), record):
                asked, failed = asked + len(one.get("cohort", ())), failed + len(one.get("failed", {}))
    return f"{asked - failed:,} of {asked:,} answers came." if asked else "No client has been asked yet."


def inside(groups: Groups) -> list[tuple[str, Table]]:
    """Tables of what rounds looked like, those that say something: scalars, classes of clients, units."""
    runs = [run for own in groups.values() for run in own]
    made = [("Scalars in all", _scalars(groups)), ("Classes of clients", _classes(runs)), ("By unit", _units(runs))]
    return [(title, table) for title, table in made if table.rows]


def _scalars(groups: Groups) -> Table:
    """Sums over the rounds and the seeds."""
    keys = ("scalars", "scalars_refused", "scalars_clipped")
    told = {label: [record for run in runs for record in run.records] for label, runs in groups.items()}
    rows = [
        (label, *(f"{sum(record.get(key, 0) for record in records):,}" for key in keys))
        for label, records in told.items()
        if any(record.get("scalars") for record in records)
    ]
    return Table(("run", "drawn", "refused", "clipped"), rows)


def _classes(runs: Sequence[Run]) -> Table:
    """Sums over the rounds; the loss is the last that is known."""
    rows = []
    for run in runs:
        told = [record["classes"] for record in run.records if isinstance(record.get("classes"), Mapping)]
        for name in dict.fromkeys(name for one in told for name in one):
            own = [one[name] for one in told if name in one]
            loss = next((one["loss"] for one in reversed(own) if one.get("loss") is not None), None)
            sums = [f"{sum(one.get(key, 0) for one in own):,.0f}" for key in ("asked", "answered", "passes")]
            rows.append((run.name, name, *sums, "-" if loss is None else f"{loss:.4f}"))
    return Table(("run", "class", "asked", "answered", "passes", "loss, last"), rows)


_BY_UNIT = {
    "cos": "alignment",
    "energy": "share of the estimate",
    "gradient": "share of the gradient",
    "step": "step / value",
}


def _units(runs: Sequence[Run]) -> Table:
    """What the newest look at the true gradient says of each unit that moved in its round."""
    rows = []
    for run in runs:
        told: Mapping[str, Any] = next((r["alignment"] for r in reversed(run.records) if _looked(r)), {})
        for unit, own in told.get("units", {}).items():
            if isinstance(own, Mapping):
                rows.append((run.name, str(unit), *(_number(own.get(key)) for key in _BY_UNIT)))
    return Table(("run", "unit", *_BY_UNIT.values()), rows)


def _looked(record: Record) -> bool:
    found = record.get("alignment")
    return isinstance(found, Mapping) and isinstance(found.get("units"), Mapping)


def _number(value: Any) -> str:
    return f"{value:.4g}" if lines.finite(value) is not None else "-"


def settings(groups: Groups) -> list[tuple[str, Table]]:
    """Every setting as it was resolved, of each run, or of the first of those that differ in seed."""
    return [
        (label, Table(("setting", "value"), [(key, str(value)) for key, value in sorted(flat(own[0].config).items())]))
        for label, own in groups.items()
        if own
    ]


def provenance(runs: Sequence[Run]) -> Table:
    """With what each run was made."""
    rows = []
    for run in runs:
        facts, data = run.facts, run.facts.get("data", {})
        hardware = ", ".join(str(value) for value in facts.get("hardware", {}).values() if value)
        versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
        rows.append(
            (
                run.name,
                str(facts.get("state", "unknown")),
                str(facts.get("started", "-")),
                str(facts.get("ended", "-")),
                f"{data.get('source', '-')}: {data.get('train', '?')} + {data.get('test', '?')} rows",
                f"{hardware}, {facts.get('threads', '?')} thread(s)",
                versions or "-",
                (facts.get("commit") or "unknown")[:12],
            )
        )
    return Table(("run", "state", "begun", "ended", "data", "hardware", "versions", "commit"), rows)
