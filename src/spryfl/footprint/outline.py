"""A model by its configuration alone: what it is built of, in bytes, and short forms of it without storage.

The short form keeps the kinds of blocks and leaves out how often each comes: what a step holds grows by the same bytes
with every further block of a kind. Cost: building the model without storage, 0.1 to 0.5 s for 40 blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spryfl import adapters, models, opened, tasks
from spryfl.adapters import Adapter
from spryfl.adapters.families import core_layers, core_pattern, from_the_front
from spryfl.backbone.codec import codec_of, nbytes
from spryfl.backbone.packed import Packed
from spryfl.backbone.store import is_packed, open_store
from spryfl.costs import Shapes
from spryfl.costs.shapes import place
from spryfl.layout import layout_of
from spryfl.tasks import Task
from spryfl.tree import BLOCK, block
from spryfl.types import Batch, Unit


@dataclass(frozen=True)
class Outline:
    """A model without weights, ready to be planned with."""

    name: str
    config: Any  # transformers' configuration
    labels: tuple[str, ...]
    adapter: Adapter
    task: Task
    precision: str  # a key of backbone.CODECS, or empty: as the model is loaded
    units: tuple[Unit, ...]
    backbone: int  # bytes of frozen values held in memory, the blocks' encoded matrices among them
    blocks: tuple[int, ...]  # bytes of each block's encoded matrices, which streaming lets go of; empty if not packed
    adapters: int  # bytes of the adapter and the head, in the module and as they start
    known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # what was run and built so far

    @property
    def layers(self) -> int:
        """Blocks."""
        return self.config.num_hidden_layers


class Skeleton(NamedTuple):
    """A model on the meta device."""

    module: Any
    params: dict[str, Tensor]
    units: tuple[Unit, ...]
    types: tuple[str, ...]  # of its blocks, where the configuration tells some


def outline(
    name: str,
    labels: Sequence[str] = ("0", "1"),
    adapter: Adapter | None = None,
    *,
    task: Task | None = None,
    precision: str = "",
    attention: str = "default",
) -> Outline:
    """A model by its configuration: a folder with a config.json, a hub name, an alias, a packed folder.

    Args:
        name: where the configuration is; nothing else of the model is read.
        labels: names of the classes.
        adapter: what is put on it; LoRA of rank 1 without.
        task: what it is asked; classification without.
        precision: float32, bfloat16, float16, 8bit or 4bit for packed matrices; empty for the model as it is loaded.
        attention: default, eager or sdpa.

    Raises:
        ValueError: the model cannot be opened, or has an encoder and a decoder.

    >>> from spryfl.footprint import outline
    >>> small = outline("minilm")
    >>> small.layers, len(small.units)
    (6, 13)
    """
    task, adapter = task or tasks.classification(), adapter or adapters.lora()
    where, _ = models.resolve(name)
    if is_packed(where):
        found = open_store(where).precision
        if precision not in ("", found):
            raise ValueError(
                f'model "{name}" is packed in {found}; precision = "{precision}" needs the checkpoint itself.'
            )
        precision = found
    config = models.configured(name, tuple(labels), task, attention)
    return outlined(name, config, tuple(labels), adapter, task, precision)


def outlined(
    name: str, config: Any, labels: tuple[str, ...], adapter: Adapter, task: Task, precision: str = ""
) -> Outline:
    """The same from a configuration that is there."""
    if precision:
        codec_of(precision)
    whole = built(config, range(config.num_hidden_layers), adapter, task, precision)
    coded = _coded_bytes(whole.module)
    frozen, every, mapped = _frozen(whole.module), _values(whole.module), _mapped(whole.module, precision)
    return Outline(
        name=name,
        config=config,
        labels=labels,
        adapter=adapter,
        task=task,
        precision=precision,
        units=whole.units,
        backbone=sum(value.nbytes for name, value in frozen.items() if name not in mapped) + sum(coded),
        blocks=coded,
        adapters=sum(value.nbytes for value in whole.params.values())
        + sum(value.nbytes for name, value in every.items() if name not in frozen),
    )


def built(config: Any, chosen: Sequence[int], adapter: Adapter, task: Task, precision: str = "") -> Skeleton:
    """A model of the chosen blocks of a configuration, on the meta device."""
    with torch.device("meta"), models.silent():
        base = models.empty(_shortened(config, chosen), task, torch.float32 if precision else None)
        if precision:
            _encode(base, task, precision)
        count = config.num_hidden_layers
        own = _renumbered(adapter, chosen, count) if len(chosen) < count else adapter
        made = adapters.wrap(base, own, task.head)
    return Skeleton(made.module, dict(made.params), made.units, tuple(_types(config)[i] for i in chosen))


class _Places(NamedTuple):
    """Where an adapter is put on a model."""

    layers: tuple[int, ...]  # empty for all
    cores: tuple[int, ...]  # of them those with ranks of their own

    def within(self, chosen: Sequence[int]) -> _Places:
        """The same in a short form of the chosen blocks; the last one stands for `layers` where none is chosen."""
        here = {i: at for at, i in enumerate(chosen)}
        layers, cores = ([here[i] for i in sorted(own) if i in here] for own in self)
        return _Places(tuple(layers or [len(chosen) - 1] * bool(self.layers)), tuple(cores))


def _places(adapter: Adapter, count: int) -> _Places:
    made = from_the_front(adapter.config(()), count)
    asked = getattr(made, "layers_to_transform", None) or ()
    return _Places(tuple(asked) if isinstance(asked, list | tuple) else (asked,), core_layers(made))


def _renumbered(adapter: Adapter, chosen: Sequence[int], count: int) -> Adapter:
    """An adapter of some blocks alone, for a short form, whose blocks have other numbers."""
    places = _places(adapter, count)
    if not any(places):
        return adapter
    here = places.within(chosen)

    def config(head: Sequence[str]) -> Any:
        made: Any = adapter.config(head)
        made.layers_to_transform = list(here.layers) or None
        for name in ("rank_pattern", "alpha_pattern") if places.cores else ():
            value = next(iter(getattr(made, name).values()))
            setattr(made, name, dict.fromkeys(map(core_pattern, here.cores), value))
        return made

    return adapter._replace(config=config)


def _encode(base: Any, task: Task, precision: str) -> None:
    """Puts a Packed in the place of each linear map, as a packed folder is opened."""
    inside = {id(module) for module in opened.trunk_of(base).modules()}
    tables = {id(module.weight) for module in base.modules() if isinstance(module, nn.Embedding)}
    for parent in list(base.modules()):
        for name, child in parent.named_children():
            if opened.is_map(child) and (id(child) in inside or not task.head):
                weight = child.weight if isinstance(child, nn.Linear) else child.weight.t()
                kept = precision if id(child.weight) not in tables else "float32"
                setattr(parent, name, Packed(weight.shape[1], weight.shape[0], child.bias, kept, dict))


def _coded_bytes(module: Any) -> tuple[int, ...]:
    """Bytes of the encoded matrices of each block."""
    maps = [[one.matrix for one in block.modules() if isinstance(one, Packed)] for block in layout_of(module).blocks]
    return tuple(sum(nbytes(m.precision, m.shape) for m in own) for own in maps) if any(maps) else ()


def _mapped(module: Any, precision: str) -> set[str]:
    """Names of tables that the system maps from a packed folder's file: they take no memory of their own."""
    return {f"{path}.weight" for path, inner in module.named_modules() if precision and isinstance(inner, nn.Embedding)}


def skeleton(of: Outline, chosen: Sequence[int]) -> Skeleton:
    """A short form of a model; the same one for blocks of the same types with the adapter at the same places."""
    places = _places(of.adapter, of.layers).within(chosen)
    key = "skeleton", tuple(_types(of.config)[i] for i in chosen), places
    if key not in of.known:
        of.known[key] = built(of.config, chosen, of.adapter, of.task, of.precision)
    return of.known[key]


def shapes(of: Outline) -> Shapes:
    """Of the whole model, for what costs know of an estimator."""
    if "shapes" not in of.known:
        whole = built(of.config, range(of.layers), of.adapter, of.task)
        of.known["shapes"] = models.shapes_of(whole.module, whole.units, 1, 1)
    return of.known["shapes"]


def _types(config: Any) -> Sequence[str]:
    """The type of each block, where the configuration tells some."""
    return getattr(config, "layer_types", None) or [""] * config.num_hidden_layers


def _shortened(config: Any, chosen: Sequence[int]) -> Any:
    """The configuration of the chosen blocks; what lists something for each block loses what belongs to the others."""
    short, count = copy.deepcopy(config), config.num_hidden_layers
    if len(chosen) == count:
        return short
    for key, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(short, key, [value[i] for i in chosen])
    short.num_hidden_layers = len(chosen)
    return short


def original(name: str, chosen: Sequence[int]) -> str:
    """A unit's or a value's name in the whole model, from that in a short form."""
    number = block(name)
    return BLOCK.sub(f".{chosen[number]}", name, count=1) if 0 <= number < len(chosen) else name


class Kind(NamedTuple):
    """What distinguishes a block from others."""

    moved: bool  # it lies at or behind the first block of which something is moved
    above: bool  # it lies above the estimator's cut
    units: tuple[tuple[str, int], ...]  # what of it the client moves: names without its number, and values
    type: str  # where the configuration tells one


def suffix(unit: Unit) -> str:
    """A unit's name without the number of its block."""
    return BLOCK.sub(".", unit.name, count=1)


def kinds(of: Outline, mine: Sequence[Unit], top: int) -> list[Kind]:
    """The kind of each block.

    Args:
        of: the model.
        mine: the client's units.
        top: how many of the last blocks lie above the estimator's cut; -1 for all.
    """
    at = 0 if top == -1 else of.layers - top
    held: dict[int, list[tuple[str, int]]] = {}
    for unit in mine:
        if not unit.head:
            held.setdefault(place(unit), []).append((suffix(unit), unit.size))
    first, types = min(held, default=of.layers), _types(of.config)
    return [Kind(i >= first, i >= at, tuple(held.get(i, ())), types[i]) for i in range(of.layers)]


def _values(module: nn.Module) -> dict[str, Tensor]:
    """All values and buffers, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _frozen(module: Any) -> dict[str, Tensor]:
    """What belongs to the model itself: neither the adapter's nor a head's copy that is trained."""
    prefix = module.base_model.prefix
    return {
        name: value
        for name, value in _values(module).items()
        if f".{prefix}" not in name and ".modules_to_save." not in name
    }


def sample(task: Task, config: Any, rows: int, tokens: int) -> Batch:
    """A batch with all that the package's tasks read; one sequence a row, no padding.

    Where a task learns tokens, all of them are learnt: the most that it can ask for.
    """
    ids = torch.full((rows, tokens), min(5, config.vocab_size - 1))
    at = torch.zeros_like(ids)
    at[:, -1] = 1
    every = torch.ones_like(ids)
    zeros = torch.zeros(rows, dtype=torch.int64)
    return {
        "input_ids": ids,
        "attention_mask": every,
        tasks.OF: torch.arange(rows),
        tasks.TARGETS: zeros,
        "labels_start": zeros,
        "labels_end": zeros + tokens - 1,
        "labels_null": zeros,
        "labels_context": every,
        "labels_next": torch.zeros_like(ids),
        **({} if task.head else {tasks.AT: at if task.needs.label else every, "labels_words": ids[:, :2]}),
    }
