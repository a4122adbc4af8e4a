"""Memory of tangents, used again within one call.

K tangents of a wide layer are freed and asked for again in every layer. The C library gives such blocks back to the
system and takes new ones, whose every page costs a fault and a clearing: measured, one pass of values out of ten at K
= 8. So on the CPU the largest tangents of a call come from a pool: a buffer is free when nothing but the pool refers
to its storage. The pool holds what the widest layer needs at one moment anyway, and lives no longer than the call. On
a GPU torch's caching allocator does all this already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

LARGEST = (32 << 20) - (1 << 16)  # bytes; just under the largest block that glibc learns from
SMALL = 1 << 18  # bytes; below it the C library keeps freed blocks itself

Buffers = dict[tuple[int, torch.dtype], list[Tensor]]
pool: ContextVar[Buffers | None] = ContextVar("pool", default=None)


@cache
def settle() -> None:
    """Let the C library keep freed blocks, once in a process.

    glibc gives a freed block back to the system unless one at least as large was freed before. One that is never
    touched costs nothing and teaches it: measured, 12,000 page faults a call before, ten after.
    """
    bytearray(LARGEST)


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
