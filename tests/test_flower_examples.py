"""The scripts of examples/flower run as they stand, end in the bits of the run in process, and leave nobody running."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples" / "flower"
LINES = {"federation.py": 59, "simulation.py": 59, "deployment.py": 59, "tls.py": 59}


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(LINES)


@pytest.mark.parametrize("name", LINES)
def test_examples_are_short(name):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= LINES[name]


def left(folder: Path) -> list[str]:
    """Processes that were started for this folder and are still there, by Flower's home in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"FLWR_HOME={folder}".encode() in (place / "environ").read_bytes():
                found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # ended meanwhile, or not ours to look at
            continue
    return found


def run(name: str, folder: Path) -> str:
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, folder],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    until = time.monotonic() + 30  # Ray's processes end by themselves, a little later
    while (there := left(folder)) and time.monotonic() < until:
        time.sleep(0.5)
    assert there == []
    return done.stdout


@pytest.mark.slow
@pytest.mark.flower
def test_a_simulation_ends_in_the_bits_of_the_run_in_process(tmp_path):
    assert "runs/in-process and runs/simulation ended in the same bits" in run("simulation.py", tmp_path)


@pytest.mark.slow
@pytest.mark.flower
def test_three_sites_on_loopback_end_in_the_same_bits(tmp_path):
    assert "runs/in-process and runs/sites ended in the same bits" in run("deployment.py", tmp_path)


@pytest.mark.slow
@pytest.mark.flower
def test_three_sites_through_tls_end_in_the_same_bits_and_a_stranger_is_turned_away(tmp_path):
    """The sites' files differ, no row of them is at the SuperLink, and a fourth node's key was never registered."""
    said = run("tls.py", tmp_path)
    assert "runs/in-process and runs/sites ended in the same bits" in said
    assert "turned away: [code: 2004]" in said
    sites = [rows(tmp_path / f"site{i}.csv") for i in range(3)]
    assert len({len(own) for own in sites}) == 3
    server = rows(tmp_path / "server" / "train.csv") | rows(tmp_path / "server" / "test.csv")
    assert not set.union(*sites) & server


def rows(path: Path) -> set[tuple[str, ...]]:
    with open(path, newline="", encoding="utf-8") as file:
        return {tuple(row[:2]) for row in csv.reader(file)} - {("text", "label")}
