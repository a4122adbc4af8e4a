"""Flower's real engine: its simulation on Ray, its deployment in processes that are killed, on free ports here."""

from __future__ import annotations

import functools
import json
import signal
import time

import pytest
from conftest import sentences
from federation import Federation, end
from flower_cases import BYTES, assert_same, facts, in_process, lines, records, settings
from flower_liar import LIARS
from flower_light import moved

from spryfl import api, train
from spryfl.config import parse

pytestmark = [pytest.mark.flower, pytest.mark.slow]

ROWS = ("spry", "spry_per_iteration", "fedavg", "fedsgd", "fwdllm_plus", "decomfl", "fedkseed", "fedspzo", "alone")


@pytest.fixture(scope="module")
def given(tiny, reviews):
    """A small experiment as plain values, changed."""
    return functools.partial(settings, tiny, reviews)


def small(given, name, **changes):
    """An experiment of two rounds, called `name`."""
    more = {"train": {"rounds": 2, **changes.pop("train", {})}}
    return given(name=name, flower={"wait": 600.0, **changes.pop("flower", {})}, **more, **changes)


def many(folder):
    """A folder of 2000 sentences and a test."""
    folder.mkdir()
    for name, count in (("train", 2000), ("test", 40)):
        rows = [f"{text},{label}" for text, label, _ in sentences(count, 5)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows, ""]))
    return folder


@pytest.fixture(scope="module")
def ran(given, tmp_path_factory):
    """(experiments by name, their folders' folder, the federation) of one run of many experiments."""
    folder = tmp_path_factory.mktemp("simulation")
    all_ = [small(given, name, method=name, train={"drop_clients": 0.2}) for name in ROWS]
    all_ += [small(given, lie, method="fedavg") for lie in LIARS]
    crowd = {"name": str(many(folder / "many")), "train_rows": 0, "test_rows": 20}
    thousand = {"data": crowd, "partition": {"clients": 1000}, "train": {"cohort": 50, "steps": 1}}
    all_ += [small(given, "thousand", method="decomfl", **thousand)]
    with Federation(folder / "flower", "flower_liar:client_app") as here:
        here.link("--simulation")
        run = here.submit(
            all_, folder / "runs", "--federation-config", "num-supernodes=1000 client-resources-num-cpus=1"
        )
        state = here.ended(run, 500)
    assert state == "finished:completed", here.log()
    return {one["name"]: one for one in all_}, folder, here


class TestSimulation:
    @pytest.mark.parametrize("name", ROWS)
    def test_ends_in_the_bits_of_the_run_in_process(self, name, ran, tmp_path):
        experiments, folder, _ = ran
        assert_same(folder / "runs" / name, in_process(experiments[name], tmp_path / "here"))

    def test_a_thousand_clients_fifty_a_round(self, ran, tmp_path):
        experiments, folder, _ = ran
        assert [len(record["cohort"]) for record in records(folder / "runs" / "thousand")[1:]] == [50, 50]
        assert_same(folder / "runs" / "thousand", in_process(experiments["thousand"], tmp_path / "here"))

    @pytest.mark.parametrize("name", LIARS)
    def test_lies_are_refused(self, name, ran, tmp_path):
        experiments, folder, here = ran
        one, told = experiments[name], lines(folder / "runs" / name)[2]
        everyone = train.cohort(api.prepared(parse(one)).plan, 2)
        assert {int(client): LIARS[name] in why for client, why in told["failed"].items()} == dict.fromkeys(
            everyone, True
        )
        assert told["engine"]["refused"] == len(everyone)
        assert all(f"round 2: client {client} is left out" in here.log() for client in everyone)
        absent = in_process(one, tmp_path / "here", lambda round_, client: round_ == 2)
        assert_same(folder / "runs" / name, absent, leave=("failed", *BYTES))


class TestDeployment:
    def test_ends_in_the_bits_of_the_run_in_process(self, given, tmp_path):
        """Scalars up, replay down: each node's memory of a round's values outlives its processes."""
        one = small(given, "decomfl", method="decomfl", train={"cohort": 2}, partition={"clients": 2})
        with Federation(tmp_path / "flower") as here:
            here.link()
            _ = here.node(0), here.node(1)
            state = here.ended(here.submit(one, tmp_path / "run"))
        assert state == "finished:completed", here.log()
        assert_same(tmp_path / "run", in_process(one, tmp_path / "here"))
        for engine in facts(tmp_path / "run"):
            assert engine["messages"] == 2
            assert all(engine[part] > 0 for part in ("start", "import", "load", "step", "exchange"))

    def test_a_node_killed_in_a_round_and_back_again(self, given, tmp_path):
        """The round ends by its deadline, and a later round uses the node that came back."""
        train_ = {"cohort": 2, "rounds": 6, "eval_every": 6}
        one = small(given, "killed", partition={"clients": 2}, train=train_, flower={"deadline": 28.0}, method="fedavg")
        folder = tmp_path / "run"
        with Federation(tmp_path / "flower", "flower_light:client_app") as here:
            here.link()
            _, second = here.node(0), here.node(1)
            run = here.submit(one, folder)
            here.wait_for_records(folder, 2, run)
            end(second, signal.SIGKILL)
            since = time.monotonic()
            here.wait_for_records(folder, 3, run)
            assert time.monotonic() - since < 45
            here.node(1)
            assert here.ended(run) == "finished:completed", here.log()
        failed = [record["failed"] for record in records(folder)[1:]]
        assert failed[1]["1"] == "did not answer within 28 s"  # before Flower misses the node, after 30 to 60 s
        assert any("1" not in why for why in failed[2:])  # it is used again
        lost = {(r, int(client)) for r, why in enumerate(failed, 1) for client in why}
        here_too = in_process(one, tmp_path / "here", lambda r, c: (r, c) in lost, moved)
        assert_same(folder, here_too, leave=("failed", *BYTES))

    def test_a_superlink_killed_and_the_run_resumed(self, given, tmp_path):
        """With a database the SuperLink knows its nodes again, and they never end."""
        one = small(given, "resumed", method="decomfl", train={"cohort": 2, "rounds": 3})
        folder = tmp_path / "run"
        with Federation(tmp_path / "flower") as here:
            database = ("--database", tmp_path / "link.db")
            link, nodes = here.link(*database), (here.node(0), here.node(1))
            run = here.submit(one, folder)
            here.wait_for_records(folder, 2, run)
            end(link, signal.SIGKILL)
            end(run, signal.SIGKILL)
            assert json.loads((folder / "run.json").read_text())["state"] == "running"
            here.link(*database)
            assert here.ended(here.submit(one, folder, resume=True)) == "finished:completed", here.log()
            assert [node.poll() for node in nodes] == [None, None]
        assert_same(folder, in_process(one, tmp_path / "here"), leave=BYTES)
