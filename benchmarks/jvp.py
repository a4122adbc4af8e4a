"""What a forward-mode derivative costs, in forward passes: `python benchmarks/jvp.py`, a table and JSON.

    ratio = time of a contestant / time of the forward pass just before it, same process; the median over turns

Contestants: backprop, backprop with checkpointing, central difference, `torch.func.jvp` with eager attention (its
loop and its `vmap` over K), and `spryfl.jvp`. Model: a random RoBERTa with LoRA (r = 1) on query and value of every
layer; attention is the default (`sdpa`) but where eager is named. Wall and CPU seconds are both kept: with one
thread, CPU time is not disturbed by other programs. Memory is the peak of live tensor storage beyond the model,
counted at each operation.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import RobertaConfig, RobertaForSequenceClassification

from spryfl.jvp import jvp

warnings.simplefilter("ignore")
Run = Callable[[], Any]
Params = dict[str, Tensor]


class Shape(NamedTuple):
    """Sizes of the model and of its batch."""

    layers: int
    width: int
    batch: int
    tokens: int


def build(s: Shape, attention: str | None = None) -> nn.Module:
    """RoBERTa with LoRA on query and value of every layer, random everywhere, evaluation mode."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=8000, hidden_size=s.width, num_hidden_layers=s.layers, num_attention_heads=s.width // 64,
        intermediate_size=4 * s.width, max_position_embeddings=s.tokens + 2, num_labels=2,
        attn_implementation=attention,
    )  # fmt: skip
    lora = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["query", "value"], init_lora_weights=False)
    return peft.get_peft_model(RobertaForSequenceClassification(config), lora).eval()


def batch(s: Shape) -> dict[str, Tensor]:
    """Random tokens; one row is padded, so that attention has a mask."""
    ids = torch.randint(3, 8000, (s.batch, s.tokens))
    mask = torch.ones_like(ids)
    mask[0, 3 * s.tokens // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(s.batch) % 2}


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[Params], Tensor]:
    return lambda params: functional_call(model, params, (), inputs).loss


def adapters(model: nn.Module, layer: int | None = None) -> Params:
    """LoRA's values: of all layers, or of one layer's query."""
    found = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return found if layer is None else {n: p for n, p in found.items() if f"layer.{layer}.attention.self.query" in n}


def directions(params: Params, k: int) -> Params:
    return {n: torch.randn(k, *p.shape) for n, p in params.items()}


def forward(f: Callable[[Params], Tensor], params: Params) -> Run:
    def run() -> Any:
        with torch.no_grad():
            return f(params)

    return run


def backprop(f: Callable[[Params], Tensor], params: Params) -> Run:
    def run() -> Any:
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        return torch.autograd.grad(f(leaves), list(leaves.values()))

    return run


def checkpointed(model: nn.Module, run: Run) -> Run:
    """`run` with transformers' own checkpointing of every layer; it asks for training mode, dropout is off in it."""

    def wrapped() -> Any:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        try:
            return run()
        finally:
            model.eval()
            model.gradient_checkpointing_disable()

    return wrapped


def central(f: Callable[[Params], Tensor], params: Params, d: Params) -> Run:
    def run() -> Any:
        with torch.no_grad():
            sides = [{n: p + s * d[n][0] for n, p in params.items()} for s in (1e-3, -1e-3)]
            return (f(sides[0]) - f(sides[1])) / 2e-3

    return run


def stock(f: Callable[[Params], Tensor], params: Params, d: Params, together: bool) -> Run:
    """torch.func.jvp over the directions: all at once by vmap, or one after the other."""

    def one(v: Params) -> Any:
        return torch.func.jvp(f, (params,), (v,))

    def run() -> Any:
        with torch.no_grad():
            if together:
                return torch.vmap(one, out_dims=(None, 0))(d)
            return [one({n: t[k] for n, t in d.items()}) for k in range(len(next(iter(d.values()))))]

    return run


class Top(nn.Module):
    """The last layer and the head, for a stage that starts at the kept output of the layers before."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        inner: Any = model.base_model.model
        self.layer, self.classifier = inner.roberta.encoder.layer[-1], inner.classifier

    def forward(self, h: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        h = self.layer(h, attention_mask=mask)
        h = h if isinstance(h, Tensor) else h[0]
        return nn.functional.cross_entropy(self.classifier(h), labels)


def last_with_prefix(model: nn.Module, inputs: dict[str, Tensor], s: Shape, k: int) -> Run:
    """K directions in the last layer's query, from the kept hidden state."""
    top, h = Top(model).eval(), torch.randn(s.batch, s.tokens, s.width)
    mask = inputs["attention_mask"].bool()[:, None, None, :].expand(-1, -1, s.tokens, -1)
    params = {n: p.detach() for n, p in top.named_parameters() if "attention.self.query.lora" in n}
    d = directions(params, k)
    return lambda: jvp(lambda p: functional_call(top, p, (h, mask, inputs["labels"])), params, d)


def contestants(s: Shape, ks: list[int], opponents: bool) -> Iterator[tuple[str, Run]]:
    """Name and function of everything that is timed; the first is the forward pass."""
    model, inputs = build(s), batch(s)
    f, params, last = loss_of(model, inputs), adapters(model), s.layers - 1
    yield "forward", forward(f, params)
    for k in ks:
        d = directions(params, k)
        yield f"spryfl.jvp, all layers, K={k}", lambda d=d: jvp(f, params, d)
    middle, top = (directions(adapters(model, i), k) for i, k in ((s.layers // 2, 1), (last, 8)))
    yield "spryfl.jvp, middle unit, K=1", lambda: jvp(f, params, middle)
    yield "spryfl.jvp, last unit, K=8", lambda: jvp(f, params, top)
    yield "spryfl.jvp, last unit, K=8, prefix kept", last_with_prefix(model, inputs, s, 8)
    if not opponents:
        return
    yield "backprop", backprop(f, params)
    yield "backprop, checkpointed", checkpointed(model, backprop(f, params))
    yield "central difference, K=1", central(f, params, directions(params, 1))
    eager_model = build(s, "eager")
    eager = loss_of(eager_model, inputs)
    yield "forward, eager attention", forward(eager, params)
    for k in sorted({1, *(k for k in ks if k == 8)}):
        d = directions(params, k)
        yield f"torch.func.jvp, eager, loop, K={k}", stock(eager, params, d, together=False)
        yield f"torch.func.jvp, eager, vmap, K={k}", stock(eager, params, d, together=True)


def timed(run: Run) -> tuple[float, float]:
    """Wall and CPU seconds of one run, in its steady state: after one of its own kind, as in training.

    A run straight after another program's pays for the pages that one gave back to the system.
    """
    run()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def race(entries: list[tuple[str, Run]], repeats: int) -> list[dict[str, Any]]:
    """All by turns, each beside a forward pass of its own; medians."""
    reference = entries[0][1]
    samples: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name, _ in entries}
    for _ in range(repeats):
        for name, run in entries:
            samples[name].append((*timed(reference), *timed(run)))
    return [row(name, taken) for name, taken in samples.items()]


def row(name: str, taken: list[tuple[float, float, float, float]]) -> dict[str, Any]:
    return {
        "name": name,
        "ratio_wall": statistics.median(t[2] / t[0] for t in taken),
        "ratio_cpu": statistics.median(t[3] / t[1] for t in taken),
        "ratio_of_minima_cpu": min(t[3] for t in taken) / min(t[1] for t in taken),
        "wall_seconds": statistics.median(t[2] for t in taken),
        "samples_wall_forward_and_own": [(t[0], t[2]) for t in taken],
    }


class Peak(TorchDispatchMode):
    """Counts the bytes of storages that operations make while it is on: live, peak, and the largest single one."""

    def __init__(self, *kept: Tensor) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known = {t.untyped_storage()._cdata for t in kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.note(t.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def memory(s: Shape, ks: list[int]) -> list[dict[str, Any]]:
    """Peaks of one shape, each over that of its forward pass."""
    model, inputs = build(s), batch(s)
    f, params = loss_of(model, inputs), adapters(model)
    runs = {"forward": forward(f, params), "backprop": backprop(f, params)}
    runs["backprop, checkpointed"] = checkpointed(model, backprop(f, params))
    for k in ks:
        d = directions(params, k)
        runs[f"spryfl.jvp, K={k}"] = lambda d=d: jvp(f, params, d)
    eager = build(s, "eager")
    d1 = directions(params, 1)
    runs["torch.func.jvp, eager, K=1"] = stock(loss_of(eager, inputs), params, d1, together=False)
    rows = []
    for name, run in runs.items():
        kept = (*model.parameters(), *model.buffers(), *eager.parameters(), *eager.buffers(), *inputs.values())
        with Peak(*kept) as peak:
            run()
        rows.append({"name": name, **s._asdict(), "peak_bytes": peak.peak, "largest_bytes": peak.largest})
    for r in rows:
        r["ratio"] = r["peak_bytes"] / rows[0]["peak_bytes"]
    return rows


def environment(threads: int) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    load = os.getloadavg()[0]
    where = {"cpu": cpu, "threads": threads, "load": load, "python": platform.python_version()}
    return {"date": str(datetime.date.today()), **where, **versions}


def table(rows: list[dict[str, Any]]) -> str:
    head = "| | ratio, wall | ratio, CPU | seconds |\n| --- | --- | --- | --- |\n"
    form = "| {name} | {ratio_wall:.2f} | {ratio_cpu:.2f} | {wall_seconds:.2f} |"
    return head + "\n".join(form.format(**r) for r in rows)


def memory_table(rows: list[dict[str, Any]]) -> str:
    head = "| layers | batch x tokens | | peak, MB | of forward | largest, MB |\n" + "| --- " * 6 + "|\n"
    form = "| {layers} | {batch} x {tokens} | {name} | {peak:.1f} | {ratio:.2f} | {largest:.1f} |"
    return head + "\n".join(
        form.format(**r, peak=r["peak_bytes"] / 1e6, largest=r["largest_bytes"] / 1e6) for r in rows
    )


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--directions", default="1,4,8,16", help="values of K")
    p.add_argument("--layers", type=int, default=12)
    p.add_argument("--width", type=int, default=512)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--ours", action="store_true", help="leave the opponents out")
    p.add_argument("--memory", action="store_true", help="peaks at 512 tokens, 6, 12 and 24 layers, and at 2048 tokens")
    p.add_argument("--no-time", action="store_true", help="memory alone")
    p.add_argument("--out", type=Path, help="write PATH.json too")
    return p.parse_args()


def main() -> None:
    o = options()
    torch.set_num_threads(o.threads)
    s, ks = Shape(o.layers, o.width, o.batch, o.tokens), [int(k) for k in o.directions.split(",")]
    result: dict[str, Any] = {"environment": environment(o.threads), "shape": s._asdict(), "repeats": o.repeats}
    if not o.no_time:
        result["time"] = race(list(contestants(s, ks, not o.ours)), o.repeats)
        print(table(result["time"]))
    if o.memory:
        shapes = [Shape(layers, o.width, 2, 512) for layers in (6, 12, 24)] + [Shape(2, o.width, 1, 2048)]
        result["memory"] = [r for shape in shapes for r in memory(shape, [1, 8])]
        print(memory_table(result["memory"]))
    result["environment"]["load_after"] = os.getloadavg()[0]
    print(json.dumps(result["environment"]))
    if o.out:
        o.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
