"""One Spry step on a packed folder in a process of its own: memory by kind, time, what was read ahead.

    python benchmarks/streamed.py FOLDER --stream --tokens 128 --batch 1 --unit 0 --repeat 2
    python benchmarks/streamed.py FOLDER --stream --limit 1.5   # under a hard limit, where a control group can be made

LoRA with r = 1 on query and value; one unit moves (Spry's client with one unit), K = 1. Anonymous memory is RssAnon of
/proc/self/status, imports included, sampled every 5 ms; beside it file pages (the mapped tables and libraries).
The limit is a control group's (v1 or v2), made around the process and taken away again: it counts the page cache that
the process brings in too, so a model that is mapped whole would be reclaimed and read again, or be killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def status() -> dict[str, int]:
    """RssAnon, RssFile and VmRSS of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split() for line in lines}
    return {name: int(fields[name][1]) * 1024 for name in ("RssAnon", "RssFile", "VmRSS")}


class Watch(threading.Thread):
    """The highest of each, sampled."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = status()
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.005):
            self.look()

    def look(self) -> None:
        self.peak = {name: max(self.peak[name], value) for name, value in status().items()}


def step(asked: argparse.Namespace) -> dict[str, object]:
    """Opens the model, takes the steps, tells what they took."""
    watch = Watch()
    import torch

    from spryfl import models, opened
    from spryfl.adapters import lora
    from spryfl.estimators import backprop, forward

    torch.set_num_threads(asked.threads)
    watch.look()
    imports = status()
    begun = time.perf_counter()
    base, tokenizer = models.load(asked.folder, ("a", "b"), stream=asked.stream)
    model = models.prepare(base, tokenizer, ("a", "b"), lora(r=1))
    loaded, load_seconds = status(), time.perf_counter() - begun
    units = [unit for unit in model.units if not unit.head]
    names = {*units[asked.unit].params, *(name for unit in model.units if unit.head for name in unit.params)}
    fixed = {name: value for name, value in model.params.items() if name not in names}
    moved = {name: value for name, value in model.params.items() if name in names}
    ids = torch.randint(2, 900, (asked.batch, asked.tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(asked.batch).long()}
    ways = {
        "forward": forward(),
        "exact": forward(exact_head=True),
        "checkpointed": backprop(checkpoint=True),
        "backprop": backprop(),
    }
    seconds, losses, slopes = [], [], []
    for i in range(asked.repeat):
        begun = time.perf_counter()
        made = ways[asked.way](models.loss_fn(model, fixed), moved, batch, i)
        seconds.append(round(time.perf_counter() - begun, 2))
        losses.append(made.loss)
        slopes += [term.coefficient for term in made.terms]
    watch.over.set()
    watch.look()
    source = opened.backbone_of(model.module).source
    return {
        "folder": asked.folder,
        "way": asked.way,
        "stream": asked.stream,
        "batch": [asked.batch, asked.tokens],
        "threads": asked.threads,
        "peak": mega(watch.peak),
        "imports": mega(imports),
        "loaded": mega(loaded),
        "load_seconds": round(load_seconds, 1),
        "step_seconds": seconds,
        "loss": losses,
        "slopes": slopes,
        "read": vars(source.counts) if asked.stream else {},
        "system_load": os.getloadavg()[0],
    }


def mega(values: dict[str, int]) -> dict[str, float]:
    """In units of 1e6 bytes."""
    return {name: round(value / 1e6, 1) for name, value in values.items()}


@contextlib.contextmanager
def group(limit: int) -> Iterator[Path]:
    """A control group with a memory limit in bytes; it is removed at the end.

    Raises:
        SystemExit: none can be made here, and why.
    """
    old = (V1 / "memory.limit_in_bytes").is_file()
    made = (V1 if old else V2) / f"spryfl-{os.getpid()}"
    try:
        made.mkdir()
        if not old and not (made / "memory.max").is_file():
            made.rmdir()
            raise OSError("the memory controller is not switched on for this group (cgroup.subtree_control)")
        (made / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))
        if not old:
            (made / "memory.swap.max").write_text("0")
    except OSError as error:
        raise SystemExit(
            f"no hard limit here: a control group could not be made under {made.parent}: {error}"
        ) from None
    try:
        yield made
    finally:
        made.rmdir()


def forget(folder: str) -> None:
    """Drops a folder's files from the page cache, so that the group is charged for what it reads."""
    for file in Path(folder).iterdir():
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def limited(folder: str, words: list[str], limit: int) -> None:
    """The same command in a control group, and what the group counted."""
    forget(folder)
    with group(limit) as made:
        code = f"import os; open({str(made / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); "
        code += f"os.execv({sys.executable!r}, {[sys.executable, __file__, *words]!r})"
        done = subprocess.run([sys.executable, "-c", code])
        peak = next((made / n for n in ("memory.max_usage_in_bytes", "memory.peak") if (made / n).is_file()), None)
        counted = f"{int(peak.read_text()) / 1e6:.1f} MB" if peak else "not told by this kernel"
        print(f"limit {limit / 1e6:.0f} MB: exit code {done.returncode}, highest count of the group {counted}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--way", default="forward", help="forward, exact (head), checkpointed or backprop")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--unit", type=int, default=0, help="the unit that moves, from the bottom")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=0.0, help="GB (1e9 bytes)")
    asked = parser.parse_args()
    if asked.limit:
        at = sys.argv.index("--limit")
        limited(asked.folder, [*sys.argv[1:at], *sys.argv[at + 2 :]], int(asked.limit * 1e9))
    else:
        print(json.dumps(step(asked)))


if __name__ == "__main__":
    main()
