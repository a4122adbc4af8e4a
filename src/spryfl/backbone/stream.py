"""Where the encoded matrices of the blocks are while a pass runs: all in memory, or one block and the next.

    Resident    every block's file in a buffer of its own
    Streamer    two buffers: the block that is being used, and the one that a thread reads ahead

A matrix asks for its parts at every product (packed.py), so nothing else tells a streamer which block a pass is in. The
first matrix of another block that asks brings that block in and lets the old one go. What is read ahead is what came
next the last time after the same two blocks, and at first the next in the direction of travel: so it goes forward,
backward where checkpointed backprop recomputes, and starts again where a cut or a kept prefix makes a pass start. Parts
begin at multiples of 64 bytes in either, so both give the same bits. Cost: the bytes of all blocks, or twice those of
the largest; streaming reads the blocks it passes once a pass, 6 GB a second where they are in the page cache.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spryfl.backbone.codec import ALIGN, Parts
from spryfl.backbone.store import Store
from spryfl.jvp.memory import return_freed


def aligned(nbytes: int) -> Tensor:
    """So many bytes, not set, that begin at a multiple of 64."""
    buffer = torch.empty(nbytes + ALIGN - 1, dtype=torch.uint8)
    start = -buffer.data_ptr() % ALIGN
    return buffer[start : start + nbytes]


class Resident:
    """All blocks in memory; each file is read once, and checked."""

    def __init__(self, store: Store) -> None:
        self._parts: dict[str, dict[str, Tensor]] = {}
        for file in store.blocks:
            buffer = aligned(store.files[file].nbytes)
            store.read(file, buffer)
            self._parts.update(store.views(file, buffer))

    def parts(self, key: str) -> Parts:
        """The encoded parts of a matrix."""
        return self._parts[key]


@dataclass
class Counts:
    """What a streamer did."""

    brought: int = 0  # blocks that came in because a matrix asked
    ahead: int = 0  # of these, how many a thread had begun to read before


class _Reading:
    """A block on its way into a buffer, in a thread that ends with it, or with the process."""

    def __init__(self, store: Store, block: int, buffer: Tensor) -> None:
        self.block = block
        self.whole = False
        self._store, self._buffer = store, buffer
        self._unwanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"spryfl reads {store.blocks[block]}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # who asks for that block reads it again, and is told
            self.whole = self._store.read(self._store.blocks[self.block], self._buffer, self._unwanted.is_set)

    def end(self, wanted: bool) -> None:
        """Waits until the thread lets the buffer alone."""
        if not wanted:
            self._unwanted.set()
        self._thread.join()


class _Place(NamedTuple):
    """Where a pass is."""

    block: int = -1  # whose parts are handed out
    before: int = -1  # the one before it
    slot: int = 0  # the buffer it lies in
    views: Mapping[str, Parts] = {}


class Streamer:
    """One block at a time and the next behind it, in two buffers that are used by turns.

    One thread at a time may run passes: another one's would take away the block that this one's product reads.
    """

    def __init__(self, store: Store) -> None:
        return_freed(streams=True)
        self.counts = Counts()
        self._store = store
        self._blocks = {key: i for i, file in enumerate(store.blocks) for key in store.inside[file]}
        largest = max((store.files[file].nbytes for file in store.blocks), default=0)
        self._buffers = [aligned(largest) for _ in store.blocks[:2]]
        self._now = _Place()
        self._followed: dict[tuple[int, int], int] = {}
        self._reading: _Reading | None = None
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """What its buffers hold."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def parts(self, key: str) -> Parts:
        """The encoded parts of a matrix; they may be gone once another block was asked for.

        Raises:
            ValueError: its file is missing, cut short or damaged.
        """
        with self._lock:
            block = self._blocks[key]
            if block != self._now.block:
                self._bring(block)
            return self._now.views[key]

    def _bring(self, block: int) -> None:
        """Makes a block the current one; where that fails or is interrupted, the old one stays."""
        now, reading = self._now, self._reading
        slot = len(self._buffers) - 1 - now.slot
        if reading is not None:
            reading.end(wanted=reading.block == block)
            self._reading = None
        ahead = reading is not None and reading.block == block and reading.whole
        if not ahead:
            self._store.read(self._store.blocks[block], self._buffers[slot])
        views = self._store.views(self._store.blocks[block], self._buffers[slot])
        self._now = _Place(block, now.block, slot, views)
        self.counts.brought += 1
        self.counts.ahead += ahead
        self._followed[now.before, now.block] = block
        following = self._followed.get((now.block, block), self._onward())
        if following not in (-1, block):
            self._reading = _Reading(self._store, following, self._buffers[now.slot])

    def _onward(self) -> int:
        """The next block in the direction of travel, -1 where there is none; after a leap that is forward."""
        onward = self._now.block + (-1 if self._now.before == self._now.block + 1 else 1)
        return onward if 0 <= onward < len(self._store.blocks) else -1
