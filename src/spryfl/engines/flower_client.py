"""A client's side of a message over Flower: its data, its model, its memory; the steps are `client.run`'s.

A process that lives for many messages keeps model and rows. What a client must remember between rounds - values that it
catches up from - lies in its node's state, which Flower gives back with each message; in a simulation in one file for
all clients, as clients that hold the values of a round hold the same bits. Lost memory is said, and the values come.

What leaves a site: its number of examples, what the method sends, and no text of its data, not even in an error. The
counts of its classes leave it where `counts=true` is in its node configuration. Cost: the client's own rows are
tokenized, no others; the model is opened once a process.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from flwr.app import Context, RecordDict

from spryfl import client, config, data, job, ledger, models, noise, partition, provenance, tasks, trace, train, wire
from spryfl.backbone.store import is_packed
from spryfl.config import Experiment
from spryfl.data import columns, tables
from spryfl.data.examples import Examples, take
from spryfl.engines.flower_letters import Note, letter, opened
from spryfl.job import Job
from spryfl.ledger import Held, LostError
from spryfl.models import Model
from spryfl.tasks import Rows
from spryfl.types import Instruction

T = TypeVar("T")
log = logging.getLogger("flwr")

_NOTHING = Rows((), (), 0, 0)


class DataError(ValueError):
    """What is wrong with a site's data or settings, said without a word of the data."""


class Site(NamedTuple):
    """What a node's configuration says, of what it may say: partition-id, data, model, device, threads, counts."""

    number: int | None  # partition-id
    of: int | None  # num-partitions
    data: str  # a file of its own
    model: str  # where the model lies here, if elsewhere than the experiment says
    device: str
    threads: int
    counts: bool  # whether the counts of its classes may leave it


def site(given: Mapping[str, Any]) -> Site:
    """A node's configuration; a DataError for a value that cannot be."""
    kinds = {"partition-id": int, "num-partitions": int, "data": str, "model": str, "device": str, "threads": int}
    for key, kind in {**kinds, "counts": bool}.items():
        if key in given and type(given[key]) is not kind:
            raise DataError(f"node-config {key}={given[key]!r}: a value of type {kind.__name__} is needed.")
    return Site(
        given.get("partition-id"),
        given.get("num-partitions"),
        given.get("data", ""),
        given.get("model", ""),
        given.get("device", ""),
        given.get("threads", 0),
        given.get("counts", False),
    )


def experiments(run_config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The experiments of a run: run-config `experiment`, one JSON object or a list of them."""
    text = run_config.get("experiment", "")
    try:
        given = json.loads(text) if text else {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"run-config experiment = {text!r:.80} is not JSON: {error}.") from None
    return given if isinstance(given, list) else [given]


def adapted(experiment: Experiment, here: Site, client_class: str = "") -> Experiment:
    """The experiment with this node's own model folder and device.

    A site with data of its own is always of one class: where that streams the model, the whole is never in memory.
    """
    changed: dict[str, Any] = {"name": here.model} if here.model else {}
    if here.data and any(one.stream for one in experiment.method.classes if one.name == client_class):
        changed["stream"] = True
    model = experiment.model.model_copy(update=changed)
    return experiment.model_copy(update={"model": model, "device": here.device or experiment.device})


def asked(note: Note, context: Context) -> dict[str, Any]:
    """The experiment that a message is about, with what the server's planner chose for classes that state a memory."""
    given = experiments(context.run_config)[note["which"]]
    chosen = {"method": {"classes": json.loads(note["classes"])}} if "classes" in note else {}
    return config.merge(given, chosen)


_cached: dict[str, tuple[Any, Any]] = {}  # kind -> (key, thing): what a process that lives on need not make again


def cached(kind: str, key: Any, make: Callable[[], T]) -> T:
    """The thing of that key, made anew where the last of its kind had another."""
    if kind not in _cached or _cached[kind][0] != key:
        _cached[kind] = (key, make())
    return cast(T, _cached[kind][1])


def opened_model(experiment: Experiment, labels: tuple[str, ...]) -> Model:
    """The model with its adapter."""
    said = experiment.as_dict()
    key = (said["model"], said["adapter"], said["task"], experiment.seed, experiment.device, labels)
    return cached("model", key, lambda: job.load_model(experiment, labels))


def opened_corpus(experiment: Experiment) -> data.Corpus:
    """The rows that are dealt to the clients."""
    said = experiment.as_dict()
    return cached("corpus", (said["data"], said["task"], experiment.seed), lambda: job.read(experiment))


@functools.lru_cache(maxsize=4)
def _own_file(
    path: str, changed: float, labels: tuple[str, ...], columns_: tuple[str, str, str], task: str
) -> Examples:
    """A site's rows; a DataError says what is wrong with the file, and the site's log says more."""
    text, pair, label = columns_
    needs = tasks.build(json.loads(task)).needs
    stage = "cannot be read as a table"
    try:
        table = tables.read(Path(path))
        named = [name for name in columns_ if name]
        stage = (
            f"has not the columns that the experiment needs ({', '.join(named) or 'a text and a label by usual names'})"
        )
        columns.choose(table, columns.Columns(text, pair, label, ""), needs)
        stage = f"holds rows that do not fit: an empty or unknown label (known: {', '.join(labels)}), or no text"
        return data.read_labelled(path, labels, text=text, pair=pair, label=label, needs=needs)
    except (ValueError, OSError) as error:
        log.error("data of this site: %s", error)
        raise DataError(f"its data file {stage}. The log of that site says more.") from None


def own_examples(experiment: Experiment, here: Site, labels: tuple[str, ...]) -> Examples:
    """The rows of a site's own file, in terms of the run's classes."""
    d, path = experiment.data, Path(here.data).expanduser()
    if not path.is_file():
        raise DataError("its data file is not there. The log of that site says more.")
    task = json.dumps(experiment.as_dict()["task"])
    return _own_file(str(path), path.stat().st_mtime, labels, (d.text, d.pair, d.label), task)


def alone(experiment: Experiment) -> Experiment:
    """The experiment as one client's: its plan is not hung on data that lie elsewhere."""
    part = experiment.partition.model_copy(update={"clients": 1, "split": {"kind": "iid"}})
    return experiment.model_copy(update={"partition": part})


def site_job(experiment: Experiment, model: Model, examples: Examples, number: int) -> Job:
    """The job of a site that holds rows of its own: it is client 0 of it."""
    corpus = data.Corpus(examples, examples, model.labels, "a site", (), "")
    rows = _encoded(model, examples, experiment.data.max_length)
    seed = noise.child_seed(experiment.seed, "held out", number)
    own, held = partition.hold_out(range(len(examples.label)), experiment.partition.held_out, seed)
    made = job.prepare(alone(experiment), corpus, model, (rows, _NOTHING))
    return made._replace(parts=(own,), held=(held,))


def dealt_job(experiment: Experiment, text: str, number: int) -> Job:
    """The job of a client that the partition deals its rows: it is client 0 of it, and only these are tokenized."""
    corpus = opened_corpus(experiment)
    model = opened_model(experiment, corpus.labels)
    whole = cached("whole", text, lambda: job.prepare(experiment, corpus, model, (_NOTHING, _NOTHING)))
    both = sorted((*whole.parts[number], *whole.held[number]))
    place = {row: i for i, row in enumerate(both)}
    rows = _encoded(model, take(corpus.train, both), experiment.data.max_length)
    own, held = (tuple(place[row] for row in rows_) for rows_ in (whole.parts[number], whole.held[number]))
    return whole._replace(rows=rows, parts=(own,), held=(held,))


def _encoded(model: Model, examples: Examples, most: int) -> Rows:
    rows = model.task.encode(model.tokenizer, examples, most)
    models.check_length(model, [rows])
    return rows


_jobs: dict[tuple[Any, ...], Job] = {}  # the latest few, of a process that lives on


def prepared(experiment: Experiment, here: Site, labels: Sequence[str], number: int, text: str) -> Job:
    """The client's job, from this process's memory where it is there."""
    key = (text, here, tuple(labels), number)
    if key not in _jobs:
        while len(_jobs) >= 16:
            del _jobs[next(iter(_jobs))]
        if here.data:
            examples = own_examples(experiment, here, tuple(labels))
            _jobs[key] = site_job(experiment, opened_model(experiment, tuple(labels)), examples, number)
        else:
            _jobs[key] = dealt_job(experiment, text, number)
    return _jobs[key]


def frozen_hash(model: Model) -> str:
    """What the frozen values of a model are, in 16 hex digits. Cost: one pass over its bytes."""
    return provenance.digest((name, value) for name, value in models.stored(model.module) if name not in model.params)


def hello(note: Note, context: Context) -> Note:
    """What a node says of itself before the first round; in place of anything else, what is wrong with it."""
    here = site(context.node_config)
    said: Note = {"own": bool(here.data), "fingerprint": trace.fingerprint(), "torch": str(torch.__version__)}
    said |= {k: v for k, v in {"partition-id": here.number, "num-partitions": here.of}.items() if v is not None}
    experiment = adapted(config.parse(asked(note, context)), here)
    labels = tuple(note["labels"])
    if here.data:
        examples = own_examples(experiment, here, labels)
        rows = range(len(examples.label))
        said["examples"] = len(partition.hold_out(rows, experiment.partition.held_out, 0)[0])
        if here.counts:
            counted = Counter(examples.label)
            said["counts"] = [counted[i] for i in range(len(labels))]
    said["model"] = frozen_hash(opened_model(read_once(experiment), labels))
    return said


def read_once(experiment: Experiment) -> Experiment:
    """The experiment with a packed model streamed: enough to look at every value once."""
    m = experiment.model
    return experiment.model_copy(update={"model": m.model_copy(update={"stream": m.stream or is_packed(m.name)})})


def answered(body: bytes, note: Note, context: Context, clock: dict[str, float]) -> RecordDict:
    """The reply to an instruction: an update, or why there is none."""
    since = time.perf_counter()
    here, text = site(context.node_config), json.dumps(asked(note, context))
    torch.set_num_threads(here.threads or note["threads"])
    told = cast(Instruction, wire.decode(body))
    which = told.client_class
    experiment = cached("experiment", (text, here, which), lambda: adapted(config.parse(json.loads(text)), here, which))
    made = prepared(experiment, here, note.get("labels", ()), told.client, text)
    if here.data and here.number != told.client:
        raise ValueError(f"asked as client {told.client}, and holds the data of client {here.number}")
    clock["load"] = time.perf_counter() - since
    since = time.perf_counter()
    memory = _memory(note, context)
    try:
        params, kept = _restored(told, memory, made)
    except LostError as error:
        log.warning("%s", error)
        return letter(b"", {"lost": True})
    update = client.run(told._replace(params=params), made.plan.method, job.local(made, told.client_class)(0))
    if made.plan.method.follows:
        memory.keep(kept)
    clock["step"] = time.perf_counter() - since
    return letter(wire.encode(update), {key: float(value) for key, value in clock.items()})


def _restored(told: Instruction, memory: Memory, made: Job) -> tuple[Any, Held]:
    """Current values from what this process holds, else from what was kept."""
    method, head = made.plan.method, train.head(made.plan)
    for held in memory.tries() if method.follows else [None]:
        try:
            return ledger.restored(told, held, method, head)
        except LostError as error:
            why = error
    raise why


class Memory(NamedTuple):
    """Where a client keeps the values that it catches up from."""

    context: Context
    key: str
    shared: str  # a file for all clients of a simulation, or "": the node's own state

    def tries(self) -> Sequence[Held | None]:
        """What might be held, the quickest first."""
        near = _held.get(self.shared) if self.shared else _unpacked(self._state())
        if not self.shared or not os.path.isfile(self.shared):
            return [near]
        return [near, _unpacked(Path(self.shared).read_bytes())]

    def keep(self, held: Held) -> None:
        """Holds values; those of a round once."""
        if not self.shared:
            self.context.state[self.key] = letter(packed(held), {})["body"]
            return
        before = _held.get(self.shared)
        if before is None or before.round != held.round:
            _held.clear()
            _held[self.shared] = held
            remember(self.shared, held)

    def _state(self) -> bytes:
        kept = self.context.state.get(self.key)
        return opened(RecordDict({"note": letter(b"", {})["note"], "body": kept}))[0] if kept is not None else b""


_held: dict[str, Held] = {}  # in a simulation: what this process saw last


def _memory(note: Note, context: Context) -> Memory:
    """Of this run and experiment alone: a node's state may outlive a run."""
    key = f"held-{context.run_id}-{note['which']}"
    for other in [name for name in context.state if name != key]:
        del context.state[other]
    return Memory(context, key, note.get("shared", ""))


def shared_file(run_id: int, which: int) -> str:
    """The file of a simulation's clients."""
    return str(Path(tempfile.gettempdir()) / f"spryfl-{run_id}-{which}.held")


def remember(path: str, held: Held) -> None:
    """Writes what all clients of a simulation hold, whole at every moment."""
    beside = f"{path}.{os.getpid()}"
    Path(beside).write_bytes(packed(held))
    os.replace(beside, path)


def packed(held: Held) -> bytes:
    return wire.dump({"round": held.round, "params": held.params})


def _unpacked(data_: bytes) -> Held | None:
    if not data_:
        return None
    kept, _ = wire.load(data_)
    return Held(kept["round"], kept["params"])
