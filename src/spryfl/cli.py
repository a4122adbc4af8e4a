"""The command line: `spryfl run | compare | resume | methods | report | partition | evaluate | predict`.

Whatever is wrong with what was given ends in one clear message and exit code 2; an interruption in 130. Modules that
load torch are imported by the commands that need them, so that --help and a typo are answered at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from spryfl.screen import Screen, Turns, classes, head, notes, table

if TYPE_CHECKING:
    from spryfl.compare import Comparison
    from spryfl.config import Experiment

app = typer.Typer(
    help="Finetune language models across clients whose data stays private and whose memory is small.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# Texts and paths may hold brackets: no markup. Piped output is not folded to the width of a terminal that is not there.
out = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True, markup=False)

Config = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file of an experiment.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any setting: --set train.rounds=10. May be repeated.")]
Method = Annotated[str | None, typer.Option("--method", "-m", help="A row of `spryfl methods`.")]
Data = Annotated[str | None, typer.Option(help="A file, a folder with train and test, a hub name, docstrings.")]
Seed = Annotated[int | None, typer.Option(help="Everything random follows from it.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps ...")]
Threads = Annotated[int | None, typer.Option(help="Threads of PyTorch on the CPU.")]
Runs = Annotated[Path, typer.Option("--out", help="Where run folders are made.")]


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
    changes = _changes(flags, set_)
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
    _go(experiment, folder, fresh=True)


@app.command("compare")
def compare_(
    config: Config = None,
    methods: Annotated[
        str | None, typer.Option(help="Labels, with commas: spry,fedavg. Or those of [compare].")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, with commas: 0,1,2. Or those of [compare].")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Its folder; made up without it.")] = None,
    set_: Set = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="The table alone.")] = False,
) -> None:
    """Several methods on the same data, seeds and budget, by turns: one table, one picture. Again: it goes on."""
    from spryfl import compare
    from spryfl import config as settings

    given = settings.merge(settings.read(config or settings.QUICKSTART), _changes({}, set_))
    labels = [word.strip() for word in (methods or "").split(",") if word.strip()]
    comparison = compare.parse(given, labels, compare.numbers(seeds or ""))
    _compare(comparison, folder or Path("runs") / f"compare-{(config or settings.QUICKSTART).stem}", quiet)


@app.command()
def resume(folder: Annotated[Path, typer.Argument(help="The folder of a run or of a comparison.")]) -> None:
    """Go on with what was stopped or killed; it ends in the same bits as if it had not been."""
    from spryfl import compare, journal
    from spryfl.config import Experiment

    if (folder / compare.FILE).is_file():
        _compare(compare.begun(folder), folder)
    else:
        _go(Experiment.load(journal.open_folder(folder).folder / "config.toml"), folder, fresh=False)


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


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or the folder of one comparison.")],
    to: Annotated[Path | None, typer.Option("--to", help="Where the picture goes.")] = None,
    means: Annotated[
        bool, typer.Option("--mean", help="Mean and spread of runs that differ in seed; Markdown.")
    ] = False,
) -> None:
    """Runs side by side: where they differ, how they ended, and a picture."""
    from spryfl import pictures
    from spryfl import report as reports

    if len(folders) == 1 and reports.is_comparison(folders[0]):
        _compared(folders[0], to)
        return
    read = [reports.read(folder) for folder in folders]
    if means:
        print(reports.markdown(*reports.summary(reports.by_seed(read))), end="")
        return
    if len(read) > 1:
        table(out, ("setting", *(r.name for r in read)), reports.differences(read))
    table(out, *reports.rows(read))
    picture = to or (folders[0] / "curves.png" if len(read) == 1 else folders[0].parent / "curves.png")
    pictures.curves(read, picture)
    out.print(f"picture: {picture}", soft_wrap=True)


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
    experiment = settings.Experiment.load(config, _changes(flags, set_))
    corpus = job.read(experiment)
    parts = job.deal(experiment, corpus)
    notes(out, corpus)
    classes(out, corpus.labels, partition.statistics(parts, corpus.train.label, len(corpus.labels)))


@app.command()
def evaluate(
    what: Annotated[Path, typer.Argument(help="A run folder or an adapter folder.")],
    file: Annotated[Path, typer.Argument(help="A labelled file: parquet, csv, jsonl.")],
    text: Annotated[str, typer.Option(help="Column of the text.")] = "",
    pair: Annotated[str, typer.Option(help="Column of the second text.")] = "",
    label: Annotated[str, typer.Option(help="Column of the label.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps ...")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
) -> None:
    """What a run or an adapter reaches on any file of its task: accuracy, or the task's other numbers, and the loss."""
    from spryfl import data, job, models

    folder, card = _adapter(what)
    model = models.open_adapter(folder, trust_remote_code, device)
    names = {"text": text, "pair": pair, "label": label}
    examples = data.read_labelled(file, model.labels, **names, needs=model.task.needs)
    rows = model.task.encode(model.tokenizer, examples, card["max_length"])
    count = len(rows.labels)
    metrics, loss = models.score(model, model.params, rows, job.scoring(rows, range(count), model))
    shown = ", ".join(f"{name} {value:.4f}" for name, value in {**metrics, "loss": loss}.items())
    out.print(f"{shown} on {count} rows; {rows.cut} texts were cut")


@app.command()
def predict(
    what: Annotated[Path, typer.Argument(help="A run folder or an adapter folder.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without any, lines of standard input.")] = None,
    pair: Annotated[str | None, typer.Option(help="The second text of each: a context, a hypothesis.")] = None,
    with_: Annotated[list[str] | None, typer.Option("--with", help="What else it reads: --with word=plant.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps ...")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
) -> None:
    """The task's answer to lines of text: a class with all probabilities, a span of the context, a perplexity."""
    from spryfl import config as settings
    from spryfl import models, tasks
    from spryfl.data.examples import Examples

    folder, card = _adapter(what)
    lines = [line for line in (texts or (line.rstrip("\n") for line in sys.stdin)) if line.strip()]
    if not lines:
        raise ValueError("no text to predict: give texts as arguments, or lines on standard input.")
    model = models.open_adapter(folder, trust_remote_code, device)
    given = {key: value for one in with_ or [] for key, value in settings.assignment(one, "--with").items()}
    if unread := [key for key in given if key not in model.task.needs.extra]:
        reads = ", ".join(model.task.needs.extra) or "nothing but the text and --pair"
        raise ValueError(f"--with {unread[0]} has no effect: this task reads {reads}. Remove it.")
    extra = {key: (value,) * len(lines) for key, value in given.items()}
    pairs = None if pair is None else (pair,) * len(lines)
    examples = Examples(tuple(lines), pairs, (0,) * len(lines), None, extra)
    rows = model.task.encode(model.tokenizer, examples, card["max_length"])
    for start in range(0, len(lines), 64):
        chosen = range(start, min(start + 64, len(lines)))
        answers = models.answers(model, model.params, tasks.collate(rows, chosen, model.device))
        for i, answer in zip(chosen, answers, strict=True):
            print(f"{model.task.say(answer, rows.labels[i], model.labels)}\t{lines[i]}")


def _go(experiment: Experiment, folder: Path, fresh: bool) -> None:
    """Prepares and runs an experiment, with what the screen shows."""
    import torch

    from spryfl import api, job

    if experiment.threads:
        torch.set_num_threads(experiment.threads)
    with out.status("reading data and model"):
        made = api.prepared(experiment)
        opened, state, progress = job.begin(made, folder) if fresh else job.resume(made, folder)
    try:
        with job.cancelling(opened):
            head(out, made, folder)
        with job.cancelling(opened), Screen(out, made.plan.rounds, made.plan.metric) as screen:
            for record, _ in job.run(made, opened, state, progress):
                screen.show(record)
    except KeyboardInterrupt:
        err.print(f"\nstopped; the finished rounds are safe. Go on with: spryfl resume {folder}", soft_wrap=True)
        raise typer.Exit(130) from None
    _tail(folder)


def _compare(comparison: Comparison, folder: Path, quiet: bool = False) -> None:
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
    _compared(folder)


def _compared(folder: Path, to: Path | None = None) -> None:
    """The table and the picture of a comparison as it stands, written and shown."""
    from spryfl import pictures
    from spryfl import report as reports

    compared = reports.write_tables(folder)
    pictures.comparison(compared, to or folder / "compare.png")
    table(out, *reports.summary(compared.groups))
    said = [f"note    {line}" for line in reports.notes(compared)]
    places = [f"table   {folder / 'table.md'}", f"picture {to or folder / 'compare.png'}"]
    out.print("\n".join(said + places), soft_wrap=True)


def _changes(flags: dict[str, Any], set_: list[str] | None) -> dict[str, Any]:
    """The flags that were given and every --set, nested."""
    from spryfl import config as settings

    changes: dict[str, Any] = {}
    for key, value in flags.items():
        if value is not None:
            changes = settings.merge(changes, settings.nested(key, value))
    for one in set_ or []:
        changes = settings.merge(changes, settings.assignment(one))
    return changes


def _tail(folder: Path) -> None:
    """After the last round: what was learned, where it lies, what to try next."""
    from spryfl import pictures
    from spryfl import report as reports

    run_ = reports.read(folder)
    pictures.curves([run_], folder / "curves.png")
    name, (first, *_, last) = reports.metric(run_), reports.scored(run_) * 2
    out.print(
        f"\n{name} on the untouched test rows: {first[name]:.4f} before, {last[name]:.4f} after "
        f"{run_.records[-1]['round']} rounds (best {last['best']:.4f} in round {last['best_round']})",
        soft_wrap=True,
    )
    out.print(f"adapter {folder / 'adapter'}\npicture {folder / 'curves.png'}", soft_wrap=True)
    out.print(
        f'next    spryfl predict {folder} "a sentence of yours"\n        spryfl run --method fedavg', soft_wrap=True
    )


def _adapter(what: Path) -> tuple[Path, dict[str, Any]]:
    """The adapter folder that a run folder or an adapter folder stands for, and its card."""
    from spryfl import models

    folder = what / "adapter" if (what / "config.toml").is_file() else what
    own = sorted(one.name for one in folder.glob("client-*"))
    if own:
        raise ValueError(f"in {folder} each client has a model of its own. Give one of them: {folder / own[0]} ...")
    return folder, models.read_card(folder)


def _free(folder: Path) -> Path:
    """The folder itself, or the first numbered one beside it that is free."""
    candidates = [folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 10_000))]
    return next(one for one in candidates if not one.exists())


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:  # without the place in the source
    err.print(f"warning {message}", style="yellow", soft_wrap=True)


def main() -> None:
    """The entry point: every ValueError, and what the system refuses, is a message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _warn
    try:
        app()
    except (ValueError, OSError) as error:
        err.print(f"spryfl: {error}", style="red", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
