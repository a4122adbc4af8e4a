"""What a run's step was predicted to hold, part by part: the planner's footprint at the settings of a run folder.

    rows, tokens    a local batch, as long as the longest training row; where the run did not record that, as long as
                    data.max_length and the model allow
    units           those of the client that is dealt most values, in the first rounds

One row for the run, or one for each class of its clients. Cost: 0.3 to 1 s a run, once the packages are imported;
nothing is read but the model's configuration.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from spryfl import adapters, config, footprint, models, server, tasks
from spryfl.choices import Built, build
from spryfl.classes import ClientClass
from spryfl.footprint.outline import skeleton
from spryfl.report import Foretold, Run, plainly
from spryfl.types import Unit

_ROUNDS = 12  # in which the largest share of the units is looked for


def steps(runs: Sequence[Run]) -> dict[str, Foretold]:
    """The prediction for each run by its name; why there is none, where the model cannot be opened here."""
    known: dict[str, Foretold] = {}
    for run in runs:
        if _key(run) not in known:
            known[_key(run)] = _tried(run)
    return {run.name: known[_key(run)] for run in runs}


def _key(run: Run) -> str:
    """Runs that differ in name and seed alone hold the same."""
    return json.dumps([{k: v for k, v in run.config.items() if k not in ("name", "seed")}, _lengths(run)])


def _lengths(run: Run) -> tuple[int, int]:
    """(tokens of the longest sequence, sequences of a row), as far as the run says."""
    data = run.facts.get("data", {})
    return data.get("tokens", 0), data.get("sequences", 1)


def _tried(run: Run) -> Foretold:
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it prints what is caught here
    was, log.disabled = log.disabled, True
    try:
        return Foretold(by_class(run.config, run.facts), "")
    except Exception as error:  # a folder of another version, a model of another machine: the report goes on without
        return Foretold({}, plainly(str(error) or type(error).__name__))
    finally:
        log.disabled = was


def by_class(given: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Bytes by part, of the run's clients or of each class of them.

    Raises:
        ValueError: the settings are not of this version, or the model is not here.
    """
    run = Run("", dict(given), dict(facts), [])
    experiment = config.parse(given)
    m, t = experiment.model, experiment.train
    labels = tuple(facts.get("clients", {}).get("labels") or ("0", "1"))
    task, adapter = tasks.build(experiment.task), adapters.build(experiment.adapter)
    of = footprint.outline(m.name, labels, adapter, task=task, attention=m.attention)
    built, (longest, sequences) = build(experiment.method), _lengths(run)
    out = {}
    for own in experiment.method.classes or (ClientClass(""),):
        method = replace(
            experiment.method,
            classes=(),
            estimator=own.estimator or experiment.method.estimator,
            head=own.head or experiment.method.head,
        )
        held = footprint.footprint(
            of,
            method,
            _most(of.units, built, experiment, own.name),
            rows=t.batch_size * sequences,
            tokens=longest or int(min(experiment.data.max_length, models.places(skeleton(of, (0,)).module))),
            micro_batch=own.micro_batch or t.micro_batch,
            stream=own.stream or m.stream,
            dropout=t.dropout,
            keep_prefix=t.keep_prefix,
        )
        out[own.name] = held._asdict()
    return out


def _most(units: Sequence[Unit], built: Built, experiment: config.Experiment, name: str) -> Sequence[Unit]:
    """The units of the client of a class that is dealt most values; of all clients where there are no classes."""
    clients = 1 if experiment.method.sharing == "pooled" else experiment.partition.clients
    there = built.present(clients)
    cohort = list(there)[: experiment.train.cohort]
    cohort += [next((i for i in there if built.member(i) == name), cohort[0])] if name else []
    dealt = [server.deal(units, list(dict.fromkeys(cohort)), built, round_) for round_ in range(1, _ROUNDS + 1)]
    mine = [own for one in dealt for client, own in one.items() if not name or built.member(client) == name]
    return max(mine, key=lambda own: sum(unit.size for unit in own), default=units)
