"""Comparisons: equal to single runs, by turns, killed and gone on with to the same bits; budgets, tables, mistakes."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
from children import start, wait_for_lines

from spryfl import compare, config, journal, pictures, report, train
from spryfl.commands import training
from spryfl.journal import Progress
from spryfl.methods import build, named
from spryfl.train import TIMED
from spryfl.types import ServerState

RUNS = ["spry-seed0", "one_lr-seed0", "spry-seed3", "one_lr-seed3"]
ROUNDS = 3


@pytest.fixture(scope="module")
def given(tiny, reviews):
    """Two labels, two seeds, three rounds; one label is a variant of a row with its own rate, evaluated more often."""
    return {
        "model": {"name": str(tiny)},
        "data": {"name": str(reviews), "train_rows": 60, "test_rows": 20},
        "partition": {"clients": 5},
        "method": {"schedule": "linear"},
        "train": {"rounds": ROUNDS, "cohort": 3, "eval_every": 2, "steps": 2, "drop_clients": 0.2},
        "compare": {
            "methods": ["spry", "one_lr"],
            "seeds": [0, 3],
            "changes": {"one_lr": {"method": {"name": "fedavg", "local_optimizer": {"lr": 0.02}}}},
        },
    }


@pytest.fixture(scope="module")
def toml(given, tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "small.toml"
    path.write_text(tomli_w.dumps(given))
    return path


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """The comparison that nobody stopped: its folder and its turns."""
    out = tmp_path_factory.mktemp("whole") / "all"
    turns = list(compare.turns(compare.parse(given), out))
    return out, turns


@pytest.fixture
def spryfl(spryfl, monkeypatch):
    """The command line, but pictures take too long."""
    monkeypatch.setattr(pictures, "curves", lambda runs, path: None)
    monkeypatch.setattr(pictures, "comparison", lambda compared, path: None)
    return spryfl


def changed(given, **section):
    return {**given, "compare": {**given["compare"], **section}}


def records(folder):
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def assert_same_run(one, other):
    """Equal in settings, records, states and adapter; times and memory aside."""
    assert records(one) == records(other)
    assert (one / "config.toml").read_bytes() == (other / "config.toml").read_bytes()
    for which in (journal.NEWEST, journal.BEST):
        (a, p), (b, q) = (journal.load(journal.open_folder(folder), which) for folder in (one, other))
        assert p._replace(seconds=0) == q._replace(seconds=0)
        for mine, theirs in [(a.params, b.params), *((a.optimizer[slot], b.optimizer[slot]) for slot in a.optimizer)]:
            assert list(mine) == list(theirs)
            assert all(mine[name].numpy().tobytes() == theirs[name].numpy().tobytes() for name in mine)
    name = "adapter/adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()
    assert json.loads((other / "run.json").read_text())["state"] == "complete"


class TestRuns:
    @pytest.mark.parametrize("name", RUNS)
    def test_each_is_the_run_that_its_configuration_makes_alone(self, name, whole, spryfl, tmp_path):
        folder = whole[0] / name
        assert spryfl("run", "--config", folder / "config.toml", "--out", tmp_path)[0] == 0
        assert_same_run(folder, tmp_path / name)

    def test_by_turns_in_the_order_of_the_labels(self, whole):
        rounds = [0, 1, 2, 3, None]  # None: the run has ended
        expected = [(seed, label, r) for seed in (0, 3) for r in rounds for label in ("spry", "one_lr")]
        assert [(t.seed, t.label, t.record and t.record["round"]) for t in whole[1]] == expected

    def test_who_is_behind_goes_first_and_who_has_ended_is_left_out(self, tmp_path):
        """Three runs of 1, 4 and 2 records; the first of them lags behind by two rounds."""
        running = {}
        for name, begun, end in (("a", 0, 2), ("b", 2, 6), ("c", 2, 4)):
            opened = journal.Journal(tmp_path / name)
            opened.folder.mkdir()
            journal.append(opened, {"round": begun})
            rounds = (({"round": r}, None) for r in range(begun + 1, end + 1))
            running[name] = compare._Running(opened, rounds)
        got = [(name, record and record["round"]) for name, record in compare.rotation(running)]
        expected = "a1 a2 a- b3 c3 b4 c4 b5 c- b6 b-"
        assert [f"{name}{record or '-'}" for name, record in got] == expected.split()

    def test_all_start_alike_and_share_cohorts(self, whole):
        for seed in (0, 3):
            one, other = (records(whole[0] / f"{label}-seed{seed}") for label in ("spry", "one_lr"))
            assert one[0]["test_loss"] == other[0]["test_loss"]
            assert [r["cohort"] for r in one[1:]] == [r["cohort"] for r in other[1:]]
            assert one[-1]["test_loss"] != other[-1]["test_loss"]
        assert records(whole[0] / "spry-seed0")[1]["cohort"] != records(whole[0] / "spry-seed3")[1]["cohort"]

    def test_data_model_and_tokens_are_loaded_once_a_seed(self, given, tmp_path, monkeypatch):
        calls = []
        for name in ("read", "load_model", "encode"):
            real = getattr(compare.job, name)
            monkeypatch.setattr(compare.job, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
        other = {"method": {"name": "fedavg"}, "adapter": {"kind": "ia3"}}
        more = {"methods": ["spry", "one_lr", "other"], "changes": {**given["compare"]["changes"], "other": other}}
        made = compare.parse(changed(given, seeds=[0], **more))
        jobs = compare._prepared(list(made.runs.values()))
        assert calls == ["read", "load_model", "encode", "load_model"]
        assert jobs[0].model is jobs[1].model
        assert jobs[0].rows is jobs[1].rows is jobs[2].rows
        assert jobs[2].model is not jobs[0].model


class TestStopped:
    @pytest.mark.parametrize(("run", "lines"), [("spry-seed0", 1), ("one_lr-seed0", 3), ("one_lr-seed3", 2)])
    def test_killed_and_given_again_it_ends_in_the_same_bits(self, run, lines, toml, whole, spryfl, tmp_path):
        words = ("compare", "--config", toml, "--out", tmp_path / "all")
        child = start(*words, log=tmp_path / "log")
        wait_for_lines(tmp_path / "all" / run / "records.jsonl", lines, child)
        child.kill()
        child.join()
        assert child.exitcode == -9, (tmp_path / "log").read_text()
        assert spryfl(*words)[0] == 0
        for name in RUNS:
            assert_same_run(whole[0] / name, tmp_path / "all" / name)

    def test_turns_go_on_where_they_stopped(self, given, whole, tmp_path):
        out, seen = tmp_path / "all", []
        for stop in (1, 2, 5, 6, 100):
            turns = compare.turns(compare.parse(given), out)
            for turn in turns:
                seen.append((turn.seed, turn.label, turn.record and turn.record["round"]))
                stop -= 1
                if not stop:
                    break
            turns.close()
        assert seen == [(t.seed, t.label, t.record and t.record["round"]) for t in whole[1]]
        for name in RUNS:
            assert_same_run(whole[0] / name, out / name)

    def test_closed_early_the_open_runs_are_cancelled_and_the_ended_ones_complete(self, given, tmp_path):
        turns = compare.turns(compare.parse(changed(given, seeds=[0])), tmp_path / "all")
        next(turn for turn in turns if turn.label == "spry" and turn.record is None)
        turns.close()
        states = {one: json.loads((tmp_path / "all" / one / "run.json").read_text())["state"] for one in RUNS[:2]}
        assert states == {"spry-seed0": "complete", "one_lr-seed0": "cancelled"}

    def test_ctrl_c_says_how_to_go_on(self, toml, spryfl, tmp_path, monkeypatch):
        def interrupt(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("spryfl.server.finish", interrupt)
            code, _, err = spryfl("compare", "--config", toml, "--out", tmp_path / "all")
        assert (code, f"spryfl resume {tmp_path / 'all'}" in err) == (130, True)
        states = {json.loads((tmp_path / "all" / one / "run.json").read_text())["state"] for one in RUNS[:2]}
        assert states == {"cancelled"}
        assert spryfl("resume", tmp_path / "all")[0] == 0
        assert report.read_comparison(tmp_path / "all").runs[3].facts["state"] == "complete"

    def test_a_finished_one_is_not_run_again(self, toml, whole, spryfl, tmp_path, monkeypatch):
        out = Path(shutil.copytree(whole[0], tmp_path / "all"))
        monkeypatch.setattr(compare.job, "read", lambda experiment: pytest.fail("the data are read again"))
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.parent != out}
        code, said, _ = spryfl("compare", "--config", toml, "--out", out)
        assert code == 0
        assert "complete" in said
        assert {path: path.read_bytes() for path in before} == before


class TestBudget:
    LIMITS = train.Limits(passes=10, megabytes=2.0, seconds=5.0)

    @pytest.mark.parametrize(
        ("spent", "expected"),
        [
            (Progress(value_passes=9), False),
            (Progress(value_passes=4, tangent_passes=3, backward_passes=3), True),
            (Progress(bytes_up=1_999_999), False),
            (Progress(bytes_up=1_000_000, bytes_down=1_000_000), True),
            (Progress(seconds=4.9), False),
            (Progress(seconds=5.0), True),
        ],
    )
    def test_a_run_is_over_when_one_limit_is_reached(self, spent, expected):
        plan = train.Plan(build(named("fedavg")), (), 0, 100, 5, 3, 1, 0, self.LIMITS)
        state, spent = ServerState(1, {}, {}), spent._replace(best=0.5)
        assert train.spent(self.LIMITS, spent) == expected
        assert train.unfinished(plan, state, spent) != expected
        assert train.unfinished(plan._replace(limits=train.Limits()), state, spent)

    def test_a_schedule_runs_over_rounds_passes_or_bytes_but_not_over_the_clock(self):
        plan = train.Plan(build(named("fedavg")), (), 0, 100, 5, 3, 1, 0, self.LIMITS)
        state = ServerState(20, {}, {})
        assert train.done(plan, state, Progress()) == 0.2
        assert train.done(plan, state, Progress(value_passes=3, backward_passes=4)) == 0.7
        assert train.done(plan, state, Progress(bytes_up=500_000, bytes_down=500_000)) == 0.5
        assert train.done(plan, state, Progress(seconds=4.0)) == 0.2
        assert train.done(plan._replace(limits=train.Limits()), state, Progress(value_passes=9)) == 0.2

    def run(self, given, tmp_path, **budget):
        """Records of a comparison's two runs under a budget; few rounds would be evaluated without it."""
        given = {**given, "train": {**given["train"], "rounds": 50, "eval_every": 40, "drop_clients": 0.0}}
        made = compare.parse(changed(given, budget=budget, seeds=[0]))
        list(compare.turns(made, tmp_path / "all"))
        return [report.read(tmp_path / "all" / name) for name in RUNS[:2]]

    @pytest.mark.parametrize(
        ("key", "limit"), [("passes", 30), ("megabytes", 0.1), ("seconds", 0.5)], ids=["passes", "bytes", "seconds"]
    )
    def test_runs_end_with_the_round_that_reaches_it_and_are_evaluated(self, key, limit, given, tmp_path, monkeypatch):
        ticks = itertools.count()
        monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: 0.05 * next(ticks)))
        used = {
            "passes": lambda r: r["value_passes"] + r["tangent_passes"] + r["backward_passes"],
            "megabytes": lambda r: (r["bytes_up"] + r["bytes_down"]) / 1e6,
            "seconds": lambda r: r["seconds"],
        }[key]
        for run in self.run(given, tmp_path, **{key: limit}):
            assert 1 < run.records[-1]["round"] < 40
            assert used(run.records[-1]) >= limit > used(run.records[-2])
            assert "accuracy" in run.records[-1]
            assert not any("accuracy" in record for record in run.records[1:-1])

    def test_too_few_rounds_for_it_are_noted(self, given, tmp_path):
        made = compare.parse(changed(given, budget={"passes": 35}, seeds=[0]))
        list(compare.turns(made, tmp_path / "all"))
        compared = report.write_tables(tmp_path / "all")
        last = [run.records[-1] for run in compared.runs]
        spent = [sum(r[f"{kind}_passes"] for kind in ("value", "tangent", "backward")) for r in last]
        assert len(report.notes(compared)) == sum(passes < 35 for passes in spent) > 0
        assert "before its budget of 35 passes was spent" in report.notes(compared)[0]
        assert report.notes(compared)[0] in (tmp_path / "all" / "table.md").read_text()

    def test_it_is_the_setting_of_each_run(self, given):
        made = compare.parse(changed(given, budget={"passes": 30, "megabytes": 0.5, "seconds": 9}))
        for one in made.runs.values():
            assert (one.train.max_passes, one.train.max_megabytes, one.train.max_seconds) == (30, 0.5, 9)
            assert one.train.rounds == ROUNDS


class TestSettings:
    def test_labels_are_rows_and_changes_are_theirs_alone(self, given):
        made = compare.parse(given)
        spry, other = made.runs["spry", 0], made.runs["one_lr", 3]
        assert (spry.method.name, other.method.name) == ("spry", "fedavg")
        assert (spry.method.local_optimizer["lr"], other.method.local_optimizer["lr"]) == (1e-3, 0.02)
        assert {one.method.schedule for one in made.runs.values()} == {"linear"}  # [method] without a name: for all
        assert (other.name, other.seed) == ("one_lr-seed3", 3)

    def test_a_method_section_with_a_name_is_for_that_row(self, given):
        own = {"name": "spry", "head": "exact", "schedule": "linear"}
        made = compare.parse(changed({**given, "method": own}, methods=["spry", "fedavg"], changes={}))
        assert made.runs["spry", 0].method.head == "exact"
        assert made.runs["fedavg", 0].method.schedule == "constant"

    @pytest.mark.parametrize("spelled", ["fedavg", {"name": "fedavg"}])
    def test_a_method_may_be_spelled_by_its_name_alone(self, given, spelled):
        made = compare.parse(changed(given, changes={"one_lr": {"method": spelled}}))
        assert (made.runs["one_lr", 0].method.name, made.runs["one_lr", 0].method.schedule) == ("fedavg", "linear")

    def test_the_command_line_chooses_among_them(self, given):
        made = compare.parse(given, ["one_lr", "head_only"], [7])
        assert list(made.runs) == [("one_lr", 7), ("head_only", 7)]
        assert made.runs["one_lr", 7].method.local_optimizer["lr"] == 0.02
        assert made.given["compare"]["methods"] == ["one_lr", "head_only"]
        assert list(compare.parse(given, ["spry"]).given["compare"]) == ["methods", "seeds"]

    def test_what_it_keeps_says_the_same_again(self, given):
        made = compare.parse(given)
        assert compare.parse(tomllib.loads(tomli_w.dumps(made.given))) == made

    def test_without_seeds_the_experiments_own(self, given):
        assert compare.parse(changed({**given, "seed": 5}, seeds=[])).seeds == (5,)


MISTAKES = {
    "unknown method": ({"methods": ["spry", "fedprx"]}, "Possible: spry"),
    "how a label of one's own is made": ({"methods": ["mine"]}, r"\[compare.changes.mine\] method.name"),
    "a label twice": ({"methods": ["spry", "fedavg", "spry"]}, "'spry' stands there twice"),
    "a seed twice": ({"seeds": [1, 1]}, "1 stands there twice"),
    "no methods": ({"methods": []}, "is empty"),
    "changes for nobody": ({"changes": {"fedyogi": {}}}, "no such label"),
    "changes of what all share": (
        {"changes": {"spry": {"data": {"max_length": 9}}}},
        "changes data, which must be the",
    ),
    "a seed of one's own": ({"changes": {"spry": {"seed": 9}}}, "changes seed"),
    "rounds of one's own": ({"changes": {"spry": {"train": {"rounds": 9}}}}, "changes train.rounds"),
    "an unknown budget": ({"budget": {"hours": 3}}, "compare.budget.hours is unknown. Possible: rounds, passes"),
    "no budget": ({"budget": {"passes": 0}}, "must be above 0"),
    "a budget twice": ({"budget": {"rounds": 3}}, "are the same setting"),
    "an unknown key": ({"method": ["spry"]}, "did you mean methods"),
    "no methods, but changes": ({"methods": [], "changes": {"spry": {}}}, "compare.methods is empty"),
    "no hint where the label is a row": (
        {"changes": {"spry": {"method": {"exchange": "x"}}}},
        "Possible: weights, scalars.$",
    ),
    "an unknown setting": ({"changes": {"spry": {"train": {"stepps": 3}}}}, "spry: unknown key train.stepps"),
    "no folder's name": ({"methods": ["../spry"]}, "cannot be a folder's name"),
}


class TestMistakes:
    @pytest.mark.parametrize("case", MISTAKES)
    def test_sections(self, case, given):
        section, said = MISTAKES[case]
        with pytest.raises(ValueError, match=said):
            compare.parse(changed(given, **{"methods": ["spry", "fedavg"], "changes": {}, **section}))

    def test_a_budget_without_rounds(self, given):
        without = {**given, "train": {"cohort": 3}}
        with pytest.raises(ValueError, match=r"Set train\.rounds"):
            compare.parse(changed(without, budget={"passes": 30}))
        assert compare.parse(changed(without, budget={"passes": 30, "rounds": 9})).runs["spry", 0].train.rounds == 9

    def test_a_budget_that_is_also_a_setting(self, given):
        twice = {**given, "train": {**given["train"], "max_passes": 9}}
        with pytest.raises(ValueError, match="same setting"):
            compare.parse(changed(twice, budget={"passes": 30}))

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--set", "train.steps=3"], "spry-seed0 train.steps = 3, was 2"),
            (["--methods", "spry"], "methods = spry, was spry,one_lr"),
            (["--seeds", "0"], "seeds = 0, was 0,3"),
            (
                ["--set", "compare.changes.one_lr.method.local_optimizer.lr=0.5"],
                "one_lr-seed0 method.local_optimizer.lr",
            ),
        ],
    )
    def test_changed_in_between(self, words, said, toml, whole, spryfl):
        before = {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()}
        code, _, err = spryfl("compare", "--config", toml, "--out", whole[0], *words)
        assert code == 2
        assert said in err
        assert f"spryfl resume {whole[0]}" in err
        assert {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()} == before

    def test_a_runs_configuration_changed_in_between(self, toml, whole, spryfl, tmp_path):
        out = Path(shutil.copytree(whole[0], tmp_path / "all"))
        text = (out / "spry-seed3" / "config.toml").read_text()
        (out / "spry-seed3" / "config.toml").write_text(text.replace("steps = 2", "steps = 4"))
        code, _, err = spryfl("compare", "--config", toml, "--out", out)
        assert (code, "spry-seed3 train.steps = 2, was 4" in err) == (2, True)

    def test_data_changed_in_between(self, given, reviews, tmp_path):
        """A run that is left must be of the data of those that are complete."""
        other = Path(shutil.copytree(reviews, tmp_path / "reviews"))
        given = changed({**given, "data": {**given["data"], "name": str(other)}}, seeds=[0])
        list(compare.turns(compare.parse(given), tmp_path / "all"))
        shutil.rmtree(tmp_path / "all" / "one_lr-seed0")
        with open(other / "train.csv", "a", encoding="utf-8") as file:
            file.writelines(["one more day,good,site 1\n"] * 200)
        with pytest.raises(ValueError, match="have changed since it began"):
            list(compare.turns(compare.parse(given), tmp_path / "all"))

    def test_a_folder_of_something_else(self, toml, spryfl, tmp_path):
        (tmp_path / "all").mkdir()
        (tmp_path / "all" / "thesis.txt").write_text("mine")
        code, _, err = spryfl("compare", "--config", toml, "--out", tmp_path / "all")
        assert (code, "holds no comparison" in err) == (2, True)
        assert [path.name for path in (tmp_path / "all").iterdir()] == ["thesis.txt"]

    def test_what_cannot_be_leaves_no_folder(self, toml, reviews, spryfl, tmp_path, monkeypatch):
        """So that the same folder can be given again when it is put right."""
        for setting, said in (
            ("data.name=nothing.csv", "nothing.csv does not exist"),
            ("compare.changes.spry.method.estimator.exact_top=9", "compare, spry-seed0: top = 9"),
        ):
            code, _, err = spryfl("compare", "--config", toml, "--out", tmp_path / "all", "--set", setting)
            assert (code, said in err) == (2, True)
            assert not (tmp_path / "all").exists()

        def stop(comparison, out):
            raise KeyboardInterrupt

        monkeypatch.setattr(compare, "turns", stop)
        code, _, err = spryfl("compare", "--config", toml, "--out", tmp_path / "all")
        assert (code, "nothing was begun" in err) == (130, True)

    def test_a_method_that_is_no_section(self, toml, spryfl, tmp_path):
        change = "compare.changes.spry.method=3"
        code, _, err = spryfl("compare", "--config", toml, "--out", tmp_path / "all", "--set", change)
        assert (code, "method = 3: give a section or a name" in err) == (2, True)

    def test_seeds_that_are_no_numbers(self, toml, spryfl, tmp_path):
        code, _, err = spryfl("compare", "--config", toml, "--seeds", "0,one", "--out", tmp_path / "all")
        assert (code, "'one'" in err) == (2, True)


class TestTable:
    def test_its_numbers_are_those_of_the_records(self, whole):
        compared = report.write_tables(whole[0])
        made = json.loads((whole[0] / "table.json").read_text())
        head, table = report.summary(compared.groups)
        for label, row in zip(("spry", "one_lr"), table, strict=True):
            runs = [
                [
                    json.loads(line)
                    for line in (whole[0] / f"{label}-seed{k}" / "records.jsonl").read_text().splitlines()
                ]
                for k in (0, 3)
            ]
            expected = {
                "round": [ROUNDS, ROUNDS],
                "accuracy": [run[-1]["accuracy"] for run in runs],
                "best": [max(r["accuracy"] for r in run if "accuracy" in r) for run in runs],
                "MB up": [run[-1]["bytes_up"] / 1e6 for run in runs],
                "MB down": [run[-1]["bytes_down"] / 1e6 for run in runs],
                "passes": [sum(run[-1][f"{k}_passes"] for k in ("value", "tangent", "backward")) for run in runs],
                "peak MB": [max(r["peak_bytes"] for r in run[1:]) / 1e6 for run in runs],
                "seconds": [run[-1]["seconds"] for run in runs],
                "failed": [sum(len(r["failed"]) for r in run[1:]) for run in runs],
            }
            said = made["methods"][label]
            shown = dict(zip(head, row, strict=True))
            for name, two in expected.items():
                assert said["mean"][name] == pytest.approx(sum(two) / 2)
                assert said["sd"][name] == pytest.approx(abs(two[0] - two[1]) / 2**0.5)  # of two: |a - b| / sqrt 2
                assert [run[name] for run in said["runs"]] == two
                assert float(shown[name].split(" ± ")[0]) == pytest.approx(sum(two) / 2, abs=0.51)
            assert shown["accuracy"] == f"{statistics.mean(expected['accuracy']):.4f} ± " + (
                f"{statistics.stdev(expected['accuracy']):.4f}"
            )
            assert shown["state"] == "complete"
            assert f"| {' | '.join(row)} |" in (whole[0] / "table.md").read_text()
        assert sum(run["failed"] for label in made["methods"].values() for run in label["runs"]) > 0

    def test_what_a_result_carries(self, whole):
        report.write_tables(whole[0])
        made = json.loads((whole[0] / "table.json").read_text())
        assert (made["state"], made["seeds"], made["metrics"]) == ("complete", [0, 3], ["accuracy"])
        assert made["config"]["compare"]["methods"] == ["spry", "one_lr"]
        facts = json.loads((whole[0] / "spry-seed0" / "run.json").read_text())
        assert made["made_with"][0] == {key: facts[key] for key in made["made_with"][0]}
        assert {"versions", "hardware", "threads", "commit", "data"} == set(made["made_with"][0])
        text = (whole[0] / "table.md").read_text()
        assert f"torch {facts['versions']['torch']}" in text

    def test_a_comparison_on_its_way(self, whole, tmp_path, spryfl):
        out = Path(shutil.copytree(whole[0], tmp_path / "all"))
        shutil.rmtree(out / "one_lr-seed0")
        shutil.rmtree(out / "one_lr-seed3")
        (out / "spry-seed3" / "records.jsonl").unlink()
        code, _, _ = spryfl("report", out)
        assert code == 0
        head, table = report.summary(report.read_comparison(out).groups)
        assert table[1][head.index("accuracy") :] == ("-",) * (len(head) - head.index("accuracy"))
        only = report.scored(report.read(out / "spry-seed0"))[-1]["accuracy"]
        assert table[0][head.index("accuracy")] == f"{only:.4f}"
        assert json.loads((out / "table.json").read_text())["state"] == "2 of 4 runs complete"

    def test_report_groups_runs_by_seed(self, whole, spryfl):
        code, said, _ = spryfl("report", "--mean", *(whole[0] / name for name in RUNS))
        assert code == 0
        _, table = report.summary(report.read_comparison(whole[0]).groups)
        assert said.splitlines()[2:] == [f"| {' | '.join(row)} |" for row in table]

    def test_two_comparisons_are_not_reported_as_runs(self, whole, spryfl):
        code, _, err = spryfl("report", whole[0], whole[0])
        assert (code, f"{whole[0]} is a comparison. Give it alone" in err) == (2, True)

    def test_what_the_screen_shows(self, toml, whole, spryfl, tmp_path):
        out = Path(shutil.copytree(whole[0], tmp_path / "all"))
        shutil.rmtree(out / "spry-seed3")
        shutil.rmtree(out / "one_lr-seed3")
        code, said, err = spryfl("compare", "--config", toml, "--out", out)
        assert (code, err) == (0, "")
        lines = [line.split() for line in said.splitlines() if line.split()[:1] == ["3"]]
        assert [line[1] for line in lines] == ["0", "1", "2", "3"]
        ends = [report.scored(report.read(out / f"{label}-seed3"))[-1]["accuracy"] for label in ("spry", "one_lr")]
        assert [float(one.rstrip(".")) for one in lines[-1][2:4]] == pytest.approx(ends, abs=1e-4)
        assert spryfl("compare", "--config", toml, "--out", out, "-q")[1].splitlines()[0].startswith("runs ")


class TestPicture:
    def test_lines_are_means_over_what_all_seeds_have(self):
        """Two seeds at other points: the mean of straight lines, as far as both go."""
        from matplotlib.figure import Figure

        def run(points):
            return report.Run("a-seed0", {}, {}, [{"round": x, "accuracy": y} for x, y in points])

        axes = Figure().subplots()
        pictures._band(axes, [run([(0, 0.0), (4, 0.8)]), run([(0, 0.2), (2, 0.4), (6, 0.8)])], lambda r: r["round"], 0)
        (line,) = axes.get_lines()
        assert list(line.get_xdata()) == [0, 2, 4]
        assert list(line.get_ydata()) == pytest.approx([0.1, 0.4, 0.7])

    def test_it_is_made_with_a_line_a_method_in_every_panel(self, whole, tmp_path, monkeypatch):
        from matplotlib.figure import Figure

        figures = []
        real = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or real(self, *a, **k))
        pictures.comparison(report.read_comparison(whole[0]), tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        panels = figures[0].get_axes()
        assert [axes.get_xlabel() for axes in panels[:4]] == ["rounds", "passes", "MB up and down", "seconds"]
        assert all(len(axes.get_lines()) == 2 for axes in panels[:4])
        assert [text.get_text() for text in panels[4].get_yticklabels()] == ["spry", "one_lr"]
        peaks = [
            json.loads((whole[0] / "table.json").read_text())["methods"][label]["mean"]["peak MB"]
            for label in ("spry", "one_lr")
        ]
        assert [bar.get_width() for bar in panels[4].patches] == pytest.approx(peaks)

    def test_before_anything_is_evaluated(self, tmp_path):
        with pytest.raises(ValueError, match="nothing to draw"):
            pictures.comparison(report.Compared("a", {}, {"spry": []}), tmp_path / "a.png")

    def test_twelve_looks_are_distinct_and_more_still_are(self):
        looks = [tuple(pictures._look(i).values()) for i in range(36)]
        assert len(set(looks)) == 36
        assert len({colour for colour, _, _ in looks}) == len({marker for _, marker, _ in looks}) == 12


def test_without_a_configuration_it_is_the_quickstarts(spryfl, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(training, "_compare", lambda *arguments: seen.append(arguments))
    assert spryfl("compare", "--methods", "spry_plus, fedavg", "--seeds", "1,2", "--set", "train.rounds=2")[0] == 0
    (made, folder, quiet, target) = seen[0]
    assert list(made.runs) == [("spry_plus", 1), ("fedavg", 1), ("spry_plus", 2), ("fedavg", 2)]
    quick = config.Experiment.load(config.QUICKSTART, {"train": {"rounds": 2}, "seed": 1, "name": "spry_plus-seed1"})
    assert made.runs["spry_plus", 1] == quick
    assert (folder, quiet, target) == (Path("runs/compare-quickstart"), False, 0.0)
