"""Predicted cost against counted cost: passes, operations, bytes, for every estimator and every row of the table."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from test_methods import settings  # noqa: F401  (a fixture)
from toy import Toy, problem
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from spryfl import adapters, costs, models
from spryfl.costs import PREDICTED, counted_flops, passes, predictor, shapes, step_flops
from spryfl.estimators import ESTIMATORS
from spryfl.loss import ModelLoss
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
        {"pairing": pairing, "scheme": scheme, "top": top, "p1": p1, "p2": 3}
        for pairing, scheme, top, p1 in itertools.product(
            ("joint", "decoupled"), ("central", "forward", "jvp"), (0, 1, -1), (1, 2)
        )
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


def small(config):
    """A random model of that configuration with LoRA everywhere PEFT puts it, and its parts."""
    base = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    base.config.pad_token_id, base.config.use_cache = 0, False
    return adapters.wrap(base, adapters.lora(r=2))


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


@pytest.mark.parametrize("case", CASES, ids=named)
@pytest.mark.parametrize("late", [0, 2])
def test_predicted_passes_are_counted_passes_on_bert(case, late, networks):
    adapted = networks["bert"]
    estimate, _, step, given = estimated(adapted, *case, moved(adapted.units, late))
    compare(estimate, step, given)


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
    options = {"pairing": "decoupled", "scheme": scheme, "top": 1, "p1": 2, "p2": 2, "budget": 24.0}
    estimate, _, step, given = estimated(adapted, "two_block", options, list(adapted.units))
    assert not step.sure
    assert sum(passes(given, step)) == pytest.approx(sum(estimate.passes), rel=0.1)
    assert sum(passes(given, step)) <= 24


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


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("case", CASES, ids=named)
def test_predicted_operations_are_counted_operations(case, late, name, networks):
    kind, options = case
    if options.get("p1", 2) == 1:
        pytest.skip("two directions show as much")
    adapted = networks[name]
    _, counted, step, given = estimated(adapted, kind, options, (mine := moved(adapted.units, late)))
    assert step_flops(given, step, mine) == pytest.approx(counted, rel=0.02)
