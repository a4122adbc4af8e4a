"""Commands that use a trained model: `spryfl evaluate | predict | export`. Costs the model, and a value pass a row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spryfl.commands import app, out


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


@app.command()
def export(
    what: Annotated[Path, typer.Argument(help="A run folder or an adapter folder.")],
    folder: Annotated[Path, typer.Argument(help="The new folder.", metavar="DIR")],
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
) -> None:
    """Write the whole finetuned model, adapter merged, as a folder that transformers opens alone."""
    from spryfl import merging

    adapter, _ = _adapter(what)
    with out.status("merging"):
        made = merging.export(adapter, folder, precision=precision, trust_remote_code=trust_remote_code)
    apart = f"its outputs are within {made.difference:.1e} of the adapter's, the largest being {made.scale:.3g}"
    out.print(f"{folder}: {made.nbytes / 1e6:.1f} MB, {precision}; {apart}", soft_wrap=True)
    out.print(f'next    transformers.{made.auto}.from_pretrained("{folder}")', soft_wrap=True)


def _adapter(what: Path) -> tuple[Path, dict[str, Any]]:
    """The adapter folder that a run folder or an adapter folder stands for, and its card."""
    from spryfl import models

    folder = what / "adapter" if (what / "config.toml").is_file() else what
    own = sorted(one.name for one in folder.glob("client-*"))
    if own:
        raise ValueError(f"in {folder} each client has a model of its own. Give one of them: {folder / own[0]} ...")
    return folder, models.read_card(folder)
