"""Predicted cost against counted cost: passes, operations, bytes, for every estimator and every row of the table."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from test_methods import settings  # noqa: F401  (a fixture)
from toy import Toy, problem
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
)

from spryfl import adapters, api, costs, explain, job, models, server, train
from spryfl.config import parse
from spryfl.costs import PREDICTED, counted_flops, header, passes, predictor, shapes, step_flops
from spryfl.costs.flops import value
from spryfl.costs.traffic import run
from spryfl.estimators import ESTIMATORS
from spryfl.loss import ModelLoss
from spryfl.methods import METHODS, Method
from spryfl.types import Passes, Unit

# Every registered kind at several options. A kind without a line here fails `test_every_kind_is_tried`.
TRIED = {
    "backprop": [{}, {"checkpoint": True}],
    "forward": [
        {},
        {"directions": 3},
        {"directions": 5, "chunk": 2},
        {"directions": 3, "exact_head": True},
        {"directions": 4, "exact_top": 1},
        {"directions": 4, "exact_top": 1, "checkpoint": True, "chunk": 3},
        {"directions": 2, "exact_top": -1},
    ],
    "central_difference": [{}, {"directions": 3}, {"directions": 2, "exact_head": True}],
    "forward_difference": [{}, {"directions": 3}, {"directions": 2, "exact_head": True}],
    "two_block": [
        {"pairing": pairing, "scheme": scheme, "top": top, "p1": 2, "p2": 3}
        for pairing, scheme, top in itertools.product(("joint", "decoupled"), ("central", "forward", "jvp"), (0, 1, -1))
    ],
}
CASES = [(kind, options) for kind in ESTIMATORS for options in TRIED.get(kind, [])]


def named(case):
    kind, options = case
    return f"{kind}({', '.join(f'{k}={v}' for k, v in options.items())})"


def made(kind, options):
    return ESTIMATORS[kind](**options), predictor(kind, options)


def test_every_kind_is_predicted_and_tried():
    assert set(ESTIMATORS) <= set(PREDICTED)
    assert set(ESTIMATORS) <= set(TRIED)


# Networks ----------------------------------------------------------------------------------------------------------


def small(config, rank=2):
    """A random model of that configuration with LoRA everywhere PEFT puts it, and its parts."""
    base = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    base.config.pad_token_id, base.config.use_cache = 0, False
    return adapters.wrap(base, adapters.lora(r=rank))


BERT = BertConfig(
    vocab_size=50,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=160,
    num_labels=3,
)
NETWORKS = {
    "bert": BERT,
    "roberta": RobertaConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        num_labels=4,
    ),
    "gpt2": GPT2Config(vocab_size=50, n_embd=64, n_layer=4, n_head=4, n_positions=64, num_labels=2),
    "llama": LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        num_labels=3,
    ),
}
ROWS, TOKENS = 3, 24


@pytest.fixture(scope="module")
def networks():
    return {name: small(config) for name, config in NETWORKS.items()}


def loss_and_batch(adapted):
    head = frozenset(name for unit in adapted.units if unit.head for name in unit.params)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (ROWS, TOKENS), generator=g)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0])}
    return ModelLoss(adapted.module, head, {}), batch


def moved(units, late):
    """All units, or those of the last blocks and the head."""
    return [unit for unit in units if unit.head or (costs.shapes and _place(unit) >= late)]


def _place(unit):
    return int(next(part for part in unit.name.split(".") if part.isdigit()))


def estimated(adapted, kind, options, mine):
    """(the estimate, operations counted, its prediction, the shapes)."""
    loss_fn, batch = loss_and_batch(adapted)
    fixed = {n: v for unit in adapted.units if unit not in mine for n, v in _values(adapted, unit).items()}
    loss_fn = dataclasses.replace(loss_fn, fixed=fixed)
    params = {n: v for unit in mine for n, v in _values(adapted, unit).items()}
    estimator, predict = made(kind, options)
    if options.get("exact_top") or options.get("top"):
        loss_fn.cut(batch, top=1)  # finding the blocks takes a pass of one row, once a model
    with counted_flops() as flops:
        estimate = estimator(loss_fn, params, batch, 5)
    given = models.shapes_of(adapted.module, adapted.units, ROWS, TOKENS)
    return estimate, flops(), predict(given, mine), given


def _values(adapted, unit):
    return {name: adapted.params[name] for name in unit.params}


# Passes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=named)
@pytest.mark.parametrize("mine", [("a", "b", "head"), ("a",), ("b", "head"), ("head",)], ids="+".join)
def test_predicted_passes_are_counted_passes_on_the_toy(case, mine):
    params, batch = problem(dtype=torch.float32)
    names = {"a": ("a",), "b": ("b",), "head": ("head.weight", "head.bias")}
    units = [
        Unit(f"layer.{i}", names[n], sum(params[p].numel() for p in names[n]), head=n == "head")
        for i, n in enumerate(names)
    ]
    own = [unit for unit, name in zip(units, names, strict=True) if name in mine]
    given = shapes()._replace(layers=2, units=tuple(units))
    estimator, predict = made(*case)
    values = {p: params[p] for unit in own for p in unit.params}
    rest = {p: v for p, v in params.items() if p not in values}
    compare(estimator(Toy(rest), values, batch, 5), predict(given, own), given)


def compare(estimate, step, given):
    assert passes(given, step) == pytest.approx(estimate.passes)
    assert step.sure
    assert step.terms == len(estimate.terms)
    assert {name for unit in step.dense for name in unit.params} == set(estimate.dense)
    sizes = {name: unit.size // len(unit.params) for unit in given.units for name in unit.params}
    if len(sizes) > 6:  # the toy's head is not of equal parts
        sizes = {unit.params: unit.size for unit in given.units}
        drawn = sum(s for term in estimate.terms for names, s in sizes.items() if set(names) <= set(term.block))
        assert step.drawn == drawn


@pytest.mark.parametrize("scheme", ["central", "forward", "jvp"])
@pytest.mark.skipif("two_block" not in ESTIMATORS, reason="not registered")
def test_a_budget_is_about_spent(scheme, networks):
    adapted = networks["bert"]
    options = {"pairing": "decoupled", "scheme": scheme, "top": 1, "p1": 2, "p2": 2, "budget": 16.0}
    estimate, _, step, given = estimated(adapted, "two_block", options, list(adapted.units))
    assert not step.sure
    assert sum(passes(given, step)) == pytest.approx(sum(estimate.passes), rel=0.1)
    assert sum(passes(given, step)) <= 16


# Operations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_forward_pass(name, networks):
    adapted = networks[name]
    loss_fn, batch = loss_and_batch(adapted)
    with counted_flops() as flops, torch.no_grad():
        loss_fn(adapted.params, batch)
    given = models.shapes_of(adapted.module, adapted.units, ROWS, TOKENS)
    step = costs.Step(Passes(1), Passes(1))
    assert step_flops(given, step, adapted.units) == pytest.approx(flops(), rel=0.005)


ALL = [("bert", case) for case in CASES] + [
    pytest.param(name, case, marks=[] if name == "llama" else pytest.mark.slow)
    for name in ("roberta", "gpt2", "llama")
    for case in CASES
    if case[0] in ("backprop", "forward")
]


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize(("name", "case"), ALL, ids=lambda one: named(one) if isinstance(one, tuple) else one)
def test_predicted_passes_and_operations_are_counted_ones(name, case, late, networks):
    adapted = networks[name]
    mine = moved(adapted.units, late)
    estimate, counted, step, given = estimated(adapted, *case, mine)
    compare(estimate, step, given)
    assert step_flops(given, step, mine) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_backprop_through_large_adapters_to_a_part_in_five_hundred(name, late, checkpoint):
    """At rank 16 the pairs' own products are not lost in the tolerance, nor is the head's."""
    adapted = small(NETWORKS[name], rank=16)
    mine = moved(adapted.units, late)
    _, counted, step, given = estimated(adapted, "backprop", {"checkpoint": checkpoint}, mine)
    assert step_flops(given, step, mine) == pytest.approx(counted, rel=0.002)


def test_a_block_that_is_left_out_is_noticed(networks):
    """The gap's own test: shapes of one block less are off by more than the tolerance."""
    adapted = networks["bert"]
    _, counted, step, given = estimated(adapted, "backprop", {}, list(adapted.units))
    assert step_flops(given._replace(layers=given.layers - 1), step, adapted.units) < 0.9 * counted


# Shapes ------------------------------------------------------------------------------------------------------------

# (configuration, classes) -> (units of the adapter, of the head, LoRA's values, the head's): the table of the paper's
# models, each counted by hand as (inputs + outputs) of the adapted maps and weights + biases of the head.
TABLE = {
    "roberta-large": (
        RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
        4,
        (48, 2, 48 * 2048, 1024 * 1024 + 1024 + 4 * 1024 + 4),
    ),
    "distilbert": (DistilBertConfig(), 2, (12, 2, 12 * 1536, 768 * 768 + 768 + 2 * 768 + 2)),
    "bert-large": (
        BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
        3,
        (48, 1, 48 * 2048, 3 * 1024 + 3),
    ),
    "bert-base": (BertConfig(), 4, (24, 1, 24 * 1536, 4 * 768 + 4)),
    "albert-large": (
        AlbertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
        2,
        (2, 1, 4096, 2050),
    ),
    "llama2-7b": (LlamaConfig(), 2, (64, 1, 64 * 8192, 8192)),
    "opt-13b": (
        OPTConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, ffn_dim=20480),
        2,
        (80, 1, 80 * 10240, 10240),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_shapes_by_the_configuration_alone(name, tmp_path):
    config, classes, expected = TABLE[name]
    config.save_pretrained(tmp_path)
    labels = tuple(str(i) for i in range(classes))
    given = models.shapes(str(tmp_path), labels, adapters.lora(), rows=8, tokens=128)
    head = [unit for unit in given.units if unit.head]
    adapter = [unit for unit in given.units if not unit.head]
    assert (len(adapter), len(head), sum(u.size for u in adapter), sum(u.size for u in head)) == expected
    assert (given.labels, given.layers, given.rows, given.tokens) == (classes, config.num_hidden_layers, 8, 128)


def test_numbers_by_hand_are_those_of_the_configuration(tmp_path):
    """RoBERTa-Large from a few numbers costs what it costs from its own configuration."""
    TABLE["roberta-large"][0].save_pretrained(tmp_path)
    by_model = models.shapes(str(tmp_path), ("a", "b", "c", "d"), adapters.lora(), rows=8, tokens=128)
    by_hand = shapes(vocabulary=by_model.vocabulary)
    assert by_hand._replace(units=()) == by_model._replace(units=())
    assert [u.size for u in by_hand.units] == [u.size for u in by_model.units]
    one, other = (train.predicted(METHODS["spry"], given, 20, 10, 2) for given in (by_hand, by_model))
    assert (one.flops, one.round, one.paper) == (other.flops, other.round, other.paper)


def test_shapes_that_cannot_be():
    with pytest.raises(ValueError, match="layers = 0"):
        shapes(layers=0)
    with pytest.raises(ValueError, match="labels = 1"):
        shapes(labels=1)


# Bytes -------------------------------------------------------------------------------------------------------------

SGD = {"kind": "sgd", "lr": 1e-4}
SCALARS = {"exchange": "scalars", "local_optimizer": SGD, "server_optimizer": {"kind": "sgd"}}
MORE = {
    "spry, replayed": {"name": "spry", **SCALARS},
    "spry, head exact, replayed": {"name": "spry", "head": "exact", **SCALARS},
    "spry, head split": {"name": "spry", "head": "split"},
    "decomfl, head exact": {"name": "decomfl", "head": "exact"},
    "fedspzo, decoupled": {"name": "fedspzo", "estimator": {"pairing": "decoupled", "scheme": "jvp"}},
    "an exact top": {"name": "fedfgd", "estimator": {"exact_top": 1, "directions": 2}, **SCALARS},
    "a guide with scalars": {"name": "fwdllm_plus", **SCALARS},
    "a pool larger than the values": {"name": "fedkseed", "seeds": {"size": 5000}},
    "a pool and an exact head": {"name": "fedkseed_pro", "head": "exact"},
    "by budget": {"name": "spry", "assignment": {"kind": "budget", "values": [700, 1500]}},
}
ROUNDS, STEPS = 4, 2


def asked(name):
    """A method as settings: few directions for the test's sake, and no gate, as whom it stops hangs on the data."""
    given = MORE.get(name, {"name": name})
    row = METHODS[given["name"]]
    few = {"directions": 2} if row.estimator.get("directions", 1) > 2 else {}
    estimator = {**few, **given.get("estimator", {})}
    return {**given, **({"estimator": estimator} if estimator else {}), **({"gate": 1e30} if row.gate else {})}


@pytest.fixture
def ran(settings):  # noqa: F811
    """What a run of a few rounds counted, and its prediction: (job, rounds of traffic, headers, costs)."""

    def go(name):
        made = api.prepared(
            parse(
                settings(
                    method=asked(name),
                    adapter={"kind": "lora", "r": 8},
                    train={"rounds": ROUNDS, "cohort": 2, "steps": STEPS, "eval_every": ROUNDS},
                )
            )
        )
        _, state, progress = job.begin(made, None)
        inner, counted, headers = job.exchange(made, state), [], []

        def exchange(told):
            answers = inner(told)
            down, up = ([header(one) for one in side] for side in (told, answers.updates))
            counted.append((answers.bytes_down - sum(down), answers.bytes_up - sum(up)))
            headers.append((max(down), max(up)))
            return answers

        records = [record for record, _ in train.train(made.plan, state, progress, exchange, job.evaluate(made))]
        return made, counted, headers, records

    return go


@pytest.mark.parametrize("name", [*METHODS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_predicted_bytes_are_counted_bytes_but_for_headers(name, ran):
    made, counted, headers, records = ran(name)
    method, plan = made.experiment.method, made.plan
    given = models.shapes_of(made.model.module, made.model.units, 8, 16)
    work = costs.work(method, given)
    rounds = [server.deal(plan.units, train.cohort(plan, r), plan.method, r) for r in range(1, ROUNDS + 1)]
    parts = run(plan.method, plan.units, work, rounds, made.steps)
    assert [(part.down, part.up) for part in parts] == counted
    whole = job.predicted(made)
    assert (whole.first.down, whole.first.up) == counted[0]
    assert sum(whole.passes) * made.steps * plan.cohort * ROUNDS == pytest.approx(
        sum(records[-1][f"{kind}_passes"] for kind in ("value", "tangent", "backward"))
    )
    names = sum(len(unit.params) for unit in plan.units)
    assert max(up for _, up in headers) <= 400 + 30 * names
    assert max(down for down, _ in headers) <= 400 + 30 * names + 250 * ROUNDS
    assert whole.headers.up == pytest.approx(headers[-1][1], rel=0.5)


# A method of one's own, and what is shown ---------------------------------------------------------------------------


def mine(scale=1.0):
    """An estimator that nothing is known of."""
    return lambda loss_fn, params, batch, seed: None


@pytest.mark.parametrize("exchange", ["weights", "scalars"])
def test_an_estimator_of_ones_own_is_unknown_not_an_error(exchange):
    method = Method("own", estimator={"kind": mine, "scale": 2.0}, exchange=exchange)
    made = explain.costs(method, shapes(layers=2, width=64), 20, 5, 3)
    assert (made.passes, made.flops, made.paper_flops) == (None, None, None)
    if exchange == "weights":
        assert made.round.up == 5 * (4 * shapes(layers=2, width=64).values + costs.ACCOUNT)
    else:
        assert (made.round, made.paper) == (None, None)
    rows = {what: true for what, _, true in explain.table(made)}
    assert rows["passes a step"] == "unknown"
    assert any("nothing is known" in does for _, _, does in explain.choices(method))


def test_a_registered_builder_itself_is_known():
    own = Method("own", estimator={"kind": ESTIMATORS["forward"], "directions": 4})
    assert costs.work(own, given := shapes())(given.units).below == Passes(1, 4)


def test_the_papers_counts():
    """Spry by its table, M = 10 clients and 48 units: w_l L / M up and w_l L down, beside the head that all train."""
    given = shapes()
    made = explain.costs(METHODS["spry"], given, 100, 10, 10)
    unit, head = 2048, 1_053_700
    assert made.paper == (10 * (unit * 48 / 10 + head), 10 * (unit * 48 / 10 + head))
    crowd = explain.costs(METHODS["spry"], given, 100, 96, 10).paper  # M > L: a unit each
    assert crowd == (96 * (unit + head), 96 * (unit + head))
    everyone = explain.costs(METHODS["fedavg"], given, 100, 10, 10).paper
    assert everyone == (10 * given.values, 10 * given.values)
    scalars = explain.costs(METHODS["decomfl"], given, 100, 10, 1).paper
    assert scalars == (10 * (given.values + 1), 10 * 10)  # (w_g + 1) M down, K up


def test_the_papers_operations():
    """3 L c, 2 max(L/M, 1) c + w_l L and K L (2 c + w_l), with c one block forward."""
    given = shapes()
    c, blocks, unit = value(given, 0, 1), given.layers, 2048
    for name, expected in {
        "fedavg": 3 * blocks * c,
        "spry": 2 * (blocks / 10) * c + unit * blocks,
        "baffle": 20 * blocks * (2 * c + unit),
    }.items():
        assert explain.costs(METHODS[name], given, 100, 10, 10).paper_flops == pytest.approx(expected)
    assert explain.costs(METHODS["fedzo"], given, 100, 10, 10).paper_flops is None


def test_what_is_drawn_is_what_replay_draws():
    """Values of directions: a client's own, the server's of all clients, once where they share their seeds."""
    given = shapes(layers=2, width=64)
    shared = explain.costs(METHODS["decomfl"], given, 20, 5, 3)
    own = explain.costs(dataclasses.replace(METHODS["decomfl"], seeds={"kind": "own"}), given, 20, 5, 3)
    assert shared.drawn == own.drawn == 3 * 10 * given.values
    assert shared.round.replayed == 3 * 10 * given.values
    assert own.round.replayed == 5 * shared.round.replayed
    assert explain.costs(METHODS["fedavg"], given, 20, 5, 3).round.replayed == 0


def test_choices_say_what_they_do():
    lines = {what: (chosen, does) for what, chosen, does in explain.choices(METHODS["fedspzo"])}
    assert "joint" in lines["estimator"][1]
    assert "c_pq" in lines["estimator"][1]
    assert "decoupled" not in lines["estimator"][1]
    assert lines["server_optimizer"][1].startswith("m = momentum m + g")
