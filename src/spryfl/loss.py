"""A Hugging Face model's loss as an estimator wants it: whole, cut before the head, or checkpointed by block.

    loss(params) = task loss of functional_call(model, {fixed, params})

The module is never written to: values come in by name. A kept prefix is the same cut further down: what the blocks
before the first moved value answer to a batch is the same in every local epoch, so it may be kept. Cost: a cut or a
checkpointed call adds nothing to what it computes; a kept prefix holds a hidden state a batch and saves the blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from spryfl import tasks
from spryfl.hooks import Reached, answering, checkpointing, heard, masks
from spryfl.tasks import Task
from spryfl.types import Batch, Cut, Features, Params


@dataclass
class Prefix:
    """Answers of the blocks before the first moved value, by the batch's contents.

    The latest one is always kept, so that all passes over one batch share it; up to `limit` bytes of others besides.
    """

    limit: int = 0
    held: int = 0
    answers: dict[bytes, Any] = field(default_factory=dict)
    latest: tuple[bytes, Any] = (b"", None)

    def add(self, key: bytes, answer: Any) -> None:
        """Keeps an answer if it still fits; nothing is pushed out, as every batch comes once an epoch."""
        self.latest = key, answer
        size = sum(leaf.nbytes for leaf in tree_leaves(answer) if isinstance(leaf, Tensor))
        if self.held + size <= self.limit:
            self.answers[key] = answer
            self.held += size

    def get(self, key: bytes) -> Any:
        """The answer to a batch, or None."""
        return self.latest[1] if self.latest[0] == key else self.answers.get(key)


@dataclass(frozen=True)
class ModelLoss:
    """The loss of a model as a function of its trainable values; `fixed` are values that stay as they are."""

    module: nn.Module  # PEFT's, frozen and in evaluation mode
    head: frozenset[str]
    fixed: Params
    dropout: bool = False  # off: seeds are ignored and every call is in evaluation mode
    prefix: Prefix = field(default_factory=Prefix)
    guide: Params = field(default_factory=dict)  # the last aggregated pseudo-gradient, or empty
    task: Task = field(default_factory=tasks.classification)

    def __call__(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        with self._masks(seed):
            return self.task.loss(self.output(params, batch), batch)

    def cut(self, batch: Batch, seed: int | None = None, top: int = 0) -> Cut:
        if top:
            raise ValueError(f"top = {top}: a cut below blocks is not offered; 0 cuts before the head.")
        trunk = self._trunk[1]
        layout: list[Any] = []

        def features(params: Params) -> Features:
            with self._masks(seed), heard(trunk, stop=True) as stopped, contextlib.suppress(Reached):
                self.output(params, batch)
            output = stopped.output
            layout[:] = [type(output), tuple(output.keys())]  # its shape only: the values may be large
            return tuple(output.values())

        def head(params: Params, given: Features) -> Tensor:
            kind, keys = layout
            output = kind(**dict(zip(keys, given, strict=True)))
            # The head has a seed of its own: its masks need not be those the trunk used up.
            with self._masks(None if seed is None else seed + 1), answering([trunk], output):
                return self.task.loss(self.output(params, batch), batch)

        return Cut(features, head, self.head)

    def checkpointed(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        with checkpointing(self._recomputed):
            return self(params, batch, seed)

    def output(self, params: Params, batch: Batch) -> Any:
        """What the model answers to a batch: logits, or start and end logits, as its class has it."""
        inputs = tasks.inputs(batch)
        with self._from_prefix(params, inputs), self._wanted(batch.get(tasks.AT)):
            return functional_call(self.module, {**self.fixed, **params}, (), inputs)

    @contextlib.contextmanager
    def _wanted(self, at: Tensor | None) -> Iterator[None]:
        """Logits over the vocabulary where `at` is 1 alone, (wanted, vocabulary): of all tokens they fill memory."""
        if at is None:
            yield
            return
        places = (at.flatten() > 0).nonzero().flatten()
        head = self.module.get_base_model().get_output_embeddings()  # type: ignore[operator]
        handle = head.register_forward_pre_hook(
            lambda module, args: (args[0].flatten(0, 1).index_select(0, places), *args[1:])
        )
        try:
            yield
        finally:
            handle.remove()

    def _masks(self, seed: int | None) -> contextlib.AbstractContextManager[None]:
        return masks(self.module, seed if self.dropout else None)

    @contextlib.contextmanager
    def _from_prefix(self, params: Params, inputs: Batch) -> Iterator[None]:
        """Runs the blocks before the first moved value once a batch, where that may be kept."""
        first = 0 if self.module.training else self._first(params)
        if not first:
            yield
            return
        before = [block for _, block in self._blocks[:first]]
        key = repr([(n, v.shape) for n, v in inputs.items()]).encode() + b"".join(_bytes(v) for v in inputs.values())
        kept = self.prefix.get(key)
        if kept is not None:
            with answering(before, kept):
                yield
            return
        with heard(before[-1]) as answer:
            try:
                yield
            finally:  # a call may well end in Reached
                if answer.output is not None:
                    self.prefix.add(key, answer.output)

    def _first(self, names: Iterable[str]) -> int:
        """How many blocks lie before all of `names`; 0 where one of them lies outside the blocks and the head."""
        paths = [path for path, _ in self._blocks]
        places = [
            next((i for i, path in enumerate(paths) if name.startswith(path + ".")), 0)
            for name in names
            if name not in self.head
        ]
        return min(places, default=len(paths))

    @cached_property
    def _trunk(self) -> tuple[str, nn.Module]:
        """The language model without its task head, and its path."""
        base = self.module.get_base_model()  # type: ignore[operator]
        trunk = getattr(base, base.base_model_prefix)
        return next(path for path, module in self.module.named_modules() if module is trunk), trunk

    @cached_property
    def _recomputed(self) -> list[nn.Module]:
        """The blocks to checkpoint; where transformers marks none (ALBERT), those of the trunk's first list."""
        marked = [block for _, block in self._blocks]
        blocks = marked or next((list(m) for m in self._trunk[1].modules() if isinstance(m, nn.ModuleList)), [])
        if not blocks:
            raise ValueError(f"{type(self._trunk[1]).__name__} has no list of layers. Use checkpoint = false.")
        return blocks

    @cached_property
    def _blocks(self) -> tuple[tuple[str, nn.Module], ...]:
        """The trunk's blocks in order, with their paths; a block inside a block counts as part of it."""
        path, trunk = self._trunk
        found: list[tuple[str, nn.Module]] = []
        for name, module in trunk.named_modules():
            inside = any(f"{path}.{name}".startswith(outer + ".") for outer, _ in found)
            if isinstance(module, GradientCheckpointingLayer) and not inside:
                found.append((f"{path}.{name}", module))
        return tuple(found)


def _bytes(value: Tensor) -> bytes:
    return value.cpu().numpy().tobytes()
