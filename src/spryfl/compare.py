"""Several methods on the same data, partition, seeds and budget, by turns: what `spryfl compare` does.

    for seed in seeds:              data, models and tokens once, shared by all methods that have them alike
        while any is unfinished:    one round of each in rotation; who is behind goes first
            train -> record         every run is an ordinary run folder, OUT/LABEL-seedSEED

A comparison is an experiment in TOML with a section `[compare]`: methods (labels), seeds, a budget, and changes by
label; a label is a row of the table of methods unless its changes name one. Killed at any moment, the same call goes on
to the same bits. Cost: that of the runs; in memory the data and the model once, and each method's state.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import torch

from spryfl import config, job, journal, models, options, report, tasks
from spryfl.config import Experiment
from spryfl.data import Corpus
from spryfl.job import Job
from spryfl.journal import Journal
from spryfl.methods import METHODS
from spryfl.models import Model
from spryfl.tasks import Rows
from spryfl.types import ServerState

FILE = "compare.toml"
BUDGET = {"rounds": "rounds", "passes": "max_passes", "megabytes": "max_megabytes", "seconds": "max_seconds"}
# What all runs have in common, or there is nothing to compare.
_SAME = ("schema", "name", "seed", "device", "threads", "data", "partition", "task", "compare")
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


class Comparison(NamedTuple):
    """What is run: an experiment for each label and seed."""

    given: dict[str, Any]  # the TOML that says so
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: dict[tuple[str, int], Experiment]


class Turn(NamedTuple):
    """One round of one run."""

    seed: int
    label: str
    record: dict[str, Any] | None  # None: the run has ended, its adapter is written


class _Running(NamedTuple):
    """A run that goes on; its generator holds its state."""

    opened: Journal
    rounds: Iterator[tuple[dict[str, Any], ServerState]]


def parse(given: Mapping[str, Any], labels: Sequence[str] = (), seeds: Sequence[int] = ()) -> Comparison:
    """A comparison from nested plain values; `labels` and `seeds` take the place of those in its section.

    Raises:
        ValueError: an unknown method, a label twice, changes for a label that is not there or of what all share, ...
    """
    fields: dict[str, Any] = {"methods": (list[str], []), "seeds": (list[int], [])}
    fields |= {"budget": (dict[str, int | float], {}), "changes": (dict[str, dict[str, Any]], {})}
    fields["target"] = (float, 0.0)  # of the metric: what it took to come there stands in the table
    section = given.get("compare", {})
    if not isinstance(section, Mapping):
        raise ValueError(f"compare = {section!r}: it is a section, [compare]. Its keys: {', '.join(fields)}.")
    said = options.typed(fields, section, "compare")
    chosen = list(labels or said["methods"])
    picked = list(seeds or said["seeds"] or [given.get("seed", 0)])
    _check_lists(chosen, picked)
    _check_changes(said["changes"], {*said["methods"], *chosen})
    changes = {label: said["changes"][label] for label in chosen if label in said["changes"]}
    own = {**said, "methods": chosen, "seeds": picked, "changes": changes}
    base = {key: value for key, value in given.items() if key not in ("compare", "tune", "seed", "name")}
    budget = _budget(said["budget"], base.get("train", {}))
    runs = {
        (label, seed): _experiment(base, label, changes.get(label, {}), budget, seed)
        for seed in picked
        for label in chosen
    }
    whole = {**base, "compare": {key: value for key, value in own.items() if value}}
    return Comparison(whole, tuple(chosen), tuple(picked), runs)


def numbers(text: str) -> list[int]:
    """Seeds as on the command line, "0,1,2"."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if odd := [word for word in words if not word.isdecimal()]:
        raise ValueError(f"--seeds: {odd[0]!r} is not a whole number from 0 on. Give for example --seeds 0,1,2.")
    return [int(word) for word in words]


def _check_lists(labels: Sequence[str], seeds: Sequence[Any]) -> None:
    if not labels:
        raise ValueError('compare.methods is empty: say what to compare, for example methods = ["spry", "fedavg"].')
    for what, values in (("methods", labels), ("seeds", seeds)):
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise ValueError(f"compare.{what}: {twice[0]!r} stands there twice. Remove one, or give it another label.")
    if odd := [label for label in labels if not _LABEL.fullmatch(label)]:
        raise ValueError(f"compare.methods: {odd[0]!r} cannot be a folder's name. Use letters, digits, _ . + -")


def _check_changes(changes: Mapping[str, Mapping[str, Any]], labels: set[str]) -> None:
    for label, own in changes.items():
        if label not in labels:
            raise ValueError(
                f"compare.changes.{label}: there is no such label in compare.methods ({', '.join(sorted(labels))}). "
                f"Add it there, or remove the changes."
            )
        train = own.get("train", {})
        limits = [f"train.{key}" for key in BUDGET.values() if isinstance(train, Mapping) and key in train]
        if shared := [key for key in own if key in _SAME] + limits:
            raise ValueError(
                f"compare.changes.{label} changes {shared[0]}, which must be the same for all that are compared. "
                f"Set it once, outside of the changes."
            )


def _budget(given: Mapping[str, float], train: Mapping[str, Any]) -> dict[str, float]:
    """The budget as settings of [train]."""
    for key, value in given.items():
        if key not in BUDGET:
            raise ValueError(f"compare.budget.{key} is unknown. Possible: {', '.join(BUDGET)}.")
        if not value > 0:
            raise ValueError(f"compare.budget.{key} = {value}: it must be above 0. Leave it out for no limit.")
        if BUDGET[key] in train:
            raise ValueError(f"compare.budget.{key} and train.{BUDGET[key]} are the same setting. Remove one of them.")
    if given and "rounds" not in {*given, *train}:
        raise ValueError(
            f"compare.budget = {dict(given)} needs a largest number of rounds beside it: a method that diverges spends "
            f"nothing and would never end. Set train.rounds, so high that the budget is reached before."
        )
    return {BUDGET[key]: value for key, value in given.items()}


def _experiment(
    base: Mapping[str, Any], label: str, changes: Mapping[str, Any], budget: Mapping[str, float], seed: int
) -> Experiment:
    """The experiment of one run. `[method]` without a name holds for all labels, with one for that row's."""
    own = config.merge({"method": {"name": label}}, changes)
    own["method"] = options.spelled("method", own["method"])
    named = {"name": f"{label}-seed{seed}", "seed": seed}
    try:
        return config.parse(config.merge(config.merge(base, own), {**named, **({"train": budget} if budget else {})}))
    except ValueError as error:
        unnamed = isinstance(own["method"], Mapping) and own["method"].get("name") == label not in METHODS
        hint = f'\n    A label of your own says which row it is: [compare.changes.{label}] method.name = "spry".'
        raise ValueError(f"compare, {label}: {error}{hint if unnamed else ''}") from None


def metric(comparison: Comparison) -> str:
    """The name of the number by which models are compared."""
    return tasks.build(next(iter(comparison.runs.values())).task).metric


def create(comparison: Comparison, out: Path) -> None:
    """Makes the comparison's folder; if it is there already, it must be of the same comparison."""
    if _is_free(comparison, out):
        with journal.writing(out):
            out.mkdir(parents=True, exist_ok=True)
        journal.write(out / FILE, tomli_w.dumps(comparison.given).encode())


def _is_free(comparison: Comparison, out: Path) -> bool:
    """Whether the folder is still to be made.

    Raises:
        ValueError: it holds another comparison or something else; nothing in it was touched.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return True
    if not (out / FILE).is_file():
        raise ValueError(f"{out} is there already and holds no comparison ({FILE}). Choose another --out.")
    there = {e.name: out / e.name / "config.toml" for e in comparison.runs.values() if (out / e.name).exists()}
    changed = _changed(begun(out), comparison)
    for e in comparison.runs.values():
        changed += _differences(Experiment.load(there[e.name]), e) if e.name in there else []
    if changed:
        raise ValueError(
            f"the comparison in {out} was begun with other settings: {'; '.join(changed[:3])}. "
            f"Choose another --out, or go on as it was begun: spryfl resume {out}"
        )
    return False


def begun(out: Path) -> Comparison:
    """The comparison whose folder this is."""
    return parse(config.read(out / FILE))


def _changed(old: Comparison, new: Comparison) -> list[str]:
    """Where two comparisons differ, as `what = new, was old`."""
    sides = (("methods", new.labels, old.labels), ("seeds", new.seeds, old.seeds))
    out = [f"{what} = {_list(mine)}, was {_list(theirs)}" for what, mine, theirs in sides if mine != theirs]
    return out or [line for run in new.runs for line in _differences(old.runs[run], new.runs[run])]


def _list(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


def _differences(old: Experiment, new: Experiment) -> list[str]:
    was, now = (report.flat(config.asked(one).as_dict()) for one in (old, new))
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    return [f"{new.name} {key} = {now.get(key, '-')}, was {was.get(key, '-')}" for key in keys]


def turns(comparison: Comparison, out: Path) -> Generator[Turn]:
    """Runs what is left, a round of each in rotation.

    Close the iterator (`contextlib.closing`) to stop early: the runs are then called cancelled and can be gone on with.
    """
    _is_free(comparison, out)  # refuse before anything is loaded, write when all of it fits together
    for seed in comparison.seeds:
        running = _opened(comparison, seed, out)
        try:
            for name, record in rotation(running):
                yield Turn(seed, name.removesuffix(f"-seed{seed}"), record)
        except (KeyboardInterrupt, GeneratorExit):
            for run in running.values():
                job.stopped(run.opened)
            raise


def rotation(running: dict[str, _Running]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """One round of each in order, those that are behind first; a run that has ended yields None and is taken out."""
    at = {name: _newest(run.opened) for name, run in running.items()}
    while running:
        turn = min(at[name] for name in running)
        for name in [name for name in running if at[name] == turn]:
            record, _ = next(running[name].rounds, (None, None))
            if record is None:
                del running[name]
            else:
                at[name] = record["round"]
            yield name, record


def _newest(opened: Journal) -> int:
    """The round of a run's last record; -1 before the first."""
    records = journal.records(opened)
    return records[-1]["round"] if records else -1


def _opened(comparison: Comparison, seed: int, out: Path) -> dict[str, _Running]:
    """The runs of one seed that are not complete, begun or gone on with."""
    experiments = [e for (_, k), e in comparison.runs.items() if k == seed]
    folders = {e.name: out / e.name for e in experiments}
    there = {name: journal.open_folder(folder) for name, folder in folders.items() if folder.exists()}
    left = [e for e in experiments if e.name not in there or journal.facts_of(there[e.name])["state"] != "complete"]
    running, jobs = {}, _prepared(left)
    for made in jobs:
        if made.experiment.name not in there:
            _rehearse(made)
    create(comparison, out)
    for made in jobs:
        for opened in there.values():  # the complete ones, too, must be of these data
            job.same_data(opened, made)
        name = made.experiment.name
        if name not in there:
            job.create(made, folders[name])
        opened, state, progress = job.resume(made, folders[name])
        running[name] = _Running(opened, job.run(made, opened, state, progress))
    return running


def _rehearse(made: Job) -> None:
    try:
        job.rehearse(made)
    except ValueError as error:
        raise ValueError(f"compare, {made.experiment.name}: {error}") from None


class Common(NamedTuple):
    """What runs on the same data share: read once, and loaded once for all that have it alike."""

    corpus: Corpus
    models: dict[str, Model]
    tokens: dict[str, tuple[Rows, Rows]]

    def job(self, e: Experiment) -> Job:
        """One experiment's job."""
        base = e.model.model_dump_json()
        adapted = base + json.dumps(e.adapter)
        if adapted not in self.models:
            self.models[adapted] = job.load_model(e, self.corpus.labels)
        if base not in self.tokens:
            self.tokens[base] = job.encode(e, self.corpus, self.models[adapted])
        return job.prepare(e, self.corpus, self.models[adapted], self.tokens[base])


def common(first: Experiment) -> Common:
    """The data of an experiment, its device and its threads."""
    models.usable(first.device)
    if first.threads:
        torch.set_num_threads(first.threads)
    return Common(job.read(first), {}, {})


def _prepared(experiments: Sequence[Experiment]) -> list[Job]:
    """Jobs of one seed."""
    if not experiments:
        return []
    shared = common(experiments[0])
    return [shared.job(e) for e in experiments]
