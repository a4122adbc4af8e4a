"""A Hugging Face model's loss as an estimator wants it: whole, cut at any depth, or checkpointed by block.

    loss(params) = task loss of functional_call(model, {fixed, params})

The module is never written to: values come in by name. A kept prefix is the same cut further down: what the blocks
before the first moved value answer to a batch is the same in every local epoch, so it may be kept. A batch may come in
pieces of so many rows, sequences of one row together. Cost: a cut or a
checkpointed call adds nothing to what it computes; a kept prefix holds a hidden state a batch and saves the blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from spryfl import tasks
from spryfl.estimators.pieces import weighed
from spryfl.hooks import Heard, Reached, answering, checkpointing, heard, masks, visited
from spryfl.layout import Layout, layout_of, parted
from spryfl.tasks import Task
from spryfl.types import Batch, Cut, Features, Params, Piece


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
        """The answer to a batch, or None; another batch than the latest one lets that go, before its own is made."""
        if self.latest[0] != key:
            self.latest = b"", None
            return self.answers.get(key)
        return self.latest[1]


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
    micro_batch: int = 0  # rows at once; 0 = whole batches

    def __call__(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        self._fits(batch)
        with self._masks(seed):
            return self.task.loss(self.output(params, batch), batch)

    def pieces(self, batch: Batch, seed: int | None = None) -> tuple[Piece, ...]:
        parts = tasks.parts(batch, self.micro_batch) if self.micro_batch else [batch]
        return weighed(parts, [self.task.terms(part) for part in parts], seed)

    def _fits(self, batch: Batch) -> None:
        rows = tasks.count(batch) if self.micro_batch else 0
        if rows > self.micro_batch:
            raise ValueError(
                f"train.micro_batch = {self.micro_batch}, but this estimator asks for the loss of {rows} rows at once. "
                f"Let it sum over loss_fn.pieces(batch, seed) (docs/add_an_estimator.md), or remove train.micro_batch."
            )

    def cut(self, batch: Batch, seed: int | None = None, top: int = 0, checkpoint: bool = False) -> Cut:
        self._fits(batch)
        if top:
            return self._below_blocks(batch, seed, top, checkpoint)
        trunk = self._layout.trunk[1]
        shape: list[Any] = []

        def features(params: Params) -> Features:
            with self._masks(seed), heard(trunk, stop=True) as stopped, contextlib.suppress(Reached):
                self.output(params, batch)
            output = stopped.output
            shape[:] = [type(output), tuple(output.keys())]  # its shape only: the values may be large
            return tuple(output.values())

        def head(params: Params, given: Features) -> Tensor:
            kind, keys = shape
            output = kind(**dict(zip(keys, given, strict=True)))
            with answering([trunk], output), self._masks(seed):
                return self.task.loss(self.output(params, batch, until=0), batch)

        return Cut(features, head, self.head)

    def _below_blocks(self, batch: Batch, seed: int | None, top: int, checkpoint: bool) -> Cut:
        """The cut below the last `top` blocks. The part above runs the model with the blocks below answered for."""
        layout = self._layout
        at, calls, above, both = layout.sides(top, tasks.inputs(batch))
        # A kept prefix answers for blocks, whose calls are not seen then: the block says more than the count.
        stop = layout.blocks[at] if calls == len(layout.blocks) else None

        def trunk(params: Params) -> Features:
            stopped = Heard()

            def visit(call: int, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
                if call < at and module is not stop:
                    return forward(*args, **kwargs)
                stopped.output = parted(args, kwargs)[0]
                raise Reached

            # The kept prefix answers inside of what counts the calls, so that each is counted.
            kept = self._from_prefix(params, tasks.inputs(batch), 0 if self.dropout and seed is not None else at)
            with kept, visited(layout.blocks, visit), self._masks(seed), contextlib.suppress(Reached):
                self.output(params, batch, until=0)
            return (stopped.output,)

        def head(params: Params, given: Features) -> Tensor:
            def visit(call: int, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
                if call < at:
                    return layout.answer(call, given[0])
                _, others, named = parted(args, kwargs)
                return forward(given[0], *others, **named) if call == at else forward(*args, **kwargs)

            recomputed = checkpointing(layout.blocks) if checkpoint else contextlib.nullcontext()
            with recomputed, visited(layout.blocks, visit), self._masks(seed):
                return self.task.loss(self.output(params, batch, until=0), batch)

        return Cut(trunk, head, above, (calls - at) / calls, both)

    def checkpointed(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        if not self._layout.blocks:
            raise ValueError(f"{type(self._layout.trunk[1]).__name__} has no list of layers. Use checkpoint = false.")
        with checkpointing(self._layout.blocks):
            return self(params, batch, seed)

    def output(self, params: Params, batch: Batch, until: int | None = None) -> Any:
        """What the model answers to a batch, as its class has it; a kept prefix ends at block `until` at the latest."""
        inputs = tasks.inputs(batch)
        with self._from_prefix(params, inputs, until), self._wanted(batch.get(tasks.AT)):
            return functional_call(self.module, self._typed({**self.fixed, **params}), (), inputs)

    def _typed(self, values: Params) -> dict[str, Tensor]:
        """Values in the model's own type where that is half precision: BitFit's biases, not adapters nor head."""
        types = {name: self.module.get_parameter(name).dtype for name in values}
        return {name: value.to(types[name]) if types[name].itemsize < 4 else value for name, value in values.items()}

    @contextlib.contextmanager
    def _wanted(self, at: Tensor | None) -> Iterator[None]:
        """Logits over the vocabulary where `at` is 1 alone, (wanted, vocabulary): of all tokens they fill memory."""
        if at is None:
            yield
            return
        places = (at.flatten() > 0).nonzero().flatten()
        head = self.module.get_base_model().get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ValueError(f"{type(self.module.get_base_model()).__name__} has no map to a vocabulary.")  # type: ignore[operator]
        handle = head.register_forward_pre_hook(
            lambda module, args: (args[0].flatten(0, 1).index_select(0, places), *args[1:])
        )
        try:
            yield
        finally:
            handle.remove()

    def _masks(self, seed: int | None) -> contextlib.AbstractContextManager[None]:
        if not self.dropout:
            return contextlib.nullcontext()
        return masks(self.module, seed, ([self._layout.trunk[1]], self._layout.blocks))

    @contextlib.contextmanager
    def _from_prefix(self, params: Params, inputs: Batch, until: int | None) -> Iterator[None]:
        """Runs the blocks before the first moved value once a batch, where that may be kept."""
        first = 0 if self.module.training or until == 0 else self._layout.first(params, self.head)
        if until is not None:
            first = min(first, until)
        if not first:
            yield
            return
        before = [block for _, block in self._layout.marked[:first]]
        shapes = repr([first, *((name, value.shape) for name, value in inputs.items())])
        key = shapes.encode() + b"".join(_bytes(value) for value in inputs.values())
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

    @property
    def _layout(self) -> Layout:
        return layout_of(self.module)


def _bytes(value: Tensor) -> bytes:
    return value.cpu().numpy().tobytes()
