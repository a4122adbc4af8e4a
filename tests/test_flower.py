"""The engine over Flower's Grid, without its processes: equality with the run in process, faults, lies, sites' data."""

from __future__ import annotations

import csv
import functools
import json
import logging
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from flower_cases import (
    BYTES,
    LIES,
    assert_same,
    facts,
    in_process,
    lines,
    lying,
    over_flower,
    records,
    settings,
    swapped,
)
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from grids import RUN, HereGrid, InMemoryHere

from spryfl import api, packing, plan, train, wire
from spryfl.config import parse
from spryfl.engines import flower_client, flower_grid, flower_server
from spryfl.engines.flower import client_app
from spryfl.engines.flower_letters import letter, opened
from spryfl.methods import METHODS

UNEQUAL = [
    {"name": "strong", "share": 0.25, "estimator": "backprop"},
    {"name": "middle", "share": 0.25, "estimator": {"kind": "forward", "directions": 2, "exact_top": 1}},
    {"name": "weak", "share": 0.5, "estimator": "forward", "assignment": "few", "head": "exact", "lr": 0.3},
]
QUICK = ("spry", "fedavg", "decomfl", "fedkseed")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(flower_grid, "_POLL", {True: 0.001, False: 0.001})


@pytest.fixture
def given(tiny, reviews):
    """A small experiment as plain values; `given(method="fedavg", train={...})` changes it."""
    return functools.partial(settings, tiny, reviews)


class TestEquality:
    @pytest.mark.parametrize(
        "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
    )
    def test_every_method_ends_in_the_bits_of_the_run_in_process(self, name, given, tmp_path):
        one = given(method=name, train={"drop_clients": 0.2})
        over_flower(one, tmp_path / "flower")
        assert_same(tmp_path / "flower", in_process(one, tmp_path / "here"))
        assert facts(tmp_path / "flower")[0]["messages"] > 0

    @pytest.mark.parametrize("changes", [
        {"method": {"name": "spry", "head": "exact"}},
        {"method": {"name": "decomfl", "head": "exact", "exchange": "scalars"}},
        {"method": "spry_per_iteration", "train": {"steps": 0, "epochs": 2}},
        {"method": "fedkseed", "partition": {"split": "dirichlet"}, "data": {"train_rows": 0}},
        {"method": {"name": "fedavg", "classes": UNEQUAL, "aggregate": {"weigh": "variance"}}},
        {"method": {"name": "fedavg", "classes": UNEQUAL, "exchange": "scalars"}},
        {"method": {"name": "fedavg", "exchange": "scalars", "aggregate": {"weigh": "variance"}, "classes": [
            {"name": "small", "share": 0.5, "estimator": "forward", "assignment": "few", "lr": 0.5, "micro_batch": 2},
        ]}},
    ])  # fmt: skip
    def test_and_other_choices(self, changes, given, tmp_path):
        over_flower(given(**changes), tmp_path / "flower")
        assert_same(tmp_path / "flower", in_process(given(**changes), tmp_path / "here"))

    def test_what_fits_a_class_is_chosen_by_the_server_alone(self, given, tmp_path, monkeypatch):
        small = {"name": "small", "share": 0.5, "memory": "3GB"}
        one = given(method={"name": "fedavg", "classes": [small]})
        asked, real = [], plan.fitting
        monkeypatch.setattr(plan, "fitting", lambda *given, **more: asked.append(given[0]) or real(*given, **more))
        here = in_process(one, tmp_path / "here")
        chosen = len(asked)
        over_flower(one, tmp_path / "flower")
        assert chosen > 0
        assert len(asked) == 2 * chosen
        assert_same(tmp_path / "flower", here)

    def test_many_clients_sit_on_few_nodes(self, given, tmp_path):
        one = given(partition={"clients": 12}, train={"cohort": 6})
        grid = over_flower(one, tmp_path / "flower", {5: {}})
        assert {message.metadata.dst_node_id for message in grid.sent} == {5}
        assert_same(tmp_path / "flower", in_process(one, tmp_path / "here"))

    def test_several_experiments_in_one_run(self, given, tmp_path):
        two = [given(name="a", method="fedavg"), given(name="b", method="decomfl", seed=3)]
        over_flower(two, tmp_path / "flower")
        for one in two:
            assert_same(tmp_path / "flower" / one["name"], in_process(one, tmp_path / one["name"]))

    def test_what_flower_carries_is_counted_beside_our_bytes(self, given, tmp_path):
        grid = over_flower(given(), tmp_path / "flower")
        whole = lines(tmp_path / "flower")
        counted = sum(record["engine"]["flower_bytes_down"] for record in whole if "engine" in record)
        bodies = [opened(message.content)[0] for message in grid.sent]
        assert whole[-1]["bytes_down"] == sum(map(len, bodies)) < counted
        assert all(0 < record["engine"]["step"] <= record["seconds"] for record in whole[1:])


class TestSimulated:
    @pytest.mark.parametrize("name", ["decomfl", "fedkseed", "fedavg"])
    def test_one_copy_of_the_values_serves_all_clients(self, name, given, tmp_path, monkeypatch):
        """What a simulation holds does not grow with its clients: no node keeps anything, one file is for all."""
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        held = []

        class Watching(InMemoryHere):
            def pull_messages(self, message_ids):
                held.append(sorted(tmp_path.glob("*.held")))
                return super().pull_messages(message_ids)

        changes = {"seeds": {"size": 8}} if name == "fedkseed" else {}
        one = given(method={"name": name, **changes}, partition={"clients": 20}, train={"cohort": 10, "rounds": 4})
        config = {"experiment": json.dumps(one), "folder": str(tmp_path / "flower")}
        grid = Watching({i: {"partition-id": i, "num-partitions": 20} for i in range(20)}, config)
        flower_server.serve(grid, Context(RUN, 1, {}, RecordDict(), config))
        assert max(map(len, held)) == (name != "fedavg")
        assert list(tmp_path.glob("*.held")) == []
        assert all(not context.state for context in grid.contexts.values())
        assert not any(message.metadata.message_type.startswith("query") for message in grid.sent)
        assert_same(tmp_path / "flower", in_process(one, tmp_path / "here"))

    def test_a_process_that_was_not_there_reads_the_file(self, given, tmp_path, monkeypatch):
        """Ray's processes take clients as they come: one that did not see the last round goes on from the file."""
        from spryfl.engines import flower_client

        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        one = given(method="decomfl", train={"rounds": 4})
        config = {"experiment": json.dumps(one), "folder": str(tmp_path / "flower")}

        class Forgetful(InMemoryHere):
            def _pushed(self, message):
                flower_client._held.clear()
                return super()._pushed(message)

        grid = Forgetful({i: {} for i in range(5)}, config)
        flower_server.serve(grid, Context(RUN, 1, {}, RecordDict(), config))
        assert len(grid.sent) == 4 * 3
        assert_same(tmp_path / "flower", in_process(one, tmp_path / "here"))


class TestResume:
    @pytest.mark.parametrize("name", ["spry", "decomfl", "fedkseed"])
    def test_a_run_that_was_cut_off_ends_in_the_same_bits(self, name, given, tmp_path, monkeypatch):
        one = given(method=name, train={"rounds": 4})
        calls = iter(range(100))
        whole = train.one_round

        def cut(*args):
            if next(calls) == 2:
                raise RuntimeError("the server is gone")
            return whole(*args)

        monkeypatch.setattr(train, "one_round", cut)
        with pytest.raises(RuntimeError, match="gone"):
            over_flower(one, tmp_path / "flower")
        monkeypatch.setattr(train, "one_round", whole)
        over_flower(one, tmp_path / "flower", resume=True)
        assert_same(tmp_path / "flower", in_process(one, tmp_path / "here"), leave=BYTES)

    def test_a_folder_that_is_there_is_not_touched_without_it(self, given, tmp_path):
        over_flower(given(), tmp_path / "flower")
        with pytest.raises(ValueError, match="is there already"):
            over_flower(given(), tmp_path / "flower")

    @pytest.mark.parametrize("name", ["decomfl", "fedkseed", "fedspzo"])
    def test_a_client_whose_memory_is_lost_is_sent_the_values(self, name, given, tmp_path):
        changes = {"seeds": {"size": 8}} if name == "fedkseed" else {}
        one = given(method={"name": name, **changes}, train={"rounds": 5}, partition={"clients": 3})
        grid = over_flower(one, tmp_path / "flower", {5: {}}, forgetful=True)
        kept = over_flower(one, tmp_path / "kept", {5: {}})
        assert len(grid.sent) > len(kept.sent)
        assert_same(tmp_path / "kept", in_process(one, tmp_path / "here"))
        assert_same(tmp_path / "flower", tmp_path / "here", leave=BYTES)


@pytest.fixture(scope="module")
def absent(tmp_path_factory):
    """(a client of round 2, the folder of the run in process in which it was absent then) of an experiment."""
    made = {}

    def run(one):
        name = one["method"]
        if name not in made:
            liar = train.cohort(api.prepared(parse(one)).plan, 2)[1]
            folder = tmp_path_factory.mktemp("absent") / name
            made[name] = liar, in_process(one, folder, lambda r, c: (r, c) == (2, liar))
        return made[name]

    return run


class TestLies:
    @pytest.mark.parametrize("lie", LIES)
    def test_a_lie_is_refused_counted_and_named(self, lie, given, absent, tmp_path, caplog):
        one = given(method="fedavg")
        liar, here = absent(one)
        with caplog.at_level(logging.WARNING, "flwr"):
            over_flower(one, tmp_path / "flower", app=lying(LIES[lie], liar))
        why = records(tmp_path / "flower")[2]["failed"][str(liar)]
        assert lie in why
        assert [engine["refused"] for engine in facts(tmp_path / "flower")] == [0, 1, 0]
        assert f"round 2: client {liar} is left out: {why}" in caplog.text
        assert_same(tmp_path / "flower", here, leave=("failed", *BYTES))

    def test_another_clients_units(self, given, absent, tmp_path):
        one = given(method="spry")
        liar, here = absent(one)
        over_flower(one, tmp_path / "flower", app=lying(swapped, liar))
        assert "other names" in records(tmp_path / "flower")[2]["failed"][str(liar)]
        assert_same(tmp_path / "flower", here, leave=("failed", *BYTES))

    TRACES: ClassVar = {
        "scalars that are not finite": lambda t: t._replace(scalars=t.scalars * float("inf")),
        "seeds of its own": lambda t: t._replace(seeds=torch.arange(len(t.scalars))),
        "scalars of 1 steps": lambda t: t._replace(steps=t.steps[:1]),
        "not its own": lambda t: t._replace(layouts=(((((99,), "gaussian", 10),)),)),
        "unknown distribution": lambda t: t._replace(layouts=((((), "uniform", 10),),)),
        "scalars for": lambda t: t._replace(scalars=t.scalars[:-1]),
        "a trace that is none": lambda t: t._replace(scalars=t.scalars.double()),
    }

    @pytest.mark.parametrize("lie", TRACES)
    def test_lies_in_scalars(self, lie, given, absent, tmp_path):
        one, change = given(method="decomfl"), self.TRACES[lie]
        liar, here = absent(one)
        app = lying(lambda u: u._replace(trace=change(u.trace)), liar)
        over_flower(one, tmp_path / "flower", app=app)
        assert lie in records(tmp_path / "flower")[2]["failed"][str(liar)]
        assert_same(tmp_path / "flower", here, leave=("failed", *BYTES))

    def test_values_where_scalars_were_asked_for(self, given, absent, tmp_path):
        one = given(method="decomfl")
        (liar, _), like = absent(one), api.prepared(parse(one)).model.params
        name = next(iter(like))
        app = lying(lambda u: u._replace(params={name: like[name]}), liar)
        over_flower(one, tmp_path / "flower", app=app)
        assert "values where scalars" in records(tmp_path / "flower")[2]["failed"][str(liar)]

    def test_a_client_that_fails_says_why(self, given, tmp_path):
        app = ClientApp()
        app.query("hello")(lambda message, context: client_app(message, context))

        @app.train("round")
        def answer(message, context):
            message.content = letter(b"cut short", {})
            return client_app(message, context)

        with pytest.raises(ValueError, match="too few clients answered, 0 of 3") as error:
            over_flower(given(train={"min_answers": 0.5}), tmp_path / "flower", app=app)
        assert "KeyError" in str(error.value) or "container" in str(error.value) or "which" in str(error.value)


class TestDeadline:
    def test_what_comes_after_it_is_dropped_and_counted(self, given, tmp_path, caplog):
        one = given(flower={"deadline": 0.5})
        late = train.cohort(api.prepared(parse(one)).plan, 1)[0]

        def delay(message):
            body, _ = opened(message.content)
            told = wire.decode(body) if body else None
            return 3 if told is not None and (told.round, told.client) == (1, late) else 0

        with caplog.at_level(logging.WARNING, "flwr"):
            over_flower(one, tmp_path / "flower", delay=delay)
        assert records(tmp_path / "flower")[1]["failed"] == {str(late): "did not answer within 0.5 s"}
        assert sum(engine["late"] for engine in facts(tmp_path / "flower")) == 1
        assert f"client {late} answered after the deadline" in caplog.text
        here = in_process(one, tmp_path / "here", lambda r, c: (r, c) == (1, late))
        assert_same(tmp_path / "flower", here, leave=("failed", *BYTES))

    def test_a_node_that_is_gone_costs_nothing(self, given, tmp_path):
        one = given(flower={"deadline": 60.0})
        nodes = {5: {"partition-id": 0}, 6: {"partition-id": 1}}
        config = {"experiment": json.dumps(one), "folder": str(tmp_path / "flower")}
        grid = HereGrid(nodes, config)
        grid.delay = lambda message: self._leaves(grid, message)
        flower_server.serve(grid, Context(RUN, 1, {}, RecordDict(), config))
        last = [message.metadata.dst_node_id for message in grid.sent[-3:]]
        assert set(last) == {6}
        assert_same(tmp_path / "flower", in_process(one, tmp_path / "here"))

    def test_a_node_that_comes_back_under_another_id_takes_its_place(self, given, tmp_path):
        one = given(flower={"deadline": 0.5}, partition={"clients": 2}, train={"cohort": 2})
        config = {"experiment": json.dumps(one), "folder": str(tmp_path / "flower")}
        grid = HereGrid({5: {"partition-id": 0}, 6: {"partition-id": 1}}, config)

        def delay(message):
            if message.metadata.group_id == "1":  # from now on the old node is deaf, though it is still listed
                grid.contexts[9] = Context(RUN, 9, {"partition-id": 1}, RecordDict(), dict(config))
            return 10**9 if message.metadata.dst_node_id == 6 and message.metadata.group_id not in ("", "1") else 0

        grid.delay = delay
        flower_server.serve(grid, Context(RUN, 1, {}, RecordDict(), config))
        seen = [(message.metadata.group_id, message.metadata.dst_node_id) for message in grid.sent]
        assert set(seen) == {("", 5), ("", 6), ("1", 5), ("1", 6), ("", 9), ("2", 5), ("2", 9), ("3", 5), ("3", 9)}
        assert_same(tmp_path / "flower", in_process(one, tmp_path / "here"))

    def test_a_node_that_never_answers_its_greeting_holds_up_nobody(self, given, tmp_path):
        one = given(flower={"nodes": 1, "deadline": 60.0})
        config = {"experiment": json.dumps(one), "folder": str(tmp_path / "flower")}
        grid = HereGrid({5: {}, 6: {}}, config)
        grid.delay = lambda message: 10**9 if message.metadata.dst_node_id == 6 else 0
        flower_server.serve(grid, Context(RUN, 1, {}, RecordDict(), config))
        assert [message.metadata.dst_node_id for message in grid.sent].count(6) == 1
        assert_same(tmp_path / "flower", in_process(one, tmp_path / "here"))

    def _leaves(self, grid, message):
        if message.metadata.group_id == "2" and len(grid.contexts) == 2:
            gone = grid.contexts.pop(5)
            grid.get_node_ids = lambda: [6]
            grid.contexts[5] = gone
        return 0


@pytest.fixture
def three(given, tmp_path, reviews):
    """Three sites with a file each, and the experiment whose folder holds all of their rows."""
    names, folder = ("a", "b", "c"), tmp_path / "all"
    folder.mkdir()
    with open(reviews / "train.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:60]
    share = {"a": rows[:30], "b": rows[30:50], "c": rows[50:]}  # the largest is client 0, as the partition has it
    _write(folder / "train.csv", [{**row, "site": name} for name in names for row in share[name]])
    (folder / "test.csv").write_text((reviews / "test.csv").read_text())
    files = {name: tmp_path / f"{name}.csv" for name in names}
    for name in names:
        _write(files[name], [{"text": row["text"], "label": row["label"]} for row in share[name]])
    one = given(
        data={"name": str(folder), "train_rows": 0, "group": "site"},
        partition={"clients": 3, "split": "natural"},
        train={"cohort": 2},
    )
    nodes = {20 + i: {"partition-id": i, "data": str(files[name])} for i, name in enumerate(names)}
    return one, nodes, files


def _write(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


class TestSites:
    @pytest.mark.parametrize("name", ["spry", "decomfl", "fedavg"])
    def test_files_of_their_own_give_the_bits_of_one_folder(self, name, three, tmp_path):
        one, nodes, _ = three
        one["method"] = name
        here = in_process(one, tmp_path / "here")
        poor = {**one, "data": {**one["data"], "name": str(_few(one, tmp_path))}}
        over_flower(poor, tmp_path / "flower", nodes)
        assert_same(tmp_path / "flower", here)

    def test_counts_of_classes_stay_unless_the_site_lets_them_go(self, three, tmp_path):
        one, nodes, _ = three
        nodes[20]["counts"] = True
        over_flower(one, tmp_path / "flower", nodes)
        said = json.loads((tmp_path / "flower" / "run.json").read_text())["flower"]["nodes"]
        assert [sorted(node) for node in said[1:]] == [sorted({*said[0]} - {"counts"})] * 2
        assert sum(said[0]["counts"]) == 30
        assert [node["examples"] for node in said] == [24, 16, 8]

    @pytest.mark.parametrize(("damage", "said"), [
        ([{"words": "SECRET", "mark": "SECRET"}], "has not the columns"),
        ([{"text": "SECRET words", "label": "SECRET"}], "holds rows that do not fit"),
        (None, "is not there"),
    ])  # fmt: skip
    def test_a_file_that_does_not_fit_is_said_without_a_word_of_it(self, damage, said, three, tmp_path, caplog):
        one, nodes, files = three
        if damage:
            _write(files["b"], damage)
        else:
            files["b"].unlink()
        with pytest.raises(ValueError, match=said) as error:
            over_flower(one, tmp_path / "flower", nodes)
        assert "node 21" in str(error.value)
        assert "SECRET" not in str(error.value)
        assert not (tmp_path / "flower").exists()

    def test_an_error_in_a_step_quotes_no_data(self, three, tmp_path, monkeypatch):
        one, nodes, _ = three
        monkeypatch.setattr("spryfl.client.run", lambda *args: {}["SECRET"])
        over_flower(one, tmp_path / "flower", nodes)
        failed = [why for record in records(tmp_path / "flower")[1:] for why in record["failed"].values()]
        assert set(failed) == {"KeyError; the log of that node says more"}

    @pytest.mark.parametrize(("config", "said"), [
        ({}, "its partition-id is missing"),
        ({"partition-id": 3}, "its partition-id is 3"),
        ({"partition-id": "two"}, "partition-id='two'"),
    ])  # fmt: skip
    def test_a_site_says_which_client_it_is(self, config, said, three, tmp_path):
        one, nodes, files = three
        nodes[22] = {"data": str(files["c"]), **config}
        with pytest.raises(ValueError, match=said):
            over_flower(one, tmp_path / "flower", nodes)

    def test_all_sites_are_waited_for(self, three, tmp_path):
        one, nodes, _ = three
        del nodes[22]
        one["flower"] = {"wait": 0.5}
        with pytest.raises(ValueError, match="2 of 3 nodes have answered"):
            over_flower(one, tmp_path / "flower", nodes)

    def test_another_model_is_turned_away(self, three, tiny, tmp_path):
        from transformers import BertModel

        one, nodes, _ = three
        other = tmp_path / "other"
        for file in Path(tiny).iterdir():
            other.mkdir(exist_ok=True)
            (other / file.name).write_bytes(file.read_bytes())
        model = BertModel.from_pretrained(tiny)
        model.embeddings.word_embeddings.weight.data += 1e-3
        model.save_pretrained(other)
        nodes[21]["model"] = str(other)
        with pytest.raises(ValueError, match="its frozen model is another"):
            over_flower(one, tmp_path / "flower", nodes)

    def test_a_site_of_a_streaming_class_never_opens_the_whole_model(self, three, tiny, tmp_path, monkeypatch):
        one, nodes, _ = three
        packing.pack(str(tiny), tmp_path / "packed", precision="float32")
        one["model"] = {"name": str(tmp_path / "packed")}
        one["method"] = {"name": "fedavg", "classes": [{"name": "small", "clients": [1], "stream": True}]}
        here = in_process(one, tmp_path / "here")
        opened_, real = [], flower_client.opened_model
        flower_client._cached.clear()
        flower_client._jobs.clear()
        monkeypatch.setattr(
            flower_client, "opened_model", lambda e, labels: opened_.append(e.model.stream) or real(e, labels)
        )
        over_flower(one, tmp_path / "flower", nodes)
        assert opened_ == [True] * 3 + [False, True, False]  # to be looked at once; then each site to train
        assert_same(tmp_path / "flower", here)

    def test_what_needs_all_rows_is_refused(self, three, tmp_path):
        one, nodes, _ = three
        with pytest.raises(ValueError, match="needs all rows in one place"):
            over_flower({**one, "method": "pooled"}, tmp_path / "flower", nodes)


def _few(one, tmp_path):
    """What a server has of its own: a row a class, and the test."""
    folder = tmp_path / "server"
    folder.mkdir()
    _write(folder / "train.csv", [{"text": f"a {w} day", "label": w, "site": "none"} for w in ("bad", "good")])
    (folder / "test.csv").write_text((Path(one["data"]["name"]) / "test.csv").read_text())
    return folder
