"""The examples run as they stand, and are as short as they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = {"own_estimator.py": 59, "own_adapter.py": 59, "own_task.py": 59}  # run in test_recipes.py
PATHS = {"from_trainer.py": 59, "from_datasets.py": 59, "plain_loop.py": 59, "own_engine.py": 62}
LINES = {"own_model.py": 59, "jvp_alone.py": 24, **PATHS, **RECIPES}


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


def accuracies(done):
    assert done.returncode == 0, done.stderr
    return [float(one) for one in re.findall(r"accuracy ([0-9.]+)", done.stdout)]


def test_from_a_trainer_and_back(tiny, reviews):
    """The Trainer measures of the merged model what the last record says, and that it learnt."""
    federated, trainer = accuracies(run("from_trainer.py", tiny, reviews / "train.csv"))
    assert federated == trainer > 0.65


def test_from_datasets_and_back(tiny, reviews):
    record, column = accuracies(run("from_datasets.py", tiny, reviews))
    assert record == column > 0.65


def test_estimators_in_a_plain_loop():
    done = run("plain_loop.py", 2)
    assert done.returncode == 0, done.stderr
    losses = [float(one) for one in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert len(losses) == 3
    assert max(losses) - min(losses) < 0.1  # the same model and data, so nearly the same loss after one step


@pytest.mark.slow
def test_an_engine_of_ones_own(tiny, reviews):
    done = run("own_engine.py", tiny, reviews)
    assert done.returncode == 0, done.stderr
    assert "the same bits: True" in done.stdout
