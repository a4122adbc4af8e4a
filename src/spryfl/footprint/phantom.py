"""Tensors without storage, and a count of the bytes that they would hold: how a step is run before there is a model.

A phantom has the shape, type and device of a tensor and none of its numbers: it wraps a tensor on PyTorch's meta
device, whose operations work out the shapes of their results. So a step's own code runs as it stands, and the storages
that it would make and free are counted one by one, as `costs.peak_memory` counts real ones. What is asked of a number
(`float(loss)`, an `if`) is answered with 1. Small whole numbers (token ids, masks) stay real, so that what depends on
them is right. Some shapes take milliseconds to work out, so what an operation makes is remembered. PyTorch's FakeTensor
does all this and more, and a plan takes seven times as long with it.

Cost: some 20 microseconds an operation, whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from spryfl import noise
from spryfl.backbone.codec import codec_of
from spryfl.backbone.packed import Matrix, Packed
from spryfl.costs.memory import Storages
from spryfl.jvp import attention

SOME = 1  # of pieces that are alike, those that are run
REAL = 1 << 20  # bytes of whole numbers up to which they are computed really

CPU, META = torch.device("cpu"), torch.device("meta")
_NUMBERS = torch.ops.aten._local_scalar_dense.default


class Form(NamedTuple):
    """What is known of a tensor without numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Phantom(Tensor):
    """A tensor on the CPU without numbers; `meta` has its shape, type and storage."""

    meta: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: Tensor) -> Phantom:
        known: Any = {"strides": meta.stride(), "storage_offset": meta.storage_offset(), "dtype": meta.dtype}
        made: Phantom = Tensor._make_wrapper_subclass(cls, meta.shape, device=CPU, **known)
        made.meta = meta
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of `meta`, by which it is counted; the wrapper has none."""
        return self.meta.untyped_storage()

    def tolist(self) -> Any:
        """Ones."""
        with _disable_current_modes():
            return torch.ones(self.shape, dtype=self.dtype).tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class Phantoms(Storages):
    """While it is on, new floating-point tensors are phantoms, and the bytes held are counted by phase.

    A phase is what lies between two calls of `mark`; `peaks` has the most bytes held in each, in order.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs as much as the rest

    def __init__(self) -> None:
        super().__init__()
        self.peaks: list[tuple[str, int]] = [("", 0)]

    def mark(self, name: str) -> None:
        """The phase `name` begins."""
        self.peaks.append((name, self.now))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if not given:
            out = _made(func, args, kwargs)
        elif any(isinstance(tensor, Phantom) for tensor in given):
            out = _run(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in _tensors(_listed(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        super()._add(storage)
        name, most = self.peaks[-1]
        self.peaks[-1] = name, max(most, self.now)

    def like(self, tensor: Tensor) -> Tensor:
        """A phantom of a tensor's shape and type on the CPU; it is not counted."""
        with _disable_current_modes():
            return Phantom(torch.empty(tensor.shape, dtype=tensor.dtype, device=META))


def _made(func: Any, args: Any, kwargs: Any) -> Any:
    """A tensor from sizes alone."""
    made = func(*args, **{**kwargs, "device": META})
    if isinstance(made, Tensor) and not made.is_floating_point() and made.nbytes < REAL:
        return func(*args, **kwargs)
    return _wrapped(made, {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on phantoms, with real tensors among them or without."""
    if func is _NUMBERS:
        return True if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1
    written, fresh = _kind(func)
    if written is not None:
        return kwargs.get(written, args[0])
    if not fresh:
        return _worked_out(func, args, kwargs)
    key = func, _described(args), _described(tuple(kwargs.items()))
    if key in _shapes:
        return _like(_shapes[key])
    made = _worked_out(func, args, kwargs)
    given = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
    if given.isdisjoint(
        tensor.untyped_storage()._cdata for tensor in _tensors(_listed(made))
    ):  # some views say nothing
        _shapes[key] = _described(made)
    return made


def _like(known: Any) -> Any:
    """A result from its description."""
    if isinstance(known, Form):
        return Phantom(torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device=META))
    if known and isinstance(known[0], type):
        return known[1]
    return tuple(map(_like, known))


_shapes: dict[Any, Any] = {}  # of what operations make from what they are given; some are slow to work them out


@cache
def _kind(func: Any) -> tuple[str | None, bool]:
    """(the argument that an operation writes to and answers with; whether all it answers with is new)."""
    schema = func._schema
    first, *_ = schema.arguments
    writes = [one for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    if len(writes) == 1 == len(schema.returns) and torch.Tag.inplace_view not in func.tags:
        return (writes[0].name, False) if writes[0].name in (first.name, "out") else (None, False)
    return None, not any(one.alias_info for one in (*schema.arguments, *schema.returns))


def _described(value: Any) -> Any:
    """What the shape of a result follows from, of an argument."""
    if isinstance(value, Tensor):
        return Form(value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value


def _worked_out(func: Any, args: Any, kwargs: Any) -> Any:
    """The result's shape by PyTorch's own rules."""
    owners: dict[int, Tensor] = {}  # an operation in place answers with what it was given
    bare = [_bare(value, owners) for value in args]
    named = {key: _bare(value, owners) for key, value in kwargs.items()}
    if named.get("device") is not None:
        named["device"] = META
    return _wrapped(func(*bare, **named), owners)


def _bare(value: Any, owners: dict[int, Tensor]) -> Any:
    """An argument with meta tensors in the place of phantoms and of real tensors."""
    if isinstance(value, Tensor):
        inner = value.meta if isinstance(value, Phantom) else value.to(META)
        owners[id(inner)] = value
        return inner
    if isinstance(value, list | tuple):
        return type(value)(_bare(one, owners) for one in value)
    return value


def _wrapped(value: Any, owners: dict[int, Tensor]) -> Any:
    """A result with phantoms in the place of meta tensors."""
    if isinstance(value, Tensor):
        return owners.get(id(value)) if id(value) in owners else Phantom(value)
    if isinstance(value, list | tuple):
        return type(value)(_wrapped(one, owners) for one in value)
    return value


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results: by themselves or in a list, which is all that there is."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (one for one in value if isinstance(one, Tensor))


def _listed(value: Any) -> Any:
    return value if isinstance(value, tuple | list) else (value,)


@contextmanager
def phantoms() -> Iterator[Phantoms]:
    """Runs what is inside on phantoms: `with phantoms() as made: ...; made.peaks`.

    Of attention's pieces and of the noise's tiles, each as large as the next and gone before it, one is run.
    """
    tokens = [(some, some.set(SOME)) for some in (attention.SOME, noise.SOME)]
    try:
        with Phantoms() as made:
            yield made
    finally:
        for some, token in tokens:
            some.reset(token)


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
