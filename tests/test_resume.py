"""A run that is killed, interrupted or cut off at any moment and resumed ends in the same bits as one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from children import ended, start, wait_for_lines

from spryfl import cli, journal
from spryfl.train import TIMED

ROUNDS = 6
MOMENTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)


@pytest.fixture(scope="module")
def settings(tiny, reviews):
    """A small run whose every part has state: Yogi on the server, dropped clients, evaluations, a best state."""
    changes = ("data.train_rows=60", "data.test_rows=20", "train.eval_every=2", "train.drop_clients=0.2")
    flags = ["--model", tiny, "--data", reviews, "--clients", 5, "--cohort", 3, "--rounds", ROUNDS]
    return [*flags, *(word for change in changes for word in ("--set", change))]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole")
    child = start("run", *settings, "--out", out, "--name", "one", log=out / "log")
    assert ended(child) == 0, (out / "log").read_text()
    return out / "one"


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the whole run, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "one"))


def spryfl(monkeypatch, *arguments):
    """The command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["spryfl", *(str(one) for one in arguments)])
    try:
        cli.main()
    except SystemExit as error:
        return error.code or 0
    return 0


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """Pictures take longer than these runs."""
    monkeypatch.setattr("spryfl.pictures.curves", lambda runs, path: None)


def records(folder):
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def assert_same(one, other):
    """Equal in everything but times, memory and the name of the folder."""
    assert records(one) == records(other)
    for which in (journal.NEWEST, journal.BEST):
        (a, p), (b, q) = (journal.load(journal.open_folder(folder), which) for folder in (one, other))
        assert p._replace(seconds=0) == q._replace(seconds=0)
        assert a.round == b.round
        for mine, theirs in [(a.params, b.params), *((a.optimizer[slot], b.optimizer[slot]) for slot in a.optimizer)]:
            assert list(mine) == list(theirs)
            assert all(mine[name].numpy().tobytes() == theirs[name].numpy().tobytes() for name in mine)
        assert set(a.optimizer) == set(b.optimizer)
    for name in ("adapter_model.safetensors", "adapter_config.json", "spryfl.json"):
        assert (one / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()
    assert json.loads((other / "run.json").read_text())["state"] == "complete"
    assert not list(other.rglob("*.part"))


class TestKilled:
    @pytest.mark.parametrize("lines", [1, 4, ROUNDS + 1])
    def test_after_a_record(self, lines, settings, whole, tmp_path, monkeypatch):
        child = start("run", *settings, "--out", tmp_path, "--name", "one", log=tmp_path / "log")
        wait_for_lines(tmp_path / "one" / "records.jsonl", lines, child)
        child.kill()
        child.join()
        assert spryfl(monkeypatch, "resume", tmp_path / "one") == 0
        assert_same(whole, tmp_path / "one")

    def test_at_any_moment_and_again(self, settings, whole, tmp_path, monkeypatch):
        """Killed after delays by chance, each time gone on from; before there is a run folder, begun again."""
        draw, folder, kills = random.Random(1), tmp_path / "one", 0
        for moment in MOMENTS:
            begun = (folder / "config.toml").is_file()
            assert begun or not folder.exists()  # a run folder is whole from its first moment
            words = ("resume", folder) if begun else ("run", *settings, "--out", tmp_path, "--name", "one")
            child = start(*words, log=tmp_path / "log")
            time.sleep(0.3 + moment * draw.random())
            child.kill()
            child.join()
            kills += child.exitcode == -signal.SIGKILL
        assert kills
        if not folder.exists():
            assert spryfl(monkeypatch, "run", *settings, "--out", tmp_path, "--name", "one") == 0
        assert spryfl(monkeypatch, "resume", folder) == 0
        assert_same(whole, folder)

    @pytest.mark.parametrize("kept", [0, 3, 5])
    def test_between_a_record_and_the_state(self, kept, settings, copied, whole, monkeypatch):
        """Records that the state has not seen, the last of them cut short, are made again."""
        lines = (copied / "records.jsonl").read_bytes().splitlines(keepends=True)
        states = self.states(settings, copied.parent, kept, monkeypatch)
        shutil.rmtree(copied / "state")
        shutil.rmtree(copied / "adapter")
        shutil.copytree(states, copied / "state")
        (copied / "records.jsonl").write_bytes(b"".join(lines[: kept + 2]) + b'{"schema": 1, "rou')
        (copied / "state" / "newest.spryfl.part").write_bytes(b"half")
        assert spryfl(monkeypatch, "resume", copied) == 0
        assert_same(whole, copied)

    @staticmethod
    def states(settings, out, rounds, monkeypatch):
        """The state folder after so many rounds."""
        taken = out / "taken"
        keep = journal.save

        def save(opened, which, state, progress):
            keep(opened, which, state, progress)
            if state.round == rounds and which == journal.NEWEST:
                shutil.copytree(opened.folder / "state", taken)

        with monkeypatch.context() as patch:
            patch.setattr(journal, "save", save)
            assert spryfl(patch, "run", *settings, "--out", out, "--name", "two") == 0
        return taken

    def test_before_the_first_state(self, copied, whole, monkeypatch):
        shutil.rmtree(copied / "adapter")
        for file in (copied / "state").iterdir():
            file.unlink()
        (copied / "records.jsonl").unlink()
        assert spryfl(monkeypatch, "resume", copied) == 0
        assert_same(whole, copied)

    def test_while_the_adapter_is_written(self, copied, whole, monkeypatch):
        shutil.rmtree(copied / "adapter")
        (copied / "adapter").mkdir()
        (copied / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
        facts = json.loads((copied / "run.json").read_text())
        (copied / "run.json").write_text(json.dumps({**facts, "state": "running"}))
        assert spryfl(monkeypatch, "resume", copied) == 0
        assert_same(whole, copied)

    def test_a_complete_run_stays_as_it_is(self, copied, whole, monkeypatch):
        before = {path.name: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
        assert spryfl(monkeypatch, "resume", copied) == 0
        after = {path.name: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
        assert set(after) == set(before)
        assert [name for name in after if after[name] != before[name]] == []
        assert_same(whole, copied)


class TestInterrupted:
    def test_ctrl_c_ends_it_cleanly(self, settings, whole, tmp_path, monkeypatch):
        child = start("run", *settings, "--out", tmp_path, "--name", "one", log=tmp_path / "log")
        wait_for_lines(tmp_path / "one" / "records.jsonl", 3, child)
        os.kill(child.pid, signal.SIGINT)
        assert ended(child) == 130
        said = (tmp_path / "log").read_text()
        assert f"Go on with: spryfl resume {tmp_path / 'one'}" in said
        assert "Traceback" not in said
        assert json.loads((tmp_path / "one" / "run.json").read_text())["state"] == "cancelled"
        assert spryfl(monkeypatch, "resume", tmp_path / "one") == 0
        assert_same(whole, tmp_path / "one")

    @pytest.mark.parametrize("where", ["spryfl.screen.Screen.show", "spryfl.server.finish", "spryfl.journal.append"])
    def test_wherever_it_comes(self, where, settings, tmp_path, monkeypatch, capsys):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(where, interrupt)
            assert spryfl(patch, "run", *settings, "--out", tmp_path, "--name", "one") == 130
        assert "spryfl resume" in capsys.readouterr().err
        assert json.loads((tmp_path / "one" / "run.json").read_text())["state"] == "cancelled"

    def test_an_error_in_the_middle_leaves_a_run_that_can_be_gone_on_with(
        self, settings, whole, tmp_path, monkeypatch, capsys
    ):
        def refuse(*args, **kwargs):
            raise ValueError("no room left")

        with monkeypatch.context() as patch:
            patch.setattr("spryfl.server.finish", refuse)
            assert spryfl(patch, "run", *settings, "--out", tmp_path, "--name", "one") == 2
        assert "no room left" in capsys.readouterr().err
        assert json.loads((tmp_path / "one" / "run.json").read_text())["state"] == "cancelled"
        assert spryfl(monkeypatch, "resume", tmp_path / "one") == 0
        assert_same(whole, tmp_path / "one")

    def test_before_the_first_round(self, settings, tmp_path, monkeypatch, capsys):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("spryfl.job.read", interrupt)
            assert spryfl(patch, "run", *settings, "--out", tmp_path, "--name", "one") == 130
        assert "Traceback" not in capsys.readouterr().err
        assert not (tmp_path / "one").exists()


class TestRefused:
    @pytest.mark.parametrize("length", [0, 10, 1000])
    def test_a_state_cut_short(self, length, copied, monkeypatch, capsys):
        state = copied / "state" / "newest.spryfl"
        state.write_bytes(state.read_bytes()[:length])
        before = (copied / "records.jsonl").read_bytes()
        assert spryfl(monkeypatch, "resume", copied) == 2
        said = capsys.readouterr().err
        assert str(state) in said.replace("\n", "")
        assert "cut short" in said
        assert "best.spryfl" in said
        assert (copied / "records.jsonl").read_bytes() == before

    def test_the_best_state_can_take_its_place(self, copied, whole, monkeypatch):
        shutil.copy(copied / "state" / "best.spryfl", copied / "state" / "newest.spryfl")
        assert spryfl(monkeypatch, "resume", copied) == 0
        assert_same(whole, copied)

    def test_changed_data(self, settings, reviews, copied, tmp_path, monkeypatch, capsys):
        other = Path(shutil.copytree(reviews, tmp_path / "other"))
        with open(other / "train.csv", "a", encoding="utf-8") as file:
            file.write("one more day,good,site 1\n")
        text = (copied / "config.toml").read_text().replace(str(reviews), str(other))
        (copied / "config.toml").write_text(text)
        before = (copied / "state" / "newest.spryfl").read_bytes()
        assert spryfl(monkeypatch, "resume", copied) == 2
        assert "have changed since it began" in capsys.readouterr().err
        assert (copied / "state" / "newest.spryfl").read_bytes() == before

    def test_a_changed_configuration(self, copied, monkeypatch, capsys):
        text = (copied / "config.toml").read_text()
        (copied / "config.toml").write_text(text.replace("\nr = 1\n", "\nr = 2\n"))
        assert spryfl(monkeypatch, "resume", copied) == 2
        assert "config.toml" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["nothing", "records.jsonl"])
    def test_what_is_no_run_folder(self, name, copied, monkeypatch, capsys):
        assert spryfl(monkeypatch, "resume", copied / name) == 2
        assert "is not a run folder" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["run.json", "records.jsonl"])
    def test_a_damaged_file(self, name, copied, monkeypatch, capsys):
        (copied / name).write_text("nonsense\n")
        assert spryfl(monkeypatch, "resume", copied) == 2
        assert name in capsys.readouterr().err


def test_stopping_early_on_a_plateau(settings, tmp_path, monkeypatch):
    """Without a better evaluation it stops, and a resumed run does not go on after all."""
    still = ("--set", "method.local_optimizer.lr=0.0", "--set", "train.patience=2", "--set", "train.eval_every=1")
    words = [*settings, "--out", tmp_path, "--name", "one", *still]
    assert spryfl(monkeypatch, "run", *words) == 0
    assert [record["round"] for record in records(tmp_path / "one")] == [0, 1, 2]
    assert json.loads((tmp_path / "one" / "run.json").read_text())["state"] == "complete"
    assert spryfl(monkeypatch, "resume", tmp_path / "one") == 0
    assert len(records(tmp_path / "one")) == 3


def test_the_best_state_is_the_best_round(whole):
    best = max((r for r in records(whole) if "accuracy" in r), key=lambda r: (r["accuracy"], -r["round"]))
    state, progress = journal.load(journal.open_folder(whole), journal.BEST)
    assert (state.round, progress.best) == (best["round"], best["accuracy"])


def test_clients_that_do_not_answer_are_recorded(whole):
    failed = [client for record in records(whole) for client in record.get("failed", {}).items()]
    assert failed
    assert all(why == "did not answer (simulated)" for _, why in failed)
    for record in records(whole)[1:]:
        assert set(record["failed"]) <= {str(client) for client in record["cohort"]}


def test_a_round_that_nobody_answers_changes_nothing(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("spryfl.train.lost", lambda seed, share: lambda round_, client: True)
    assert spryfl(monkeypatch, "run", *settings, "--out", tmp_path, "--name", "one") == 0
    made = records(tmp_path / "one")
    assert len({record["accuracy"] for record in made if "accuracy" in record}) == 1
    assert all(record["loss"] is None and len(record["failed"]) == 3 for record in made[1:])
