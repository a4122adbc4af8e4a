"""What it took to come to a target: against hand-made records, in the tables of comparisons and of reports."""

from __future__ import annotations

import json
import statistics

import pytest
from test_compare import given, spryfl, toml, whole  # noqa: F401  # fixtures

from spryfl import compare, job, report
from spryfl.api import prepared


def run(name, *scores, metric="accuracy", personal=()):
    """A run that was scored every other round: 10 passes, 2 MB and 3 s a round."""
    records = []
    for i, score in enumerate(scores):
        r = 2 * i
        cost = {"value_passes": 6 * r, "tangent_passes": 3 * r, "backward_passes": r, "seconds": 3.0 * r}
        own = {"personal_after": personal[i]} if personal else {}
        records.append({"round": r, metric: score, **cost, "bytes_up": 1e6 * r, "bytes_down": 1e6 * r, **own})
        records.append({**records[-1], "round": r + 1})
        records[-1].pop(metric)
    return report.Run(name, {"seed": 0}, {"metric": metric, "state": "complete"}, records)


def test_the_first_evaluation_at_the_target_counts():
    one = run("a", 0.5, 0.79, 0.8, 0.7, 0.9)
    assert report.reached(one, 0.8)["round"] == 4
    assert report.reached(one, 0.91) is None
    assert report.reached(run("b", 0.5, 0.6, personal=(0.4, 0.85)), 0.8, "personal_after")["round"] == 2


def test_mean_and_spread_over_the_runs_that_came_there():
    runs = [run("a", 0.5, 0.8), run("b", 0.5, 0.6, 0.7, 0.9), run("c", 0.5, 0.6)]
    found = report.to_target({"m": runs}, 0.8)["m"]["accuracy"]
    assert (found["reached"], found["of"]) == (2, 3)
    assert found["rounds"] == {"mean": 4, "sd": pytest.approx(statistics.stdev([2, 6]))}
    assert found["passes"]["mean"] == statistics.mean([20, 60])
    assert found["MB up and down"]["mean"] == statistics.mean([4, 12])
    assert found["seconds"]["mean"] == statistics.mean([6, 18])
    head, table = report.target_table({"m": runs, "n": [run("d", 0.1)]}, 0.8)
    assert head == ("runs", "to 0.8", "reached", "rounds", "passes", "MB up and down", "seconds")
    assert table[0] == ("m", "accuracy", "2 of 3", "4 ± 3", "40 ± 28", "8.00 ± 5.66", "12 ± 8")
    assert table[1] == ("n", "accuracy", "0 of 1", "-", "-", "-", "-")


def test_both_accuracies_where_clients_hold_rows_out():
    both = report.to_target({"m": [run("a", 0.5, 0.9, personal=(0.95, 0.99))]}, 0.9)["m"]
    assert both["accuracy"]["rounds"]["mean"] == 2
    assert both["personal"]["rounds"]["mean"] == 0


def test_a_comparison_says_it_in_all_its_tables(whole, spryfl):  # noqa: F811
    out, _ = whole
    code, printed, _ = spryfl("report", out, "--target", "0.3")
    assert code == 0
    assert "to 0.3" in printed
    facts = json.loads((out / "table.json").read_text())["target"]
    assert facts["value"] == 0.3
    compared = report.read_comparison(out)
    assert facts["methods"] == report.to_target(compared.groups, 0.3)
    assert report.markdown(*report.target_table(compared.groups, 0.3)) in (out / "table.md").read_text()
    spryfl("report", out)
    assert "target" not in json.loads((out / "table.json").read_text())


def test_it_is_a_setting_of_the_comparison_and_a_flag(given, toml, spryfl, tmp_path):  # noqa: F811
    made = compare.parse({**given, "compare": {**given["compare"], "target": 0.75}})
    assert made.given["compare"]["target"] == 0.75
    code, printed, _ = spryfl(
        "compare", "-c", toml, "--methods", "spry", "--seeds", "0", "--target", "0.01", "--out", tmp_path / "c"
    )
    assert code == 0
    assert "1 of 1" in printed
    assert report.read_comparison(tmp_path / "c").target == 0.01


def test_seeds_vary_partition_start_and_sampling(given):  # noqa: F811
    made = compare.parse(given)
    one, other = (prepared(made.runs["spry", seed]) for seed in (0, 3))
    assert one.parts != other.parts
    assert any((one.model.params[name] != other.model.params[name]).any() for name in one.model.params)
    assert [job.train.cohort(one.plan, r) for r in (1, 2, 3)] != [job.train.cohort(other.plan, r) for r in (1, 2, 3)]
