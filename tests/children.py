"""The command line in a process of its own that can be killed; one import of the package serves all of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

STARTS = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def start(*arguments: object, log: Path) -> multiprocessing.Process:
    """`spryfl` with these arguments; what it prints goes to `log`."""
    context = multiprocessing.get_context(STARTS)
    if STARTS == "forkserver":
        context.set_forkserver_preload(
            ["spryfl.cli", "spryfl.api", "spryfl.pictures", "spryfl.screen", "spryfl.compare"]
        )
    child = context.Process(target=_main, args=([str(one) for one in arguments], str(log)), daemon=True)
    child.start()
    return child


def ended(child: multiprocessing.Process, seconds: float = 60.0) -> int:
    """Its exit code; below 0 the signal that ended it."""
    child.join(seconds)
    if child.is_alive():
        child.kill()
        raise TimeoutError(f"still running after {seconds} s")
    return child.exitcode


def wait_for_lines(file: Path, count: int, child: multiprocessing.Process, seconds: float = 60.0) -> None:
    """Until a file has so many lines, or the child has ended."""
    limit = time.monotonic() + seconds
    while child.is_alive() and (not file.is_file() or file.read_bytes().count(b"\n") < count):
        assert time.monotonic() < limit, f"{file} has not {count} lines after {seconds} s"
        time.sleep(0.002)


def _main(arguments: list[str], log: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job was born deaf to it
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    from spryfl import cli

    sys.argv = ["spryfl", *arguments]
    cli.main()
