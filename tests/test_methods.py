"""Every row of the table of methods, end to end on a tiny model; what sets some of them apart; and `finetune`."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from conftest import sentences
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import spryfl
from spryfl import api, job, models, noise, tasks
from spryfl.config import parse
from spryfl.methods import METHODS, build
from spryfl.train import TIMED

PROMISED = {"round", "cohort", "failed", "loss", "best", "best_round", "bytes_down", "bytes_up", "seconds"}
PROMISED |= {"value_passes", "tangent_passes", "backward_passes", "peak_bytes", "accuracy", "test_loss"}
LABELS = ("bad", "good")


@pytest.fixture
def settings(tiny, reviews):
    """A small experiment as nested values; `settings(method="fedavg", train={...})` changes it."""

    def make(**changes):
        base = {
            "model": {"name": str(tiny)},
            "data": {"name": str(reviews), "train_rows": 40, "test_rows": 20},
            "partition": {"clients": 4, "held_out": 0.2},
            "train": {"rounds": 1, "cohort": 2, "steps": 3},
        }
        return {**base, **{k: {**base.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}}

    return make


def ran(given):
    """(the job, its records, its final values) of an experiment."""
    made = api.prepared(parse(given))
    _, state, progress = job.begin(made, None)
    kept = list(job.run(made, None, state, progress))
    return made, [record for record, _ in kept], kept[-1][1].params


def untimed(records):
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", METHODS)
class TestEveryRow:
    def test_it_runs_and_records_what_is_promised(self, name, settings):
        made, records, final = ran(settings(method=name))
        assert [record["round"] for record in records] == [0, 1]
        assert set(records[1]) >= PROMISED
        assert {"personal_before", "personal_after"} <= set(records[1])
        assert records[1]["bytes_up"] > 0
        assert records[1]["peak_bytes"] > 0
        start = made.model.params
        moved = {
            n.partition("/")[2] or n for n, v in final.items() if not torch.equal(v, start[n.partition("/")[2] or n])
        }
        assert moved
        if made.experiment.method.gate:
            assert set(records[1]["variance"]) == {str(client) for client in records[1]["cohort"]}
            assert all(value > 0 for value in records[1]["variance"].values())
            assert records[1]["gated"] == []
        assert all(bool(torch.isfinite(value).all()) for value in final.values())

    def test_the_same_seed_is_the_same_run(self, name, settings):
        state = torch.get_rng_state()
        (_, one, a), (_, two, b) = ran(settings(method=name, seed=3)), ran(settings(method=name, seed=3))
        assert untimed(one) == untimed(two)
        assert equal(a, b)
        assert torch.equal(torch.get_rng_state(), state)
        assert not equal(a, ran(settings(method=name, seed=4))[2])


@pytest.mark.parametrize("name", [name for name in METHODS if f"{name}_checkpointed" in METHODS])
@pytest.mark.parametrize("dropout", [False, True])
def test_checkpointing_changes_memory_alone(name, dropout, settings):
    (_, _, plain), (_, again, checkpointed) = (
        ran(settings(method=one, train={"dropout": dropout})) for one in (name, f"{name}_checkpointed")
    )
    assert equal(plain, checkpointed)
    assert again[1]["backward_passes"] > 0


def test_dropout_is_an_option_that_does_something(settings):
    assert not equal(*(ran(settings(method="fedavg", train={"dropout": on}))[2] for on in (False, True)))


def test_fedavg_of_one_client_and_one_step_is_adamw(settings):
    """One local batch on one client, the server's mean of one: torch's own step on autograd's gradient."""
    given = settings(
        method={"name": "fedavg", "local_optimizer": {"lr": 0.01, "weight_decay": 0.1}},
        partition={"clients": 1, "held_out": 0.0},
        train={"steps": 1, "cohort": 1, "batch_size": 64},
    )
    made, _, final = ran(given)
    leaves = {name: value.clone().requires_grad_() for name, value in made.model.params.items()}
    batch = tasks.collate(made.rows, made.parts[0])
    assert len(batch["labels"]) == 40
    optimizer = torch.optim.AdamW(leaves.values(), lr=0.01, weight_decay=0.1)
    models.loss_fn(made.model, {})(leaves, batch).backward()
    optimizer.step()
    for name, value in leaves.items():
        torch.testing.assert_close(final[name], value.detach(), rtol=1e-3, atol=1e-5)


def test_the_mean_is_weighted_by_examples(settings):
    """Two clients of unequal size that share nothing but the start."""
    given = settings(
        method={"name": "fedavg", "local_optimizer": {"kind": "sgd", "lr": 0.1}},
        partition={"clients": 2, "held_out": 0.0, "split": {"kind": "natural"}},
        train={"steps": 1, "batch_size": 64},
        data={"group": "label", "train_rows": 0},
    )
    made, _, final = ran(given)
    sizes, steps = [len(part) for part in made.parts], []
    assert sizes[0] != sizes[1]
    for client, part in enumerate(made.parts):
        order = noise.child_seed(noise.child_seed(made.plan.seed, "round", 1, "client", client), "order")
        chosen = next(tasks.shuffled(part, 64, order, 0, 1))
        leaves = {name: value.clone().requires_grad_() for name, value in made.model.params.items()}
        models.loss_fn(made.model, {})(leaves, tasks.collate(made.rows, chosen)).backward()
        steps.append({name: value.detach() - 0.1 * value.grad for name, value in leaves.items()})
    for name, value in final.items():
        mean = (sizes[0] * steps[0][name] + sizes[1] * steps[1][name]) / sum(sizes)
        torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-6)


def test_alone_keeps_clients_apart(settings):
    """Each has a model of its own, and only those of the round's clients move."""
    made, records, final = ran(settings(method="alone"))
    start, cohort = made.model.params, records[1]["cohort"]
    for client in range(4):
        own = {name: final[f"client {client}/{name}"] for name in start}
        assert equal(own, start) is (client not in cohort)


def test_pooled_is_one_client_with_all_rows(settings):
    made, records, _ = ran(settings(method="pooled"))
    assert (made.plan.clients, made.plan.cohort, len(made.parts)) == (1, 1, 1)
    assert sorted(made.parts[0] + made.held[0]) == list(range(40))
    assert records[1]["cohort"] == [0]
    federated = ran(settings(method="fedavg"))[1]
    assert abs(records[1]["backward_passes"] - federated[1]["backward_passes"]) <= 2


def test_head_only_moves_the_head_alone(settings):
    made, _, final = ran(settings(method="head_only"))
    for unit in made.model.units:
        for name in unit.params:
            assert torch.equal(final[name], made.model.params[name]) is not unit.head


def test_a_split_deals_every_unit_to_one_client(settings):
    made = api.prepared(parse(settings(method={"name": "fedavg_split", "head": "split"})))
    dealt = [job.server.deal(made.plan.units, (0, 1), build(made.experiment.method), 1)[c] for c in (0, 1)]
    assert not set(dealt[0]) & set(dealt[1])
    assert set(dealt[0]) | set(dealt[1]) == set(made.plan.units)


FEW = {"partition": {"clients": 4}, "train": {"rounds": 2, "cohort": 2}}


class TestFinetune:
    def module(self, tiny):
        return AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=2), AutoTokenizer.from_pretrained(
            tiny
        )

    def rows(self, count=40, seed=1):
        return datasets.Dataset.from_list([{"text": t, "label": y} for t, y, _ in sentences(count, seed)])

    def test_a_module_and_a_data_set(self, tiny, tmp_path):
        module, tokenizer = self.module(tiny)
        seen = []
        history = spryfl.finetune(
            module,
            self.rows(),
            tokenizer=tokenizer,
            method="fedavg",
            folder=tmp_path / "run",
            on_record=seen.append,
            **FEW,
        )
        assert seen == history.records
        assert [record["round"] for record in seen] == [0, 1, 2]
        assert history.model.labels == LABELS
        carried = dict(history.model.module.named_parameters())
        assert all(torch.equal(carried[name], value) for name, value in history.params.items())
        assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "complete"

    def test_train_and_test_sets(self, tiny):
        module, tokenizer = self.module(tiny)
        history = spryfl.finetune(
            module, (self.rows(), self.rows(16, 2)), tokenizer=tokenizer, method=spryfl.methods.spry(), **FEW
        )
        assert 0 <= history.records[-1]["accuracy"] <= 1
        assert history.records[-1]["accuracy"] * 16 % 1 == 0

    def test_an_experiment_and_names_are_the_same(self, settings, tiny, reviews):
        given = settings(method="fedavg")
        one = spryfl.finetune(spryfl.Experiment(**given))
        rest = {key: value for key, value in given.items() if key not in ("model", "data")}
        rest["reading"] = {key: value for key, value in given["data"].items() if key != "name"}
        two = spryfl.finetune(tiny, reviews, **rest)
        three = spryfl.finetune({"name": str(tiny)}, reviews, **rest)
        assert equal(one.params, two.params)
        assert equal(one.params, three.params)
        assert untimed(one.records) == untimed(two.records)

    def test_how_data_in_memory_are_read(self, tiny):
        module, tokenizer = self.module(tiny)
        rows = self.rows().rename_columns({"text": "said", "label": "stars"})
        reading = {"text": "said", "label": "stars", "max_length": 5}
        history = spryfl.finetune(module, rows, tokenizer=tokenizer, reading=reading, method="head_only", **FEW)
        assert history.model.labels == LABELS

    @pytest.mark.parametrize("beside", [{"data": "a.csv"}, {"method": "spry"}, {"tokenizer": 1}, {"seed": 3}])
    def test_nothing_stands_beside_an_experiment(self, beside):
        with pytest.raises(ValueError, match="change the Experiment"):
            spryfl.finetune(spryfl.Experiment(), **beside)

    def test_mistakes(self, tiny):
        module, tokenizer = self.module(tiny)
        with pytest.raises(ValueError, match="needs its tokenizer"):
            spryfl.finetune(module, self.rows())
        with pytest.raises(ValueError, match="needs its tokenizer"):
            spryfl.finetune(str(tiny), self.rows(), tokenizer=tokenizer)
        with pytest.raises(ValueError, match="model is a int"):
            spryfl.finetune(3, self.rows())
        three = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3)
        with pytest.raises(ValueError, match="num_labels=2"):
            spryfl.finetune(three, self.rows(), tokenizer=tokenizer, **FEW)
        with pytest.raises(ValueError, match="did you mean rounds"):
            spryfl.finetune(tiny, self.rows(), train={"round": 2})
