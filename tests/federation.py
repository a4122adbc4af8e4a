"""Flower's own processes on free ports of this machine, everything in one folder; each is ended by its id."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from spryfl.sites import processes

BIN = Path(sys.executable).parent
APP = """\
[project]
name = "spryfl-test"
version = "1.0.0"
description = "A thin app"
license = "Apache-2.0"
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "spryfl"
[tool.flwr.app.components]
serverapp = "spryfl.engines.flower:server_app"
clientapp = "{client}"
[tool.flwr.app.config]
experiment = ""
folder = ""
resume = false
"""


class Federation:
    """A SuperLink and SuperNodes. Use it in a `with` block."""

    def __init__(self, folder: Path, client: str = "spryfl.engines.flower:client_app"):
        self.folder, self.started = folder, []
        self.port = processes.free_ports(4)
        self.node_ports = [self.port + 1 + i for i in range(3)]
        (folder / "app").mkdir(parents=True)
        (folder / "app" / "pyproject.toml").write_text(APP.format(client=client))
        (folder / "home").mkdir()
        link = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        (folder / "home" / "config.toml").write_text(link)
        root = Path(__file__).parents[1]
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root / "tests")]),
            "FLWR_HOME": str(folder / "home"),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in reversed(self.started):
            end(one)

    def start(self, log: str, *words: object) -> subprocess.Popen:
        with open(self.folder / f"{log}.log", "ab") as file:
            one = subprocess.Popen(
                [str(word) for word in words],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.folder,
            )
        self.started.append(one)
        return one

    def link(self, *more: object) -> subprocess.Popen:
        """A SuperLink, from the moment it listens."""
        one = self.start("link", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", self.port, *more)
        _until(lambda: _listens(self.port), 60, "the SuperLink does not listen")
        return one

    def node(self, number: int, config: str = "") -> subprocess.Popen:
        """A SuperNode."""
        address = ("--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1", "--port", self.node_ports[number])
        given = ("--node-config", config or f"partition-id={number} num-partitions=2")
        return self.start(f"node{number}", "flower-supernode", "--insecure", *address, *given)

    def submit(self, experiment: object, folder: Path, *more: object, resume: bool = False) -> subprocess.Popen:
        """`flwr run`, which shows the log until the run ends."""
        values = {"experiment": json.dumps(experiment), "folder": str(folder), "resume": resume}
        (self.folder / "run.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()))
        words = ("flwr", "run", "app", "here", "--stream", "--run-config", "run.toml", *more)
        return self.start("run", *words)

    def ended(self, submitted: subprocess.Popen, seconds: float = 1500) -> str:
        """The state of the newest run once `flwr run` is done, "finished:completed" if it went well."""
        submitted.wait(seconds)
        words = ["flwr", "list", "here", "--format", "json", "--limit", "1"]
        said = subprocess.run(
            words, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=120, check=True
        ).stdout
        return json.loads(said[said.index("{") :])["runs"][0]["status"]

    def wait_for_records(self, folder: Path, count: int, run: subprocess.Popen, seconds: float = 400) -> None:
        """Until the run folder of a run that goes on has so many records."""
        file = folder / "records.jsonl"

        def there() -> bool:
            assert run.poll() is None, f"the run ended too early: {self.log()}"
            return file.is_file() and file.read_bytes().count(b"\n") >= count

        _until(there, seconds, f"{file} has not {count} records")

    def log(self, name: str = "run") -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")


def end(one: subprocess.Popen, how: int = signal.SIGTERM) -> None:
    """Ends a process and all that it started, each by its id."""
    family = [one.pid, *descendants(one.pid)]
    for pid in family if how == signal.SIGKILL else family[:1]:
        _signal(pid, how)
    try:
        one.wait(20)
    except subprocess.TimeoutExpired:
        one.kill()
        one.wait(20)
    for pid in family[1:]:
        _signal(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The ids of all processes below one."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        below = parents.get(left.pop(), [])
        found += below
        left += below
    return found


def _signal(pid: int, how: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, how)


def _until(true, seconds: float, otherwise: str) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, f"{otherwise} after {seconds} s"
        time.sleep(0.1)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
