"""Runs the commands of a federation on this machine, for scripts, tests and benchmarks: every process ended by its id.

A process that goes on beside this one gets a process group of its own, which is ended as a whole: Flower's programs
start others. `flwr run` ends with 0 whether the run went well or not, so `finished` asks the SuperLink. Costs what it
runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from spryfl.sites import typed

_STOP = 15.0  # seconds to end in good order


class FailedError(RuntimeError):
    """A command or a run that ended badly, and what it printed."""


def found(words: Sequence[str]) -> list[str]:
    """A command as this Python's own environment has it."""
    beside = Path(sys.executable).parent / words[0]
    if words[0] == "spryfl":
        return [sys.executable, "-m", "spryfl.cli", *words[1:]]
    return [str(beside) if beside.is_file() else words[0], *words[1:]]


def environment(app: Path) -> dict[str, str]:
    """This process's environment and Flower's; paths to packages hold in any folder.

    Flower starts its other programs by name: they are found beside this interpreter, though nobody activated its
    environment.
    """
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    own = {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}
    found = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **own, "PATH": found, **typed.environment(app)}


def call(words: Sequence[str], app: Path, folder: Path, seconds: float = 1800.0) -> str:
    """Runs a command to its end in `folder`, and returns what it printed; a FailedError if its exit code is not 0.

    What it started and left behind is ended too: a node that is turned away leaves such a process.
    """
    with tempfile.TemporaryFile() as file:
        one = _started(words, app, folder, file)
        try:
            one.wait(seconds)
        finally:
            end(one)
        file.seek(0)
        said = file.read().decode(errors="replace")
    if one.returncode:
        raise FailedError(f"{typed.line(words)}\nended with {one.returncode}:\n{said}")
    return said


def _started(words: Sequence[str], app: Path, folder: Path, out: IO[bytes]) -> subprocess.Popen[bytes]:
    """A process in a group of its own: its id is the group's."""
    options: dict[str, Any] = {"stdout": out, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(found(words), cwd=folder, env=environment(folder / app), start_new_session=True, **options)


@contextlib.contextmanager
def running(
    words: Sequence[str], app: Path, folder: Path, ready: Callable[[], bool], seconds: float = 60.0
) -> Iterator[subprocess.Popen[bytes]]:
    """A process beside this one, from the moment it is ready until the end of the block.

    Args:
        words: the command.
        app: the app folder, for Flower's home.
        folder: where it runs, and where its log goes, <program>-<process id>.log.
        ready: asked until it is true.
        seconds: to wait for that.

    Raises:
        FailedError: it ended, or was not ready in time; with its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{words[0]}.log.part-{time.monotonic_ns()}"
    with open(part, "wb") as file:
        one = _started(words, app, folder, file)
    log = part.rename(folder / f"{words[0]}-{one.pid}.log")
    try:
        until = time.monotonic() + seconds
        while not ready():
            if one.poll() is not None or time.monotonic() > until:
                how = "is not ready" if one.returncode is None else f"ended with {one.returncode}"
                raise FailedError(f"{typed.line(words)}\n{how}:\n{log.read_text(errors='replace')}")
            time.sleep(0.1)
        yield one
    finally:
        end(one)


def end(one: subprocess.Popen[Any]) -> None:
    """Ends a process by its id, in good order if it will, and all that is left of its group."""
    if one.poll() is None:
        one.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.wait(_STOP)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(one.pid, signal.SIGKILL)
    one.wait(_STOP)


def answers(port: int) -> Callable[[], bool]:
    """Whether somebody listens on a port of this machine."""

    def ready() -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return ready


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    start = 20_000 + secrets.randbelow(10_000)  # below 32768, from where on the system gives them to any connection
    runs = (port for port in range(start, 32_768 - count, count) if not any(answers(port + i)() for i in range(count)))
    return next(runs)


def finished(connection: str, app: Path, folder: Path) -> dict[str, Any]:
    """What Flower says of the newest run, its bytes among it; a FailedError with the logs unless it finished well."""
    said = call(typed.listing(connection), app, folder)
    [run] = json.loads(said[said.index("{") :])["runs"]
    if run["status"] != "finished:completed":
        logs = "\n".join(path.read_text(errors="replace")[-8000:] for path in sorted(folder.glob("flower-*.log")))
        raise FailedError(f"the run ended as {run['status']}: {run.get('status-details')}\n{logs}")
    return dict(run)
