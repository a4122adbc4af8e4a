"""Commands that show: `spryfl methods | partition`. Costs what they read; `methods` loads no weights."""

from __future__ import annotations

from typing import Annotated

import typer

from spryfl.commands import Config, Data, Seed, Set, app, changed_by, out
from spryfl.screen import classes, notes, table


@app.command("methods")
def methods_(
    name: Annotated[str | None, typer.Argument(help="A row: what it is, its formula, its choices, its costs.")] = None,
    model: Annotated[str, typer.Option(help="Costs for this one: a local folder, a hub name, or minilm.")] = "",
    layers: Annotated[int | None, typer.Option(help="Blocks; without it RoBERTa-Large's 24.")] = None,
    width: Annotated[int | None, typer.Option(help="Values of a hidden state; without it 1024.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens a row.")] = 128,
    batch: Annotated[int, typer.Option(help="Rows a batch.")] = 8,
    labels: Annotated[int, typer.Option(help="Classes.")] = 4,
    rank: Annotated[int, typer.Option(help="r of LoRA on query and value.")] = 1,
    clients: Annotated[int, typer.Option(help="Clients in all.")] = 100,
    cohort: Annotated[int, typer.Option(help="Clients a round.")] = 10,
    steps: Annotated[int, typer.Option(help="Local batches a round.")] = 10,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Other choices: --set method.head=exact.")] = None,
) -> None:
    """The table of methods, or one of them with its formula and its predicted costs."""
    from spryfl import explain
    from spryfl.methods import METHODS

    given = explain.sized(model, {"layers": layers, "width": width}, tokens, batch, labels, rank)
    where = clients, cohort, steps
    if name is None:
        if set_:
            raise ValueError("--set changes one method: give its name too.")
        rows = [(m, explain.listed(m, given, *where)) for m in METHODS.values()]
        table(
            out,
            ("method", "gradient", "who trains what", "passes", "up", "what it is"),
            [(m.name, explain.gradient(m), explain.trainers(m), *costs, m.summary) for m, costs in rows],
        )
        out.print(
            "\nPasses of a step (value, tangent, backward) and what a client sends a round, predicted for", end=" "
        )
        out.print(explain.shown(given, *where), soft_wrap=True)
        return
    row = explain.changed(name, set_ or [])
    made = explain.costs(row, given, *where)
    out.print(f"{row.name}: {row.summary}\n{row.paper}\n", soft_wrap=True)
    table(out, ("choice", "value", "what it does"), explain.choices(row))
    out.print(f"\ncosts at {explain.shown(given, *where)}", soft_wrap=True)
    table(out, ("", "by the paper", "true"), explain.table(made))


@app.command("partition")
def partition_(
    config: Config = None,
    data: Data = None,
    clients: Annotated[int | None, typer.Option(help="Clients in all.")] = None,
    seed: Seed = None,
    set_: Set = None,
) -> None:
    """Draw how the classes fall to the clients."""
    from spryfl import config as settings
    from spryfl import job, partition

    flags = {"data.name": data, "partition.clients": clients, "seed": seed}
    experiment = settings.Experiment.load(config, changed_by(flags, set_))
    corpus = job.read(experiment)
    parts = job.deal(experiment, corpus)
    notes(out, corpus)
    classes(out, corpus.labels, partition.statistics(parts, corpus.train.label, len(corpus.labels)))
