"""What a call may do to a module while it lasts, and takes out again: stop it, answer for it, recompute, mask, reseed.

Each is a context; afterwards the module and PyTorch's generators are what they were. Costs nothing by itself.
A context that was entered later stands nearer to the caller. What counts calls must stand outside of checkpointing, as
recomputing a block calls it again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from spryfl.noise import child_seed

Visit = Callable[..., Any]  # (number of the call, module, its forward, args, kwargs) -> what the call answers


class Reached(Exception):
    """The trunk has answered; the head is not wanted."""


@dataclass
class Heard:
    """What a module answered, once it has."""

    output: Any = None


@contextlib.contextmanager
def heard(module: nn.Module, stop: bool = False) -> Iterator[Heard]:
    """Keeps the module's answer; with `stop` the call ends there, by `Reached`."""
    kept = Heard()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kept.output = output
        if stop:
            raise Reached

    handle = module.register_forward_hook(hook)
    try:
        yield kept
    finally:
        handle.remove()


@contextlib.contextmanager
def answering(modules: Iterable[nn.Module], output: Any) -> Iterator[None]:
    """While it is on, each of the modules gives `output` instead of computing."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced(module, lambda *args, **kwargs: output))
        yield


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` for one module; what stood there before comes back."""
    outer, module.forward = module.__dict__.get("forward"), forward
    try:
        yield
    finally:
        if outer is None:
            del module.forward
        else:
            module.forward = outer


@contextlib.contextmanager
def visited(modules: Iterable[nn.Module], visit: Visit) -> Iterator[None]:
    """`visit` answers every call of the modules; calls are counted from 0 over all of them together."""
    count = itertools.count()

    def standing_before(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: visit(next(count), module, forward, args, kwargs)

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced(module, standing_before(module, module.forward)))
        yield


@contextlib.contextmanager
def masks(module: nn.Module, seed: int | None, stages: Sequence[Iterable[nn.Module]] = ()) -> Iterator[None]:
    """Dropout on with masks from `seed`, or off; the mode and PyTorch's generators are afterwards what they were.

    The generator starts anew behind every call of a stage's modules, from the seed and the call's number. So the masks
    of one part of the network do not depend on what ran before it, and a part alone has those of the whole.
    A layer without dropout is the same in both modes, so a model whose dropout is 0 draws nothing.
    """
    if seed is None:
        yield
        return
    module.train()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(seeded(seed))
            for stage, modules in enumerate(stages):
                stack.enter_context(visited(modules, _reseeding(seed, stage)))
            yield
    finally:
        module.eval()


def _reseeding(seed: int, stage: int) -> Visit:
    def visit(call: int, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        torch.manual_seed(child_seed(seed, "behind", stage, call))
        return output

    return visit


@contextlib.contextmanager
def checkpointing(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Each block keeps its input alone and computes again on the way back."""
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced(block, _recomputed(block, block.forward)))
        yield


def _recomputed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        # What functional_call put into the block is bound here: on the way back it is gone.
        values: dict[str, Tensor] = dict(block.named_parameters())
        training = block.training

        def inner(*args: Any) -> Any:
            with in_mode(block, training), replaced(block, forward):
                return functional_call(block, values, args, kwargs)

        return checkpoint(inner, *args, use_reentrant=False)

    return run


@contextlib.contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
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
