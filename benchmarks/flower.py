"""What a round costs in process, in Flower's simulation and in its deployment: `python benchmarks/flower.py FOLDER`.

    seconds a round    from one record to the next; the first round and those with an evaluation are left out
    bytes a round      as counted by `wire`, and as Flower counted what it carried, down and up
    a message          seconds of its parts at a client: process start, import, load (data and model), steps

1, 10 and 100 local steps a message, a method that sends values and one that sends scalars; three clients, MiniLM with
LoRA r = 1, rows of the embedded docstrings, batches of 8, one thread a client. Deployment is a SuperLink and three
SuperNodes on this machine with TLS and node keys, each with a file of its own. Writes NAME.json and NAME.md, and the
table into docs/flower.md.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import itertools
import json
import os
import platform
import statistics
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w

from spryfl import data, partition
from spryfl.config import Experiment
from spryfl.sites import certs, folder, processes, typed

CLIENTS, APP = 3, Path("app")
METHODS: dict[str, dict[str, Any]] = {
    "spry, values": {"name": "spry"},
    "fedmezo, scalars": {"name": "fedmezo", "exchange": "scalars"},
}
STEPS = (1, 10, 100)
ENGINES = ("in process", "simulation", "deployment")
PARTS = ("start", "import", "load", "step")
MARKS = "<!-- table of benchmarks/flower.py -->", "<!-- end of the table -->"


def write(path: Path, rows: list[tuple[str, str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label", "site"), *rows])


def prepare(where: Path) -> None:
    """all/ for the runs that deal the rows, and a file a site, the first the largest so that numbers agree."""
    corpus = data.load("docstrings", train_rows=600, test_rows=100)
    names = corpus.labels
    parts = partition.iid()(corpus.train.label, None, 6, 0)
    sites = [parts[0] + parts[1] + parts[2], parts[3] + parts[4], parts[5]]
    rows = [[(corpus.train.text[i], names[corpus.train.label[i]], f"site{k}") for i in s] for k, s in enumerate(sites)]
    write(where / "all" / "train.csv", [row for site in rows for row in site])
    test = zip(corpus.test.text, corpus.test.label, strict=True)
    write(where / "all" / "test.csv", [(text, names[label], "test") for text, label in test])
    for k, site in enumerate(rows):
        write(where / f"site{k}.csv", site)


def experiments(where: Path, rounds: int, methods: list[str], steps_: list[int]) -> list[Experiment]:
    return [
        Experiment(
            name=f"{which}-{steps}".replace(", ", "-"),
            threads=1,
            data={"name": str(where / "all"), "group": "site", "max_length": 64},
            partition={"clients": CLIENTS},
            method=method,
            train={"rounds": rounds, "cohort": CLIENTS, "steps": steps, "eval_every": rounds},
        )
        for which, method in METHODS.items()
        for steps in steps_
        if method["name"] in methods
    ]


def in_process(where: Path, given: list[Experiment]) -> None:
    for one in given:
        (where / f"{one.name}.toml").write_text(one.toml(), encoding="utf-8")
        config = ["--config", str(where / f"{one.name}.toml"), "--out", str(where / "runs" / ENGINES[0])]
        processes.call(["spryfl", "run", *config], APP, where)


def flown(where: Path, given: list[Experiment], connection: str, which: str, clients: int) -> dict[str, Any]:
    """All experiments, one after the other in one run: what starting a run costs is paid once, and left out."""
    told = {"experiment": json.dumps([folder.settled(one).as_dict() for one in given])}
    (where / f"{connection}.toml").write_text(tomli_w.dumps({**told, "folder": str(where / "runs" / which)}))
    words = typed.run(APP, connection, clients=clients)
    words[words.index("--run-config") + 1] = str(where / f"{connection}.toml")
    processes.call(words, APP, where)
    return processes.finished(connection, APP, where)


@contextlib.contextmanager
def deployed(where: Path, made: typed.Federation) -> Iterator[None]:
    certs.make(where / "tls", CLIENTS, [made.host])
    with contextlib.ExitStack() as started:
        started.enter_context(processes.running(typed.superlink(made), APP, where, processes.answers(made.port)))
        for i in range(CLIENTS):
            processes.call(typed.register(made, i), APP, where)
            port = made.port + 2 + i
            words = typed.supernode(made, i, typed.node(i, where / f"site{i}.csv"), port)
            started.enter_context(processes.running(words, APP, where, processes.answers(port)))
        yield


def measured(path: Path) -> dict[str, float]:
    """The medians over a run's rounds, without the first and without those that are evaluated."""
    records = [json.loads(line) for line in (path / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [(a, b) for a, b in itertools.pairwise(records) if b["round"] > 1 and "test_loss" not in b]
    out = {
        "seconds": statistics.median(b["seconds"] - a["seconds"] for a, b in pairs),
        "down": statistics.median(b["bytes_down"] - a["bytes_down"] for a, b in pairs),
        "up": statistics.median(b["bytes_up"] - a["bytes_up"] for a, b in pairs),
        "rounds": len(pairs),
    }
    if "engine" in records[-1]:
        own = [b["engine"] for _, b in pairs]
        out |= {f"flower_{way}": statistics.median(one[f"flower_bytes_{way}"] for one in own) for way in ("down", "up")}
        out |= {part: statistics.median(one[part] / one["messages"] for one in own) for part in PARTS}
    return out


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    head = ("engine", "steps", "s a round", *PARTS[:3], "steps, s", "kB down", "kB up", "Flower: down", "up")
    keys = ("down", "up", "flower_down", "flower_up")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for which in METHODS:
        if not (steps_ := [s for s in STEPS if f"{which}-{s}".replace(", ", "-") in results[ENGINES[0]]]):
            continue
        lines.append(f"| **{which}** |" + " |" * (len(head) - 1))
        for engine in ENGINES:
            for steps in steps_:
                one = results[engine][f"{which}-{steps}".replace(", ", "-")]
                parts = [f"{one[part]:.2f}" if part in one else "" for part in PARTS]
                sizes = [f"{one[key] / 1e3:.1f}" if key in one else "" for key in keys]
                lines.append(f"| {engine} | {steps} | {one['seconds']:.2f} | " + " | ".join(parts + sizes) + " |")
    return "\n".join(lines)


def facts(rounds: int) -> dict[str, Any]:
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    names = ("torch", "transformers", "peft", "flwr", "ray")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "processor": (models or [platform.processor()])[0],
        "cores": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in names}},
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--name", type=Path, default=Path(__file__).with_name("flower_cpu"))
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "flower.md")
    parser.add_argument("--steps", type=int, nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--methods", nargs="+", default=[one["name"] for one in METHODS.values()])
    given = parser.parse_args()
    where, before = given.folder.resolve(), facts(given.rounds)
    prepare(where)
    todo = experiments(where, given.rounds, given.methods, given.steps)
    made = typed.federation(APP, f"localhost:{processes.free_ports(2 + CLIENTS)}", Path("tls"))
    folder.init(where / APP, todo[0], made._replace(tls=where / "tls"))
    in_process(where, todo)
    with processes.running(typed.simulator(made.port + 1), APP, where, processes.answers(made.port + 1)):
        flown(where, todo, typed.SIMULATION, ENGINES[1], CLIENTS)
    with deployed(where, made):
        carried = flown(where, todo, typed.SITES, ENGINES[2], 0)
    results = {e: {one.name: measured(where / "runs" / e / one.name) for one in todo} for e in ENGINES}
    report = {**before, "load_after": [round(value, 1) for value in os.getloadavg()], "results": results}
    report["flower_total"] = carried.get("network-traffic")
    given.name.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    given.name.with_suffix(".md").write_text(said(report, results), encoding="utf-8")
    text = given.page.read_text(encoding="utf-8")
    head, _, rest = text.partition(MARKS[0])
    tail = rest.partition(MARKS[1])[2]
    new = f"{MARKS[0]}\n{machine(report)}\n\n{table(results)}\n{MARKS[1]}"
    given.page.write_text(head + new + tail, encoding="utf-8")
    print(table(results))


def machine(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"{report['date']}, {report['cores']} cores of {report['processor']}, load {report['load'][0]} before and "
        f"{report['load_after'][0]} after; {versions}."
    )


def said(report: dict[str, Any], results: dict[str, Any]) -> str:
    return f"# A round on Flower\n\n`python benchmarks/flower.py FOLDER`. {machine(report)}\n\n{table(results)}\n"


if __name__ == "__main__":
    main()
