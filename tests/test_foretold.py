"""What the report foretells of a run's memory, against what the run measured."""

from __future__ import annotations

import pytest

import spryfl
from spryfl import foretold, methods, report
from spryfl.footprint import predict
from spryfl.report import Run

STEP = ("activations", "tangents", "gradients", "prefix")
CLASSES = (
    methods.ClientClass("strong", share=0.5, estimator={"kind": "backprop"}),
    methods.ClientClass("weak", share=0.5, estimator={"kind": "forward", "directions": 2}),
)


@pytest.fixture(autouse=True)
def _process(monkeypatch):
    monkeypatch.setattr(predict, "process", lambda: 1000)


def made(tiny, reviews, folder, method, **more):
    """A run of two rounds whose rows are all four tokens long, read again."""
    sections = {
        "reading": {"max_length": 4, "train_rows": 240, "test_rows": 10},
        "partition": {"clients": 2, "held_out": 0.0},
        "train": {"rounds": 2, "cohort": 2, "batch_size": 64, "steps": 1, "eval_every": 2},
        **more,
    }
    spryfl.finetune(str(tiny), str(reviews), method=method, folder=folder, **sections)
    return report.read(folder)


def step(parts):
    return sum(parts[part] for part in STEP)


def near(found, measured):
    """Within 3 %; tables of the noise that are there from the rehearsal on are some kB."""
    assert measured > 200_000
    assert found == pytest.approx(measured, rel=0.03, abs=9_000)


@pytest.mark.parametrize("method", ["spry", "fedavg", "fedmezo", "head_only"])
def test_as_measured(tiny, reviews, tmp_path, method):
    run = made(tiny, reviews, tmp_path / "a", method)
    assert run.facts["data"]["tokens"] == 4
    found = foretold.steps([run])[run.name]
    assert found.why == ""
    near(step(found.parts[""]), max(one.get("peak_bytes", 0) for one in run.records))


def test_a_run_that_did_not_record_its_longest_row(tiny, reviews, tmp_path, capfd):
    """Rows as long as they may be; the model here has places for 64 tokens."""
    run = made(tiny, reviews, tmp_path / "a", "fedavg", reading={"train_rows": 60, "test_rows": 10})
    del run.facts["data"]["tokens"]
    found = [foretold.steps([run._replace(facts=facts)])[run.name] for facts in ({}, {"data": {"tokens": 64}})]
    assert found[0] == found[1]
    assert step(found[0].parts[""]) > 1_000_000
    longer = foretold.steps([run._replace(facts={"data": {"tokens": 65}})])[run.name]
    assert longer.parts == {}
    assert longer.why
    assert capfd.readouterr().err == ""


def test_classes_of_clients(tiny, reviews, tmp_path):
    run = made(tiny, reviews, tmp_path / "a", methods.spry(classes=CLASSES))
    found = foretold.steps([run])[run.name].parts
    measured = {name: max(one["class_peak_bytes"][name] for one in run.records[1:]) for name in found}
    assert set(found) == {"strong", "weak"}
    for name, peak in measured.items():
        near(step(found[name]), peak)


def test_how_classes_fall_is_recorded(tiny, reviews, tmp_path):
    """As the partition of the same settings says; not where the values are promised to be private."""
    run = made(tiny, reviews, tmp_path / "a", "head_only", partition={"clients": 3, "held_out": 0.2})
    rows = [[int(word) for word in line.split()] for line in run.facts["clients"]["rows"]]
    assert run.facts["clients"]["labels"] == ["bad", "good"]
    assert (len(rows), sum(map(sum, rows))) == (3, run.facts["data"]["train"])
    private = made(tiny, reviews, tmp_path / "b", "fedavg", privacy={"clip": 1.0})
    assert "clients" not in private.facts


def test_a_model_that_is_not_here_is_a_reason(tmp_path):
    one = Run("a", {"model": {"name": str(tmp_path / "gone")}}, {}, [])
    other = Run("b", {"no such section": {}}, {}, [])
    found = foretold.steps([one, other])
    assert found["a"].parts == found["b"].parts == {}
    assert "gone" in found["a"].why
    assert "no such section" in found["b"].why
    assert all("\n" not in one.why for one in found.values())


def test_runs_that_differ_in_seed_are_foretold_once(monkeypatch):
    asked = []
    monkeypatch.setattr(foretold, "by_class", lambda config, facts: asked.append(config) or {"": {}})
    runs = [Run(f"a-{seed}", {"seed": seed, "name": f"a-{seed}", "x": {"y": 1}}, {}, []) for seed in (0, 1)]
    other = Run("b", {"seed": 0, "x": {"y": 2}}, {}, [])
    assert set(foretold.steps([*runs, other])) == {"a-0", "a-1", "b"}
    assert len(asked) == 2
