"""Micro-batches: an estimate in pieces is the whole batch's, for every estimator and task, and holds one piece."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from test_estimators import CASES
from test_loss import blocks_run, loaded, of_layer  # noqa: F401  (a fixture)
from test_tasks import EACH, folders, opened  # noqa: F401  (fixtures)
from toy import Toy, problem
from transformers import BertConfig, BertForSequenceClassification

import spryfl
from spryfl import adapters, models, noise, tasks, tree
from spryfl.config import parse
from spryfl.costs import peak_memory
from spryfl.estimators import ESTIMATORS, backprop, central_difference, forward, forward_difference, two_block
from spryfl.estimators.pieces import summed, weighed
from spryfl.jvp import jvp
from spryfl.loss import ModelLoss
from spryfl.testing import check_estimator
from spryfl.types import Directional, Estimate, Passes, Piece

# Everything of the laws' table, and what is not linear in the loss.
NOT_LINEAR = [
    ("forward", {"directions": 4, "clip": 0.3}),
    ("forward", {"directions": 6, "chunk": 2, "exact_top": 1, "checkpoint": True}),
    ("forward", {"directions": 3, "candidates": 4}),
    ("central_difference", {"directions": 4, "clip": 0.3}),
    ("central_difference", {"directions": 3, "candidates": 4, "exact_head": True}),
    ("forward_difference", {"directions": 6, "distribution": "rademacher", "normalize": True}),
    ("forward_difference", {"directions": 4, "normalize": True, "exact_head": True, "distribution": "orthogonal"}),
    *(("two_block", {"scheme": scheme, "clip": 0.3, "p1": 2, "p2": 2}) for scheme in ("central", "forward", "jvp")),
    *(
        ("two_block", {"scheme": scheme, "pairing": "decoupled", "p1": 1, "p2": 2, "budget": 14.0})
        for scheme in ("central", "forward", "jvp")
    ),
]
TRIED = [(name, options) for name, options, _ in CASES] + NOT_LINEAR


def named(case):
    return f"{case[0]} {case[1]}"


def same(one, other, rel=1e-5):
    """Two estimates of the same directions, passes and counts, and numbers to rounding."""
    assert [(t.seed, t.block, t.distribution) for t in one.terms] == [
        (t.seed, t.block, t.distribution) for t in other.terms
    ]
    largest = max((abs(t.coefficient) for t in other.terms), default=0.0)
    for a, b in zip(one.terms, other.terms, strict=True):
        assert a.coefficient == pytest.approx(b.coefficient, rel=rel, abs=rel * largest)
    assert set(one.dense) == set(other.dense)
    for name, g in other.dense.items():
        torch.testing.assert_close(one.dense[name], g, rtol=rel, atol=rel * tree.norm(other.dense))
    assert one.loss == pytest.approx(other.loss, rel=rel)
    assert one.passes == other.passes
    assert one.scalars[:3] == other.scalars[:3]
    assert one.scalars[3:] == pytest.approx(other.scalars[3:], rel=10 * rel)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("case", TRIED, ids=named)
def test_an_estimate_in_pieces_is_the_whole_batchs(case, rows):
    params, batch = problem()
    estimator, guide = ESTIMATORS[case[0]](**case[1]), problem(seed=8)[0]
    parts = Toy(guide=guide, micro_batch=rows)
    one = estimator(parts, params, batch, 3)
    same(one, estimator(Toy(guide=guide), params, batch, 3))
    assert parts.most == rows
    for other in (5, 9):  # one piece is the batch itself, to the bit
        again = estimator(Toy(guide=guide, micro_batch=other, dropout=0.3), params, batch, 3)
        whole = estimator(Toy(guide=guide, dropout=0.3), params, batch, 3)
        assert (again.loss, again.terms) == (whole.loss, whole.terms)
        assert all(torch.equal(again.dense[n], whole.dense[n]) for n in whole.dense)


def test_what_is_not_linear_is_tried():
    assert {name for name, _ in NOT_LINEAR} == set(ESTIMATORS) - {"backprop"}


@pytest.mark.parametrize("case", TRIED, ids=named)
def test_under_dropout_each_piece_has_masks_of_its_own(case):
    """The estimate is that of the weighted sum of the pieces' losses, each under its own masks on both sides."""
    params, batch = problem()
    fn = Toy(dropout=0.4, micro_batch=2)
    pieces = fn.pieces(batch, 3)
    assert len({piece.seed for piece in pieces} | {3}) == 4
    assert [piece.weight for piece in pieces] == [0.4, 0.4, 0.2]

    def whole(p):
        return sum(piece.weight * fn(p, piece.batch, piece.seed) for piece in pieces)

    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    truth = dict(zip(leaves, torch.autograd.grad(whole(leaves), list(leaves.values())), strict=True))
    options = {k: v for k, v in case[1].items() if k not in ("clip", "normalize", "candidates")}
    if "mu" in inspect.signature(ESTIMATORS[case[0]]).parameters:
        options["mu"] = 1e-5
    estimate = ESTIMATORS[case[0]](**options)(fn, params, batch, 3)
    assert estimate.loss == pytest.approx(float(whole(params)), rel=1e-6)
    for name, g in estimate.dense.items():
        torch.testing.assert_close(g, truth[name])
    for k, term in enumerate(estimate.terms if case[0] != "two_block" else ()):
        v = expanded(estimate.terms, params)[k]
        slope = sum(float((truth[n] * v[n].double()).sum()) for n in v) / len(estimate.terms)
        assert term.coefficient == pytest.approx(slope, rel=1e-3, abs=1e-4 * tree.norm(truth))


def expanded(terms, params):
    """The direction of each term."""
    like = {name: params[name] for name in terms[0].block}
    drawn = noise.stack([term.seed for term in terms], like, terms[0].distribution)
    return [{name: value[k] for name, value in drawn.items()} for k in range(len(terms))]


def test_weights_are_the_shares_of_the_terms():
    drawn = torch.tensor([[2.0, 1.0], [4.0, 5.0], [1.0, 1.0]])
    pieces = weighed([{"x": row} for row in drawn], [3, 0, 5], 7)
    assert [piece.number for piece in pieces] == [0, 1, 2]
    found = summed(pieces, lambda piece: (piece.batch["x"], {"y": [float(piece.batch["x"].sum())]}))
    assert found[0].tolist() == pytest.approx([(3 * 2 + 5 * 1) / 8, (3 * 1 + 5 * 1) / 8])
    assert found[1]["y"] == pytest.approx([(3 * 3 + 5 * 2) / 8])
    assert drawn.tolist() == [[2.0, 1.0], [4.0, 5.0], [1.0, 1.0]]
    assert [piece.weight for piece in weighed([{}, {}], [0, 0], None)] == [0.5, 0.5]


# Models and tasks.

QUICK = [
    ("backprop", {}),
    ("backprop", {"checkpoint": True}),
    ("forward", {"directions": 2}),
    ("forward", {"directions": 2, "exact_head": True}),
    ("forward", {"directions": 2, "exact_top": 1, "checkpoint": True}),
    ("central_difference", {"directions": 2, "mu": 1e-2}),
    ("forward_difference", {"directions": 2, "mu": 1e-2, "exact_head": True}),
    ("two_block", {"p1": 1, "p2": 2, "scheme": "jvp"}),
]


@pytest.mark.parametrize(("case", "family"), EACH)
def test_every_task_in_pieces(case, family, opened):  # noqa: F811
    """Rows of several sequences stay together, and rows of many terms weigh more; in float64."""
    model, params, rows, _ = opened(case, family)
    module = model.module.double()
    try:
        batch = tasks.collate(rows, range(len(rows.labels)))
        wide = {name: value.double() for name, value in params.items()}
        whole = models.loss_fn(model._replace(module=module), {})
        parts = dataclasses.replace(whole, micro_batch=2)
        pieces = parts.pieces(batch, 1)
        assert sum(tasks.count(piece.batch) for piece in pieces) == tasks.count(batch)
        assert sum(model.task.terms(piece.batch) for piece in pieces) == model.task.terms(batch)
        for name, options in QUICK:
            estimator = ESTIMATORS[name](**options)
            # Llama's norms are in float32 whatever its values are, and a difference of losses feels it.
            near = 1e-2 if "difference" in name else 1e-4
            same(estimator(parts, wide, batch, 1), estimator(whole, wide, batch, 1), near)
    finally:
        module.float()


def test_terms_differ_between_rows(opened):  # noqa: F811
    """What the test above is for: pieces of unequal weight, and rows of several sequences."""
    seen = set()
    for case, family in EACH:
        model, _, rows, _ = opened(case, family)
        batch = tasks.collate(rows, range(len(rows.labels)))
        pieces = dataclasses.replace(models.loss_fn(model, {}), micro_batch=2).pieces(batch)
        equal = [tasks.count(piece.batch) / tasks.count(batch) for piece in pieces]
        seen |= {case} if [piece.weight for piece in pieces] != pytest.approx(equal) else set()
        seen |= {"sequences"} if any(len(p.batch["input_ids"]) != tasks.count(p.batch) for p in pieces) else set()
    assert {"causal_lm", "question_answering", "sequences"} <= seen


def test_sequences_of_a_row_stay_together():
    batch = {"labels_of": torch.tensor([0, 0, 1, 2, 2, 2, 3]), "x": torch.arange(7)}
    parts = tasks.parts(batch, 2)
    assert [part["x"].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5, 6]]
    assert [part["labels_of"].tolist() for part in parts] == [[0, 0, 1], [0, 0, 0, 1]]
    assert tasks.parts(batch, 4) == [batch]
    assert [tasks.count(part) for part in tasks.parts({"x": torch.arange(5)}, 2)] == [2, 2, 1]


@pytest.fixture(scope="module")
def wide():
    """A network whose activations outweigh its trainable values by far."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    made = adapters.wrap(base, adapters.lora(r=1))
    head = frozenset(name for unit in made.units if unit.head for name in unit.params)
    ids = torch.randint(1, 50, (8, 48), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1] * 4)}
    loss_fn = ModelLoss(made.module, head, {})
    loss_fn.cut(batch, None, 1)  # the first cut looks at the model once
    return loss_fn, dict(made.params), batch


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("case", QUICK, ids=named)
def test_peak_memory_is_one_pieces(case, late, wide):
    """Also where the first blocks' answer to each piece is kept, for its passes alone."""
    fn, params, batch = wide
    if late:
        params = {name: value for name, value in params.items() if ".layer.0." not in name}
    estimator = ESTIMATORS[case[0]](**case[1])

    def peak(rows, micro_batch):
        with peak_memory() as held:
            loss_fn = dataclasses.replace(fn, micro_batch=micro_batch, prefix=type(fn.prefix)())
            estimator(loss_fn, params, {name: value[:rows] for name, value in batch.items()}, 1)
        return held()

    one, pieces, whole = peak(2, 0), peak(8, 2), peak(8, 0)
    values = 4 * tree.size(params)
    assert pieces <= one + 2 * values + 4_000  # the sum of the gradients, and its next part
    assert whole > 2.5 * pieces


@pytest.mark.parametrize("case", QUICK, ids=named)
def test_a_piece_is_its_share_of_a_pass(case, loaded):  # noqa: F811
    model, params, rows = loaded
    estimator, batch = ESTIMATORS[case[0]](**case[1]), tasks.collate(rows, range(4))
    fn = models.loss_fn(model, {})
    fn.cut(batch, None, 1)
    whole, ran = blocks_run(model, lambda: estimator(fn, params, batch, 1))
    parts, again = blocks_run(model, lambda: estimator(dataclasses.replace(fn, micro_batch=1), params, batch, 1))
    assert parts.passes == whole.passes
    assert sorted(again) == sorted(4 * ran)


@pytest.mark.parametrize(
    "estimator",
    [
        central_difference(directions=3, exact_head=True),
        forward_difference(directions=3, exact_head=True),
        forward(directions=4, chunk=2),
        two_block(top=1, p1=2, p2=2),
        backprop(checkpoint=True),
    ],
)
def test_a_prefix_is_run_once_a_piece_and_kept_by_pieces(estimator, loaded):  # noqa: F811
    model, params, rows = loaded
    moved = {n: v for n, v in params.items() if ".layer.0." not in n}
    fixed = {n: v for n, v in params.items() if n not in moved}
    batch = tasks.collate(rows, range(4))
    expected = estimator(models.loss_fn(model, fixed), moved, batch, 1)
    plain = models.loss_fn(model, fixed, micro_batch=2)
    first, ran = blocks_run(model, lambda: estimator(plain, moved, batch, 1))
    assert ran.count(0) == 2
    keeping = models.loss_fn(model, fixed, keep=1_000_000, micro_batch=2)
    estimator(keeping, moved, batch, 1)
    again, ran = blocks_run(model, lambda: estimator(keeping, moved, batch, 1))
    assert ran.count(0) == 0
    for got in (first, again):
        same(got, expected, 2e-3)


# What ignores the pieces is told so.


def ignoring(loss_fn, params, batch, seed):
    """One direction of the whole batch at once."""
    one = noise.child_seed(seed, "direction", 0)
    loss, slopes = jvp(lambda p: loss_fn(p, batch, seed), params, noise.stack([one], params))
    term = Directional(one, float(slopes[0].float()), tuple(params), "gaussian")
    return Estimate(float(loss), {}, (term,), Passes(1, 1))


def unweighted(loss_fn, params, batch, seed):
    """Adds pieces up as if they had all the same terms."""
    pieces = loss_fn.pieces(batch, seed)
    return backprop()(Given(loss_fn, [piece._replace(weight=1 / len(pieces)) for piece in pieces]), params, batch, seed)


class Given:
    """A loss with other pieces."""

    def __init__(self, loss_fn, pieces):
        self.loss_fn, self.given = loss_fn, tuple(pieces)

    def __call__(self, *args):
        return self.loss_fn(*args)

    def pieces(self, batch, seed):
        return self.given


def counting(loss_fn, params, batch, seed):
    made = backprop()(loss_fn, params, batch, seed)
    return made._replace(passes=Passes(len(loss_fn.pieces(batch, seed)), 0, 1))


@pytest.mark.parametrize(
    ("estimator", "text"),
    [(ignoring, "asked for 2 rows at once, it took 5"), (unweighted, "what the whole gives"), (counting, "a piece is")],
)
def test_the_check_names_what_is_wrong_about_pieces(estimator, text):
    with pytest.raises(AssertionError, match=text):
        check_estimator(estimator, seeds=20)
    check_estimator(estimator, seeds=20, pieces=False)


def test_a_loss_in_pieces_refuses_a_whole_batch(loaded):  # noqa: F811
    model, params, rows = loaded
    fn, batch = models.loss_fn(model, {}, micro_batch=2), tasks.collate(rows, range(4))
    for ask in (fn, fn.checkpointed, lambda p, b, s: fn.cut(b, s)):
        with pytest.raises(ValueError, match="micro_batch = 2, but this estimator asks for the loss of 4 rows at once"):
            ask(params, batch, 1)
    assert ignoring(fn, params, tasks.collate(rows, range(2)), 1).loss > 0
    assert isinstance(fn.pieces(batch)[0], Piece)


RUN = {
    "partition": {"clients": 4, "held_out": 0.2},
    "train": {"rounds": 2, "cohort": 2, "steps": 2, "batch_size": 5, "eval_every": 1},
    "reading": {"train_rows": 40, "test_rows": 12},
}


@pytest.mark.parametrize("method", ["spry", "fedavg", "fedspzo"])
def test_a_run_in_micro_batches_is_the_run_without(method, tiny, reviews):
    runs = [
        spryfl.finetune(
            str(tiny), str(reviews), method=method, **{**RUN, "train": {**RUN["train"], "micro_batch": most}}
        )
        for most in (0, 2)
    ]
    for one, other in zip(*(run.records for run in runs), strict=True):
        for name in ("loss", "test_loss", "personal_after", "value_passes", "tangent_passes", "backward_passes"):
            if name in one:
                assert one[name] == pytest.approx(other[name], rel=2e-3)
    assert runs[1].records[-1]["peak_bytes"] < 0.8 * runs[0].records[-1]["peak_bytes"]


def test_a_run_with_an_estimator_that_ignores_pieces_is_refused_before_its_folder(tiny, reviews, tmp_path):
    method = spryfl.Method("mine", estimator={"kind": lambda: ignoring})
    with pytest.raises(ValueError, match="this estimator asks for the loss of 3 rows at once"):
        spryfl.finetune(
            str(tiny),
            str(reviews),
            method=method,
            folder=tmp_path / "run",
            **{**RUN, "train": {**RUN["train"], "micro_batch": 2}},
        )
    assert not (tmp_path / "run").exists()


def test_micro_batches_larger_than_batches_are_refused():
    with pytest.raises(ValueError, match=r"micro_batch = 9 rows at once, of train\.batch_size = 8"):
        parse({"train": {"micro_batch": 9}})
    assert parse({"train": {"micro_batch": 8}}).train.micro_batch == 8
