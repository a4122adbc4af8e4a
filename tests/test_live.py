"""The live page, for this machine alone, drawn anew as records come, gone with the run; and TensorBoard's events."""

from __future__ import annotations

import html
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from folders import record, rounds, write

from spryfl import report, track
from spryfl.page.live import HOST, Live


def get(address, seen="", host=None, path="/"):
    """(status, headers, text) of a request."""
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    line = http.client.HTTPConnection(HOST, port, timeout=10)
    line.request("GET", path, headers={"If-None-Match": seen, **({"Host": host} if host else {})})
    answer = line.getresponse()
    try:
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        line.close()


def data(text):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def append(folder, one):
    with open(folder / "records.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(one) + "\n")


@pytest.fixture
def going(tmp_path):
    return write(tmp_path / "a", rounds(3), state="running")


def finish(folder, state="complete"):
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, "state": state}))


class TestLive:
    def test_a_new_record_is_seen(self, going):
        with Live([going], kept="a/report.html") as live:
            status, headers, text = get(live.address)
            assert (status, data(text)["live"]) == (200, {"every": 2.0, "ended": False, "kept": "a/report.html"})
            assert data(text)["lines"][0]["x"]["rounds"] == [0, 1, 2, 3]
            assert "round 3 of 24" in text
            assert get(live.address, headers["ETag"])[0] == 304
            append(going, record(4, accuracy=0.75))
            status, newer, text = get(live.address, headers["ETag"])
            assert (status, newer["ETag"] != headers["ETag"]) == (200, True)
            assert data(text)["lines"][0]["y"]["metric-0"][-1] == 0.75

    def test_only_this_machine_under_its_own_name(self, going):
        with Live([going]) as live:
            port = live.address.rstrip("/").rsplit(":", 1)[1]
            assert live.address == f"http://127.0.0.1:{port}/"
            assert [get(live.address, host=f"{name}:{port}")[0] for name in ("localhost", "127.0.0.1")] == [200, 200]
            assert get(live.address, host="attacker.example")[0] == 403
            assert get(live.address, path="/records.jsonl")[0] == 404
            assert get(live.address, path="/../../etc/passwd")[0] == 404
            assert get(live.address)[1]["X-Frame-Options"] == "DENY"
            _, headers, text = get(live.address)
            assert "Access-Control-Allow-Origin" not in headers
            assert "connect-src 'self'" in html.unescape(text)

    def test_a_folder_that_is_not_there_yet(self, tmp_path):
        with Live([tmp_path / "a"]) as live:
            assert get(live.address)[0] == 503
            write(tmp_path / "a", rounds(2), state="running")
            assert get(live.address)[0] == 200

    def test_it_ends_with_the_run(self, going):
        """Who looks is given the end; then nothing answers."""
        with Live([going], every=5.0) as live:
            get(live.address)
            finish(going)
            assert live.ended
            looking = threading.Timer(0.5, lambda: seen.append(get(live.address)))
            seen = []
            looking.start()
            began = time.monotonic()
        assert time.monotonic() - began < 4
        looking.join()
        assert data(seen[0][2])["live"]["ended"]
        with pytest.raises(ConnectionRefusedError):
            get(live.address)

    def test_a_comparison_goes_on_between_its_runs(self, tmp_path):
        (tmp_path / "compare.toml").write_text('[compare]\nmethods = ["a", "b"]\nseeds = [0]\n')
        write(tmp_path / "a-seed0", rounds(2))
        live = Live([tmp_path])
        assert not live.ended
        write(tmp_path / "b-seed0", rounds(2), state="running")
        assert not live.ended
        finish(tmp_path / "b-seed0")
        assert live.ended
        live.close()

    def test_a_comparison_that_was_stopped_has_ended(self, tmp_path):
        (tmp_path / "compare.toml").write_text('[compare]\nmethods = ["a", "b"]\nseeds = [0]\n')
        write(tmp_path / "a-seed0", rounds(2), state="cancelled")
        live = Live([tmp_path])
        assert live.ended
        live.close()

    def test_nobody_is_waited_for(self, going):
        with Live([going], every=60.0):
            began = time.monotonic()
        assert time.monotonic() - began < 2

    def test_an_error_of_the_run_is_not_held_up(self, going):
        live = Live([going], every=60.0).__enter__()
        get(live.address)
        began = time.monotonic()
        live.__exit__(KeyboardInterrupt)
        assert time.monotonic() - began < 2

    def test_a_port_that_is_taken(self, going):
        with socket.create_server((HOST, 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ValueError, match=rf"port {port} of 127.0.0.1 cannot be used: .*Choose another --port"):
                Live([going], port)


@pytest.fixture(scope="module")
def flags(tiny, reviews):
    words = ["--model", tiny, "--data", reviews, "--clients", 4, "--cohort", 2, "--set", "data.train_rows=40"]
    return [str(one) for one in (*words, "--set", "data.test_rows=20", "--set", "train.eval_every=2")]


class TestCommands:
    def test_watch(self, flags, tmp_path):
        """The page of a run that goes on, by the real command: its records come one by one, its end is the last."""
        words = [sys.executable, "-u", "-m", "spryfl.cli", "run", *flags, "--rounds", "40", "--watch"]
        words += ["--out", str(tmp_path), "--name", "one"]
        ran = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
        try:
            line = next(one for one in ran.stdout if one.startswith("live"))
            address = line.split()[1]
            seen, counts, ended = "", [], False
            while not ended:
                status, headers, text = get(address, seen)
                if status == 200:
                    seen, ended = headers["ETag"], data(text)["live"]["ended"]
                    counts.append(len(data(text)["lines"][0]["x"]["rounds"]))
                time.sleep(0.02)
            printed, complained = ran.communicate(timeout=60)
        finally:
            ran.kill()
        assert (ran.returncode, complained) == (0, "")
        assert counts == sorted(counts)
        assert (len(set(counts)) > 2, counts[-1]) == (True, 41)
        assert f"page    {tmp_path / 'one' / 'report.html'}" in printed
        page = (tmp_path / "one" / "report.html").read_text()
        assert data(page)["live"] is None
        assert "foretold" in page
        with pytest.raises(ConnectionRefusedError):
            get(address)

    def test_a_refused_port_comes_before_anything_else(self, flags, tmp_path, spryfl):
        with socket.create_server((HOST, 0)) as taken:
            port = taken.getsockname()[1]
            code, out, err = spryfl("run", *flags, "--watch", "--port", port, "--out", tmp_path / "r")
        assert (code, out) == (2, "")
        assert err.startswith(f"spryfl: port {port} of 127.0.0.1 cannot be used: ")
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "r").exists()

    def test_a_run_that_cannot_begin_gives_the_port_back(self, tmp_path, spryfl):
        with socket.create_server((HOST, 0)) as free:
            port = free.getsockname()[1]
        words = ("--data", tmp_path / "gone.csv", "--watch", "--port", port, "--out", tmp_path / "r")
        for _ in range(2):
            code, _, err = spryfl("run", *words)
            assert (code, "gone.csv" in err) == (2, True)

    def test_watching_from_beside(self, going, spryfl):
        threading.Timer(0.3, finish, [going]).start()
        code, out, err = spryfl("report", "--watch", going, "--no-memory")
        assert (code, err) == (0, "")
        assert re.search(r"^live    http://127\.0\.0\.1:\d+/ until the runs have ended", out, re.MULTILINE)
        assert f"page    {going / 'report.html'}" in out
        assert ">complete<" in (going / "report.html").read_text()

    def test_a_comparison_is_watched_from_beside(self, tmp_path, spryfl):
        (tmp_path / "compare.toml").write_text("")
        code, _, err = spryfl("resume", tmp_path, "--watch")
        assert (code, f"spryfl report --watch {tmp_path}" in err) == (2, True)

    def test_events_of_a_run(self, flags, tmp_path, spryfl):
        """Read back by TensorBoard's own reader: every number of the records, at its round."""
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        words = ("--rounds", 3, "--tensorboard", "--out", tmp_path, "--name", "one")
        assert spryfl("run", *flags, *words)[0] == 0
        read = accumulator.EventAccumulator(str(tmp_path / "one" / track.FOLDER)).Reload()
        records = report.read(tmp_path / "one").records
        expected = {}
        for one in records:
            for name, value in track.numbers(one).items():
                expected.setdefault(name, []).append((one["round"], pytest.approx(value, rel=1e-5)))
        tags = read.Tags()
        found = {
            tag: [(event.step, event.tensor_proto.float_val[0]) for event in read.Tensors(tag)]
            for tag in tags["tensors"]
        }
        assert {"loss", "accuracy", "bytes_up", "failed", "scalar_rms"} <= set(found)
        assert found == expected


class TestEvents:
    def test_a_library_that_is_not_there(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
        with pytest.raises(ValueError, match=r"pip install 'spryfl\[track\]'"):
            track.Events(tmp_path)

    def test_what_goes_wrong_is_said_once_and_ends_the_events_alone(self, tmp_path):
        pytest.importorskip("tensorboard")
        (tmp_path / track.FOLDER).write_text("a file where the folder should be")
        with track.Events(tmp_path) as events:
            with pytest.warns(UserWarning, match="no more TensorBoard events: .* The run goes on"):
                events.show(record(1))
            events.show(record(2))  # a second warning would be an error

    def test_numbers(self):
        one = record(
            3, cohort=[5], failed={"5": "gone"}, loss=float("nan"), best=True, alignment={"cos": 0.5, "by": {"u": 1}}
        )
        made = track.numbers(one)
        assert made["alignment/cos"] == 0.5
        assert made["alignment/by/u"] == 1
        assert made["failed"] == 1
        assert not {"loss", "best", "round", "schema", "cohort"} & set(made)
