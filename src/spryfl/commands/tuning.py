"""The command that chooses settings: `spryfl tune`. Costs its trials; an interruption leaves what was finished."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from spryfl.commands import Config, Set, app, changed_by, err, out


@app.command()
def tune(
    config: Config = None,
    methods: Annotated[str | None, typer.Option(help="Labels, with commas: spry,fedavg. Or those of [tune].")] = None,
    trials: Annotated[int | None, typer.Option(help="Trials of each method, the same for all.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of a trial; without it the experiment's.")] = None,
    rows: Annotated[int | None, typer.Option(help="Training rows held out to choose by.")] = None,
    objective: Annotated[str | None, typer.Option(help="loss or metric, on those rows.")] = None,
    prune: Annotated[bool | None, typer.Option("--prune/--no-prune", help="End trials that are behind.")] = None,
    space: Annotated[
        list[str] | None, typer.Option(help="A range: --space 'method.local_optimizer.lr={log=[1e-4,1e-1]}'.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Trials and their runs follow from it.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Its folder; made up without it.")] = None,
    set_: Set = None,
) -> None:
    """Choose rates and other settings on held-out training rows, as many trials for each method. Again: it goes on."""
    from spryfl import config as settings
    from spryfl import tune as tuning

    if importlib.util.find_spec("optuna") is None:
        raise ValueError("spryfl tune needs Optuna, which is not installed here: pip install 'spryfl[tune]'.")
    given = settings.merge(settings.read(config or settings.QUICKSTART), changed_by({}, set_))
    flags = {"trials": trials, "rounds": rounds, "rows": rows, "objective": objective, "prune": prune, "seed": seed}
    changes: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    labels = [word.strip() for word in (methods or "").split(",") if word.strip()]
    made = tuning.parse(given, labels, {**changes, "space": dict(_range(text) for text in space or [])})
    where = folder or Path("runs") / f"tune-{(config or settings.QUICKSTART).stem}"
    total = made.trials * len(made.labels)
    out.print(f"folder  {where}: {made.trials} trials for each of {len(made.labels)} methods\n", soft_wrap=True)
    try:
        for one in tuning.turns(made, where):
            values = ", ".join(f"{key} = {value}" for key, value in one.values.items())
            score = "not finite" if one.score is None else f"{one.score:.4f}"
            said = f"{one.label} {one.number + 1}/{made.trials}: {score} after {one.rounds} rounds"
            out.print(f"{said}{' (pruned)' if one.pruned else ''}  {values}", soft_wrap=True)
    except KeyboardInterrupt:
        err.print(f"\nstopped; of {total} trials those that ended are kept. The same command goes on.", soft_wrap=True)
        raise typer.Exit(130) from None
    out.print(f"\n{tuning.table(made, tuning.trials(where))}", soft_wrap=True)
    out.print(f"chosen  {where / tuning.TUNED}\nnext    spryfl compare --config {where / tuning.TUNED}", soft_wrap=True)


def _range(text: str) -> tuple[str, Any]:
    """KEY={log=[a,b]} as (key, section)."""
    key, _, value = text.partition("=")
    try:
        return key.strip(), tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        shown = "--space 'method.local_optimizer.lr={log=[1e-4,1e-1]}'"
        raise ValueError(f'--space "{text}" is not of the form KEY=RANGE, for example {shown}.') from None
