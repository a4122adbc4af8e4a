"""Memory of one client's step: shapes by ways to a gradient, predicted and measured, the papers' numbers beside.

    python benchmarks/memory.py measure STORES [ROW ...]    cells one after the other, each in a fresh process; goes on
    python benchmarks/memory.py predict STORES [ROW ...]    predictions
    python benchmarks/memory.py table STORES                the page of what there is of both

STORES is a folder for packed folders of random values (stores.py makes missing ones); results go to memory_[hardware]_
[date].json and .md beside this file. A cell that is there is not measured again: remove it from the JSON to repeat it.
LoRA with r = 1 on query and value, a classifier of two classes as head. In the columns of Spry a client moves the
first block's first unit and the head, K = 1, the most that any of so many clients as units needs; in the others all.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from shapes import config, tokenizer

from spryfl import methods, packing, provenance
from spryfl.footprint import Footprint
from spryfl.footprint.measure import Request, measured, plain, planned, predicted, restored

HERE = Path(__file__).parent
RESULT = HERE / "memory_cpu_2026-11.json"
COLUMNS = {  # title -> (row of the table of methods, streamed)
    "backprop": ("fedavg", False),
    "checkpointed backprop": ("fedavg_checkpointed", False),
    "central difference": ("fedmezo", False),
    "Spry": ("spry", False),
    "Spry, streamed": ("spry", True),
}
# (shape, precision, rows, tokens), in the order of the table; what is measured is named on the command line.
ROWS = [
    ("roberta-large", "float32", 8, 256),
    ("roberta-large", "float32", 8, 64),
    ("roberta-large", "float32", 1, 256),
    ("qwen2.5-0.5b", "float32", 8, 256),
    ("qwen2.5-0.5b", "float32", 8, 64),
    ("qwen2.5-0.5b", "float32", 1, 256),
    ("qwen2.5-0.5b", "float32", 1, 64),
    ("llama3.2-1b", "4bit", 8, 256),
    ("llama3.2-1b", "4bit", 1, 256),
    ("llama2-7b", "4bit", 8, 256),
    ("llama2-7b", "4bit", 8, 64),
    ("llama2-7b", "4bit", 1, 128),
    ("opt-6.7b", "4bit", 8, 256),
    ("opt-6.7b", "4bit", 1, 128),
    ("opt-13b", "4bit", 8, 256),
    ("opt-13b", "4bit", 8, 64),
    ("opt-13b", "4bit", 1, 128),
    ("opt-13b", "4bit", 1, 64),
]
# Peak of one client, GB, of Panchal et al. 2024 (arXiv 2405.15551), as its figure and text give them; and what others
# report of such models. None of it was measured here, and not on this hardware, length or software.
THEIRS = {
    "llama2-7b": "Spry's paper: 33.9 backprop, 6.2 Spry",
    "opt-13b": "Spry's paper: 76.5 backprop, 10.8 Spry; ZO2 (offloaded layers): 6.18",
    "opt-6.7b": "Spry's paper: 86.26 % less than backprop",
    "roberta-large": "Spry's paper: 27.90 % less than backprop",
    "qwen2.5-0.5b": "MeSP (2602.13069), on-device backprop: 0.136",
    "llama3.2-1b": "MeBP (2510.03425), on-device backprop of 0.5B to 4B: under 1",
}


def name_of(row: tuple[str, str, int, int]) -> str:
    shape, precision, rows, tokens = row
    return f"{shape} {precision} {rows}x{tokens}"


def units_of(shape: str) -> int:
    """LoRA's units on query and value."""
    return 2 * config(shape).num_hidden_layers


def folder_of(stores: Path, shape: str, precision: str, packed: bool) -> Path:
    """A packed folder, or for float32 in memory one with a configuration alone; made where it is not there."""
    folder = stores / (f"{shape}-{precision}" if packed else f"{shape}-config")
    if not folder.exists() and packed:
        packing.random_store(config(shape), folder, precision, tokenizer=tokenizer())
    elif not folder.exists():
        config(shape).save_pretrained(folder)
    return folder


def request(stores: Path, row: tuple[str, str, int, int], column: str) -> Request:
    """What a cell runs."""
    (shape, precision, rows, tokens), (method, stream) = row, COLUMNS[column]
    return Request(
        model=str(folder_of(stores, shape, precision, packed=stream or precision != "float32")),
        method=asdict(methods.named(method)),
        adapter={"kind": "lora", "r": 1},
        task={"kind": "classification"},
        labels=("0", "1"),
        rows=rows,
        tokens=tokens,
        stream=stream,
        threads=1,
        clients=units_of(shape) if method == "spry" else 1,
        split=False,
    )


def read() -> dict[str, Any]:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"cells": {}}


def write(result: dict[str, Any]) -> None:
    made = RESULT.with_suffix(".tmp")
    made.write_text(json.dumps(result, indent=1) + "\n")
    made.replace(RESULT)


def machine() -> dict[str, Any]:
    """Where and when a cell was measured."""
    cpu = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    where = {**provenance.environment(torch.device("cpu")), "date": provenance.now()}
    cores = {
        "cpu": {key.strip(): value.strip() for key, value in cpu.items()}.get("model name", ""),
        "cores": os.cpu_count(),
        "memory": int(memory["MemTotal"].split()[0]) * 1024,
        "kernel": platform.release(),
    }
    return {**where, **cores}


def measure(stores: Path, wanted: list[str]) -> None:
    """Measures what is not there yet, of the rows whose name begins with one of the words; `row:column` is one cell."""
    for word in wanted or [""]:
        begin, _, only = word.partition(":")
        for row in (row for row in ROWS if name_of(row).startswith(begin)):
            for column in COLUMNS:
                key = f"{name_of(row)}: {column}"
                if (only and column != only) or key in read()["cells"]:
                    continue
                asked, load = request(stores, row, column), os.getloadavg()
                try:
                    found: Any = plain(measured(asked))
                except ValueError as error:
                    found = {"failed": str(error)}
                said = {**asked._asdict(), "model": Path(asked.model).name}  # no path of a machine
                cell = {"request": said, "measured": found, "where": {**machine(), "load_before": load}}
                result = read()
                result["cells"][key] = cell
                write(result)
                print(key, {k: round(found[k] / 1e6) for k in ("peak", "counted") if k in found}, found.get("seconds"))


def predict(stores: Path, wanted: list[str]) -> None:
    """Predictions for the rows whose name begins with one of the words, those there are being made anew."""
    known: dict[str, Any] = {}
    for row in (row for row in ROWS if any(name_of(row).startswith(word) for word in wanted or [""])):
        for column in COLUMNS:
            asked = request(stores, row, column)
            known[asked.model] = known.get(asked.model) or planned(asked)
            foretold = predicted(asked, known[asked.model])
            result = read()
            result.setdefault("predicted", {})[f"{name_of(row)}: {column}"] = {
                **foretold._asdict(),
                "total": foretold.total,
                "commit": provenance.environment(torch.device("cpu"))["commit"],
            }
            write(result)
            print(f"{name_of(row)}: {column}: {foretold.total / 1e6:.0f} MB", flush=True)


def tabled() -> None:
    """The table of what has been predicted and measured."""
    result, gaps = read(), []
    lines = ["| shape, backbone, batch x tokens | " + " | ".join(COLUMNS) + " | theirs, GB |", "| --- " * 7 + "|"]
    for row in ROWS:
        keys = [f"{name_of(row)}: {column}" for column in COLUMNS]
        if not any(key in result["predicted"] for key in keys):
            continue
        said = [
            cell(result["predicted"].get(key, {}).get("total"), result["cells"].get(key, {}).get("measured"), key, gaps)
            for key in keys
        ]
        lines.append(f"| {name_of(row)} | " + " | ".join(said) + f" | {THEIRS[row[0]]} |")
    text = PAGE.format(table="\n".join(lines), gaps=told(gaps), parts=parts(result), notes=notes(result))
    RESULT.with_suffix(".md").write_text(text)
    print(text)


def cell(foretold: int | None, found: dict[str, Any] | None, key: str, gaps: list[tuple[float, str]]) -> str:
    if foretold is None:
        return "-"
    if not found or "failed" in found:
        return f"{foretold / 1e9:.2f} / {'failed' if found else '-'}"
    gap = foretold / found["peak"] - 1
    gaps.append((gap, key))
    return f"{foretold / 1e9:.2f} / **{found['peak'] / 1e9:.2f}** ({gap:+.0%})"


def told(gaps: list[tuple[float, str]]) -> str:
    if not gaps:
        return "Nothing has been measured yet."
    outside = [f"{key} ({gap:+.1%})" for gap, key in gaps if abs(gap) > 0.1]
    worst = max(gaps, key=lambda one: abs(one[0]))
    return (
        f"{len(gaps)} cells are measured; the prediction is within 10 % of {len(gaps) - len(outside)}. The "
        f"largest gap: {worst[1]} ({worst[0]:+.1%})." + (f" Outside: {'; '.join(outside)}." if outside else "")
    )


def parts(result: dict[str, Any]) -> str:
    """Predicted / measured by part, MB, of the measured cells."""
    names = Footprint._fields
    step = ("activations", "tangents", "gradients", "prefix")
    lines = [
        "| cell | process | backbone | adapters | step (allocator's count) | buffers | beside | mapped files | s |"
    ]
    lines.append("| --- " * 9 + "|")
    for key, one in result["cells"].items():
        found, foretold = one["measured"], result["predicted"].get(key)
        if "failed" in found or foretold is None:
            continue
        own = restored(found)
        both = [(foretold[name], getattr(own.parts, name)) for name in names]
        stepped = [
            tuple(map(sum, zip(*(pair for name, pair in zip(names, both, strict=True) if name in step), strict=True)))
        ]
        columns = [f"{a / 1e6:.0f} / {b / 1e6:.0f}" for a, b in [*both[:3], *stepped, both[7]]]
        columns += [f"{own.beside / 1e6:.0f}", f"{own.mapped / 1e6:.0f}"]
        lines.append(f"| {key} | " + " | ".join(columns) + f" | {own.seconds:.0f} |")
    return "\n".join(lines)


def notes(result: dict[str, Any]) -> str:
    where = next((one["where"] for one in result["cells"].values()), {})
    if not where:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    loads = [one["where"]["load_before"][0] for one in result["cells"].values()]
    threads = " or ".join(sorted({str(one["request"]["threads"]) for one in result["cells"].values()}))
    dates = sorted(one["where"]["date"] for one in result["cells"].values())
    commits = sorted({one["where"]["commit"][:10] for one in result["cells"].values()})
    return (
        f"{where['cpu']}, {where['cores']} cores shared with other work (load before a cell {min(loads):.1f} to "
        f"{max(loads):.1f}, so times say little), {where['memory'] / 1e9:.0f} GB, Linux {where['kernel']}; {versions}; "
        f"{threads} threads. Measured {dates[0]} to {dates[-1]}, commits {', '.join(commits)}."
    )


PAGE = """# Memory of one client's step, CPU, November 2026

GB of 1e9 bytes, predicted / **measured** (gap of the prediction). The peak of anonymous resident memory of a fresh
process that opens the model and takes one step, imports included, with the mapped pages of weights. `-`: not measured.
The last column is what the papers say of their own hardware, software and lengths: reported there, not measured here.

{table}

{gaps}

LoRA of rank 1 on query and value with a classifier of two classes, random weights: memory does not depend on them.
float32 rows stand in memory as transformers opens them; streamed columns and 4bit rows are packed folders. Spry moves
the first unit of the first block and the head (one of as many clients as there are units), K = 1; the others move all.
Attention is the models' default (scaled dot product), so backprop here does not keep the scores that the papers' does.

glibc keeps freed blocks up to the size of the largest that was freed, among which those in use leave holes. Where that
costs most, by reverse mode and in streamed steps, the package tells it to give blocks above 1 MB back at once. What it
saves, GB: RoBERTa-Large 8 x 64 backprop 2.68 before and 2.39 after, checkpointed 2.25 and 1.91; 1 x 256 2.27 and 2.09,
2.04 and 1.85; Qwen2.5-0.5B 8 x 64 3.60 and 3.37, 2.69 and 2.49. Forward mode keeps its freed blocks, for speed: that is
most of its `beside`.

## By part, MB, predicted / measured

`beside`: by how much the peak exceeds the sum of the measured parts (late imports, room that the C library keeps,
scratch of kernels). `mapped files` are pages of libraries and of weights that the system may drop.

{parts}

{notes}

Again: `python benchmarks/memory.py measure STORES`, then `predict` and `table` in the place of `measure`. Nothing of
this has been measured on a GPU: `spryfl profile --device cuda` takes the allocator's peaks there.
"""


if __name__ == "__main__":
    command, stores, *rest = sys.argv[1:]
    {"measure": measure, "predict": predict}[command](Path(stores), rest) if command != "table" else tabled()
