"""The command that says what fits where: `spryfl plan`. Cost: seconds; of a model its configuration alone is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from spryfl import options
from spryfl.commands import Config, Set, app, changed_by, err, out
from spryfl.screen import table

_HEAD = "fits", "method", "setting", "total"
_TAIL = "passes", "TFLOP", "progress", "up", "down"


@app.command("plan")
def plan_(
    config: Config = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="Rows of `spryfl methods`, with commas.")] = None,
    model: Annotated[str | None, typer.Option(help="A folder with a config.json, a packed folder, a hub name.")] = None,
    memory: Annotated[str, typer.Option(help="What a client has, imports included: 6GB, 800MB, 1.5GiB.")] = "",
    batch: Annotated[int | None, typer.Option(help="Rows of a local batch.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="lora, ia3, bitfit ...; its options by --set adapter.r=4.")
    ] = None,
    precision: Annotated[str, typer.Option(help="As `spryfl pack` makes it: 4bit, 8bit, bfloat16 ...")] = "",
    labels: Annotated[int, typer.Option(help="Classes.")] = 2,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="All blocks stay in memory.")] = False,
    settings: Annotated[bool, typer.Option("--own", help="The methods' own settings alone, all of them.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the parts of each row there.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Plain values, for programs.")] = False,
    set_: Set = None,
) -> None:
    """What one client's step holds in memory, part by part, with each way to a gradient; what fits, best first."""
    from spryfl import advice, footprint
    from spryfl.config import Experiment
    from spryfl.methods import named
    from spryfl.plan import shown

    footprint.measure_here()
    flags = {"model.name": model, "train.batch_size": batch, "data.max_length": tokens, "adapter.kind": adapter}
    asked = [word.strip() for word in (method or "").split(",") if word.strip()]
    given = Experiment.load(config, changed_by({**flags, "method.name": asked[0] if asked else None}, set_))
    budget = options.nbytes(memory) if memory else 0
    of, note = _outline(given, labels, precision, budget, no_stream)
    methods = [given.method, *(named(name) for name in asked[1:])]
    t = given.train
    own: dict[str, Any] = {"rows": t.batch_size, "tokens": given.data.max_length, "every": settings}
    round_: dict[str, Any] = {"clients": given.partition.clients, "cohort": t.cohort, "steps": t.steps or 10}
    answer = advice.advise(of, methods, budget=budget, stream=not no_stream, **own, **round_)
    if picture and answer.rows:
        from spryfl import pictures

        parts = [(row.planned.setting, row.planned.footprint._asdict()) for row in answer.rows]
        pictures.parts([(advice.said(setting), held) for setting, held in parts], picture, budget)
    if json_:
        rows = [advice.plain(row) for row in answer.rows]
        print(json.dumps({"model": of.name, "precision": of.precision, "rows": rows, "advice": answer.text}, indent=1))
    else:
        out.print(
            f"{of.name}: {of.layers} blocks, {of.precision or 'as it is loaded'}; batches of {t.batch_size} x "
            f"{given.data.max_length} tokens{'; ' + note if note else ''}\n",
            soft_wrap=True,
        )
        if answer.rows:
            table(out, (*_HEAD, *footprint.Footprint._fields, *_TAIL), [advice.cells(row) for row in answer.rows])
            out.print(
                f"\nprocess is measured here: {shown(footprint.process())} after the imports. The rest is predicted."
            )
    if not answer.fits:
        err.print(f"spryfl: {answer.text}", style="red", soft_wrap=True)
        raise typer.Exit(2)
    if not json_:
        out.print(answer.text, soft_wrap=True)
    if picture and not json_:
        out.print(f"picture {picture}", soft_wrap=True)


def _outline(given: Any, labels: int, precision: str, budget: int, no_stream: bool) -> tuple[Any, str]:
    """The model; in 4 bits where no precision was asked for and the budget is below the model as it is loaded."""
    from spryfl import adapters, footprint, tasks
    from spryfl.plan import shown

    names = tuple(str(i) for i in range(labels))
    own = {"task": tasks.build(given.task), "attention": given.model.attention}
    made = [given.model.name, names, adapters.build(given.adapter)]
    of = footprint.outline(*made, precision=precision, **own)
    idle = footprint.held(of).total
    if of.precision or not budget or idle <= budget:
        return of, ""
    less = footprint.outline(*made, precision="4bit", **own)
    note = f"as it is loaded, {shown(of.backbone)}, it does not fit at all: these rows are for `spryfl pack` in 4 bits"
    return less, note
