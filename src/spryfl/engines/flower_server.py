"""The server's side of a run over Flower: the loop, the state and the run folder of `spryfl run`, another exchange.

Where nodes hold data of their own, the server's rows name the classes and are the test; no row of a site comes here.
Cost: that of a run in this process, but for the clients' steps.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from spryfl import config, costs, job, ledger, models, server, train
from spryfl.choices import REGISTRIES, parties
from spryfl.config import Experiment
from spryfl.engines import flower_client
from spryfl.engines.flower_check import Expected
from spryfl.engines.flower_grid import carried
from spryfl.engines.flower_letters import Note
from spryfl.engines.flower_nodes import Nodes, gathered
from spryfl.job import Job
from spryfl.journal import Journal, Progress
from spryfl.types import Instruction, ServerState

log = logging.getLogger("flwr")


def serve(grid: Grid, context: Context) -> None:
    """All experiments of a run, one after the other."""
    given = flower_client.experiments(context.run_config)
    where = Path(str(context.run_config.get("folder", "") or "runs/flower")).expanduser().absolute()
    goes_on = bool(context.run_config.get("resume", False))
    for which, one in enumerate(given):
        experiment = config.parse(one)
        folder = where / experiment.name if len(given) > 1 else where
        run(grid, context.run_id, which, experiment, folder, goes_on)


def run(grid: Grid, run_id: int, which: int, experiment: Experiment, folder: Path, goes_on: bool) -> None:
    """One experiment, to the end; its folder then is that of a run in process."""
    if experiment.threads:
        torch.set_num_threads(experiment.threads)
    corpus = job.read(experiment)
    model = job.load_model(experiment, corpus.labels)
    nodes = _nodes(grid, run_id, which, experiment, model)
    gathered(nodes, experiment.flower.nodes, experiment.flower.wait)
    own = nodes.own()
    if own:
        nodes.note |= {"labels": list(corpus.labels)}
    made = sites_job(experiment, corpus, model) if own else job.prepare(experiment, corpus, model)
    if any(one.memory for one in experiment.method.classes):  # chosen here, once; no client runs the planner
        nodes.note |= {"classes": json.dumps(made.experiment.as_dict()["method"]["classes"])}
    try:
        _rounds(made, nodes, own, *opened(made, folder, goes_on, own))
    finally:
        if nodes.simulated:
            Path(nodes.note["shared"]).unlink(missing_ok=True)


def _nodes(grid: Grid, run_id: int, which: int, experiment: Experiment, model: models.Model) -> Nodes:
    """Who is to take part, and what they are told beside their instructions."""
    note: Note = {"which": which, "threads": torch.get_num_threads()}
    clients, deadline = experiment.partition.clients, experiment.flower.deadline
    if not isinstance(grid, InMemoryGrid):
        greeting = {**note, "labels": list(model.labels), "model": flower_client.frozen_hash(model)}
        return Nodes(grid, clients, False, note, greeting, deadline)
    if not experiment.threads:
        side = "clients run side by side, each with %d threads, for the bits of the run in process; set threads = 1"
        log.warning(side, note["threads"])
    note |= {"shared": flower_client.shared_file(run_id, which)}
    return Nodes(grid, clients, True, note, {}, deadline)


def sites_job(experiment: Experiment, corpus: Any, model: models.Model) -> Job:
    """The server's job where every client's rows lie elsewhere."""
    if experiment.method.sharing != "federated":
        raise ValueError(
            f'method.sharing = "{experiment.method.sharing}" needs all rows in one place, and these nodes hold their '
            f"own. Run it in process, or use a federated method."
        )
    if experiment.train.probe:
        raise ValueError(
            f"train.probe = {experiment.train.probe} looks at training rows, and these nodes keep their own. "
            f"Remove it, or run it in process."
        )
    made, clients = job.prepare(flower_client.alone(experiment), corpus, model), experiment.partition.clients
    there = len(made.plan.method.present(clients))
    plan = made.plan._replace(clients=clients, cohort=min(experiment.train.cohort, there))
    settled = experiment.model_copy(update={"method": made.experiment.method})
    return made._replace(experiment=settled, plan=plan, parts=((),) * clients, held=((),) * clients)


def opened(made: Job, folder: Path, goes_on: bool, own: bool) -> tuple[Journal, ServerState, Progress]:
    """The run folder, new or gone on with."""
    if goes_on and folder.is_dir():
        return job.resume(made, folder)
    if own:
        return job.create(made, folder), *train.start(made.plan, made.model.params)
    begun, state, progress = job.begin(made, folder)
    assert begun is not None
    return begun, state, progress


def _rounds(made: Job, nodes: Nodes, own: bool, book: Journal, state: ServerState, progress: Progress) -> None:
    """The rounds that are left."""
    held = ledger.held_by_all(state, made.plan.method)
    if nodes.simulated and held:
        flower_client.remember(nodes.note["shared"], held)
    elif made.plan.method.follows:  # a new run is a new memory: nobody holds anything
        state = server.forget(state, state.ledger.seen)
    job.note(book, flower=_facts(nodes, own))
    log.info("run folder %s, process %d", book.folder, os.getpid())
    lost = train.lost(made.experiment.seed, made.experiment.train.drop_clients)
    usual = expected(made)
    exchange = carried(nodes, lost, lambda: usual._replace(examples={**usual.examples, **_examples(nodes)}))
    for record, _ in job.run(made, book, state, progress, exchange):
        score = record.get(made.plan.metric)
        log.info("round %d: loss %s%s", record["round"], record.get("loss"), f", {score:.4f}" if score else "")
    log.info("complete: %s", book.folder / "adapter")


def _facts(nodes: Nodes, own: bool) -> dict[str, Any]:
    """What run.json says of the federation."""
    keys = ("partition-id", "own", "examples", "counts", "fingerprint", "model", "torch")
    said = [{key: note[key] for key in keys if key in note} for note in nodes.said.values()]
    return {
        "engine": "simulation" if nodes.simulated else "deployment",
        "threads": nodes.note["threads"],
        "data": "at the sites" if own else "dealt",
        "nodes": sorted(said, key=lambda one: one.get("partition-id", 0)),
        "bytes_down": nodes.bytes_down,
        "bytes_up": nodes.bytes_up,
    }


def _examples(nodes: Nodes) -> dict[int, int]:
    """What sites with data of their own say that they train on, the newest word of each."""
    said = [note for note in nodes.said.values() if note.get("own") and "error" not in note]
    return {note["partition-id"]: note["examples"] for note in said}


def expected(made: Job) -> Expected:
    """What answers must be like."""
    examples = {i: len(part) for i, part in enumerate(made.parts)}
    method = made.experiment.method
    known = all(one.estimator["kind"] in list(REGISTRIES["estimator"]) for one in parties(method))
    return Expected(made.model.params, examples, steps(made), _seeded(made), method.guide or not known)


def steps(made: Job) -> Callable[[int], int]:
    """Local batches by the number of examples."""
    t = made.experiment.train
    return lambda examples: made.steps or t.epochs * math.ceil(examples / t.batch_size)


def _seeded(made: Job) -> Callable[[Instruction], tuple[int, frozenset[str]] | None]:
    """Scalars of a step and the names that are exact, by an instruction's units and its client's class."""
    work = costs.work(made.experiment.method, models.shapes_of(made.model.module, made.model.units, 1, 1))

    @functools.lru_cache(maxsize=256)
    def seeded(names: tuple[str, ...], client: int) -> tuple[int, frozenset[str]] | None:
        step = work([unit for unit in made.model.units if set(unit.params) <= set(names)], client)
        return step and (step.terms, frozenset(name for unit in step.dense for name in unit.params))

    def known(told: Instruction) -> tuple[int, frozenset[str]] | None:
        found = seeded(told.names, told.client)
        return found and (math.ceil(found[0] * told.growth) + 1, found[1]) if told.growth > 1 else found

    return known
