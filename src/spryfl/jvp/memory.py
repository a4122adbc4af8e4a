"""Memory of tangents, used again within one call.

K tangents of a wide layer are freed and asked for again in every layer. The C library gives such blocks back to the
system and takes new ones, whose every page costs a fault and a clearing: measured, one pass of values out of ten at K
= 8. So on the CPU the largest tangents of a call come from a pool: a buffer is free when nothing but the pool refers
to its storage. The pool holds what the widest layer needs at one moment anyway, and lives no longer than the call. On
a GPU torch's caching allocator does all this already.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

LARGEST = 32 << 20  # bytes; the largest block that glibc can be told to keep
GIVEN = 1 << 20  # bytes; larger blocks are given back at once
SMALL = 1 << 18  # bytes; below it the C library keeps freed blocks itself

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for mallopt

Buffers = dict[tuple[int, torch.dtype], list[Tensor]]
pool: ContextVar[Buffers | None] = ContextVar("pool", default=None)


class _Freed:
    """What the C library of this process does with freed blocks, so far as we have told it."""

    kept: bool | None = None
    streams = False


def keep_freed() -> None:
    """Let the C library keep freed blocks for the next tangents, unless this process streams a model.

    glibc gives a freed block back to the system unless one at least as large was freed before: measured, 12,000 page
    faults a call, ten when it is told to keep them. Other C libraries are left as they are. Costs nothing when told so.
    """
    if not _Freed.streams:
        _tell(kept=True)


def return_freed(streams: bool = False) -> None:
    """Let the C library give each large block back when it is freed: what reverse mode and streamed blocks need.

    Their blocks are of many sizes, so that kept ones leave room between those that live. Measured in a streamed step of
    RoBERTa-Large, 1 x 256 tokens: 81 MB beside what was in use, 14 MB with this, in the same time.

    Args:
        streams: whatever comes later in this process, as the model was to take little memory.
    """
    _Freed.streams |= streams
    _tell(kept=False)


@contextlib.contextmanager
def again(nbytes: int) -> Iterator[None]:
    """For a loop that makes and frees one block after another of up to `nbytes`: inside, they use the same pages.

    Says nothing where freed blocks are kept anyway. Measured in a streamed step of Llama2-7B's width, whose matrices
    are decoded 4 MB at a time: 0.6 million page faults where there were 15, 27 s where it took 36. It costs holes, of
    which others take a part, so that the next loop opens a new one: 45 MB there.
    """
    library = _glibc() if _Freed.kept is False else None
    if library:
        _give_back(library, above=nbytes + nbytes // 4)
    try:
        yield
    finally:
        if library:
            _give_back(library, above=GIVEN)


def _tell(kept: bool) -> None:
    if kept is not _Freed.kept and (library := _glibc()) is not None:
        _give_back(library, above=LARGEST if kept else GIVEN)
        if not kept:
            library.malloc_trim(0)
    _Freed.kept = kept


def _give_back(library: Any, above: int) -> None:
    """Freed blocks above so many bytes at once, and what is free at the heap's end above twice as many."""
    library.mallopt(_MMAP_THRESHOLD, above)
    library.mallopt(_TRIM_THRESHOLD, 2 * above)


@cache
def _glibc() -> Any:
    """The C library where it can be told."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def references(buffer: Tensor) -> int:
    """How many tensors share this buffer's storage, the buffer among them."""
    return torch._C._storage_Use_Count(buffer.untyped_storage()._cdata) - 1  # less the storage object made here


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for one tangent, its content undefined; contiguous."""
    buffers, size = pool.get(), math.prod(shape)
    if buffers is None or device.type != "cpu" or size * dtype.itemsize < SMALL or not admitted(buffers, size):
        return torch.empty(shape, dtype=dtype, device=device)
    kept = buffers.setdefault((size, dtype), [])
    found = next((b for b in kept if references(b) == 1), None)
    if found is None:
        found = torch.empty(size, dtype=dtype)
        kept.append(found)
    return found.view(shape)


def admitted(buffers: Buffers, size: int) -> bool:
    """Whether this size is more than half of the pool's largest; a new largest drops what is less than half of it."""
    if 2 * size <= max((s for s, _ in buffers), default=0):
        return False
    for key in [k for k in buffers if 2 * k[0] <= size]:
        del buffers[key]
    return True
