"""The thin app folder of an experiment on Flower: it names the apps of the installed package and holds the experiment.

    pyproject.toml       the apps; the experiment, one JSON string of the run configuration; what it was made with
    .flwr/config.toml    Flower's connections, for FLWR_HOME; Flower leaves this folder out of what it sends

Nothing of the package is copied. Cost: the model is loaded once, for its hash, where it is on this machine.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from spryfl import __version__, job, trace
from spryfl.config import Experiment, parse
from spryfl.data import DOCSTRINGS
from spryfl.sites import typed
from spryfl.sites.typed import Federation

APPS = "spryfl.engines.flower"
KEY = "experiment"  # of the run configuration
PACKAGES = ("flwr", "torch", "transformers", "peft", "tokenizers")
_HEAD = """\
# Made by `spryfl flower init`. The apps are in the installed package; the experiment is the JSON string below.
# Run it in process: spryfl run --config {config}

"""


class Opened(NamedTuple):
    """What an app folder says."""

    experiment: Experiment
    made_with: Mapping[str, str]  # package or "python" -> version; "noise": the fingerprint; "model": the weights' hash
    labels: tuple[str, ...]  # the classes, if they were known


class Step(NamedTuple):
    """One command of a walk."""

    where: str  # on which machine, in which terminal
    why: str
    words: list[str]
    site: int | None = None  # its number, where it is one of many


def init(folder: Path, experiment: Experiment, made: Federation, weights: str = "", labels: Sequence[str] = ()) -> None:
    """Writes the app folder; it appears whole or not at all.

    Args:
        folder: a folder that is not there yet.
        experiment: what to run.
        made: where its SuperLink will be.
        weights: the hash of the model's weights, if it is known.
        labels: the classes, if they are known.

    Raises:
        ValueError: the folder is there already.
    """
    if folder.exists():
        raise ValueError(
            f"{folder} is there already, and nothing in it was touched. Give another folder, or remove it."
        )
    beside = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    try:
        (beside / typed.HOME).mkdir(parents=True)
        (beside / "pyproject.toml").write_text(project(experiment, weights, labels), encoding="utf-8")
        (beside / typed.HOME / "config.toml").write_text(connections(made), encoding="utf-8")
        (beside / "experiment.toml").write_text(settled(experiment).toml(), encoding="utf-8")
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def settled(experiment: Experiment) -> Experiment:
    """The experiment with its files by their full paths: Flower's processes run elsewhere."""
    given = experiment.as_dict()
    for section, key in (("data", "name"), ("data", "test"), ("model", "name"), ("model", "adapter")):
        value = given[section][key]
        if value and value != DOCSTRINGS and Path(value).expanduser().exists():
            given[section][key] = str(Path(value).expanduser().resolve())
    return parse({key: value for key, value in given.items() if value != {}})


def classes(experiment: Experiment) -> tuple[str, ...]:
    """The classes that the experiment's data name; none where the data are not on this machine."""
    name = experiment.data.name
    here = name == DOCSTRINGS or Path(name).expanduser().exists()
    return job.read(experiment).labels if here else ()


def project(experiment: Experiment, weights: str = "", labels: Sequence[str] = ()) -> str:
    """The text of pyproject.toml."""
    name = "".join(c if c.isalnum() else "-" for c in experiment.name.lower()).strip("-") or "experiment"
    whole = {
        "project": {
            "name": f"spryfl-{name}",
            "version": "1.0.0",
            "description": f"{experiment.method.name} by spryfl, on Flower",
            "license": "Apache-2.0",
            "dependencies": [f"spryfl[flower]=={__version__}"],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "spryfl",
                    "fab-exclude": ["**"],  # this file alone travels: no run folder, no note beside it
                    "components": {"serverapp": f"{APPS}:server_app", "clientapp": f"{APPS}:client_app"},
                    "config": run_config(experiment),
                }
            },
            "spryfl": {"labels": list(labels), "made-with": made_with(weights)},
        },
    }
    return _HEAD.format(config="experiment.toml") + tomli_w.dumps(whole)


def run_config(experiment: Experiment) -> dict[str, Any]:
    """What the apps are told: Flower's run configuration takes plain values alone, so the experiment is one text."""
    whole = json.dumps(settled(experiment).as_dict(), separators=(",", ":"))
    return {KEY: whole, "folder": f"runs/{experiment.name}", "resume": False}


def made_with(weights: str = "") -> dict[str, str]:
    """Versions, the fingerprint of the noise, and the hash of the model's weights where it is known."""
    return {**versions(), "noise": trace.fingerprint(), **({"model": weights} if weights else {})}


def versions() -> dict[str, str]:
    """Of Python and of what the results hang on; an empty text for what is not installed."""
    return {"python": platform.python_version(), "spryfl": __version__, **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def connections(made: Federation) -> str:
    """The text of Flower's config.toml: where `flwr` finds the SuperLinks."""
    trust: dict[str, Any] = {"insecure": True}
    if made.tls:
        trust = {"root-certificates": str((made.tls / typed.certs.CA).resolve())}
    simulation = {"address": f"127.0.0.1:{simulation_port(made)}", "insecure": True}
    known = {"default": typed.SITES, typed.SIMULATION: simulation, typed.SITES: {"address": made.address, **trust}}
    return tomli_w.dumps({"superlink": known})


def simulation_port(made: Federation) -> int:
    """The next one, so that both SuperLinks may run side by side."""
    return made.port + 1 if made.port < 65535 else made.port - 1


def read(folder: Path) -> Opened:
    """An app folder's experiment and what it was made with; a ValueError says what is wrong with it."""
    path = folder / "pyproject.toml"
    try:
        tool = tomllib.loads(path.read_text(encoding="utf-8"))["tool"]
        text = tool["flwr"]["app"]["config"][KEY]
        noted = tool.get("spryfl", {})
        return Opened(parse(json.loads(text)), noted.get("made-with", {}), tuple(noted.get("labels", ())))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no app folder's: {error}. Make one: spryfl flower init DIR --config FILE"
        ) from None


def walk(made: Federation, experiment: Experiment) -> list[Step]:
    """Every command from the folder to the result: in simulation, then with sites."""
    clients = experiment.partition.clients
    where = "the SuperLink's machine"
    steps = [
        Step("this machine, terminal 1", "simulation: the SuperLink", typed.simulator(simulation_port(made))),
        Step("this machine, terminal 2", "simulation: the run", typed.run(made.app, typed.SIMULATION, clients=clients)),
        Step("this machine, terminal 2", "how it ended", typed.listing(typed.SIMULATION)),
    ]
    if made.tls:
        make = ["spryfl", "flower", "certs", str(made.tls), "--nodes", str(clients), "--host", made.host]
        steps.append(Step(where, "certificates and keys, for trying out", make))
    steps.append(Step(f"{where}, terminal 1", "the SuperLink", typed.superlink(made)))
    for i in range(clients) if made.tls else ():
        steps.append(Step(f"{where}, terminal 2", f"admits site {i}", typed.register(made, i), i))
    for i in range(clients):
        words = typed.supernode(made, i, typed.node(i, "/path/to/site.parquet"), typed.NODE_PORT + i)
        steps.append(Step(f"site {i}", "its process", words, i))
    steps.append(Step(f"{where}, terminal 2", "the run", typed.run(made.app, typed.SITES)))
    steps.append(Step(f"{where}, terminal 2", "how it ended", typed.listing(typed.SITES)))
    return steps
