"""Tuning: on held-out training rows alone, the same trials whatever is killed, ranges, what comes out of it."""

from __future__ import annotations

import json
import math
import sys
import tomllib

import pytest
import tomli_w

from spryfl import cli, compare, data, job, journal, report, tune
from spryfl.commands import tuning as command

LR = "method.local_optimizer.lr"


@pytest.fixture(scope="module")
def given(tiny, reviews):
    return {
        "model": {"name": str(tiny)},
        "data": {"name": str(reviews), "train_rows": 80, "test_rows": 20},
        "partition": {"clients": 4, "held_out": 0.0},
        "adapter": {"kind": "lora_xs", "r": 2},
        "train": {"rounds": 2, "cohort": 2, "steps": 2, "eval_every": 1},
        "tune": {
            "methods": ["fedavg", "quick"],
            "trials": 3,
            "rows": 20,
            "space": {LR: {"log": [1e-4, 1e-1]}, "train.steps": {"choices": [1, 2]}},
            "spaces": {"quick": {"method.head_lr": {"range": [0.5, 4.0]}}},
        },
        "compare": {"methods": ["fedavg", "quick"], "changes": {"quick": {"method": {"name": "spry"}}}},
    }


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("tune") / "all"
    return tune.parse(given), out, list(tune.turns(tune.parse(given), out))


def plain(trials):
    return sorted(trials, key=lambda one: (one.label, one.number))


class TestTrials:
    def test_every_method_has_as_many_in_its_own_ranges(self, whole):
        _, _, trials = whole
        assert [(one.label, one.number) for one in trials] == [(m, n) for n in range(3) for m in ("fedavg", "quick")]
        for one in trials:
            if one.label == "quick":
                assert set(one.values) == {"method.head_lr"}
                assert 0.5 <= one.values["method.head_lr"] <= 4
            else:
                assert 1e-4 <= one.values[LR] <= 1e-1
                assert one.values["train.steps"] in (1, 2)
        assert len({one.values[LR] for one in trials if one.label == "fedavg"}) == 3

    def test_a_trial_is_its_run_and_its_score_is_the_runs(self, whole):
        _, out, trials = whole
        for one in trials:
            run = report.read(out / "runs" / f"{one.label}-{one.number:03d}")
            flat = report.flat(run.config)
            assert all(flat[key] == value for key, value in one.values.items())
            assert one.score == report.scored(run)[-1]["test_loss"]
            assert one.metric == report.scored(run)[-1]["accuracy"]
            assert flat["method.name"] == ("spry" if one.label == "quick" else "fedavg")

    def test_test_rows_are_never_scored(self, given, tmp_path, monkeypatch):
        """Rows that are scored are training rows, and not those that are trained on."""
        seen = []
        real = job.prepare
        monkeypatch.setattr(job, "prepare", lambda e, corpus, *more: seen.append(corpus) or real(e, corpus, *more))
        made = tune.parse({**given, "tune": {**given["tune"], "trials": 1}})
        list(tune.turns(made, tmp_path / "t"))
        full = compare.common(tune.experiment(made, "fedavg", 0, {LR: 0.01, "train.steps": 1})).corpus
        which = json.loads((tmp_path / "t" / tune.TRIALS).read_text())["held_out"]["which"]
        assert len(which) == 20
        for corpus in seen:
            assert corpus.test.text == tuple(full.train.text[i] for i in which)
            assert corpus.train.text == tuple(t for i, t in enumerate(full.train.text) if i not in set(which))
            assert corpus.test.text != full.test.text

    def test_killed_anywhere_it_ends_in_the_same_trials(self, whole, given, tmp_path, monkeypatch):
        """Stopped after two trials, then within the third's run, then after its run and before it was written."""
        _, _, expected = whole
        out = tmp_path / "again"
        turns = tune.turns(tune.parse(given), out)
        next(turns)
        next(turns)
        turns.close()
        real, calls = journal.append, []

        def killed(opened, record):
            real(opened, record)
            calls.append(record)
            if record["round"] == 1 and len(calls) < 4:
                raise KeyboardInterrupt

        monkeypatch.setattr(journal, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            list(tune.turns(tune.parse(given), out))
        monkeypatch.setattr(journal, "append", real)
        assert len(tune.trials(out)) == 2
        write = journal.write
        monkeypatch.setattr(
            journal, "write", lambda path, data: _broken() if path.name == tune.TRIALS else write(path, data)
        )
        with pytest.raises(KeyboardInterrupt):
            list(tune.turns(tune.parse(given), out))
        monkeypatch.setattr(journal, "write", write)
        list(tune.turns(tune.parse(given), out))
        assert plain(tune.trials(out)) == plain(expected)
        assert list(tune.turns(tune.parse(given), out)) == []

    def test_more_trials_go_on_from_those_that_are_there(self, whole, given, tmp_path):
        short = {**given, "tune": {**given["tune"], "trials": 2}}
        list(tune.turns(tune.parse(short), tmp_path / "t"))
        list(tune.turns(tune.parse(given), tmp_path / "t"))
        assert plain(tune.trials(tmp_path / "t")) == plain(whole[2])

    def test_another_tuning_in_its_folder_is_refused(self, whole, given):
        other = {**given, "tune": {**given["tune"], "rows": 21}}
        with pytest.raises(ValueError, match="begun with other settings"):
            list(tune.turns(tune.parse(other), whole[1]))


def _broken():
    raise KeyboardInterrupt


def trial(number, score, label="fedavg", pruned=False, seen=None, lr=1e-2):
    values = {LR: lr, "train.steps": 2}
    return tune.Trial(label, number, values, score, 0.5, 2, pruned, seen or {1: score or 0.0, 2: score or 0.0})


class TestChoice:
    def test_the_best_is_the_lowest_loss_that_ran_to_its_end(self, given):
        made = tune.parse(given)
        done = [trial(0, 0.7), trial(1, 0.5), trial(2, 0.5), trial(3, 0.1, pruned=True), trial(4, None)]
        assert tune.best(made, done)["fedavg"].number == 1
        by_metric = made._replace(objective="metric")
        assert tune.best(by_metric, done)["fedavg"].number == 0

    def test_at_the_edge(self, given):
        made = tune.parse(given)
        assert tune.edges(made, trial(0, 1.0, lr=1.1e-4)) == [LR]
        assert tune.edges(made, trial(0, 1.0, lr=3e-3)) == []

    def test_what_comes_out_is_a_comparison_with_the_best_values(self, whole):
        tuning, out, trials = whole
        made = compare.parse(tomllib.loads((out / tune.TUNED).read_text()))
        assert made.labels == ("fedavg", "quick")
        for label, one in tune.best(tuning, trials).items():
            flat = report.flat(next(e for (of, _), e in made.runs.items() if of == label).as_dict())
            assert all(flat[key] == value for key, value in one.values.items())
        table = (out / tune.TABLE).read_text()
        assert table.count("taken") == 2
        assert all(f"{one.score:.4f}" in table for one in trials)

    def test_the_model_of_what_is_good_is_used_after_the_first_trials(self, given):
        """20 trials whose loss falls towards 1e-3: later proposals are nearer to it than even draws."""
        made, done = tune.parse(given), []
        space = tune._distributions(made.spaces["fedavg"])
        for number in range(30):
            lr = tune._study(made, "fedavg", number, done).ask(fixed_distributions=space).params[LR]
            loss = abs(math.log10(lr) + 3)
            done.append(trial(number, loss, lr=lr))
        early, late = (sum(one.score for one in part) / len(part) for part in (done[:5], done[15:]))
        assert late < 0.6 * early

    def test_a_trial_that_is_behind_is_pruned(self, given):
        made = tune.parse({**given, "tune": {**given["tune"], "prune": True}})
        done = [trial(n, 0.5 + n / 100, seen={1: 0.5 + n / 100, 2: 0.4}, lr=0.01) for n in range(5)]
        space = tune._distributions(made.spaces["fedavg"])
        behind, ahead = (tune._study(made, "fedavg", 5, done).ask(fixed_distributions=space) for _ in range(2))
        assert tune._worse(behind, 1, 0.9)
        assert not tune._worse(ahead, 1, 0.3)


def test_held_out_rows_are_of_all_classes(reviews):
    corpus = data.load(str(reviews), train_rows=100)
    cut, which = data.held_out(corpus, 30, seed=1)
    assert len(which) == 30 == len(cut.test.label)
    assert len(cut.train.label) == 70
    assert {*cut.test.label} == {0, 1}
    assert cut.fingerprint != corpus.fingerprint
    assert data.held_out(corpus, 30, seed=2)[1] != which
    with pytest.raises(ValueError, match="Hold out fewer"):
        data.held_out(corpus, 100, seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "no ranges"),
        ({"space": {LR: {"log": [0.0, 1.0]}}}, "no range"),
        ({"space": {LR: {"log": [0.1, 0.01]}}}, "the lower first"),
        ({"space": {LR: 3}}, "give { log"),
        ({"space": {"method.local_optimizer.rate": {"log": [0.1, 1.0]}}}, "unknown key"),
        ({"space": {"train.step": {"choices": [1, 2]}}}, "unknown key"),
        ({"objective": "speed"}, "Possible: loss, metric"),
        ({"trials": 0}, "1 or more"),
        ({"spaces": {"nobody": {}}}, "no such method"),
        ({"methods": []}, "methods is empty"),
        ({"tries": 3}, "unknown key"),
    ],
    ids=str,
)
def test_mistakes(given, changes, message):
    without = {key: value for key, value in given.items() if key != "compare"}
    section = {"methods": ["fedavg"], "trials": 3, "rows": 20, "space": given["tune"]["space"], **changes}
    with pytest.raises(ValueError, match=message):
        tune.parse({**without, "tune": section})


def test_a_single_run_refuses_the_section(given):
    from spryfl.config import parse

    with pytest.raises(ValueError, match="spryfl tune"):
        parse({key: value for key, value in given.items() if key != "compare"})


def test_the_command(given, tmp_path, monkeypatch, capsys):
    config = tmp_path / "small.toml"
    config.write_text(tomli_w.dumps({key: value for key, value in given.items() if key not in ("tune", "compare")}))
    words = ["tune", "-c", config, "--methods", "fedavg", "--trials", "2", "--rounds", "1", "--rows", "10"]
    words += ["--space", f"{LR}={{log=[1e-3, 1e-1]}}", "--out", tmp_path / "t", "--objective", "metric"]
    monkeypatch.setattr(sys, "argv", ["spryfl", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "spryfl compare --config" in capsys.readouterr().out
    assert len(tune.trials(tmp_path / "t")) == 2
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "spryfl[tune]" in capsys.readouterr().err
