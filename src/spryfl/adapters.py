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
from typing import Any, NamedTuple

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from spryfl.types import Unit

Adapter = Callable[[Sequence[str]], PeftConfig]  # names of the head's modules -> PEFT's configuration

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


def wrap(model: nn.Module, adapter: Adapter) -> Adapted:
    """Puts a new adapter on a model.

    Raises:
        ValueError: none of the target modules is there; it lists the linear layers that are.
    """
    config = adapter(head_modules(model))
    try:
        with _quiet():
            module = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(_no_target(model, config, error)) from error
    return adapted(module)


def load(model: nn.Module, folder: str) -> Adapted:
    """Puts a saved adapter on a model, ready to be trained further."""
    with _quiet():
        return adapted(PeftModel.from_pretrained(model, folder, is_trainable=True))


def adapted(module: PeftModel) -> Adapted:
    """Lists what is trainable in a PEFT model, and freezes the module: values are passed in by name from here on."""
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad and ".original_module." not in n}
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


def _unit_of(name: str, prefix: str) -> tuple[str, bool]:
    """A value's unit, and whether that is the head's: LoRA's A and B share one, so do a layer's biases."""
    short = name.removeprefix("base_model.model.")
    if ".modules_to_save." in short:
        return re.sub(r"\.modules_to_save\.[^.]+", "", short).rpartition(".")[0], True
    if f".{prefix}" in short:
        return short.split(f".{prefix}")[0], False
    layer = re.match(r".*?\.\d+(?=\.)", short)
    return (layer.group() if layer else short.rpartition(".")[0]), False


def _no_target(model: nn.Module, config: PeftConfig, error: ValueError) -> str:
    """The clear form of PEFT's complaint: what was asked for, and which linear layers there are."""
    asked = getattr(config, "target_modules", None)
    ends = dict.fromkeys(n.rpartition(".")[2] for n, m in model.named_modules() if n and isinstance(m, nn.Linear))
    if not asked:
        return f"{type(model).__name__}: {error} Set adapter.targets. Linear layers there: {', '.join(ends)}."
    return (
        f"the adapter found none of targets = {sorted(asked)} in {type(model).__name__}. "
        f"Linear layers there: {', '.join(ends)}."
    )


class _quiet(warnings.catch_warnings):
    """Leaves out one deprecation that PEFT causes inside transformers and a user can do nothing about."""

    def __enter__(self) -> Any:
        log = super().__enter__()
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return log
