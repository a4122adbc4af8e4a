"""`spryfl profile`: one client's step for real, its memory beside the prediction. Costs the model and a step."""

from __future__ import annotations

from typing import Annotated

import typer

from spryfl.commands import Config, Device, Method, Set, Threads, app, changed_by, out
from spryfl.screen import table


@app.command()
def profile(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder (packed or not; with a config.json alone: random weights), a hub name, or minilm."
        ),
    ] = None,
    config: Config = None,
    method: Method = None,
    batch: Annotated[int | None, typer.Option(help="Rows a batch.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens a row; without it data.max_length.")] = None,
    micro_batch: Annotated[int | None, typer.Option("--micro-batch", help="Rows in memory at once.")] = None,
    stream: Annotated[bool | None, typer.Option(help="One block of a packed model in memory at a time.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="lora, ia3, bitfit ...; its options by --set adapter.r=4.")
    ] = None,
    clients: Annotated[int | None, typer.Option(help="Clients of a round, among whom the units are dealt.")] = None,
    client: Annotated[int, typer.Option(help="Whose units are moved; 0 is the first client.")] = 0,
    labels: Annotated[int, typer.Option(help="Classes.")] = 2,
    device: Device = None,
    threads: Threads = None,
    set_: Set = None,
) -> None:
    """One step of one client in a fresh process: the peak of its memory, part by part, predicted and measured."""
    from spryfl import config as settings
    from spryfl.footprint import measure

    flags = {
        "model.name": model,
        "model.stream": stream,
        "method.name": method,
        "adapter.kind": adapter,
        "train.batch_size": batch,
        "train.micro_batch": micro_batch,
        "train.cohort": clients,
        "partition.clients": max(clients, 40) if clients else None,
        "data.max_length": tokens,
        "device": device,
        "threads": threads,
    }
    request = measure.requested(settings.Experiment.load(config, changed_by(flags, set_)), labels, client)
    found = measure.profile(request)
    rows, words = measure.shown(request, found)
    table(out, ("part", "predicted MB", "measured MB", "gap MB"), rows)
    for line in words:
        out.print(line, soft_wrap=True)
