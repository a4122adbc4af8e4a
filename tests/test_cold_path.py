"""What a newcomer types: the way from a clone to PEFT, and every command of the tutorial, in a folder of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import sentences

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an unpacked sdist cannot be cloned")
def test_from_a_clone_to_peft(tmp_path):
    """With the environment at hand in place of a new one."""
    words = ["bash", ROOT / "tests" / "cold_path.sh", tmp_path / "cold", Path(sys.executable).parent]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = re.findall(r"^== (.*)$", done.stdout, re.MULTILINE)
    assert steps[0] == "clone"
    assert steps[-1] == "done"
    assert "the same answers:" in done.stdout


def blocks(kind: str) -> list[str]:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_tutorial(tmp_path):
    """Its commands in their order, its TOML and its Python, on 240 rows of the kind that it shows."""
    rows = [f"{text},{'good' if label == 'good' else 'bad'},{site}" for text, label, site in sentences(240, 3)]
    (tmp_path / "visits.csv").write_text("\n".join(["text,label,clinic", *rows]) + "\n")
    (tmp_path / "compare.toml").write_text(blocks("toml")[0])
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    run = f'spryfl() {{ "{sys.executable}" -m spryfl.cli "$@"; }}\n'
    for block in blocks("bash"):
        words = [shutil.which("bash"), "-euc", run + block]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    for block in blocks("python"):
        words = [sys.executable, "-c", block]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"
        assert done.stdout.strip()
    for left in ("runs/first/adapter", "runs/second/curves.png", "runs/both/table.md", "finetuned/config.json"):
        assert (tmp_path / left).exists(), left
