"""A run's folder: configuration, one record a round, newest and best state. Killed at any moment, it stays whole.

    config.toml   run.json   records.jsonl   state/newest.spryfl   state/best.spryfl   adapter/   curves.png   .lock

A round is appended to the records first and saved as state second, each flushed to the disk; a state replaces the old
one in one step. On resuming, records past the state are dropped: those rounds are run again, to the same bits. One
process at a time writes to a folder; the system undoes its lock when the process ends, however it ends. Cost: a write
of the trainable values and their optimizer state a round.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from spryfl import wire
from spryfl.types import ServerState

SCHEMA = 1
NEWEST, BEST = "newest", "best"


class Progress(NamedTuple):
    """What the loop carries besides the server's state."""

    best: float = -math.inf  # highest value of the task's metric so far
    best_round: int = 0
    waited: int = 0  # evaluations since
    bytes_down: int = 0
    bytes_up: int = 0
    value_passes: float = 0
    tangent_passes: float = 0
    backward_passes: float = 0
    seconds: float = 0.0
    failing: Mapping[int, tuple[int, int]] = MappingProxyType({})  # client -> (times running, rests until round)


class Journal(NamedTuple):
    """A run folder."""

    folder: Path
    lock: FileLock | None = None  # while this process may write to it

    @property
    def records_file(self) -> Path:
        return self.folder / "records.jsonl"

    def state_file(self, which: str) -> Path:
        return self.folder / "state" / f"{which}.spryfl"


def create(folder: Path, config: str, facts: Mapping[str, Any]) -> Journal:
    """Makes a new run folder, whole from its first moment; a ValueError if there is one already."""
    if folder.exists():
        raise ValueError(
            f"the run folder {folder} is there already, and nothing in it was touched. "
            f"Choose another --name, or go on with: spryfl resume {folder}"
        )
    beside = folder.with_name(folder.name + ".part")
    with writing(folder):
        (beside / "state").mkdir(parents=True, exist_ok=True)
        write(beside / "config.toml", config.encode())
        describe(Journal(beside), facts)
        beside.rename(folder)
    return claim(folder)


def claim(folder: Path) -> Journal:
    """An existing run folder to write to, held until `release` or this process's end; a ValueError if another's.

    A second claim in the same process is the first one again: a notebook goes on with what it has just interrupted.
    """
    opened = open_folder(folder)
    with writing(folder):
        lock = FileLock((folder / ".lock").resolve(), timeout=0, thread_local=False, is_singleton=True)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"another process works on the run folder {folder}, and nothing in it was touched. "
                f"Wait for its end, or stop it and go on with: spryfl resume {folder}"
            ) from None
    return opened._replace(lock=lock)


def release(journal: Journal) -> None:
    """Lets another process write to the folder."""
    if journal.lock:
        journal.lock.release(force=True)


def open_folder(folder: Path) -> Journal:
    """An existing run folder; a ValueError if it is none."""
    if not (folder / "config.toml").is_file():
        raise ValueError(f"{folder} is not a run folder: there is no config.toml in it. Runs lie in runs/<name>.")
    return Journal(folder)


def describe(journal: Journal, facts: Mapping[str, Any]) -> None:
    """Writes run.json: versions, hardware, commit, date, state of the run."""
    write(journal.folder / "run.json", json.dumps({"schema": SCHEMA, **facts}, indent=1).encode())


def facts_of(journal: Journal) -> dict[str, Any]:
    """run.json as it stands."""
    return _parsed(journal.folder / "run.json", _text(journal.folder / "run.json"))


def append(journal: Journal, record: Mapping[str, Any]) -> None:
    """Adds one record and waits until it is on the disk."""
    with writing(journal.records_file), open(journal.records_file, "a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps({"schema": SCHEMA, **record}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def records(journal: Journal) -> list[dict[str, Any]]:
    """All whole records; a last line that was cut short is left out."""
    if not journal.records_file.is_file():
        return []
    return [_parsed(journal.records_file, line) for line in _text(journal.records_file).split("\n")[:-1]]


def save(journal: Journal, which: str, state: ServerState, progress: Progress) -> None:
    """Writes a state so that the file is at every moment the old one or the new one."""
    write(journal.state_file(which), wire.dump({"state": state, "progress": progress._asdict()}))


def load(journal: Journal, which: str = NEWEST) -> tuple[ServerState, Progress]:
    """A saved state; a ValueError names a file that is missing or damaged."""
    path = journal.state_file(which)
    try:
        saved, _ = wire.load(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: the run ended before its first state. Start it again.") from None
    except ValueError as error:
        raise ValueError(
            f"state {path}: {error} Copy another state over it (state/{BEST}.spryfl), or start again."
        ) from None
    return saved["state"], Progress(**saved["progress"])


def rewind(journal: Journal, round_: int) -> None:
    """Drops the records past `round_`: they belong to rounds that the state has not seen."""
    kept = [record for record in records(journal) if record["round"] <= round_]
    write(journal.records_file, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Restore it, or start a new run.") from None


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged: {text[:40]!r} is not JSON ({error.msg}). Restore it, or start a new run."
        ) from None


def write(path: Path, data: bytes) -> None:
    """Writes a file beside `path` and puts it in its place in one step."""
    beside = path.with_name(path.name + ".part")
    with writing(path, lambda: beside.unlink(missing_ok=True)):
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


@contextlib.contextmanager
def writing(path: Path, undo: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One clear message for a disk that is full or cannot be written to."""
    try:
        yield
    except OSError as error:
        undo()
        raise ValueError(
            f"could not write {path}: {error.strerror or error}. What was there before is untouched; "
            f"free some space, then go on with: spryfl resume"
        ) from error


def same_values(opened: Journal, state: ServerState, fresh: ServerState) -> None:
    """A state of other names or shapes belongs to another adapter, model or method."""
    shapes, expected = (
        [{name: value.shape for name, value in values.items()} for values in (one.params, *one.optimizer.values())]
        for one in (state, fresh)
    )
    if shapes != expected:
        raise ValueError(
            f"the state of {opened.folder} does not fit its config.toml: the model, the adapter or the method was "
            f"changed since the run began. Restore config.toml, or start a new run."
        )
