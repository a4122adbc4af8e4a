"""Run folders become result files, and are held against committed ones."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import folders
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def scripts():
    """curves.py and again.py as modules."""
    sys.path.insert(0, str(EXPERIMENTS))
    yield importlib.import_module("curves"), importlib.import_module("again")
    sys.path.remove(str(EXPERIMENTS))


@pytest.fixture
def runs(tmp_path):
    """Two labels, three runs; one was cancelled."""
    made = {"a-seed0": 0.75, "a-seed1": 0.81, "b-x-seed0": 0.5}
    hardware = {"machine": "m", "device": "d"}
    for name, accuracy in made.items():
        records = folders.rounds(2)
        records[-1]["accuracy"] = accuracy
        folders.write(tmp_path / name, records, hardware=hardware, commit="c0", started="2026-11-23T01:00:00+00:00")
    folders.write(tmp_path / "c-seed0", folders.rounds(1), state="cancelled")
    (tmp_path / "compare.toml").write_text("")
    return sorted(map(str, tmp_path.iterdir()))


class TestCurves:
    def test_a_line_a_label(self, scripts, runs):
        lines = scripts[0].results(scripts[0].table(runs), {"a": 1.25})
        assert [(line["row"], line["seeds"], line["each"], line["held"]) for line in lines] == [
            ("a", "0, 1", "0.7500, 0.8100", "1.2"),
            ("b-x", "0", "0.5000", ""),
        ]
        assert lines[0]["accuracy"] == pytest.approx(0.78)
        assert lines[0]["passes"] == 8 + 16
        assert lines[0]["up"] == pytest.approx(0.04)
        assert lines[0]["before"] == "0.315, 0.315"  # after the first of two rounds: 0.9 - 0.65 / (1 + 1 / 9)

    def test_a_table_keeps_what_it_knew(self, scripts, runs):
        """So that a row, or a seed of one, can be run alone and later than the rest."""
        known = {"a": {"seed": [1, 4], "accuracy": [0.1, 0.2], "of_old": [3, 4]}, "z": {"seed": [0], "accuracy": [0.7]}}
        both = scripts[0].merged(known, scripts[0].table(runs))
        assert list(both) == ["a", "z", "b-x"]
        assert both["a"] == {"seed": [0, 1, 4], "accuracy": pytest.approx([0.75, 0.81, 0.2])}
        assert both["z"] is known["z"]
        assert both["b-x"]["seed"] == [0]

    @pytest.mark.parametrize("place", ["exact_top/table.json", "t1_sst2/table.json", "spry_figures/table.json#iid"])
    def test_committed_tables_become_lines(self, place, scripts):
        """So that a picture can be drawn again without run folders, from tables of any day."""
        name, _, part = place.partition("#")
        found = scripts[0].read(EXPERIMENTS / name)
        found = found[part] if part else found
        assert [line["row"] for line in scripts[0].results(found, {})] == list(found)

    def test_as_a_program(self, runs, tmp_path):
        out = tmp_path / "results.json"
        done = subprocess.run([sys.executable, str(EXPERIMENTS / "curves.py"), str(out), *runs], check=False)
        assert done.returncode == 0
        assert [line["row"] for line in json.loads(out.read_text())] == ["a", "b-x"]


FORMS = {  # each kind of result file, with the same three runs
    "lines": [
        {"row": "a", "seeds": "0, 1", "each": "0.7500, 0.8000"},
        {"row": "b-x", "seeds": "0", "each": "0.5000"},
    ],
    "table": {
        "a": {"seed": [0, 1], "accuracy": [0.75, 0.8]},
        "b-x": {"seed": [0], "accuracy": [0.5]},
    },
    "comparison": {
        "methods": {
            "a": {"runs": [{"seed": 0, "accuracy": 0.75}, {"seed": 1, "accuracy": 0.8}]},
            "b-x": {"runs": [{"seed": 0, "accuracy": 0.5}]},
        }
    },
}


BEFORE = {  # what again.json may know of a file already
    "file": "f.json", "runs": 99, "hardware": ["other"], "commits": ["b9"], "date": "2026-11-22",
    "each": {"e-x-seed2": [0.53, 0.5], "a-seed0": [0.75, 0.1]},
}  # fmt: skip


class TestAgain:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_of_a_result_file(self, form, scripts, tmp_path, monkeypatch):
        again = scripts[1]
        monkeypatch.setattr(again, "HERE", tmp_path)
        (tmp_path / "f.json").write_text(json.dumps(FORMS[form]))
        assert again.committed("f.json") == {("a", 0): 0.75, ("a", 1): 0.8, ("b-x", 0): 0.5}

    def test_a_part_of_a_file(self, scripts, tmp_path, monkeypatch):
        again = scripts[1]
        monkeypatch.setattr(again, "HERE", tmp_path)
        (tmp_path / "f.json").write_text(json.dumps({"iid": FORMS["table"], "0.1": {}}))
        assert again.committed("f.json#iid")["a", 1] == 0.8
        after = {"x": "f1a 0.1, accuracy 0.25", "y": "f1a 0.1, accuracy 0.5"}
        rows = [{"data": data, "row": "a", "seed": 3, "after": said} for data, said in after.items()]
        (tmp_path / "f.json").write_text(json.dumps(rows))
        assert again.committed("f.json#y") == {("a", 3): 0.5}

    def test_what_is_said_and_written(self, scripts, runs, tmp_path, monkeypatch, capsys):
        again = scripts[1]
        kept = tmp_path / "kept"
        kept.mkdir()
        monkeypatch.setattr(again, "HERE", kept)
        (kept / "f.json").write_text(json.dumps(FORMS["lines"][:1]))
        (kept / "again.json").write_text(json.dumps([{"file": "z.json"}, BEFORE]))
        monkeypatch.setattr(sys, "argv", ["again.py", "--write", "f.json", *runs])
        assert again.main() == 0
        said = capsys.readouterr()
        assert "seed 1  0.8000  0.8100  +1.00" in said.out
        assert "left out: b-x, seed 0" in said.err
        line, other = json.loads((kept / "again.json").read_text())
        assert other == {"file": "z.json"}
        assert (line["file"], line["runs"], line["same"], line["date"]) == ("f.json", 3, 1, "2026-11-23")
        assert line["apart"] == "e-x 2 -3.00, a 1 +1.00"
        assert line["which"] == "e-x 2, a 0 1"
        assert line["each"] == {"e-x-seed2": [0.53, 0.5], "a-seed0": [0.75, 0.75], "a-seed1": [0.8, 0.81]}
        assert line["hardware"] == ["m, d", "other"]
        assert line["commits"] == ["b9", "c0"]

    def test_nothing_to_compare(self, scripts, runs, tmp_path, monkeypatch):
        again = scripts[1]
        monkeypatch.setattr(again, "HERE", tmp_path)
        (tmp_path / "f.json").write_text("{}")
        monkeypatch.setattr(sys, "argv", ["again.py", "--write", "f.json", *runs])
        assert again.main() == 1
        assert not (tmp_path / "again.json").exists()
