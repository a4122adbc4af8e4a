"""Few trainable values on a frozen Hugging Face model, through PEFT; and the units in which they are trained.

    lora     W x + (alpha/r) B A x, B = 0 at the start      Hu et al., arXiv 2106.09685
    ia3      a learned factor on keys, values, feed-forward  Liu et al., arXiv 2205.05638
    bitfit   the biases                                      Ben Zaken et al., arXiv 2106.10199
    head     nothing but the head

Whatever the adapter, the task's head (all that the model has outside its trunk) is trained and saved with it. A family
of adapters is one builder here: options -> what `wrap` needs. Cost: the values themselves, float32.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from spryfl.types import Unit

Adapter = Callable[[Sequence[str]], PeftConfig]  # names of the head's modules -> PEFT's configuration

# Where PEFT has no choice of its own: model type -> LoRA's targets (query and value), IA3's, its feed-forward ones.
_USUAL = {
    "albert": (("query", "value"), ("key", "value", "ffn_output"), ("ffn_output",)),
    "distilbert": (("q_lin", "v_lin"), ("k_lin", "v_lin", "lin2"), ("lin2",)),
}
# PEFT's own name for "no module at all": what is left are biases and modules_to_save.
_NOTHING = "dummy-target-modules"


def lora(
    r: int = 1, alpha: float = 1.0, dropout: float = 0.0, targets: tuple[str, ...] = (), layers: tuple[int, ...] = ()
) -> Adapter:
    """LoRA, W x + (alpha/r) B A x.

    Args:
        r: rank; values per map r (inputs + outputs).
        alpha: scale of the update.
        dropout: on the adapter's input, while training.
        targets: ends of module names; empty is PEFT's choice for the model (query and value).
        layers: numbers of the layers that get one, 0 first; empty is all.
    """
    if r < 1:
        raise ValueError(f"r = {r} of lora; the rank must be 1 or more.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout} of lora; it must be in [0, 1).")
    return lambda head: LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets) or None,
        layers_to_transform=list(layers) or None,
        modules_to_save=list(head),
    )


def ia3(targets: tuple[str, ...] = (), feedforward: tuple[str, ...] = ()) -> Adapter:
    """IA3: one learned factor for each output of `targets`, for each input of those named in `feedforward` too."""
    if set(feedforward) - set(targets):
        raise ValueError(f"feedforward = {list(feedforward)} of ia3 must be among targets = {list(targets)}.")
    named: dict[str, Any] = (
        {"target_modules": list(targets), "feedforward_modules": list(feedforward)} if targets else {}
    )
    return lambda head: IA3Config(modules_to_save=list(head), **named)


def bitfit() -> Adapter:
    """BitFit: every bias of the trunk, a unit a layer."""
    return lambda head: LoraConfig(r=1, target_modules=_NOTHING, bias="all", modules_to_save=list(head))


def head() -> Adapter:
    """No adapter: the head alone."""
    return lambda head: LoraConfig(r=1, target_modules=_NOTHING, modules_to_save=list(head))


ADAPTERS: dict[str, Callable[..., Adapter]] = {"lora": lora, "ia3": ia3, "bitfit": bitfit, "head": head}


class Adapted(NamedTuple):
    """A model with its adapter, and what of it is trained."""

    module: PeftModel
    params: dict[str, torch.Tensor]  # as the model starts, float32
    units: tuple[Unit, ...]


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the direct children outside the trunk that hold values: what the task added to the language model."""
    children = model.named_children()
    return tuple(n for n, child in children if n != model.base_model_prefix and any(True for _ in child.parameters()))


def wrap(model: nn.Module, adapter: Adapter, head: bool = True) -> Adapted:
    """Puts a new adapter on a model; without `head` what it has outside its trunk stays as it is.

    Raises:
        ValueError: a target module or a layer is not there; it lists the linear layers that are.
    """
    config = _filled(adapter(head_modules(model) if head else ()), model)
    try:
        with _quiet():
            module = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(_no_target(model, config, error)) from error
    _check_used(module, config)
    return _trained(adapted(module))


def load(model: nn.Module, folder: str) -> Adapted:
    """Puts a saved adapter on a model, ready to be trained further."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds no adapter: there is no adapter_config.json in it. Runs keep theirs in adapter/."
        )
    try:
        with _quiet():
            return adapted(PeftModel.from_pretrained(model, folder, is_trainable=True))
    except RuntimeError as error:  # other shapes
        raise ValueError(
            f"the adapter in {folder} does not fit {type(model).__name__}: {str(error).splitlines()[-1].strip()} "
            f"Start from an adapter of the same model and number of labels."
        ) from error


def adapted(module: PeftModel) -> Adapted:
    """Lists what is trainable in a PEFT model, and freezes the module: values are passed in by name from here on."""
    frozen = _frozen_head(module)
    trainable = {
        n: p
        for n, p in module.named_parameters()
        if p.requires_grad and ".original_module." not in n and not n.startswith(frozen)
    }
    for config in module.peft_config.values():
        _in_order(config)
    params = {name: value.detach().float().clone() for name, value in trainable.items()}
    for value in module.parameters():
        value.requires_grad_(False)
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in params:
        groups.setdefault(_unit_of(name, module.base_model.prefix), []).append(name)
    units = (
        Unit(unit, tuple(names), sum(params[n].numel() for n in names), is_head)
        for (unit, is_head), names in groups.items()
    )
    return Adapted(module.eval(), params, tuple(units))


def _frozen_head(module: PeftModel) -> tuple[str, ...]:
    """Beginnings of the names of a head that is not trained: PEFT would train its biases with the trunk's."""
    saved = {name for config in module.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()}
    base = module.get_base_model()
    return tuple(f"base_model.model.{name}." for name in head_modules(base) if name not in saved)


def _trained(made: Adapted) -> Adapted:
    if not made.params:
        raise ValueError(
            f"nothing of {type(made.module.get_base_model()).__name__} is left to train: the adapter brings no values, "
            f"and this task keeps the pretrained head. Use an adapter with values of its own, such as lora."
        )
    return made


def _in_order(config: PeftConfig) -> None:
    """PEFT writes its sets of names in the order they happen to have; sorted, equal runs write equal files."""
    for key, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, key, sorted(value))


def _unit_of(name: str, prefix: str) -> tuple[str, bool]:
    """A value's unit, and whether that is the head's: LoRA's A and B share one, so do a layer's biases."""
    short = name.removeprefix("base_model.model.")
    if ".modules_to_save." in short:
        return re.sub(r"\.modules_to_save\.[^.]+", "", short).rpartition(".")[0], True
    if f".{prefix}" in short:
        return short.split(f".{prefix}")[0], False
    layer = re.match(r".*?\.\d+(?=\.)", short)
    return (layer.group() if layer else short.rpartition(".")[0]), False


def _filled(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """The configuration with its targets named, for the models that PEFT names none for."""
    named: Any = config
    kind = getattr(model.config, "model_type", "")
    if named.target_modules is None and kind in _USUAL:
        lora_targets, targets, feedforward = _USUAL[kind]
        named.target_modules = set(targets if isinstance(config, IA3Config) else lora_targets)
        if isinstance(config, IA3Config):
            config.feedforward_modules = set(feedforward)
    return config


def _check_used(module: PeftModel, config: PeftConfig) -> None:
    """A target or a layer that nothing was found for is a mistake, though others were found."""
    asked: Any = config
    found: list[str] = module.base_model.targeted_module_names
    if asked.target_modules == _NOTHING:
        return
    numbers = {int(part) for name in found for part in name.split(".") if part.isdigit()}
    missing = sorted(t for t in asked.target_modules if not any(f".{name}".endswith(f".{t}") for name in found))
    absent = [layer for layer in getattr(asked, "layers_to_transform", None) or () if layer not in numbers]
    if missing or absent:
        what = f"targets {missing}" if missing else f"layers {absent}"
        raise ValueError(f"the adapter found nothing for {what} in {_there(module.get_base_model())}")


def _no_target(model: nn.Module, config: PeftConfig, error: ValueError) -> str:
    """The clear form of PEFT's complaint: what was asked for, and which linear layers there are."""
    asked: Any = getattr(config, "target_modules", None)
    if not asked:
        return f"an adapter for {_there(model)} Name some of them: adapter.targets. ({str(error).splitlines()[0]})"
    layers = getattr(config, "layers_to_transform", None)
    where = f" of layers {layers}" if layers else ""
    return f"the adapter found none of targets = {sorted(asked)}{where} in {_there(model)}"


def _there(model: nn.Module) -> str:
    """The model's class and the linear layers that an adapter could be put on, by the ends of their names."""
    ends = dict.fromkeys(
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and ".lora_" not in name and ".modules_to_save" not in name
    )
    ends.pop("original_module", None)
    count = getattr(model.config, "num_hidden_layers", None)
    layers = f" {count} layers." if count else ""
    return f"{type(model).__name__}.{layers} Linear layers there: {', '.join(ends)}."


class _quiet(warnings.catch_warnings):
    """Leaves out what PEFT warns of and a user can do nothing about: a deprecation, and a setting it mends itself."""

    def __enter__(self) -> Any:
        log = super().__enter__()
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
        return log
