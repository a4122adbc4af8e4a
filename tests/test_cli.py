"""The command line as a user meets it: what each command prints and leaves, and how every mistake is answered."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from spryfl import cli
from spryfl.methods import METHODS

SMALL = ("data.train_rows=40", "data.test_rows=20", "train.eval_every=2")


@pytest.fixture(scope="module")
def flags(tiny, reviews):
    words = ["--model", tiny, "--data", reviews, "--clients", 4, "--cohort", 2, "--rounds", 2]
    return [str(one) for one in (*words, *(word for one in SMALL for word in ("--set", one)))]


@pytest.fixture(scope="module")
def done(flags, tmp_path_factory):
    """A finished run by the real command in a process of its own: its folder and what it printed."""
    out = tmp_path_factory.mktemp("runs")
    words = [sys.executable, "-m", "spryfl.cli", "run", *flags, "--out", str(out), "--name", "one"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "80"})
    assert ran.returncode == 0, ran.stderr
    return out / "one", ran


class TestRun:
    def test_what_it_leaves(self, done):
        folder, _ = done
        assert {path.name for path in folder.iterdir()} == {
            "config.toml",
            "run.json",
            "records.jsonl",
            "state",
            "adapter",
            "curves.png",
            ".lock",
        }
        assert {path.name for path in (folder / "state").iterdir()} == {"newest.spryfl", "best.spryfl"}
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        assert [record["round"] for record in records] == [0, 1, 2]
        assert all(record["schema"] == 1 for record in records)
        assert records[-1]["bytes_up"] > 0
        assert records[-1]["bytes_down"] > records[-1]["bytes_up"]
        assert 0 <= records[-1]["personal_after"] <= 1
        facts = json.loads((folder / "run.json").read_text())
        assert facts["state"] == "complete"
        assert facts["threads"] == 1
        assert {"schema", "started", "ended", "versions", "hardware", "commit", "seed", "data"} <= set(facts)

    def test_what_it_says(self, done):
        folder, ran = done
        assert ran.stderr == ""
        for part in ("40 training rows, 20 test rows, 2 classes", "4, 2 a round, 2 rounds", "2/2", "(guessed)"):
            assert part in ran.stdout
        assert "accuracy on the untouched test rows: " in ran.stdout
        assert f"adapter {folder / 'adapter'}\n" in ran.stdout
        assert f'spryfl predict {folder} "a sentence of yours"' in ran.stdout
        assert "\x1b" not in ran.stdout

    def test_a_warning_is_a_line(self, spryfl, monkeypatch):
        monkeypatch.setattr(cli, "app", lambda: warnings.warn("a [bad] head", stacklevel=1))
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert spryfl() == (0, "", "warning a [bad] head\n")

    def test_what_it_says_of_the_method(self, done, flags, spryfl, tmp_path):
        """An option that the row leaves at its default is said too, when it is changed."""
        assert "method  spry\n" in done[1].stdout
        top = ["--set", "method.estimator.exact_top=1", "--set", "method.head_lr=2.0", "--rounds", 1]
        out = spryfl("run", *flags, *top, "--out", tmp_path)[1]
        (line,) = [line for line in out.splitlines() if line.startswith("method")]
        assert line.startswith("method  spry, but estimator forward(")
        assert "exact_top=1" in line
        assert line.endswith("; head_lr 2.0 (row: 1.0)")

    def test_its_configuration_runs_again_as_it_is(self, done, spryfl, tmp_path):
        folder, _ = done
        code, _, _ = spryfl("run", "--config", folder / "config.toml", "--out", tmp_path)
        assert code == 0
        for name in ("config.toml", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
            assert (tmp_path / "one" / name).read_bytes() == (folder / name).read_bytes()

    def test_a_dry_run_writes_nothing(self, flags, spryfl, tmp_path):
        code, out, err = spryfl("run", *flags, "--out", tmp_path / "runs", "--dry-run", "--seed", 7, "--threads", 3)
        made = tomllib.loads(out)
        assert (code, err, made["seed"], made["threads"], made["train"]["rounds"]) == (0, "", 7, 3, 2)
        assert not (tmp_path / "runs").exists()

    def test_without_a_name_folders_are_numbered(self, flags, spryfl, tmp_path):
        for _ in range(2):
            assert spryfl("run", *flags, "--rounds", 1, "--method", "head_only", "--out", tmp_path)[0] == 0
        assert {path.name for path in tmp_path.iterdir()} == {
            f"head_only-{Path(flags[3]).stem}{end}" for end in ("", "-2")
        }

    def test_threads_are_set_and_recorded(self, flags, spryfl, tmp_path, monkeypatch):
        set_to = []
        monkeypatch.setattr("torch.set_num_threads", set_to.append)
        assert spryfl("run", *flags, "--rounds", 1, "--threads", 1, "--out", tmp_path, "--name", "a")[0] == 0
        assert set(set_to) == {1}

    def test_cut_texts_are_said(self, flags, spryfl, tmp_path):
        code, out, _ = spryfl(
            "run", *flags, "--rounds", 1, "--set", "data.max_length=4", "--out", tmp_path, "--name", "a"
        )
        assert code == 0
        assert "texts were cut at 4 tokens" in out
        assert json.loads((tmp_path / "a" / "run.json").read_text())["data"]["cut"] > 0

    def test_a_saved_adapter_is_a_start(self, done, flags, spryfl, tmp_path):
        folder, _ = done
        adapter = ("--set", f"model.adapter={folder / 'adapter'}")
        assert spryfl("run", *flags, *adapter, "--out", tmp_path, "--name", "a")[0] == 0
        first = json.loads((tmp_path / "a" / "records.jsonl").read_text().splitlines()[0])
        last = json.loads((folder / "records.jsonl").read_text().splitlines()[-1])
        assert first["test_loss"] == pytest.approx(last["test_loss"], rel=1e-6)
        assert spryfl("resume", tmp_path / "a")[0] == 0


class TestUse:
    def test_evaluate(self, done, reviews, spryfl):
        folder, _ = done
        code, out, err = spryfl("evaluate", folder, reviews / "test.csv")
        assert (code, err) == (0, "")
        assert "on 80 rows; 0 texts were cut" in out
        assert spryfl("evaluate", folder / "adapter", reviews / "test.csv")[1] == out

    def test_evaluate_agrees_with_the_last_record(self, done, spryfl, tmp_path, flags):
        """On all test rows, the accuracy of the record."""
        every = ("--set", "data.test_rows=0", "--rounds", 1)
        assert spryfl("run", *flags, *every, "--out", tmp_path, "--name", "a")[0] == 0
        last = json.loads((tmp_path / "a" / "records.jsonl").read_text().splitlines()[-1])
        out = spryfl("evaluate", tmp_path / "a", Path(flags[3]) / "test.csv")[1]
        assert f"accuracy {last['accuracy']:.4f}, " in out
        assert f"loss {last['test_loss']:.4f}" in out

    def test_predict(self, done, spryfl):
        code, out, err = spryfl("predict", done[0], "the film was good", "a [bad] day")
        assert (code, err) == (0, "")
        rows = [line.split("\t") for line in out.splitlines()]
        assert [row[2] for row in rows] == ["the film was good", "a [bad] day"]
        for label, shares, _ in rows:
            share = dict(one.split("=") for one in shares.split())
            assert set(share) == {"bad", "good"}
            assert label == max(share, key=lambda name: float(share[name]))
            assert sum(map(float, share.values())) == pytest.approx(1, abs=2e-3)

    def test_predict_from_standard_input(self, done, spryfl, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO("a warm day\n\na cold day\n"))
        assert spryfl("predict", done[0])[1].count("\n") == 2
        monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
        code, _, err = spryfl("predict", done[0])
        assert code == 2
        assert "no text to predict" in err

    def test_clients_that_do_not_share_have_an_adapter_each(self, flags, spryfl, tmp_path):
        assert spryfl("run", *flags, "--method", "alone", "--out", tmp_path, "--name", "a")[0] == 0
        assert len(list((tmp_path / "a" / "adapter").iterdir())) == 4
        code, _, err = spryfl("predict", tmp_path / "a", "a day")
        assert code == 2
        assert "each client has a model of its own" in err
        assert spryfl("predict", tmp_path / "a" / "adapter" / "client-002", "a day")[0] == 0

    def test_partition(self, reviews, spryfl):
        code, out, err = spryfl("partition", "--data", reviews, "--clients", 3, "--set", "partition.split=iid")
        assert (code, err) == (0, "")
        bars = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()][:3]
        assert [int(rows) for _, rows, _ in bars] == [80, 80, 80]
        assert all(set(bar) == {"A", "B"} for _, _, bar in bars)
        assert "A bad  B good" in out
        assert "80 to 80 rows a client" in out

    def test_methods(self, spryfl):
        out = spryfl("methods")[1]
        for name, row in METHODS.items():
            assert any(line.startswith(f"{name} ") and row.summary in line for line in out.splitlines())

    @pytest.mark.parametrize("name", METHODS)
    def test_one_method(self, name, spryfl):
        code, out, err = spryfl("methods", name)
        assert (code, err) == (0, "")
        row = METHODS[name]
        assert row.summary in out
        assert row.paper in out
        assert f"{row.estimator['kind']}(" in out
        assert "98,304 adapter values, 1,053,700 in the head of 4 classes" in out
        assert "passes a step" in out

    def test_one_method_at_other_shapes(self, tiny, spryfl):
        code, out, _ = spryfl("methods", "spry", "--model", tiny, "--labels", 2, "--rank", 3, "--cohort", 2)
        assert code == 0
        assert "3 blocks, 32 wide, 1,152 adapter values, 66 in the head of 2 classes" in out
        out = spryfl("methods", "spry", "--layers", 2, "--width", 64, "--batch", 1, "--tokens", 16)[1]
        assert "2 blocks, 64 wide, 512 adapter values, 4,420 in the head of 4 classes; batches of 1 x 16" in out

    def test_one_method_with_other_choices(self, spryfl):
        out = spryfl("methods", "spry", "--set", "method.estimator.directions=7")[1]
        assert "1 value, 7 tangent" in out

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--layers", 2, "--model", "minilm"], "--layers has no effect"),
            (["--set", "train.rounds=3"], "no effect on a method"),
            (["--cohort", 200], "cohort = 200"),
            (["--rank", 0], "rank = 0"),
            (["--layers", 3, "--set", "method.estimator.exact_top=4"], "the last 4 blocks, and there are 3"),
        ],
    )
    def test_shapes_that_cannot_be(self, words, said, spryfl):
        code, _, err = spryfl("methods", "spry", *words)
        assert (code, said in err) == (2, True)

    def test_the_table_at_one_block(self, spryfl):
        """A row whose cut lies lower has no costs there; the others have."""
        code, out, _ = spryfl("methods", "--layers", 1, "--width", 64)
        rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
        assert code == 0
        assert " ? " in rows["fedspzo"]
        assert "?" not in rows["fedmezo"]

    def test_report_of_one(self, done, spryfl, tmp_path):
        picture = tmp_path / "a.png"
        code, out, err = spryfl("report", done[0], "--to", picture, "--out", tmp_path / "pages")
        assert (code, err) == (0, "")
        assert f"page    {tmp_path / 'pages' / 'report.html'}" in out
        page = (tmp_path / "pages" / "report.html").read_text()
        assert "foretold" in page
        assert "No prediction" not in page
        assert "complete" in out
        assert "accuracy" in out
        assert "…" not in out
        assert picture.is_file()

    def test_report_of_two(self, done, flags, spryfl, tmp_path):
        assert spryfl("run", *flags, "--method", "fedavg", "--out", tmp_path, "--name", "two")[0] == 0
        out = spryfl("report", done[0], tmp_path / "two", "--out", tmp_path / "a.html", "--no-memory")[1]
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "curves.svg").read_text()
        assert "spryfl report" in (tmp_path / "a.html").read_text()
        assert "method.estimator.kind" in out
        assert "train.rounds" not in out

    def test_report_of_a_run_without_records(self, done, spryfl, tmp_path):
        folder = Path(shutil.copytree(done[0], tmp_path / "one"))
        (folder / "records.jsonl").unlink()
        assert spryfl("report", folder)[0] == 0
        assert (folder / "report.html").is_file()

    def test_the_page_is_no_picture(self, done, spryfl, tmp_path):
        code, _, err = spryfl("report", done[0], "--out", tmp_path / "a.png")
        assert (code, "--to is for the picture" in err) == (2, True)

    def test_a_name_is_no_formula(self, done, spryfl, tmp_path):
        """Pictures show it as it is; one that begins with "_" too."""
        folders = [Path(shutil.copytree(done[0], tmp_path / name)) for name in ("_a", "$\\frac$")]
        code, _, err = spryfl("report", *folders, "--no-memory")
        assert (code, err) == (0, "")
        svg = (tmp_path / "curves.svg").read_text()
        assert svg.count("<!--  _a -->") == svg.count("<!-- $\\frac$ -->") == 1


def lines(rows, head="text,label"):
    return "\n".join([head, *rows]).encode() + b"\n"


GOOD = [f"a good day {i},good" for i in range(6)] + [f"a bad day {i},bad" for i in range(6)]
# a file's contents, more arguments -> what is said
BAD_FILES = {
    "no label column": (lines(["a,b"] * 9, "text,other"), [], "label"),
    "the named column is missing": (lines(GOOD), ["--label", "class"], '"class"'),
    "an empty label": (lines([*GOOD, "a day,"]), [], "is empty in"),
    "labels not dense": (lines([line.replace("good", "3").replace("bad", "1") for line in GOOD]), [], "0 to C-1"),
    "not UTF-8": (lines(GOOD) + b"caf\xe9,good\n", [], "is not UTF-8"),
    "more clients than examples": (lines(GOOD), ["--clients", "11"], "only"),
    "no example for a client": (
        lines([f"{line},one" for line in GOOD], "text,label,user"),
        ["--set", "data.group=user"],
        "only 1 groups",
    ),
    "a single class": (lines(["a day,good"] * 12), [], "class"),
    "no rows": (lines([]), [], "b.csv"),
    "a row beyond the model's places": (lines([*GOOD, "a " * 80 + ",good"]), [], "data.max_length to 64 or less"),
}
BAD_WORDS = {
    "unknown key": (["--set", "train.round=3"], "did you mean rounds?"),
    "no assignment": (["--set", "train.rounds"], "a.b=c"),
    "no effect": (["--set", "train.steps=2", "--set", "train.epochs=2"], "has no effect"),
    "no effect with these data": (["--set", "data.revision=main"], "has no effect"),
    "unknown method": (["--method", "fedprox"], "Possible: spry"),
    "no such target": (["--set", 'adapter={kind="lora", targets=["nope"]}'], "query, key, value, dense"),
    "no such layer": (["--set", 'adapter={kind="lora", targets=["query"], layers=[9]}'], "3 layers"),
    "no such model here": (["--model", "nobody/nothing-here"], "neither a local folder nor reachable"),
    "no such device": (["--device", "gpu"], "Possible: cpu"),
    "no such adapter": (["--set", "model.adapter=nothing"], "nothing holds no adapter"),
    "no such file": (["--data", "nothing.csv"], "nothing.csv"),
    "no such configuration": (["--config", "nothing.toml"], "nothing.toml cannot be read"),
    "a comparison": (["--set", "compare.seeds=[0]"], "spryfl compare --config"),
    "more blocks than there are": (["--set", "method.estimator.exact_top=4"], "BertModel has 3 blocks"),
    "more directions than values": (
        ["--set", "method.estimator.distribution=orthogonal", "--set", "method.estimator.directions=2000"],
        "2000 orthogonal directions do not fit",
    ),
    "more directions than the smallest client's values": (
        [
            *("--cohort", "4", "--set", 'method.assignment={kind="budget", values=[384, 64]}'),
            *("--set", "method.estimator={distribution='orthogonal', directions=200}"),
        ],
        "200 orthogonal directions do not fit",
    ),
}


class TestMistakes:
    @pytest.mark.parametrize("case", BAD_FILES)
    def test_files(self, case, tiny, spryfl, tmp_path):
        content, words, said = BAD_FILES[case]
        (tmp_path / "b.csv").write_bytes(content)
        clients = [] if "--clients" in words else ["--clients", 2]
        code, _, err = spryfl(
            "run", "--model", tiny, "--data", tmp_path / "b.csv", *clients, *words, "--out", tmp_path / "runs"
        )
        self.check(code, err, said)
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize("case", BAD_WORDS)
    def test_settings(self, case, flags, spryfl, tmp_path):
        words, said = BAD_WORDS[case]
        code, _, err = spryfl("run", *flags, *words, "--out", tmp_path / "runs")
        self.check(code, err, said)
        assert not (tmp_path / "runs").exists()

    @staticmethod
    def check(code, err, said):
        assert code == 2, err
        assert err.startswith("spryfl: ")
        assert said in err
        assert "Traceback" not in err
        assert len(err.splitlines()) <= 2

    def test_an_existing_run_folder_is_not_touched(self, done, flags, spryfl):
        folder, _ = done
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        code, _, err = spryfl("run", *flags, "--out", folder.parent, "--name", folder.name)
        self.check(code, err, f"spryfl resume {folder}")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_an_adapter_of_other_labels(self, done, flags, spryfl, tmp_path):
        folder, _ = done
        rows = [[f"a day {i}", f"class {i % 3}"] for i in range(30)]
        with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["text", "label"], *rows])
        words = ["--data", tmp_path / "a.csv", "--set", f"model.adapter={folder / 'adapter'}", "--out", tmp_path]
        code, _, err = spryfl("run", *flags, "--set", "data.test_rows=0", "--set", "data.train_rows=0", *words)
        self.check(code, err, "does not fit BertForSequenceClassification")

    def test_a_folder_that_another_process_works_on(self, done, spryfl, tmp_path):
        """Refused and untouched while that process lives; killed, it leaves nothing in the way."""
        folder = tmp_path / "a"
        shutil.copytree(done[0], folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        hold = "from spryfl import journal; a = journal.claim(Path(sys.argv[1])); print('held', flush=True); input()"
        words = [sys.executable, "-c", f"import sys; from pathlib import Path; {hold}", str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(words, **pipes) as other:
            try:
                assert other.stdout.readline() == "held\n"
                code, _, err = spryfl("resume", folder)
            finally:
                other.kill()
        self.check(code, err, f"another process works on the run folder {folder}")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert spryfl("resume", folder)[0] == 0

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_full_disk(self, call, flags, spryfl, tmp_path, monkeypatch):
        """It fails in the second round; with space again, the run goes on."""
        real, calls = getattr(os, call), []

        def full(*args):
            calls.append(args)
            if len(calls) > 9:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            code, _, err = spryfl("run", *flags, "--rounds", 4, "--out", tmp_path, "--name", "a")
        self.check(code, err, "No space left on device")
        assert "spryfl resume" in err
        assert not list(tmp_path.rglob("*.part"))
        assert spryfl("resume", tmp_path / "a")[0] == 0
        records = [json.loads(line) for line in (tmp_path / "a" / "records.jsonl").read_text().splitlines()]
        assert [record["round"] for record in records] == [0, 1, 2, 3, 4]

    def test_a_full_disk_while_the_adapter_is_written(self, flags, spryfl, tmp_path, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("spryfl.models.save_adapter", full)
            code, _, err = spryfl("run", *flags, "--out", tmp_path, "--name", "a")
        self.check(code, err, "No space left on device")
        assert json.loads((tmp_path / "a" / "run.json").read_text())["state"] == "cancelled"
        assert spryfl("resume", tmp_path / "a")[0] == 0

    def test_a_place_that_cannot_be_written_to(self, flags, spryfl, tmp_path):
        (tmp_path / "file").write_text("")
        code, _, err = spryfl("run", *flags, "--out", tmp_path / "file", "--name", "a")
        self.check(code, err, "could not write")

    @pytest.mark.parametrize("command", [["evaluate", "nothing", "a.csv"], ["predict", "nothing", "x"]])
    def test_no_adapter(self, command, spryfl):
        code, _, err = spryfl(*command)
        self.check(code, err, "holds no adapter of spryfl")

    def test_no_run_to_report(self, spryfl, tmp_path):
        code, _, err = spryfl("report", tmp_path)
        self.check(code, err, "is not a run folder")

    def test_unknown_method(self, spryfl):
        code, _, err = spryfl("methods", "fedprox")
        self.check(code, err, "Possible: spry")

    def test_an_unknown_option_is_the_usual_exit_code(self, spryfl):
        code, _, err = spryfl("run", "--sead", "3")
        assert code == 2
        assert "--seed" in err


@pytest.mark.parametrize("what", ["--model", "--data"])
def test_without_a_network_a_hub_name_fails_at_once(what, flags, spryfl, tmp_path, monkeypatch):
    """One look-up of the hub's address, and no attempt after it."""
    asked = []

    def unknown(host, *args, **kwargs):
        asked.append(host)
        raise OSError("Name or service not known")

    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    code, _, err = spryfl("run", *flags, what, "nobody/nothing-here", "--out", tmp_path)
    assert code == 2
    assert "nobody/nothing-here" in err
    assert asked == ["huggingface.co"]
