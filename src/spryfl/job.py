"""Joins an experiment's parts: data, model, partition, clients, loop, folder. `finetune` is the same for Python.

Cost: the model once, the tokens of all rows, and what the loop costs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spryfl import (
    adapters,
    client,
    costs,
    data,
    firstbatch,
    journal,
    ledger,
    methods,
    models,
    noise,
    partition,
    probe,
    provenance,
    server,
    sizing,
    tasks,
    train,
    tree,
)
from spryfl.config import Experiment
from spryfl.engines.simulate import simulation
from spryfl.journal import Journal, Progress
from spryfl.models import Model
from spryfl.privacy import Privacy
from spryfl.tasks import Rows
from spryfl.types import Batch, Params, ServerState

_SCORE_BATCH = 64  # rows; scoring keeps no activations


class Job(NamedTuple):
    """An experiment ready to run."""

    experiment: Experiment
    corpus: data.Corpus
    model: Model
    rows: Rows  # the training rows
    test: Rows
    parts: tuple[tuple[int, ...], ...]  # each client's rows for training
    held: tuple[tuple[int, ...], ...]  # each client's rows held out
    plan: train.Plan
    steps: int  # local batches a round; 0 = by epochs
    streamed: Model | None = None  # the same model opened block by block, where a class of clients wants it so


def read(experiment: Experiment) -> data.Corpus:
    """The experiment's data."""
    d = experiment.data
    options = d.model_dump(exclude={"name", "max_length"})
    return data.load(d.name, **options, seed=experiment.seed, needs=tasks.build(experiment.task).needs)


def deal(experiment: Experiment, corpus: data.Corpus) -> tuple[tuple[int, ...], ...]:
    """Each client's rows of the training set."""
    make = partition.build(experiment.partition.split)
    labels, groups = corpus.train.label, corpus.train.group
    return make(labels, groups, experiment.partition.clients, noise.child_seed(experiment.seed, "partition"))


def load_model(experiment: Experiment, labels: tuple[str, ...]) -> Model:
    """The experiment's model with its adapter."""
    m, seed = experiment.model, noise.child_seed(experiment.seed, "model")
    base, tokenizer = models.load(
        m.name,
        labels,
        revision=m.revision,
        attention=m.attention,
        trust_remote_code=m.trust_remote_code,
        seed=models.drawn(m.adapter, seed),
        task=(task := tasks.build(experiment.task)),
        stream=m.stream,
    )
    adapter = m.adapter or adapters.build(experiment.adapter)
    _, source = models.resolve(m.name)
    where: dict[str, Any] = {"source": source, "seed": seed, "device": experiment.device}
    return models.prepare(base, tokenizer, labels, adapter, **where, task=task)


def encode(experiment: Experiment, corpus: data.Corpus, model: Model) -> tuple[Rows, Rows]:
    """Tokens of the training and of the test rows."""
    most = experiment.data.max_length
    train, test = (model.task.encode(model.tokenizer, side, most) for side in (corpus.train, corpus.test))
    models.check_length(model, [train, test])
    return train, test


def prepare(experiment: Experiment, corpus: data.Corpus, model: Model, tokens: tuple[Rows, Rows] | None = None) -> Job:
    """Tokens (unless they are there), partition and plan of an experiment whose data and model are there."""
    rows, test = tokens or encode(experiment, corpus, model)
    experiment = sizing.settled(experiment, corpus.labels, rows)
    cut = [
        partition.hold_out(part, experiment.partition.held_out, noise.child_seed(experiment.seed, "held out", i))
        for i, part in enumerate(deal(experiment, corpus))
    ]
    parts, held = tuple(own for own, _ in cut), tuple(kept for _, kept in cut)
    steps, t = experiment.train.steps, experiment.train
    if experiment.method.sharing == "pooled":
        steps = _pooled_steps(experiment, parts)
        parts, held = (_joined(parts),), (_joined(held),)
    clients, built = len(parts), methods.build(experiment.method)
    plan = train.Plan(
        method=built,
        units=model.units,
        seed=experiment.seed,
        rounds=t.rounds,
        clients=clients,
        cohort=min(t.cohort, len(built.present(clients))),
        eval_every=t.eval_every,
        patience=t.patience,
        limits=train.Limits(t.max_passes, t.max_megabytes, t.max_seconds),
        metric=model.task.metric,
        quorum=train.Quorum(t.min_answers, t.tries, t.rest),
        promised=Privacy(**experiment.privacy.model_dump()) if experiment.privacy.clip else None,
    )
    return Job(experiment, corpus, model, rows, test, parts, held, plan, steps, _streamed(experiment, corpus))


def _streamed(experiment: Experiment, corpus: data.Corpus) -> Model | None:
    """The packed model once more, for the classes of clients that stream it: units and values are the same."""
    section = experiment.model.model_copy(update={"stream": True})
    wanted = any(one.stream for one in experiment.method.classes) and not experiment.model.stream
    return load_model(experiment.model_copy(update={"model": section}), corpus.labels) if wanted else None


def _held(job: Job, name: str) -> tuple[Model, int]:
    """How a class of clients holds the model: (as it is opened for it, rows at once; 0 = whole batches)."""
    for one in job.experiment.method.classes:
        if one.name == name:
            model = job.streamed if one.stream and job.streamed else job.model
            return model, one.micro_batch or job.experiment.train.micro_batch
    return job.model, job.experiment.train.micro_batch


def _pooled_steps(experiment: Experiment, parts: Sequence[Sequence[int]]) -> int:
    """As many local batches a round as a cohort of clients would take together."""
    t = experiment.train
    each = [t.steps or t.epochs * -(-len(part) // t.batch_size) for part in parts]
    return max(1, round(t.cohort * sum(each) / len(each)))


def _joined(parts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sorted(index for part in parts for index in part))


def predicted(job: Job) -> costs.Costs:
    """What the experiment's method costs at its shapes, a row as long as the mean of the training rows."""
    t, method = job.experiment.train, job.experiment.method
    lengths = tasks.lengths(job.rows)
    sequences = t.batch_size * len(lengths) // max(len(job.rows.inputs), 1)
    shapes = models.shapes_of(job.model.module, job.model.units, sequences, round(sum(lengths) / len(lengths)))
    steps = job.steps or t.epochs * math.ceil(sum(map(len, job.parts)) / len(job.parts) / t.batch_size)
    if method.sharing == "pooled":  # the steps of a cohort are counted already
        method = dataclasses.replace(method, sharing="federated")
    return train.predicted(method, shapes, job.plan.clients, job.plan.cohort, steps)


def local(job: Job, client_class: str | None = None) -> Callable[[int], client.Local]:
    """Each client's own side: its rows, and the model as its class holds it.

    A job of one client alone has it under number 0: it says the class that the instruction says.
    """
    t, keep = job.experiment.train, int(job.experiment.train.keep_prefix * 1e6)

    def batches(indices: Sequence[int], seed: int) -> Iterator[Batch]:
        epochs = 0 if job.steps else t.epochs
        for chosen in tasks.shuffled(indices, t.batch_size, seed, epochs, job.steps, same=bool(t.keep_prefix)):
            yield tasks.collate(job.rows, chosen, job.model.device)

    def one(i: int) -> client.Local:
        model, most = _held(job, job.plan.method.member(i) if client_class is None else client_class)
        return client.Local(
            bind=lambda fixed, guide: models.loss_fn(model, fixed, guide, t.dropout, keep, most),
            batches=lambda seed: batches(job.parts[i], seed),
            examples=len(job.parts[i]),
            held_out=lambda: scoring(job.rows, job.held[i], model, most),
            score=lambda params, held: personal(job, params, held, len(job.held[i]), model),
            device=model.device,
        )

    return one


def personal(
    job: Job, params: Params, held: Iterator[tuple[list[int], Batch]], count: int, model: Model
) -> tuple[float, int]:
    """(the metric on a client's held-out rows, times these; rows): sums over clients give the mean weighted by rows."""
    if not count:
        return 0, 0
    metrics, _ = models.score(model, params, job.rows, held)
    return metrics[job.model.task.metric] * count, count


def scoring(rows: Rows, indices: Sequence[int], model: Model, most: int = 0) -> Iterator[tuple[list[int], Batch]]:
    """Batches for scoring, of like length, each with the indices of its rows; of `most` rows, 0 as usual."""
    for chosen in tasks.by_length(rows, indices, most or _SCORE_BATCH):
        yield chosen, tasks.collate(rows, chosen, model.device)


def evaluate(job: Job) -> train.Evaluate:
    """The task's metrics and the mean loss on the test rows: of the shared model, or the mean over the clients' own."""

    def one(params: Params) -> dict[str, float]:
        batches = scoring(job.test, range(len(job.test.labels)), job.model, job.experiment.train.micro_batch)
        metrics, loss = models.score(job.model, params, job.test, batches)
        return {**metrics, "test_loss": loss}

    def every(params: Params) -> dict[str, float]:
        scores = [one(own) for own in own_models(job, params)]
        return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}

    return every


def watched(job: Job) -> train.Watch | None:
    """What holds rounds against the true gradient, where that is asked for."""
    t = job.experiment.train
    asked = t.probe, t.probe_every, t.batch_size
    return probe.watch(job.plan, job.rows, job.parts, functools.partial(_held, job), asked) if t.probe else None


def own_models(job: Job, params: Params) -> list[Params]:
    """The models that a state holds: one, or one a client where nobody shares."""
    if not job.plan.method.alone:
        return [params]
    return [server.personal(params, i, job.plan.method) for i in range(job.plan.clients)]


def exchange(job: Job, state: ServerState) -> train.Exchange:
    """The exchange in this process, from a state on."""
    drop = train.lost(job.experiment.seed, job.experiment.train.drop_clients)
    return simulation(
        job.plan.method, local(job), drop, train.head(job.plan), ledger.held_by_all(state, job.plan.method)
    )


def rehearse(job: Job) -> None:
    """One row through the estimator, for the clients with the fewest and the most values, before there is a folder.

    A ValueError says what cannot be together. Of classes the first client of each; with micro-batches a row more.
    """
    plan, (state, _) = job.plan, train.start(job.plan, job.model.params)
    first = {plan.method.member(client_): client_ for client_ in reversed(plan.method.present(plan.clients))}
    cohort = list(first.values()) if plan.method.classes else train.cohort(plan, 1)
    told = server.begin(state, plan.units, cohort, plan.method, plan.seed, growth=plan.method.growth)
    told.sort(key=lambda one: tree.size(tree.select(one.params, one.names)))
    for one in told if plan.method.classes else {told[i].client: told[i] for i in (0, -1)}.values():
        values, (model, most) = tree.to(one.params, job.model.device), _held(job, one.client_class)
        loss_fn = models.loss_fn(model, tree.without(values, one.names), micro_batch=most)
        batch = tasks.collate(job.rows, job.parts[one.client][: 1 + most], job.model.device)
        seed, chosen = noise.child_seed(plan.seed, "rehearsal"), tree.select(values, one.names)
        estimator = plan.method.of(one.client_class, one.growth).estimator
        firstbatch.rehearsed(estimator, loss_fn, chosen, batch, seed, models.foreign(model))


def begin(job: Job, folder: Path | None) -> tuple[Journal | None, ServerState, Progress]:
    """A new run, in a new folder if one is given."""
    if folder or models.foreign(job.model):
        rehearse(job)
    return (create(job, folder) if folder else None, *train.start(job.plan, job.model.params))


def create(job: Job, folder: Path) -> Journal:
    """The folder of a new run."""
    return journal.create(folder, job.experiment.toml(), facts(job))


def resume(job: Job, folder: Path) -> tuple[Journal, ServerState, Progress]:
    """The run in a folder, from its newest state; from the start if it was killed before the first."""
    opened = journal.claim(folder)
    begun = opened.state_file(journal.NEWEST).is_file()
    fresh = train.start(job.plan, job.model.params)
    state, progress = journal.load(opened) if begun else fresh
    same_data(opened, job)
    journal.same_values(opened, state, fresh[0])
    journal.rewind(opened, state.round if begun else -1)
    return opened, state, progress


def run(
    job: Job, opened: Journal | None, state: ServerState, progress: Progress, carry: train.Exchange | None = None
) -> Iterator[tuple[dict[str, Any], ServerState]]:
    """The rounds that are left, in this process or by `carry`; then the adapter is written, the run called complete."""
    if opened and not train.unfinished(job.plan, state, progress) and journal.facts_of(opened)["state"] == "complete":
        journal.release(opened)
        return
    final, carry = state, carry or exchange(job, state)
    note(opened, state="running")
    for record, final in train.train(job.plan, state, progress, carry, evaluate(job), opened, watched(job)):
        yield record, final
    if opened:
        export(job, server.served(final), opened.folder / "adapter")
        note(opened, state="complete", ended=provenance.now())
        journal.release(opened)


@contextlib.contextmanager
def cancelling(opened: Journal | None) -> Iterator[None]:
    """Around what consumes `run`: an interruption or an error, wherever it comes, leaves a run called cancelled."""
    try:
        yield
    except BaseException:
        stopped(opened)
        raise


def stopped(opened: Journal | None) -> None:
    """A run that was not carried to its end: called so, and free for another process to go on with."""
    if opened:
        try:
            note(opened, state="cancelled")
        finally:
            journal.release(opened)


def export(job: Job, params: Params, folder: Path) -> None:
    """The adapter and head in PEFT's format; a folder for each client where nobody shares."""
    own = own_models(job, params)
    for i, values in enumerate(own):
        with journal.writing(folder):
            models.save_adapter(job.model, values, folder if len(own) == 1 else folder / f"client-{i:03d}", card(job))


def card(job: Job) -> dict[str, Any]:
    """What PEFT's format has no place for."""
    d = job.experiment
    return {
        "model": d.model.name,
        "revision": d.model.revision,
        "task": d.as_dict()["task"],
        "labels": list(job.model.labels),
        "max_length": d.data.max_length,
        "method": d.method.name,
        "seed": models.drawn(d.model.adapter, noise.child_seed(d.seed, "model")),
        **({"stream": True} if d.model.stream else {}),
    }


def note(opened: Journal | None, **changes: Any) -> None:
    """Changes some facts in run.json."""
    if opened:
        journal.describe(opened, {**journal.facts_of(opened), **changes})


def facts(job: Job) -> dict[str, Any]:
    """What a result must carry: versions, hardware, commit, date, data, state."""
    return {
        "state": "running",
        "started": provenance.now(),
        **provenance.environment(job.model.device),
        "seed": job.experiment.seed,
        "metric": job.model.task.metric,
        "model": models.facts(job.model),
        "data": {
            "source": job.corpus.source,
            "fingerprint": job.corpus.fingerprint,
            "train": len(job.rows.labels),
            "test": len(job.test.labels),
            "cut": job.rows.cut + job.test.cut,
            "tokens": max(tasks.lengths(job.rows), default=0),  # of the longest sequence
            "sequences": max(map(len, job.rows.inputs), default=1),  # of a row
        },
        **_dealt(job),
    }


def _dealt(job: Job) -> dict[str, Any]:
    """How the classes fall to the clients; not where the rows lie elsewhere or a promise covers them."""
    parts = [(*own, *kept) for own, kept in zip(job.parts, job.held, strict=True) if not job.plan.promised]
    return {"clients": partition.written(tuple(parts), job.corpus.train.label, job.corpus.labels)} if any(parts) else {}


def same_data(opened: Journal, job: Job) -> None:
    """Going on with other data, or another packed model, would not be the same run."""
    then = journal.facts_of(opened)
    models.same(then.get("model", {}), job.model)
    if then["data"]["fingerprint"] != job.corpus.fingerprint:
        raise ValueError(
            f"the data of {opened.folder} have changed since it began ({job.corpus.source}; the docstrings change with "
            f"the installed packages). Restore them, or start a new run."
        )
