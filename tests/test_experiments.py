"""Every configuration under experiments/ is one that the program takes; its pages' commands name what is there."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from spryfl import compare, config
from spryfl.estimators import ESTIMATORS

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
FILES = sorted(EXPERIMENTS.rglob("*.toml"))
PAGES = sorted(EXPERIMENTS.rglob("README.md"))


def taken(path):
    """The configuration, or the comparison, that a file is."""
    words = tomllib.loads(path.read_text(encoding="utf-8"))
    return (compare.parse if "compare" in words else config.parse)(words)


@pytest.fixture
def projected(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "projected", None)  # what the script registers is gone afterwards
    runpy.run_path(str(EXPERIMENTS / "spry_figures" / "projected.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(EXPERIMENTS)))
def test_it_is_taken(path, projected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where nobody has packed a model
    if path == EXPERIMENTS / "unequal" / "compare.toml":
        with pytest.raises(ValueError, match="Make one: spryfl pack"):  # its page packs the model first
            taken(path)
    else:
        assert taken(path)


def commands(page):
    """The lines of a page's commands, with the words that P="..." put aside."""
    blocks = re.findall(r"^```\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = dict(found.groups() for line in lines if (found := re.match(r'(\w+)="(.*)"$', line)))
    return [re.sub(r"\$(\w+)", lambda found: words.get(found[1], found[0]), line) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_commands_name_what_is_there(page):
    named = re.findall(r"experiments/[\w/]+\.(?:toml|py|sh)", "\n".join(commands(page)))
    assert [name for name in named if not (EXPERIMENTS.parent / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_commands_name_rows_of_their_comparison(page):
    for line in commands(page):
        found = re.search(r"compare --config (experiments/\S+\.toml).*--methods (\S+)", line)
        if found:
            words = tomllib.loads((EXPERIMENTS.parent / found[1]).read_text(encoding="utf-8"))
            assert set(found[2].split(",")) <= set(words["compare"]["methods"]), line
