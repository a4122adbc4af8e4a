"""The tables of the documents are those of the result files; and `experiments/check.py` sees it when they are not."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import sys
from pathlib import Path

import pytest

from spryfl import report

ROOT = Path(__file__).parents[1]


def script():
    spec = importlib.util.spec_from_file_location("check_documents", ROOT / "experiments" / "check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and named tuples look their module up
    spec.loader.exec_module(module)
    return module


check = script()


@pytest.mark.parametrize("document", check.documents(), ids=lambda path: path.parent.name)
def test_what_stands_there_is_what_was_measured(document):
    assert check.check(document) == []


RUNS = [
    {"seed": 0, "state": "complete", "accuracy": 0.75, "passes": 100, "personal": None},
    {"seed": 1, "state": "complete", "accuracy": 0.8, "passes": 104, "personal": None},
    {"seed": 2, "state": "cancelled", "accuracy": 0.9, "passes": 90, "personal": None},
]
COLUMNS = ("accuracy", "passes", "personal")
FACTS = {"methods": {"spry": {"mean": dict.fromkeys(COLUMNS), "runs": RUNS}}}


@pytest.fixture
def document(tmp_path):
    """`document(text)` -> a page beside a result file and a list of rows."""
    (tmp_path / "table.json").write_text(json.dumps(FACTS))
    (tmp_path / "rows.json").write_text(
        json.dumps({"rows": [{"name": "a", "d": 12, "x": 0.5}, {"name": "b", "d": 3, "x": None}]})
    )
    (tmp_path / "made.md").write_text("text\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n| c |\n| --- |\n| 3 |\n")

    def write(text):
        path = tmp_path / "README.md"
        path.write_text(text)
        return path

    return write


EMPTY = "| x |\n| --- |\n| y |\n"


def renewed(path):
    assert check.check(path) != []
    assert check.check(path, write=True) == []
    return path.read_text()


def test_a_table_by_columns(document):
    said = "r <- label ; n <- seeds ; s <- state ; m <- mean accuracy 3 ; b <- mean±sd passes 0"
    said += " ; e <- each accuracy 2 ; p <- mean personal 4"
    text = renewed(document(f"<!-- check: methods table.json ; {said} -->\n\n{EMPTY}\nafter\n"))
    mean, spread = statistics.mean([0.75, 0.8, 0.9]), statistics.stdev([100, 104, 90])
    assert f"| spry | 3 | 2 of 3 complete | {mean:.3f} | 98 ± {spread:.0f} | 0.75, 0.80, 0.90 | - |" in text
    assert "| r | n | s | m | b | e | p |" in text
    assert text.endswith("\nafter\n")


def test_rows_and_copies(document):
    text = renewed(document(f"<!-- check: rows rows.json ; n <- name ; d <- d 0 ; x <- x 2 -->\n{EMPTY}"))
    assert "| a | 12 | 0.50 |\n| b | 3 | - |" in text
    assert "| 3 |" in renewed(document(f"<!-- check: copy made.md 2 -->\n{EMPTY}"))


def test_values_differences_and_multiples(document):
    one = "table.json#methods.spry.runs.1.accuracy"
    other = "table.json#methods.spry.runs.0.accuracy"
    text = f"It is <!--= {one} .2f -->0.70<!--/--> and <!--= {one} - {other} * 100 +.1f -->4<!--/--> more."
    assert re.sub("<!--.*?-->", "", renewed(document(text))) == "It is 0.80 and +5.0 more."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (EMPTY, "does not say"),
        (f"<!-- check: record -->\n{EMPTY}", "needs a reason"),
        (f"<!-- check: sumary table.json -->\n{EMPTY}", "sumary is unknown"),
        (f"<!-- check: summary none.json -->\n{EMPTY}", "cannot be read"),
        (f"<!-- check: target table.json -->\n{EMPTY}", "no target"),
        (f"<!-- check: methods table.json ; a <- median accuracy 4 -->\n{EMPTY}", "none of label"),
        (f"<!-- check: rows rows.json ; a <- e 2 -->\n{EMPTY}", "no 'e'"),
        ("<!-- check: record ; why -->\n\nno table\n", "no table stands below"),
        ("<!--= table.json#methods.spy.mean .2f -->1<!--/-->", "no methods.spy.mean"),
    ],
)
def test_mistakes_are_said_with_their_line(document, text, message):
    wrong = check.check(document(f"one\n\n{text}"))
    assert len(wrong) == 1
    assert message in wrong[0].what
    assert wrong[0].where.endswith(("README.md:3", "README.md:4"))


def test_what_needs_no_file(document):
    for said in ("words", "record ; not kept"):
        assert check.check(document(f"<!-- check: {said} -->\n\n{EMPTY}")) == []
    assert check.check(document(f"```\n{EMPTY}```\n")) == []


def test_a_number_in_a_sentence(document, tmp_path):
    """By the row's name, by its place, a difference; a name that no row has is a mistake."""
    (tmp_path / "list.json").write_text(json.dumps([{"row": "top 2", "x": 0.5}, {"row": "b", "x": 0.25}]))
    page = document(
        "<!--= list.json#top%202.x .2f -->?<!--/--> <!--= list.json#1.x - list.json#top%202.x * 100 +.1f -->?<!--/-->"
    )
    assert check.check(page, write=True) == []
    assert "0.50" in page.read_text()
    assert "-25.0" in page.read_text()
    assert "has no c.x" in check.check(document("<!--= list.json#c.x .2f -->0.50<!--/-->"))[0].what


def test_a_single_changed_digit_is_seen(tmp_path):
    """In a copy of the comparison on SST-2."""
    folder = ROOT / "experiments/compare_sst2"
    for one in (folder / "README.md", *folder.glob("*.json")):
        (tmp_path / one.name).write_text(one.read_text())
    page = tmp_path / "README.md"
    assert check.check(page) == []
    page.write_text(page.read_text().replace("0.7511 ± 0.0050", "0.7611 ± 0.0050", 1))
    assert ["0.7611" in one.what for one in check.check(page)] == [True]
    assert check.check(page, write=True) == []


def run(name, *scores):
    cost = {"value_passes": 3, "tangent_passes": 1, "backward_passes": 0, "bytes_up": 2e6, "bytes_down": 1e6}
    records = [{"round": r, "accuracy": s, "best": s, "seconds": 1.5 * r, **cost} for r, s in enumerate(scores)]
    return report.Run(name, {"seed": 0}, {"metric": "accuracy", "state": "complete"}, records)


def test_it_writes_what_the_report_writes():
    groups = {"a": [run("a-0", 0.1, 0.4), run("a-1", 0.2, 0.5)], "b": [run("b-0", 0.3)]}
    facts = {"methods": {label: report._numbers(runs) for label, runs in groups.items()}}
    head, rows = report.summary(groups)
    assert check._summary(facts, ()) == [head, *rows]
    facts["target"] = {"value": 0.35, "methods": report.to_target(groups, 0.35)}
    head, rows = report.target_table(groups, 0.35)
    assert check._target(facts, ()) == [head, *rows]


def test_the_command(document, capsys):
    page = document(EMPTY)
    assert check.main([str(page)]) == 1
    assert "1 documents, 1 mistakes" in capsys.readouterr().out
    assert check.main([str(document("no table"))]) == 0
