"""The examples run as they stand, and are as short as they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = {"own_estimator.py": 59, "own_adapter.py": 59, "own_task.py": 59}  # run in test_recipes.py
LINES = {"own_model.py": 59, "jvp_alone.py": 24, **RECIPES}


def run(name, *words):
    command = [sys.executable, "-W", "error::UserWarning:spryfl", EXAMPLES / name, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(LINES)


@pytest.mark.parametrize("name", LINES)
def test_examples_are_short(name):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= LINES[name]


def test_a_model_and_a_file_of_ones_own(tiny, reviews, tmp_path):
    done = run("own_model.py", tiny, reviews / "train.csv", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "round 15" in done.stdout
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_engine_alone():
    done = run("jvp_alone.py")
    assert done.returncode == 0, done.stderr
    assert "derivatives in 8 directions" in done.stdout
