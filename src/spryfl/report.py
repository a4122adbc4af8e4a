"""Run folders and comparisons as tables. Reads result files alone and imports nothing of the package.

    rows(runs)          a row a run
    summary(groups)     a row a group of runs that differ in seed: mean ± sample standard deviation
    write_tables(out)   table.md and table.json of a folder that `spryfl compare` made

Cost: reading the files.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

Record = dict[str, Any]


class Run(NamedTuple):
    """What a run folder says."""

    name: str
    config: dict[str, Any]
    facts: dict[str, Any]
    records: list[Record]


class Foretold(NamedTuple):
    """What a step was predicted to hold."""

    parts: Mapping[str, Mapping[str, int]]  # bytes by part, by class of clients; "" where there are no classes
    why: str  # there is no prediction


def plainly(text: str, most: int = 240) -> str:
    """One line of a message that may be long."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


Groups = Mapping[str, Sequence[Run]]  # runs that differ in seed, by what they have in common


def read(folder: Path) -> Run:
    """A run folder's configuration, facts and records."""
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        file = folder / "records.jsonl"  # not there before the first round
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
        return Run(folder.resolve().name, config, facts, [json.loads(line) for line in lines])
    except OSError as error:
        if is_comparison(folder):
            raise ValueError(f"{folder} is a comparison. Give it alone, or runs in it: {folder}/*-seed*.") from None
        raise ValueError(
            f"{folder} is not a run folder: {Path(error.filename).name} is missing. Give runs/<name>."
        ) from None
    except ValueError as error:
        raise ValueError(f"a file of {folder} is damaged: {error}.") from None


def metric(run: Run) -> str:
    """The name of the number by which the run's models are compared."""
    return run.facts.get("metric", "accuracy")


def scored(run: Run) -> list[Record]:
    """The records at which the test rows were scored."""
    return [record for record in run.records if metric(run) in record]


def probed(runs: Sequence[Run]) -> list[Run]:
    """The runs in which the probe looked at a round (train.probe)."""
    return [run for run in runs if any("alignment" in record for record in run.records)]


# What of a record lies along a picture, or stands in a table: its name, and how it is made.
ALONG: dict[str, Callable[[Record], float]] = {
    "rounds": lambda r: r["round"],
    "passes": lambda r: r["value_passes"] + r["tangent_passes"] + r["backward_passes"],
    "MB up and down": lambda r: (r["bytes_up"] + r["bytes_down"]) / 1e6,
    "seconds": lambda r: r["seconds"],
}
_OWN = "personal_after"


class Column(NamedTuple):
    """A number of a run in a table; None where it has none."""

    name: str
    digits: int
    of: Callable[[Run], float | None]


_COLUMNS = (
    Column("round", 0, lambda run: run.records[-1]["round"]),
    Column("METRIC", 4, lambda run: scored(run)[-1][metric(run)]),
    Column("best", 4, lambda run: run.records[-1]["best"]),
    Column("personal", 4, lambda run: next((r[_OWN] for r in reversed(run.records) if _OWN in r), None)),
    Column("MB up", 2, lambda run: run.records[-1]["bytes_up"] / 1e6),
    Column("MB down", 2, lambda run: run.records[-1]["bytes_down"] / 1e6),
    Column("Flower MB", 2, lambda run: carried(run)),
    Column("epsilon", 2, lambda run: run.records[-1].get("epsilon")),
    Column("passes", 0, lambda run: ALONG["passes"](run.records[-1])),
    Column("peak MB", 1, lambda run: peak(run)),
    Column("seconds", 0, lambda run: run.records[-1]["seconds"]),
    Column("failed", 0, lambda run: sum(len(record.get("failed", {})) for record in run.records)),
)
_RARE = ("Flower MB", "epsilon")


def peak(run: Run) -> float | None:
    """The most that a client's step held above the model, in MB."""
    return max((record.get("peak_bytes", 0) for record in run.records), default=0) / 1e6 or None


def carried(run: Run) -> float | None:
    """MB up and down as Flower counted them, its own framing among them; None for a run in process."""
    facts = [record["engine"] for record in run.records if "engine" in record]
    return sum(one["flower_bytes_up"] + one["flower_bytes_down"] for one in facts) / 1e6 if facts else None


def columns(runs: Sequence[Run]) -> list[Column]:
    """The columns of these runs, under the name of their metric; some only where a run has anything to say there."""
    names = {metric(run) for run in runs}
    own = next(iter(names)) if len(names) == 1 else "metric"
    some = [c.name for c in _COLUMNS if c.name in _RARE and not any(run.records and c.of(run) for run in runs)]
    shown = [column for column in _COLUMNS if column.name not in some]
    return [column._replace(name=own) if column.name == "METRIC" else column for column in shown]


def values(column: Column, runs: Sequence[Run]) -> list[float]:
    """A column's numbers, of the runs that have one; a run without a first record has none."""
    return [value for run in runs if scored(run) and (value := column.of(run)) is not None]


def rows(runs: Sequence[Run]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A table of runs: its head, and a row each."""
    shown = columns(runs)
    return ("run", "state", *(one.name for one in shown)), [
        (run.name, run.facts["state"], *(_cell(one, values(one, [run])) for one in shown)) for run in runs
    ]


def summary(groups: Groups) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A table of groups: mean ± sample standard deviation over the runs of each; "-" where nothing is known."""
    shown = columns([run for runs in groups.values() for run in runs])
    table = [
        (label, str(len(runs)), _state(runs), *(_cell(one, values(one, runs)) for one in shown))
        for label, runs in groups.items()
    ]
    return ("runs", "seeds", "state", *(one.name for one in shown)), table


def reached(run: Run, target: float, key: str = "") -> Record | None:
    """The first record at which a number of the run is at the target; its metric, where no key is given."""
    what = key or metric(run)
    return next((record for record in run.records if record.get(what, -math.inf) >= target), None)


def to_target(groups: Groups, target: float) -> dict[str, dict[str, dict[str, Any]]]:
    """label -> metric or "personal" -> how many runs reached the target, and what it took those that did.

    Counted at evaluations, so a run may have been there up to `eval_every` rounds before. The personal number is of
    the round's cohort after local training.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for label, runs in groups.items():
        for name, key in ((columns(runs)[1].name, ""), ("personal", _OWN)):
            found = [record for run in runs if (record := reached(run, target, key)) is not None]
            known = any(key in record for run in runs for record in run.records) if key else True
            costs = {what: [along(record) for record in found] for what, along in ALONG.items()}
            mean_sd = {what: _mean_sd(values) for what, values in costs.items()}
            if known:
                out.setdefault(label, {})[name] = {"reached": len(found), "of": len(runs), **mean_sd}
    return out


def _mean_sd(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": mean(values) if values else None, "sd": stdev(values) if len(values) > 1 else None}


def target_table(groups: Groups, target: float) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """`to_target` as a table: a row a label and number."""
    digits, table = {"rounds": 0, "passes": 0, "MB up and down": 2, "seconds": 0}, []
    for label, numbers in to_target(groups, target).items():
        for name, one in numbers.items():
            cells = [_said(one[what], digits[what]) for what in ALONG]
            table.append((label, name, f"{one['reached']} of {one['of']}", *cells))
    return ("runs", f"to {target:g}", "reached", *ALONG), table


def _said(one: Mapping[str, float | None], digits: int) -> str:
    if one["mean"] is None:
        return "-"
    return f"{one['mean']:.{digits}f}" + (f" ± {one['sd']:.{digits}f}" if one["sd"] else "")


def _cell(column: Column, found: Sequence[float]) -> str:
    """A mean, with its spread where there is one to be seen; that of the metric always."""
    if not found:
        return "-"
    spread = f"{stdev(found):.{column.digits}f}" if len(found) > 1 else ""
    shown = spread and (float(spread) or column.digits == 4)
    return f"{mean(found):.{column.digits}f}" + (f" ± {spread}" if shown else "")


def _state(runs: Sequence[Run]) -> str:
    complete = sum(run.facts["state"] == "complete" for run in runs)
    return "complete" if runs and complete == len(runs) else f"{complete} of {len(runs)} complete"


def by_seed(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in name and seed alone, together; the name is that of the first without its number."""
    names: dict[str, str] = {}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        rest = json.dumps({key: value for key, value in run.config.items() if key not in ("name", "seed")})
        name = re.sub(r"-(seed)?\d+$", "", run.name)
        groups.setdefault(names.setdefault(rest, name if name not in groups else run.name), []).append(run)
    return groups


def differences(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Settings in which the runs differ: the key, then each run's value."""
    settings = [flat(run.config) for run in runs]
    keys = sorted({key for one in settings for key in one} - {"name"})
    return [
        (key, *(str(one.get(key, "-")) for one in settings))
        for key in keys
        if len({str(one.get(key)) for one in settings}) > 1
    ]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping: {"train": {"rounds": 3}} is {"train.rounds": 3}."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return out


class Compared(NamedTuple):
    """What a comparison's folder holds: its TOML, and the runs that are there."""

    name: str
    given: dict[str, Any]
    groups: dict[str, list[Run]]  # in the order of the labels; each in the order of the seeds

    @property
    def target(self) -> float:
        """What of the metric is to be reached; 0 = nothing was named."""
        return self.given["compare"].get("target", 0.0)

    @property
    def runs(self) -> list[Run]:
        return [run for runs in self.groups.values() for run in runs]

    @property
    def asked(self) -> int:
        """How many runs there are to be."""
        return len(self.given["compare"]["methods"]) * len(self.given["compare"]["seeds"])


def is_comparison(folder: Path) -> bool:
    """Whether `spryfl compare` made this folder."""
    return (folder / "compare.toml").is_file()


def read_comparison(folder: Path) -> Compared:
    """The runs of a comparison, as far as they have begun."""
    given = tomllib.loads((folder / "compare.toml").read_text(encoding="utf-8"))
    labels, seeds = given["compare"]["methods"], given["compare"]["seeds"]
    folders = {label: [folder / f"{label}-seed{seed}" for seed in seeds] for label in labels}
    groups = {label: [read(one) for one in own if one.exists()] for label, own in folders.items()}
    return Compared(folder.resolve().name, given, groups)


def write_tables(folder: Path, target: float = 0.0) -> Compared:
    """Writes table.md and table.json from the runs as they stand; `target` in place of the comparison's own."""
    compared = read_comparison(folder)
    if target:
        compared.given["compare"]["target"] = target
    facts = _as_json(compared)
    _write(folder / "table.json", json.dumps(facts, indent=1) + "\n")
    _write(folder / "table.md", _as_markdown(compared, facts))
    return compared


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _as_json(compared: Compared) -> dict[str, Any]:
    """Every number of the table by run and by method, with what a result must carry."""
    where = [
        {key: run.facts[key] for key in ("versions", "hardware", "threads", "commit", "data")} for run in compared.runs
    ]
    return {
        "schema": 1,
        "state": _total(compared),
        "metrics": sorted({metric(run) for run in compared.runs}),
        "seeds": compared.given["compare"]["seeds"],
        "config": compared.given,
        "made_with": [one for i, one in enumerate(where) if one not in where[:i]],
        "started": min((run.facts["started"] for run in compared.runs), default=None),
        "ended": max((run.facts.get("ended", "") for run in compared.runs), default="") or None,
        "methods": {label: _numbers(runs) for label, runs in compared.groups.items()},
        **({"target": {"value": t, "methods": to_target(compared.groups, t)}} if (t := compared.target) else {}),
    }


def _total(compared: Compared) -> str:
    complete = sum(run.facts["state"] == "complete" for run in compared.runs)
    return "complete" if complete == compared.asked else f"{complete} of {compared.asked} runs complete"


def _numbers(runs: Sequence[Run]) -> dict[str, Any]:
    """Mean, sample standard deviation and each run's value of every column."""
    out: dict[str, Any] = {"mean": {}, "sd": {}, "runs": []}
    for column in columns(runs):
        found = values(column, runs)
        out["mean"][column.name] = mean(found) if found else None
        out["sd"][column.name] = stdev(found) if len(found) > 1 else None
    for run in runs:
        own = {column.name: next(iter(values(column, [run])), None) for column in columns(runs)}
        last = run.records[-1] if run.records else {}
        kinds = {key: value for key, value in last.items() if key.endswith("_passes")}
        out["runs"].append({"run": run.name, "seed": run.config["seed"], "state": run.facts["state"], **own, **kinds})
    return out


def markdown(head: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *table))


_LEGEND = """\
Mean ± sample standard deviation over the seeds. {metric}: the last evaluation on the test rows; best: the highest on
the same rows, so it flatters. Passes: value + tangent + backward passes of one batch, all clients, each counted as one.
MB: those of the messages, all clients. Peak: what a client's first step of a round held above the model. Seconds: a
run's own rounds and evaluations; the runs of a seed took turns in one process, a round each. Failed: answers that never
came or were refused.
"""


_TO_TARGET = """\
To the first evaluation at the target or above it, mean ± sample standard deviation over the runs that came there; "-"
where none did. personal: the clients of that round on their own held-out rows, after local training.
"""


def _as_markdown(compared: Compared, facts: Mapping[str, Any]) -> str:
    """The table, what its columns mean, and where it was made."""
    lines = [
        f"# {compared.name}\n",
        markdown(*summary(compared.groups)),
        _LEGEND.format(metric=", ".join(facts["metrics"])),
    ]
    if compared.target:
        lines += [markdown(*target_table(compared.groups, compared.target)), _TO_TARGET]
    lines += [f"- {note}" for note in notes(compared)] + [""] * bool(notes(compared))
    lines += ["![the same as a picture](compare.png)\n", f"State: {facts['state']}. Seeds: {facts['seeds']}."]
    lines += [f"Begun {facts['started']}, ended {facts['ended'] or '-'}. All settings: `compare.toml`; again with:\n"]
    lines += ["```", "spryfl compare --config compare.toml", "```", ""]
    for made in facts["made_with"]:
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        hardware = ", ".join(value for value in made["hardware"].values() if value)
        data = made["data"]
        lines += [
            f"- {hardware}, {made['threads']} thread(s); {versions}; commit {made['commit'] or 'unknown'}; "
            f"{data['train']} training and {data['test']} test rows"
        ]
    return "\n".join(lines) + "\n"


def notes(compared: Compared) -> list[str]:
    """What a reader of the table must know: runs that ended by their rounds before their budget."""
    limits = {"max_passes": "passes", "max_megabytes": "MB up and down", "max_seconds": "seconds"}
    out = []
    for run in compared.runs:
        train, last = run.config["train"], run.records[-1] if run.records else None
        asked = {key: name for key, name in limits.items() if train.get(key)}
        if not asked or not last or run.facts["state"] != "complete":
            continue
        if all(ALONG[name](last) < train[key] for key, name in asked.items()):
            budget = " or ".join(f"{train[key]:g} {name}" for key, name in asked.items())
            out.append(f"{run.name} ended after {last['round']} rounds, before its budget of {budget} was spent")
    return out
