"""Memory of this process as the system counts it, while it runs: its peak between marks.

    anonymous     resident pages that no file stands behind: what the process needs, and what a small machine must have
    mapped        resident pages of files: libraries, mapped weights; the system may drop them and read them again

Linux tells both in /proc/self/status (RssAnon, RssFile), to some hundred kB. A thread looks every few milliseconds, and
every mark looks itself, so a peak that is shorter than that may be missed. Cost: 20 microseconds a look.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

STATUS = "/proc/self/status"
EVERY = 0.004  # seconds between two looks


class Resident(NamedTuple):
    """Bytes that are resident; 0 where the system does not tell."""

    anonymous: int = 0
    mapped: int = 0


def resident() -> Resident:
    """What this process holds now.

    >>> resident().anonymous >= 0
    True
    """
    try:
        with open(STATUS, encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        return Resident()
    return Resident(*(int(lines.get(key, "0 kB").split()[0]) * 1024 for key in ("RssAnon", "RssFile")))


def pages_of(folder: str) -> int:
    """Resident bytes of the files of a folder that are mapped into this process; 0 where the system does not tell."""
    held, inside = 0, False
    try:
        with open("/proc/self/smaps", encoding="utf-8") as file:
            for line in file:
                words = line.split()
                if "-" in words[0]:  # a mapping: addresses, rights, offset, device, inode, path
                    inside = len(words) > 5 and Path(words[5]).is_relative_to(Path(folder).resolve())
                elif inside and words[0] == "Rss:":
                    held += int(words[1]) * 1024
    except OSError:
        return 0
    return held


class Watch:
    """The most that was resident, from a mark to the next."""

    def __init__(self) -> None:
        self.peaks: list[tuple[str, Resident]] = [("", resident())]
        self._lock = threading.Lock()

    def mark(self, name: str = "") -> None:
        """The phase `name` begins."""
        self.look()
        with self._lock:
            self.peaks.append((name, resident()))

    def look(self) -> None:
        """Counts what is resident now."""
        now = resident()
        with self._lock:
            name, most = self.peaks[-1]
            self.peaks[-1] = name, Resident(*map(max, most, now))

    @property
    def peak(self) -> Resident:
        """The most of all phases, of each kind by itself."""
        return Resident(*(max(most[i] for _, most in self.peaks) for i in range(2)))


@contextmanager
def watched(every: float = EVERY) -> Iterator[Watch]:
    """Looks at what is resident while the block runs: `with watched() as watch: ...; watch.peak`."""
    watch, ended = Watch(), threading.Event()

    def run() -> None:
        while not ended.wait(every):
            watch.look()

    thread = threading.Thread(target=run, name="spryfl watches its memory", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()
        watch.look()
