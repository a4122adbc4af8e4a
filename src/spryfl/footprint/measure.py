"""One client's step, run for real in a fresh process, its memory measured part by part: the other side of `predict`.

    process      anonymous resident memory after the imports
    backbone     what loading the model adds to it, and the resident pages of its files where they are mapped
    adapters     what the adapter and the client's values add
    step         most bytes of tensors that the allocator held: activations (in the value pass alone), tangents (what is
                 held beyond it), gradients and optimizer state, a kept prefix
    buffers      of streamed blocks
    beside       what the peak has over the sum of these: modules that load late, room that the C library keeps, scratch
                 of kernels, stacks of threads. No prediction has it, so it is part of the gap.

The peak is that of anonymous resident memory plus the mapped pages of weights: a checkpoint in safetensors is mapped as
it is, and a machine that has no room for these pages reads them again in every pass. On a GPU the allocator's counts
stand in for resident memory. Cost: loading the model, a step, and a value pass to tell activations from tangents.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spryfl import adapters, methods, models, opened, server, tasks, tree
from spryfl.backbone.stream import Streamer
from spryfl.choices import Built, Method
from spryfl.config import Experiment
from spryfl.costs import peak_memory, work
from spryfl.costs.resident import pages_of, resident, watched
from spryfl.footprint.outline import Outline, outline, sample
from spryfl.footprint.predict import Footprint, footprint
from spryfl.footprint.step import prefix_bytes, step, values
from spryfl.loss import ModelLoss
from spryfl.types import Batch, Params, Unit

_CODE = "import spryfl.api, spryfl.backbone, spryfl.footprint.measure as own; own.main()"


class Request(NamedTuple):
    """What is to be run; plain values, as they go to another process."""

    model: str  # a folder, packed or not; one with a config.json alone gets random values
    method: dict[str, Any]  # all fields of a Method
    adapter: dict[str, Any]
    task: dict[str, Any]
    labels: tuple[str, ...]
    rows: int
    tokens: int
    micro_batch: int = 0
    stream: bool = False
    dropout: bool = False
    keep_prefix: float = 0.0  # MB
    attention: str = "default"
    device: str = "cpu"
    threads: int = 0  # 0 = PyTorch's choice
    clients: int = 1  # of a round, among whom the units are dealt
    slot: int = 0  # whose units are moved, 0 the first; those of a rotating assignment before its first turn
    split: bool = True  # run the value pass by itself too


class Measured(NamedTuple):
    """Bytes, measured."""

    parts: Footprint
    beside: int
    peak: int  # of anonymous resident memory in the step, and the weights' pages that are mapped
    weights: int  # of that, the mapped ones
    mapped: int  # the most of all files' pages, libraries among them
    loading: int  # peak of anonymous resident memory before the step
    counted: int  # the allocator's peak above the model
    seconds: float  # of the step, the counting included
    passes: tuple[float, float, float]  # value, tangent, backward


class Profile(NamedTuple):
    """Both sides of one request."""

    predicted: Footprint
    measured: Measured

    @property
    def gap(self) -> float:
        """Prediction over measurement, less 1."""
        return self.predicted.total / self.measured.peak - 1

    @property
    def counted_gap(self) -> float:
        """The same of the step's own tensors."""
        return self.predicted.step / self.measured.counted - 1


def profile(request: Request) -> Profile:
    """A step's memory, predicted and measured in a fresh process.

    Raises:
        ValueError: the model cannot be opened, the method does not fit it, or the machine is too small for it.
    """
    return Profile(predicted(request), measured(request))


def requested(experiment: Experiment, labels: int = 2, slot: int = 0) -> Request:
    """What an experiment's client would run: rows as long as `data.max_length`, `labels` classes.

    >>> from spryfl import Experiment
    >>> requested(Experiment(), slot=3).rows
    8
    """
    train, model = experiment.train, experiment.model
    return Request(
        model=model.name,
        method={**asdict(experiment.method), "classes": []},  # one client: its class's choices are the method's here
        adapter=dict(experiment.adapter),
        task=dict(experiment.task),
        labels=tuple(str(i) for i in range(labels)),
        rows=train.batch_size,
        tokens=experiment.data.max_length,
        micro_batch=train.micro_batch,
        stream=model.stream,
        dropout=train.dropout,
        keep_prefix=train.keep_prefix,
        attention=model.attention,
        device=experiment.device,
        threads=experiment.threads,
        clients=train.cohort,
        slot=slot,
    )


def shown(request: Request, found: Profile) -> tuple[list[tuple[str, ...]], list[str]]:
    """(rows of a table: part, predicted, measured, gap; lines below it), in MB."""
    one, other = found
    pairs = list(zip(Footprint._fields, one, other.parts, strict=True))
    pairs += [("beside these", 0, other.beside), ("peak", one.total, other.peak)]
    rows = [(name, *(f"{value / 1e6:.1f}" for value in (a, b, a - b))) for name, a, b in pairs if a or b]
    gpu = request.device != "cpu"
    mapped = f", {other.weights / 1e6:.0f} MB of it mapped weights" if other.weights else ""
    kind = "what the GPU's allocator gave out" if gpu else f"anonymous resident memory{mapped}"
    return rows, [
        f"peak: {kind}; the prediction is off by {found.gap:+.1%}, that of the step's own tensors (allocator's count) "
        f"{one.step / 1e6:.1f} of {other.counted / 1e6:.1f} MB by {found.counted_gap:+.1%}.",
        f"beside it at most {other.mapped / 1e6:.0f} MB of files' pages; {other.loading / 1e6:.0f} MB anonymous while "
        f"the model was loaded. The step took {other.seconds:.1f} s with all counting on, "
        f"{'/'.join(f'{n:g}' for n in other.passes)} value/tangent/backward passes.",
    ]


def planned(request: Request) -> Outline:
    """The model of a request as the planner sees it; no weights are read."""
    task, adapter = tasks.build(request.task), adapters.build(request.adapter)
    return outline(request.model, request.labels, adapter, task=task, attention=request.attention)


def predicted(request: Request, of: Outline | None = None) -> Footprint:
    """What the planner says of a request; `of` is what `planned` gave for its model, for many of them."""
    of = of or planned(request)
    method = Method(**request.method)
    return footprint(
        of,
        method,
        _mine(request, of.units, methods.build(method)),
        rows=request.rows,
        tokens=request.tokens,
        micro_batch=request.micro_batch,
        stream=request.stream,
        dropout=request.dropout,
        keep_prefix=request.keep_prefix,
    )


def measured(request: Request, timeout: float = 7200.0) -> Measured:
    """Runs a request in a process of its own."""
    plain = json.dumps(request._asdict())
    done = subprocess.run([sys.executable, "-c", _CODE], input=plain, capture_output=True, text=True, timeout=timeout)
    if done.returncode == 2:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        why = "killed, most likely as memory ran out" if done.returncode < 0 else done.stderr.strip()[-500:]
        raise ValueError(f"the measuring process ended with {done.returncode} ({why}). Ask for fewer rows or tokens.")
    return restored(json.loads(done.stdout.strip().splitlines()[-1]))


def plain(found: Measured) -> dict[str, Any]:
    """What was measured as JSON has it, the parts beside the rest."""
    own = found._asdict()
    return {**own.pop("parts")._asdict(), **own}


def restored(given: Mapping[str, Any]) -> Measured:
    """What `plain` made it."""
    parts = Footprint(*(given[name] for name in Footprint._fields))
    own = {name: given[name] for name in Measured._fields if name != "parts"}
    return Measured(**{**own, "parts": parts, "passes": tuple(own["passes"])})


def main() -> None:
    """The measuring process: a request in, one line of JSON out."""
    given = json.load(sys.stdin)
    try:
        print(json.dumps(plain(run(Request(**{**given, "labels": tuple(given["labels"])})))))
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def run(request: Request) -> Measured:
    """A request, in this process, which should have done nothing else."""
    if request.threads:
        torch.set_num_threads(request.threads)
    begun = _held(request.device)
    with watched() as before:
        task = tasks.build(request.task)
        base, tokenizer = _opened(request, task)
        gc.collect()
        loaded = _held(request.device)
        adapter, device = adapters.build(request.adapter), request.device
        model = models.prepare(base, tokenizer, request.labels, adapter, device=device, task=task)
        del base
        gc.collect()
        ready = _held(request.device)
    backbone = opened.backbone_of(model.module)
    streamer = backbone.source if backbone and isinstance(backbone.source, Streamer) else None
    buffers, early = (streamer.nbytes, bool(streamer.counts.brought)) if streamer else (0, False)
    walk = _walk(request, model)
    room = walk.counted - walk.state - walk.prefix
    activations = min(walk.values, room)
    peak = walk.peak if model.device.type == "cpu" else ready + walk.counted
    weights = pages_of(models.resolve(request.model)[0])
    parts = Footprint(
        process=begun,
        backbone=loaded - begun + weights,
        adapters=ready - loaded - early * buffers,
        activations=activations,
        tangents=room - activations,
        gradients=walk.state,
        prefix=walk.prefix,
        buffers=buffers,
    )
    return Measured(
        parts,
        beside=peak - ready - (not early) * buffers - walk.counted,
        peak=peak + weights,
        weights=weights,
        mapped=walk.mapped,
        loading=before.peak.anonymous,
        counted=walk.counted,
        seconds=walk.seconds,
        passes=walk.passes,
    )


class _Walk(NamedTuple):
    """What one step held."""

    counted: int
    values: int  # in the value pass alone
    state: int
    prefix: int
    peak: int
    mapped: int
    seconds: float
    passes: tuple[float, float, float]


def _walk(request: Request, model: models.Model) -> _Walk:
    """One step with all counts on, then what of it is there without a direction."""
    method = Method(**request.method)
    built = methods.build(method)
    mine = _mine(request, model.units, built)
    batch = tree.to(sample(model.task, model.module.config, request.rows, request.tokens), model.device)
    loss_fn, own = _bound(request, model, mine)
    start = time.perf_counter()
    with watched() as watch, peak_memory(model.device) as counted:
        passes = step(built, loss_fn, own, batch, mark=watch.mark).passes
    seconds, whole = time.perf_counter() - start, counted()
    state = built.local.init(own) if built.local else {}
    held = sum(value.nbytes for values in (own, *state.values()) for value in values.values())
    return _Walk(
        counted=whole,
        values=_values(request, model, method, mine, batch) if request.split else whole,
        state=held,
        prefix=prefix_bytes(loss_fn),
        peak=watch.peak.anonymous,
        mapped=watch.peak.mapped,
        seconds=seconds,
        passes=(passes.value, passes.tangent, passes.backward),
    )


def _values(request: Request, model: models.Model, method: Method, mine: Sequence[Unit], batch: Batch) -> int:
    """The allocator's peak in the value pass alone, or where there is reverse mode in that and the way back."""
    done = work(method, models.shapes_of(model.module, model.units, request.rows, request.tokens))(mine)
    reverse = done is not None and bool(done.below.backward or done.above.backward)
    loss_fn, own = _bound(request, model, done.dense if done and reverse else mine)
    with peak_memory(model.device) as counted:
        values(methods.build(method).estimator if reverse else None, loss_fn, own, batch)
    return counted() - prefix_bytes(loss_fn)


def _bound(request: Request, model: models.Model, mine: Sequence[Unit]) -> tuple[ModelLoss, Params]:
    """The loss as the client has it, and the values that it moves."""
    own = tree.select(model.params, [name for unit in mine for name in unit.params])
    keep = int(request.keep_prefix * 1e6)
    fixed = tree.without(model.params, own)
    return models.loss_fn(model, fixed, None, request.dropout, keep, request.micro_batch), own


def _mine(request: Request, units: Sequence[Unit], built: Built) -> tuple[Unit, ...]:
    """The units of one client of a round."""
    if not 0 <= request.slot < request.clients:
        raise ValueError(f"client {request.slot} of a round of {request.clients}; they count from 0.")
    return server.deal(units, range(request.clients), built, 0)[request.slot]  # before any rotation


def _held(device: str) -> int:
    """Bytes held now: anonymous resident memory, or what a GPU's allocator has given out."""
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else resident().anonymous


def _opened(request: Request, task: tasks.Task) -> tuple[Any, Any]:
    """The model and its tokenizer; random values where there is a configuration alone."""
    where = Path(models.resolve(request.model)[0])
    weights = ("*.safetensors", "*.bin", "*.index.json")
    if where.is_dir() and not any(any(where.glob(one)) for one in weights):
        if request.stream:
            raise ValueError(f"{where} holds a configuration alone; to stream it, make a packed folder of it.")
        config = models.configured(request.model, request.labels, task, request.attention)
        return models.empty(config, task).eval(), None
    return models.load(request.model, request.labels, attention=request.attention, task=task, stream=request.stream)
