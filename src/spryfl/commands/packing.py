"""The command that packs a model: `spryfl pack`. Costs encoding it once; memory: one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from spryfl.commands import app, out


@app.command()
def pack(
    model: Annotated[str, typer.Argument(help="A local folder with safetensors, a hub name, or minilm.")],
    folder: Annotated[Path, typer.Argument(help="The new folder.", metavar="DIR")],
    precision: Annotated[str, typer.Option(help="4bit, 8bit, bfloat16, float16 or float32.")] = "4bit",
    revision: Annotated[str, typer.Option(help="Of a hub name.")] = "",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
) -> None:
    """Write a model in few bits, block by block, so that it fits in small memory: then --model DIR."""
    from spryfl import packing

    columns = TextColumn("packing"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as shown:
        bar = shown.add_task("")
        made = packing.pack(
            model,
            folder,
            precision,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: shown.update(bar, completed=done, total=total),
        )
    out.print(f"{folder}: {made.after / 1e6:.1f} MB of {made.before / 1e6:.1f} MB, {precision}", soft_wrap=True)
    if made.left_out:
        named = ", ".join(made.left_out[:3]) + (" ..." if len(made.left_out) > 3 else "")
        out.print(f"left out, as the model's class has no place for them: {named}", soft_wrap=True)
    out.print(f"next    spryfl run --model {folder} --set model.stream=true", soft_wrap=True)
