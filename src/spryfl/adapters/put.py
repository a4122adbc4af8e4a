"""Puts an adapter on a model, opens a saved one, saves one: PEFT's own format, and what that cannot tell beside it.

PEFT, opening a folder, would train all that the adapter has. Where less is trained (LoRA-FA's B, LoRA-XS's cores) the
trained values stand beside it in trained.safetensors, under their names here; PEFT passes over that file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from spryfl.adapters import core
from spryfl.adapters.families import NOTHING, Adapter, core_layers, from_the_front
from spryfl.adapters.units import Adapted, adapted, head_modules, own, plain_head, state

TRAINED = "trained.safetensors"  # beside an adapter of which PEFT would train more
# Where PEFT has no choice of its own: model type -> LoRA's targets (query and value), IA3's, its feed-forward ones.
_USUAL = {
    "albert": (("query", "value"), ("key", "value", "ffn_output"), ("ffn_output",)),
    "distilbert": (("q_lin", "v_lin"), ("k_lin", "v_lin", "lin2"), ("lin2",)),
}


def wrap(model: nn.Module, adapter: Adapter, head: bool = True) -> Adapted:
    """Puts a new adapter on a model; without `head` what it has outside its trunk stays as it is.

    Raises:
        ValueError: a target module or a layer is not there, and it lists the linear layers that are; or the adapter's
            options do not fit the targets.

    Args:
        model: a Hugging Face model; it is changed in place.
        adapter: what a builder made.
        head: whether what lies outside the trunk is trained too.
    """
    if head:
        plain_head(model)
    config = _filled(adapter.config(head_modules(model) if head else ()), model)
    try:
        with _quiet():
            module = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ValueError(_refused(model, config, error)) from error
    _check_used(module, config)
    adapter.finish(module)
    made = adapted(module)
    if not made.params:
        raise ValueError(
            f"nothing of {type(model).__name__} is left to train: the adapter brings no values, "
            f"and this task keeps the pretrained head. Use an adapter with values of its own, such as lora."
        )
    return made


def load(model: nn.Module, folder: str) -> Adapted:
    """Puts a saved adapter on a model, ready to be trained further as it was trained before.

    Args:
        model: the base model; it is changed in place.
        folder: of the adapter, as `save` or PEFT wrote it.

    Raises:
        ValueError: there is no adapter in it, or it is another model's.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds no adapter: there is no adapter_config.json in it. Runs keep theirs in adapter/."
        )
    try:
        with _quiet():
            module = PeftModel.from_pretrained(model, folder, is_trainable=True)
    except RuntimeError as error:  # other shapes
        raise ValueError(
            f"the adapter in {folder} does not fit {type(model).__name__}: {str(error).splitlines()[-1].strip()} "
            f"Start from an adapter of the same model and number of labels."
        ) from error
    if (Path(folder) / TRAINED).is_file():
        _trained_alone(module, Path(folder) / TRAINED)
    return adapted(module)


def save(module: PeftModel, params: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes an adapter with these trained values, and the head, in PEFT's own format.

    Args:
        module: PEFT's.
        params: trained values by name; those that are missing are saved as the module has them.
        folder: where; made if it is not there.
    """
    module.save_pretrained(str(folder), state_dict=state(module, params), save_embedding_layers=False)
    mine = {name: value.cpu().contiguous() for name, value in params.items() if own(module, name)}
    if mine.keys() == {name for name, _ in module.named_parameters() if own(module, name)}:
        (folder / TRAINED).unlink(missing_ok=True)
    else:
        save_file(mine, folder / TRAINED)


def _trained_alone(module: PeftModel, path: Path) -> None:
    """Makes trainable what the file names and freezes the rest of the adapter."""
    values = load_file(path)
    try:
        core.restore(module, values)
        for name, value in module.named_parameters():
            if own(module, name):
                value.requires_grad_(name in values)
                if name in values and not torch.equal(value.detach().float().cpu(), values[name]):
                    raise ValueError(f"{name} is no longer the value that was saved.")
    except ValueError as error:
        raise ValueError(
            f"the adapter in {path.parent} was changed after {path.name} was written, or belongs to another model: "
            f"{error} Give the model it was made for, or remove {path.name} to go on with it as plain LoRA."
        ) from error


def _filled(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """The configuration with its targets named, for the models that PEFT names none for, and its layers by number."""
    named: Any = from_the_front(config, getattr(model.config, "num_hidden_layers", 0))
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
    if asked.target_modules == NOTHING:
        return
    numbers = {int(part) for name in found for part in name.split(".") if part.isdigit()}
    missing = sorted(t for t in asked.target_modules if not any(f".{name}".endswith(f".{t}") for name in found))
    wanted = {*(getattr(asked, "layers_to_transform", None) or ()), *core_layers(asked)}
    absent = sorted(layer for layer in wanted if layer not in numbers)
    if missing or absent:
        what = f"targets {missing}" if missing else f"layers {absent}"
        raise ValueError(f"the adapter found nothing for {what} in {_there(module.get_base_model())}")


def _refused(model: nn.Module, config: PeftConfig, error: Exception) -> str:
    """The clear form of PEFT's complaint: what was asked for, and which linear layers there are."""
    asked: Any = getattr(config, "target_modules", None)
    first = str(error).splitlines()[0]
    if not asked:
        return f"an adapter for {_there(model)} Name some of them: adapter.targets. ({first})"
    if "target" not in first.lower():
        return f"the adapter does not fit {_there(model)} ({first})"
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
    """Leaves out what PEFT warns of and a user cannot mend: a deprecation, a setting it changes, norms, layers."""

    def __enter__(self) -> Any:
        log = super().__enter__()
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message="Unsupported layer type", category=UserWarning)  # norms, in LN tuning
        return log
