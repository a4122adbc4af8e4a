"""What of an adapted model is trained, and in which units: values that are moved together. Costs the values, float32.

Adapter and head are float32 whatever the model is in: what comes to the head in a lower precision is cast at its door.
Trained values of the model itself (BitFit's biases) are float32 here and of the model's type inside (`ModelLoss`).

A family may share values over its maps (VB-LoRA's bank, Uni-LoRA's values, a tied TinyLoRA vector): they are a unit of
their own and counted once, where the first map that holds them stands.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from spryfl.adapters.core import Core
from spryfl.types import Unit

_TRUNK = "base_model.model."


class Adapted(NamedTuple):
    """A model with its adapter, and what of it is trained."""

    module: PeftModel
    params: dict[str, torch.Tensor]  # as the model starts, float32
    units: tuple[Unit, ...]


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the direct children outside the trunk that hold values: what the task added to the language model.

    Args:
        model: a Hugging Face model with a head, without an adapter.
    """
    children = model.named_children()
    return tuple(n for n, child in children if n != model.base_model_prefix and any(True for _ in child.parameters()))


def plain_head(model: nn.Module) -> None:
    """Makes the linear maps of a head that is to be trained ordinary ones, where a library quantized them too."""
    for head in head_modules(model):
        for path, layer in list(model.get_submodule(head).named_modules(prefix=head)):
            if isinstance(layer, nn.Linear) and (foreign(layer) or "weight" not in layer._parameters):
                made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                made.load_state_dict({"weight": _decoded(layer), **_bias(layer)})
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, made.to(layer.weight.device))


def foreign(layer: nn.Module) -> bool:
    """Whether a library keeps this layer's weight in a form of its own, or would: bitsandbytes, torchao.

    Args:
        layer: any module.
    """
    weight = layer._parameters.get("weight")
    known = type(layer).__module__.startswith("bitsandbytes.")
    return known or (weight is not None and type(weight) not in (nn.Parameter, Tensor))


def _decoded(layer: nn.Module) -> Tensor:
    """The values of such a weight, float32."""
    weight: Any = layer.weight
    if not weight.is_floating_point():
        weight = dequantize_module_weight(layer)  # bitsandbytes; one that it never came to quantize is floating
    values: Tensor = weight.dequantize() if type(weight).__module__.startswith("torchao.") else weight.clone()
    return values.detach().float()


def _bias(layer: nn.Module) -> dict[str, Tensor]:
    bias: Any = layer.bias
    return {} if bias is None else {"bias": bias.detach().float()}


def adapted(module: PeftModel) -> Adapted:
    """Lists what is trainable in a PEFT model, and freezes the module: values are passed in by name from here on.

    Args:
        module: PEFT's, as it was made or opened; it is changed in place.

    Returns:
        The module, its trainable values by name (float32, copies), and their units.
    """
    shared = _tied(module)
    frozen = _frozen_head(module)
    _wide_head(module)
    trainable = {
        n: p
        for n, p in module.named_parameters()
        if p.requires_grad and ".original_module." not in n and not n.startswith(frozen)
    }
    for config in module.peft_config.values():
        _in_order(config)
    groups: dict[tuple[str, bool], list[str]] = {}
    for name, value in trainable.items():
        unit = (shared[id(value)], False) if id(value) in shared else _unit_of(name, module.base_model.prefix)
        groups.setdefault(unit, []).append(name)
    for name, value in trainable.items():
        if value.itemsize < 4 and (own(module, name) or ".modules_to_save." in name):
            value.data = value.data.float()
    params = {name: value.detach().float().clone() for name, value in trainable.items()}
    for value in module.parameters():
        value.requires_grad_(False)
    units = (
        Unit(unit, tuple(names), sum(params[n].numel() for n in names), is_head)
        for (unit, is_head), names in groups.items()
    )
    return Adapted(module.eval(), params, tuple(units))


def own(module: PeftModel, name: str) -> bool:
    """Whether a value is an adapter's, and neither the model's nor the head's."""
    return f".{module.base_model.prefix}" in name


def state(module: PeftModel, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's state with these values in it: a shared one under all its names, a core as the map it makes."""
    first = {id(value): name for name, value in module.named_parameters()}
    names = {name: first[id(value)] for name, value in module.named_parameters(remove_duplicate=False)}
    made = {name: params.get(names.get(name, name), value) for name, value in module.state_dict().items()}
    for path, inner in module.named_modules():
        if isinstance(inner, Core):
            made[f"{path}.weight"] = inner.through(params.get(f"{path}.core", inner.core.detach()))
    return made


def _frozen_head(module: PeftModel) -> tuple[str, ...]:
    """Beginnings of the names of a head that is not trained: PEFT would train its biases with the trunk's."""
    saved = {name for config in module.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()}
    base = module.get_base_model()
    return tuple(f"{_TRUNK}{name}." for name in head_modules(base) if name not in saved)


def _wide_head(module: PeftModel) -> None:
    """A head that is trained on a model in half precision has float32 inputs, as it has float32 values."""
    if not any(value.is_floating_point() and value.itemsize < 4 for value in module.parameters()):
        return
    for wrapper in module.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            wrapper.register_forward_pre_hook(_widened, with_kwargs=True)


def _widened(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() and x.itemsize < 4 else x, (args, kwargs))


def _tied(module: PeftModel) -> dict[int, str]:
    """Gives each map a container of its own for values it shares; returns the shared values' ids and unit names.

    PEFT registers one container in all maps. `functional_call` writes into such a container once for each of its
    names and so does not put back what stood there before; values that are tied it handles well.
    """
    tuner: Any = module.base_model
    shared = {id(c) for name, c in tuner.named_children() if name != "model" and any(True for _ in c.parameters())}
    for inner in list(tuner.model.modules()):
        for key, child in list(inner.named_children()):
            if id(child) in shared:
                setattr(inner, key, _own_container(inner, child))
    held = Counter(id(value) for _, value in tuner.model.named_parameters(remove_duplicate=False))
    return {
        id(value): name.replace(".default", "")
        for name, value in tuner.named_parameters(remove_duplicate=False)
        if not name.startswith("model.") and held[id(value)] > 1
    }


def _own_container(layer: nn.Module, container: nn.Module) -> nn.Module:
    """A copy of a container, the very same values in it; of TinyLoRA's vectors the layer's alone."""
    made: Any = copy.deepcopy(container, {id(value): value for value in container.parameters()})
    mine = getattr(layer, "_tinylora_v_key", {})
    return nn.ModuleDict({k: nn.ParameterDict({key: made[k][key]}) for k, key in mine.items()}) if mine else made


def _in_order(config: PeftConfig) -> None:
    """PEFT writes its sets of names in the order they happen to have; sorted, equal runs write equal files."""
    for key, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, key, sorted(value))


def _unit_of(name: str, prefix: str) -> tuple[str, bool]:
    """A value's unit, and whether that is the head's: LoRA's A and B share one, so do a layer's biases."""
    short = name.removeprefix(_TRUNK)
    if ".modules_to_save." in short:
        return re.sub(r"\.modules_to_save\.[^.]+", "", short).rpartition(".")[0], True
    if f".{prefix}" in short:
        return short.split(f".{prefix}")[0], False
    layer = re.match(r".*?\.\d+(?=\.)", short)
    return (layer.group() if layer else short.rpartition(".")[0]), False
