"""Opens a model whose values are not in it yet: from a checkpoint, or from a packed folder, block by block or whole.

transformers knows which of a checkpoint's tensors becomes which value of which class, under other prefixes and older
names too, and draws what is missing. So a packed folder is opened by transformers as well, with a stand-in of four
bytes for each tensor (one number, expanded to its shape); where a stand-in ends up, the real value belongs:

    linear maps         Packed: no weight, the encoded parts are asked for at each product
    embedding tables    where the system maps the file; only rows that are looked up come into memory
    tied output maps    Packed, on the mapped table
    all else            float32 in memory: norms, biases, and a head that will be trained
    not in the folder   as transformers draws it from the seed

Cost: the stand-ins, 0.1 s; then the small values, and the blocks if they are to stay in memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spryfl.backbone.codec import Parts, codec_of
from spryfl.backbone.packed import Packed
from spryfl.backbone.store import REST, Store
from spryfl.backbone.stream import Resident, Streamer

PLAIN = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}  # as codecs


class Backbone(NamedTuple):
    """What a model's frozen matrices are read from."""

    store: Store
    source: Resident | Streamer

    @property
    def facts(self) -> dict[str, Any]:
        """What a result must say of it."""
        streamed = isinstance(self.source, Streamer)
        return {"precision": self.store.precision, "stream": streamed, "fingerprint": self.store.fingerprint}


_BACKBONES: weakref.WeakKeyDictionary[nn.Module, Backbone] = weakref.WeakKeyDictionary()


def backbone_of(module: Any) -> Backbone | None:
    """What a model, PEFT's or not, was opened from; None where that is no packed folder."""
    return _BACKBONES.get(module.get_base_model() if hasattr(module, "get_base_model") else module)


def from_files(auto: Any, where: str, name: str, options: dict[str, Any]) -> tuple[Any, set[str]]:
    """A model and the names of values that its files did not have; a ValueError if that is the whole trunk.

    Some families call their trunk otherwise under this head (Llama's and Qwen's for questions): transformers then finds
    none of its weights in a checkpoint of the family, and says nothing. Such are opened again under the right name.
    """

    def opened(**more: Any) -> tuple[Any, set[str], bool]:
        model, found = auto.from_pretrained(
            where, ignore_mismatched_sizes=True, output_loading_info=True, **options, **more
        )
        missing, own = set(found["missing_keys"]), f"{model.base_model_prefix}."
        values = list(model.state_dict())
        trunk = [key for key in values if key.startswith(own)] or values  # or the model is the trunk itself
        return model, missing, 2 * sum(key in missing for key in trunk) > len(trunk)

    model, missing, lost = opened()
    own = model.base_model_prefix
    usual = {getattr(kind, "base_model_prefix", "") for kind in type(model).__mro__} - {own, ""}
    if lost and usual:
        model, missing, lost = opened(key_mapping={rf"^({'|'.join(sorted(usual))})\.": f"{own}."})
    if lost:
        raise ValueError(
            f'model "{name}" brings no weights for the layers of {type(model).__name__}: they would start at random. '
            f"Give a folder or a name with weights of this family."
        )
    return model, missing


class Standing(NamedTuple):
    """Stands where transformers' auto class does, for tensors that are known by name and shape alone."""

    kind: Any  # the model's class
    config: Any
    given: dict[str, Tensor]  # the stand-ins

    def from_pretrained(self, where: str, **options: Any) -> Any:
        """A model of stand-ins, and of what was not among them."""
        return self.kind.from_pretrained(
            None, config=self.config, state_dict=dict(self.given), dtype=torch.float32, **options
        )


def kind_of(auto: Any, config: Any, **options: Any) -> Any:
    """The class that transformers' auto class has for a configuration."""
    with torch.device("meta"):
        return type(auto.from_config(config, **options))


def standing(kind: Any, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Standing:
    """Stand-ins for tensors of these shapes, for a class of models."""
    return Standing(kind, config, {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()})


class Origin(NamedTuple):
    """A stand-in in a model."""

    module: nn.Module
    name: str  # in the module
    value: Tensor
    key: str  # the tensor it stands for


def origins(model: nn.Module, given: Mapping[str, Tensor], missing: set[str]) -> list[Origin]:
    """Where the stand-ins ended up; a value under two names is there twice.

    Raises:
        ValueError: the trunk has a value that neither is one of them nor is missing: made from several, or changed.
    """
    keys = {value.untyped_storage().data_ptr(): key for key, value in given.items()}
    trunk = {id(module) for module in trunk_of(model).modules()}
    found = []
    for path, module in model.named_modules():
        kept = module._non_persistent_buffers_set
        own = [*module._parameters.items(), *((n, b) for n, b in module._buffers.items() if n not in kept)]
        for name, value in own:
            if value is None or not value.is_floating_point():
                continue
            key = keys.get(value.untyped_storage().data_ptr())
            if key is not None:
                found.append(Origin(module, name, value, key))
            elif id(module) in trunk and f"{path}.{name}".removeprefix(".") not in missing:
                raise ValueError(
                    f"{path}.{name} of {type(model).__name__} is not stored as the model holds it (transformers makes "
                    f"it from several tensors), so it cannot be packed tensor by tensor. Save the model anew with "
                    f"save_pretrained in its present form, or use it unpacked."
                )
    return found


def trunk_of(model: Any) -> nn.Module:
    """The language model without its task head; the model itself where it has none."""
    return getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model


def is_map(module: nn.Module) -> bool:
    """Whether a module is a linear map of whose weight nothing but the product is asked."""
    return type(module) in (nn.Linear, Conv1D)


def fill(
    model: nn.Module, given: Mapping[str, Tensor], missing: set[str], store: Store, stream: bool, head: bool
) -> None:
    """Puts what a packed folder holds in the place of its stand-ins; in place.

    Args:
        model: of stand-ins, as `Standing` opened it.
        given: the stand-ins.
        missing: names of values that are not in the folder.
        store: the folder.
        stream: one block in memory at a time, instead of all.
        head: whether what lies outside the trunk will be trained: then it is float32 whatever the folder has.
    """
    backbone = Backbone(store, Streamer(store) if stream else Resident(store))
    rest = store.views(REST, store.mapped(REST)) if REST in store.files else {}
    found = origins(model, given, missing)
    inside = {id(module) for module in trunk_of(model).modules()}
    tables = {
        id(o.value): rest[o.key][""] for o in found if is_table(o) and store.tensors[o.key].parts[""].dtype in PLAIN
    }
    made: dict[int, Any] = {}
    maps: dict[int, tuple[str, Callable[[], Parts]]] = {}  # module -> precision and parts of its matrix
    for module, name, value, key in found:
        where = partial(rest.__getitem__, key) if key in rest else partial(backbone.source.parts, key)
        if is_map(module) and name == "weight" and (id(module) in inside or not head):
            if id(value) in tables:
                table = tables[id(value)]
                maps[id(module)] = PLAIN[table.dtype], partial(dict, weight=table)
                continue
            if store.tensors[key].matrix:
                maps[id(module)] = store.precision, where
                continue
        if id(value) not in made:
            made[id(value)] = _kept(value, tables.get(id(value)), partial(_dense, store, key, where))
        (module._parameters if name in module._parameters else module._buffers)[name] = made[id(value)]
        if id(value) in tables and isinstance(module, nn.Embedding) and made[id(value)].dtype != torch.float32:
            module.register_forward_hook(_in_float32)
    _swap(model, maps)
    _BACKBONES[model] = backbone


def is_table(origin: Origin) -> bool:
    """Whether it is looked up by row."""
    return isinstance(origin.module, nn.Embedding) and origin.name == "weight"


def _kept(old: Tensor, table: Tensor | None, dense: Callable[[], Tensor]) -> Tensor:
    """What takes a stand-in's place."""
    new = dense() if table is None else table
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _dense(store: Store, key: str, parts: Callable[[], Parts]) -> Tensor:
    """A tensor in float32, in memory of its own, as the model's class has it."""
    stored = store.tensors[key]
    if not stored.matrix:
        return parts()[""].to(torch.float32, copy=True)
    rows, width = stored.shape
    whole = codec_of(store.precision).decode(parts(), (rows, width), 0, rows)
    return (whole.t() if stored.transposed else whole).clone(memory_format=torch.contiguous_format)


def _swap(model: nn.Module, maps: Mapping[int, tuple[str, Callable[[], Parts]]]) -> None:
    """Puts a Packed in the place of each of these modules."""
    made: dict[int, Packed] = {}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if id(child) in maps:
                setattr(parent, name, made.setdefault(id(child), _packed(child, *maps[id(child)])))


def _packed(old: Any, precision: str, parts: Callable[[], Parts]) -> Packed:
    width, rows = old.weight.shape if isinstance(old, Conv1D) else old.weight.shape[::-1]
    return Packed(width, rows, old.bias, precision, parts)


def _in_float32(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """What is looked up in a table of 16 bits goes on in 32."""
    return output.float()
