"""What must work from an installed wheel, in another directory, with nothing of the source tree at hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import spryfl

COMMAND = Path(sys.executable).with_name("spryfl")


def spry(*words, **options):
    return subprocess.run([COMMAND, *words], capture_output=True, text=True, timeout=600, **options)


def test_it_is_the_installed_package():
    assert "site-packages" in spryfl.__file__
    assert (Path(spryfl.__file__).parent / "py.typed").is_file()


def test_methods_are_listed():
    out = spry("methods")
    assert out.returncode == 0
    assert "spry" in out.stdout
    assert "fedavg" in out.stdout


def test_a_typo_is_one_clear_message():
    out = spry("run", "--method", "sprry")
    assert out.returncode == 2
    assert "did you mean spry" in out.stderr
    assert "Traceback" not in out.stderr


def test_a_short_run_of_the_main_job(tmp_path):
    small = ["--rounds", "1", "--set", "train.steps=1", "--set", "data.train_rows=200", "--set", "data.test_rows=50"]
    done = spry("run", *small, "--name", "smoke", "--clients", "10", "--cohort", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "smoke"
    for name in ("config.toml", "records.jsonl", "run.json", "adapter/adapter_model.safetensors", "curves.png"):
        assert (folder / name).is_file(), name
    shown = spry("report", "runs/smoke", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "uPlot" in page
    assert "No prediction" not in page
    told = spry("predict", "runs/smoke", "Return the sum of two arrays along an axis.", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert "=" in told.stdout
    made = spry("export", "runs/smoke", "merged", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()
