"""A Hugging Face model's loss as an estimator wants it: whole, cut before the head, or checkpointed by block.

    loss(params) = task loss of functional_call(model, {fixed, params})

The module is never written to: values come in by name, and what a call hooks in it takes out again. Cost: a cut or a
checkpointed call adds nothing to what it computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from spryfl import tasks
from spryfl.types import Batch, Cut, Features, Params


@dataclass(frozen=True)
class ModelLoss:
    """The loss of a model as a function of its trainable values; `fixed` are values that stay as they are."""

    module: nn.Module  # PEFT's, frozen and in evaluation mode
    head: frozenset[str]
    fixed: Params
    dropout: bool = False  # off: seeds are ignored and every call is in evaluation mode

    def __call__(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        with self._masks(seed):
            return tasks.loss(self.logits(params, batch), batch)

    def cut(self, batch: Batch, seed: int | None = None) -> Cut:
        trunk = _trunk(self.module)
        layout: list[Any] = []

        def features(params: Params) -> Features:
            with self._masks(seed), _stopped_after(trunk) as stop, contextlib.suppress(_Reached):
                self.logits(params, batch)
            layout[:] = [type(stop.output), tuple(stop.output.keys())]  # its shape only: the values may be large
            return tuple(stop.output.values())

        def head(params: Params, given: Features) -> Tensor:
            kind, keys = layout
            output = kind(**dict(zip(keys, given, strict=True)))
            # The head has a seed of its own: its masks need not be those the trunk used up.
            with self._masks(None if seed is None else seed + 1), _answering(trunk, output):
                return tasks.loss(self.logits(params, batch), batch)

        return Cut(features, head)

    def checkpointed(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        with _checkpointing(self.module):
            return self(params, batch, seed)

    def _masks(self, seed: int | None) -> contextlib.AbstractContextManager[None]:
        return _masks(self.module, seed if self.dropout else None)

    def logits(self, params: Params, batch: Batch) -> Tensor:
        """The model's answers, (rows, labels)."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return functional_call(self.module, {**self.fixed, **params}, (), inputs).logits


def _trunk(module: nn.Module) -> nn.Module:
    """The language model without its task head."""
    base = module.get_base_model()  # type: ignore[operator]
    return getattr(base, base.base_model_prefix)


class _Reached(Exception):
    """The trunk has answered; the head is not wanted."""


@dataclass
class _Stop:
    output: Any = None


@contextlib.contextmanager
def _stopped_after(trunk: nn.Module) -> Iterator[_Stop]:
    stop = _Stop()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        stop.output = output
        raise _Reached

    handle = trunk.register_forward_hook(hook)
    try:
        yield stop
    finally:
        handle.remove()


@contextlib.contextmanager
def _answering(trunk: nn.Module, output: Any) -> Iterator[None]:
    """While it is on, the trunk gives `output` instead of computing."""
    trunk.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del trunk.forward


@contextlib.contextmanager
def _masks(module: nn.Module, seed: int | None) -> Iterator[None]:
    """Dropout on with masks from `seed`, or off; the mode and PyTorch's generators are afterwards what they were.

    A layer without dropout is the same in both modes, so a model whose dropout is 0 draws nothing.
    """
    if seed is None:
        yield
        return
    module.train()
    try:
        with seeded(seed):
            yield
    finally:
        module.eval()


@contextlib.contextmanager
def _checkpointing(module: nn.Module) -> Iterator[None]:
    """Each block keeps its input alone. What functional_call put in is bound now: on the way back it is gone."""
    blocks = _blocks(module)
    for block in blocks:
        block.forward = _recomputed(block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The layers that transformers marks for checkpointing; where it marks none (ALBERT), those of the first list."""
    marked = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
    listed = next((list(m) for m in module.modules() if isinstance(m, nn.ModuleList)), [])
    if not marked and not listed:
        raise ValueError(f"{type(module).__name__} has no list of layers to checkpoint. Use checkpoint = false.")
    return marked or listed


def _recomputed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        values: dict[str, Tensor] = dict(block.named_parameters())
        training = block.training

        def inner(*args: Any) -> Any:
            with _mode(block, training), _forward(block, forward):
                return functional_call(block, values, args, kwargs)

        return checkpoint(inner, *args, use_reentrant=False)

    return run


@contextlib.contextmanager
def _forward(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    outer, block.forward = block.__dict__.get("forward"), forward
    try:
        yield
    finally:
        if outer is None:
            del block.forward
        else:
            block.forward = outer


@contextlib.contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = module.training
    module.train(training)
    try:
        yield
    finally:
        module.train(before)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's generators start from `seed` inside and are afterwards what they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
