"""Commands that train: `spryfl run | compare | resume`. An interruption leaves what was finished, and exit code 130."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from spryfl.commands import Config, Data, Device, Method, Port, Runs, Seed, Set, Threads, app, changed_by, err, out
from spryfl.screen import Screen, Turns, head, table

if TYPE_CHECKING:
    from spryfl.compare import Comparison
    from spryfl.config import Experiment
    from spryfl.job import Job
    from spryfl.journal import Journal

Watch = Annotated[bool, typer.Option("--watch", help="Serve the report's page on this machine while the run goes on.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Events for TensorBoard too, in the run's folder.")]


@app.command()
def run(
    config: Config = None,
    method: Method = None,
    data: Data = None,
    model: Annotated[str | None, typer.Option(help="A local folder, a hub name, or minilm.")] = None,
    task: Annotated[str | None, typer.Option(help="classification, prompted, question_answering ...")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder; made up and numbered without it.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds.")] = None,
    clients: Annotated[int | None, typer.Option(help="Clients in all.")] = None,
    cohort: Annotated[int | None, typer.Option(help="Clients a round.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    set_: Set = None,
    runs: Runs = Path("runs"),
    watch: Watch = False,
    port: Port = 0,
    tensorboard: Tensorboard = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Finetune. Without --config, --method, --data or --model: the quickstart, on English that every machine has."""
    from spryfl import config as settings

    flags = {
        "method.name": method,
        "task.kind": task,
        "data.name": data,
        "data.text": text,
        "data.label": label,
        "model.name": model,
        "train.rounds": rounds,
        "train.cohort": cohort,
        "partition.clients": clients,
        "seed": seed,
        "device": device,
        "threads": threads,
        "name": name,
    }
    changes = changed_by(flags, set_)
    if not (config or method or data or model):
        config = settings.QUICKSTART
    experiment = settings.Experiment.load(config, changes)
    if dry_run:
        print(experiment.toml(), end="")
        return
    named = "name" in experiment.model_fields_set
    folder = runs / experiment.name if named else _free(runs / experiment.name)
    if folder.exists():
        raise ValueError(f"the run folder {folder} is there already. Choose another --name, or: spryfl resume {folder}")
    _go(experiment, folder, fresh=True, watch=port if watch else None, tensorboard=tensorboard)


@app.command("compare")
def compare_(
    config: Config = None,
    methods: Annotated[
        str | None, typer.Option(help="Labels, with commas: spry,fedavg. Or those of [compare].")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, with commas: 0,1,2. Or those of [compare].")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Its folder; made up without it.")] = None,
    set_: Set = None,
    target: Annotated[float, typer.Option(help="Of the metric: what each needs to come there. 0 = none.")] = 0.0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="The table alone.")] = False,
) -> None:
    """Several methods on the same data, seeds and budget, by turns: one table, one picture. Again: it goes on."""
    from spryfl import compare
    from spryfl import config as settings

    given = settings.merge(settings.read(config or settings.QUICKSTART), changed_by({}, set_))
    given = settings.merge(given, {"compare": {"target": target}} if target else {})
    labels = [word.strip() for word in (methods or "").split(",") if word.strip()]
    comparison = compare.parse(given, labels, compare.numbers(seeds or ""))
    _compare(comparison, folder or Path("runs") / f"compare-{(config or settings.QUICKSTART).stem}", quiet, target)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of a run or of a comparison.")],
    watch: Watch = False,
    port: Port = 0,
    tensorboard: Tensorboard = False,
) -> None:
    """Go on with what was stopped or killed; it ends in the same bits as if it had not been."""
    from spryfl import compare, journal
    from spryfl.config import Experiment

    if (folder / compare.FILE).is_file():
        if watch or tensorboard:
            beside = f"spryfl report --watch {folder}"
            raise ValueError(f"--watch and --tensorboard are for a run. Of a comparison, while it goes on: {beside}")
        _compare(compare.begun(folder), folder)
    else:
        experiment = Experiment.load(journal.open_folder(folder).folder / "config.toml")
        _go(experiment, folder, fresh=False, watch=port if watch else None, tensorboard=tensorboard)


def _go(experiment: Experiment, folder: Path, fresh: bool, watch: int | None, tensorboard: bool) -> None:
    """Prepares and runs an experiment, with what the screen shows; `watch` is the port of its page."""
    import torch

    from spryfl import api, job

    with contextlib.ExitStack() as stack:
        beside = _beside(folder, watch, tensorboard)
        for one in beside:
            stack.callback(one.close)
        if experiment.threads:
            torch.set_num_threads(experiment.threads)
        with out.status("reading data and model"):
            made = api.prepared(experiment)
            opened, state, progress = job.begin(made, folder) if fresh else job.resume(made, folder)
        try:
            with job.cancelling(opened):
                head(out, made, folder)
                _foretell(beside, folder)
            _rounds(made, opened, job.run(made, opened, state, progress), beside)
        except KeyboardInterrupt:
            err.print(f"\nstopped; the finished rounds are safe. Go on with: spryfl resume {folder}", soft_wrap=True)
            raise typer.Exit(130) from None
    _tail(folder)
    if watch is not None:
        _keep(beside, folder)


def _rounds(
    made: Job, opened: Journal | None, rounds: Iterator[tuple[dict[str, Any], Any]], beside: Sequence[Any]
) -> None:
    """Shows each round on the screen and beside it."""
    from spryfl import job

    with contextlib.ExitStack() as stack:
        for one in beside:
            stack.enter_context(one)
        stack.enter_context(job.cancelling(opened))
        screen = stack.enter_context(Screen(out, made.plan.rounds, made.plan.metric))
        for record, _ in rounds:
            for one in (screen, *beside):
                one.show(record)


def _beside(folder: Path, watch: int | None, tensorboard: bool) -> list[Any]:
    """What else is shown of a run: its page, events. Refused before anything is read."""
    made: list[Any] = []
    if watch is not None:
        from spryfl import footprint, page
        from spryfl.page.live import Live

        footprint.measure_here()
        made.append(Live([folder], watch, str(folder / page.NAME)))
    if tensorboard:
        from spryfl.track import Events

        made.append(Events(folder))
    return made


def _foretell(beside: Sequence[Any], folder: Path) -> None:
    """What the page says of memory, before the rounds begin: while they go on nothing is computed for it."""
    from spryfl.page.live import Live

    for live in (one for one in beside if isinstance(one, Live)):
        from spryfl import foretold, report

        live.foretold = foretold.steps([report.read(folder)])
        out.print(f"live    {live.address}\n", soft_wrap=True)


def _keep(beside: Sequence[Any], folder: Path) -> None:
    """The page as it was at the end, in the run's folder."""
    from spryfl import page

    page.write(page.gather([folder])._replace(foretold=beside[0].foretold), folder / page.NAME)
    out.print(f"page    {folder / page.NAME}", soft_wrap=True)


def _compare(comparison: Comparison, folder: Path, quiet: bool = False, target: float = 0.0) -> None:
    """Runs a comparison, with what the screen shows."""
    from spryfl import compare

    each = f"{len(comparison.labels)} methods x {len(comparison.seeds)} seeds"
    screen = Turns(Console(quiet=True) if quiet else out, comparison.labels, compare.metric(comparison))
    try:
        if not quiet:
            out.print(f"folder  {folder}: {each}\n", soft_wrap=True)
        with contextlib.closing(compare.turns(comparison, folder)) as turns, screen:
            for turn in turns:
                screen.show(*turn)
    except KeyboardInterrupt:
        begun = f"the finished rounds are safe. Go on with: spryfl resume {folder}"
        err.print(f"\nstopped; {begun if folder.exists() else 'nothing was begun.'}", soft_wrap=True)
        raise typer.Exit(130) from None
    compared(folder, target=target)


def compared(folder: Path, to: Path | None = None, target: float = 0.0) -> None:
    """The table and the picture of a comparison as it stands, written and shown."""
    from spryfl import pictures
    from spryfl import report as reports

    compared = reports.write_tables(folder, target)
    for path in [to] if to else [folder / "compare.png", folder / "compare.svg"]:
        pictures.comparison(compared, path)
    table(out, *reports.summary(compared.groups))
    if compared.target:
        out.print()
        table(out, *reports.target_table(compared.groups, compared.target))
    said = [f"note    {line}" for line in reports.notes(compared)]
    places = [f"table   {folder / 'table.md'}", f"picture {to or folder / 'compare.png'}"]
    out.print("\n".join(said + places), soft_wrap=True)


def _tail(folder: Path) -> None:
    """After the last round: what was learned, where it lies, what to try next."""
    from spryfl import pictures
    from spryfl import report as reports

    run_ = reports.read(folder)
    pictures.curves([run_], folder / "curves.png")
    if seen := reports.probed([run_]):
        pictures.alignment(seen, folder / "alignment.png")
        out.print(f"\nprobe   {folder / 'alignment.png'}", soft_wrap=True)
    name, (first, *_, last) = reports.metric(run_), reports.scored(run_) * 2
    out.print(
        f"\n{name} on the untouched test rows: {first[name]:.4f} before, {last[name]:.4f} after "
        f"{run_.records[-1]['round']} rounds (best {last['best']:.4f} in round {last['best_round']})",
        soft_wrap=True,
    )
    out.print(f"adapter {folder / 'adapter'}\npicture {folder / 'curves.png'}", soft_wrap=True)
    out.print(
        f'next    spryfl predict {folder} "a sentence of yours"\n        spryfl report {folder}\n'
        "        spryfl run --method fedavg",
        soft_wrap=True,
    )


def _free(folder: Path) -> Path:
    """The folder itself, or the first numbered one beside it that is free."""
    candidates = [folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 10_000))]
    return next(one for one in candidates if not one.exists())
