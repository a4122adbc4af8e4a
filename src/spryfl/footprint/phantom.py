"""Tensors without storage, and a count of the bytes that they would hold: how a step is run before there is a model.

A phantom is PyTorch's FakeTensor: shape, type and device of a tensor, none of its numbers. Every operation on one
works out the shapes of its results, so a step's own code runs as it stands and the storages that it would make and
free are counted one by one, as `costs.peak_memory` counts real ones. What is asked of a number (`float(loss)`, an
`if`) is answered with 1. Small whole numbers (token ids, masks) stay real, so that what depends on them is right.

Cost: some 50 microseconds an operation, whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from spryfl import noise
from spryfl.backbone.codec import codec_of
from spryfl.backbone.packed import Matrix, Packed
from spryfl.costs.memory import Storages
from spryfl.jvp import attention

SOME = 1  # of pieces that are alike, those that are run
REAL = 1 << 20  # bytes of whole numbers up to which they are computed really

_NUMBERS = torch.ops.aten._local_scalar_dense.default


class Phantoms(Storages):
    """While it is on, new floating-point tensors are phantoms, and the bytes held are counted by phase.

    A phase is what lies between two calls of `mark`; `peaks` has the most bytes held in each, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.peaks: list[tuple[str, int]] = [("", 0)]

    def mark(self, name: str) -> None:
        """The phase `name` begins."""
        self.peaks.append((name, self.now))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*_tensors(args), *_tensors((kwargs or {}).values())]
        if not given:
            out = self._made(func, args, kwargs or {})
        elif func is _NUMBERS and isinstance(given[0], FakeTensor):
            return True if given[0].dtype is torch.bool else 1.0 if given[0].is_floating_point() else 1
        else:
            out = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in _tensors(out if isinstance(out, tuple | list) else (out,)):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._add(storage)
        return out

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor from sizes alone."""
        with self.mode:
            made = func(*args, **kwargs)
        if isinstance(made, Tensor) and not made.is_floating_point() and made.nbytes < REAL:
            return func(*args, **kwargs)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        super()._add(storage)
        name, most = self.peaks[-1]
        self.peaks[-1] = name, max(most, self.now)

    def like(self, tensor: Tensor) -> Tensor:
        """A phantom of a tensor's shape and type on the CPU; it is not counted."""
        with _disable_current_modes(), self.mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results: by themselves or in a list, which is all that there is."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (one for one in value if isinstance(one, Tensor))


@contextmanager
def phantoms() -> Iterator[Phantoms]:
    """Runs what is inside on phantoms: `with phantoms() as made: ...; made.peaks`.

    What the package keeps between calls (the counters of the noise) is thrown away before and after: a phantom must
    not be met outside, and a fresh process has none. Of attention's pieces, each as large as the next and gone before
    it, one is run.
    """
    noise.forget()
    token = attention.SOME.set(SOME)
    try:
        with Phantoms() as made:
            yield made
    finally:
        attention.SOME.reset(token)
        noise.forget()


def fill(module: nn.Module, made: Phantoms) -> None:
    """Gives a module that was built on the meta device phantoms for values and buffers; tied ones stay tied."""
    known: dict[int, Tensor] = {}

    def one(value: Tensor) -> Tensor:
        if id(value) not in known:
            known[id(value)] = made.like(value)
        return known[id(value)]

    kept = list(module.parameters()), list(module.buffers())  # alive, so that no id comes twice
    for inner in module.modules():
        if isinstance(inner, Packed):
            inner.matrix = Some(inner.matrix.precision, inner.matrix.shape, partial(dict, _parts(inner.matrix, made)))
            inner.device = torch.device("cpu")
        for name, value in inner._parameters.items():
            if value is not None:
                filled = one(value)
                inner._parameters[name] = known.setdefault(id(filled), nn.Parameter(filled, requires_grad=False))  # type: ignore[assignment]
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                inner._buffers[name] = one(buffer)
    del kept


class Some(Matrix):
    """An encoded matrix of whose chunks, each as large as the next and gone before it, one is decoded."""

    def chunks(self) -> Iterator[slice]:
        """The first chunk."""
        return islice(super().chunks(), SOME)


def _parts(matrix: Matrix, made: Phantoms) -> dict[str, Tensor]:
    layout = codec_of(matrix.precision).layout(matrix.shape)
    return {name: made.like(torch.empty(shape, dtype=dtype, device="meta")) for name, (dtype, shape) in layout.items()}
