"""A model's loss in parts: cuts at every depth of every family, masks, a kept prefix, what estimators run."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from jvp.families import FAMILIES, base, batch

from spryfl import adapters, models, noise, tasks, tree
from spryfl.data.examples import Examples
from spryfl.estimators import backprop, central_difference, forward, two_block
from spryfl.jvp import jvp
from spryfl.layout import layout_of
from spryfl.loss import ModelLoss
from spryfl.testing import true_gradient


@pytest.fixture(scope="module")
def loaded(tiny):
    base, tokenizer = models.load(str(tiny), ("bad", "good"))
    model = models.prepare(base, tokenizer, ("bad", "good"), adapters.lora(r=2))
    texts = ("the film was good", "a sad day in town", "we saw it and they said it was warm", "dull")
    rows = tasks.encode(tokenizer, Examples(texts, None, (1, 0, 1, 0), None), 32)
    draw = torch.Generator().manual_seed(3)
    params = {n: v + 0.3 * torch.randn(v.shape, generator=draw) for n, v in model.params.items()}
    return model, params, rows


def of_layer(params, layer):
    return {n: v for n, v in params.items() if f".layer.{layer}." in n or "modules_to_save" in n}


def blocks_run(model, call):
    """How many blocks' first linear map really computes."""
    ran = []
    maps = [m for n, m in model.module.named_modules() if n.endswith("attention.self.key")]
    handles = [m.register_forward_hook(lambda *a, i=i: ran.append(i)) for i, m in enumerate(maps)]
    try:
        result = call()
    finally:
        for handle in handles:
            handle.remove()
    return result, ran


ESTIMATORS = {
    "forward": forward(directions=2),
    "exact head": forward(directions=2, exact_head=True),
    "backprop": backprop(),
    "checkpointed": backprop(checkpoint=True),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_kept_prefix_gives_the_same_bits_and_skips_its_blocks(loaded, name):
    model, params, rows = loaded
    moved = of_layer(params, 2)
    fixed = {n: v for n, v in params.items() if n not in moved}
    plain, keeping = models.loss_fn(model, fixed), models.loss_fn(model, fixed, keep=1_000_000)
    batch = tasks.collate(rows, range(4))
    expected, ran = blocks_run(model, lambda: ESTIMATORS[name](plain, moved, batch, 1))
    assert {0, 1, 2} <= set(ran)
    first, _ = blocks_run(model, lambda: ESTIMATORS[name](keeping, moved, batch, 1))
    again, ran = blocks_run(model, lambda: ESTIMATORS[name](keeping, moved, batch, 1))
    assert set(ran) == {2}
    for got in (first, again):
        assert got.loss == expected.loss
        assert got.terms == expected.terms
        assert all(torch.equal(got.dense[n], expected.dense[n]) for n in expected.dense)


def test_a_prefix_reaches_only_to_the_first_moved_block(loaded):
    model, params, rows = loaded
    batch = tasks.collate(rows, range(4))
    for layer, expected in ((0, {0, 1, 2}), (1, {1, 2})):
        keeping = models.loss_fn(model, params, keep=1_000_000)
        moved = of_layer(params, layer)
        backprop()(keeping, moved, batch, 1)
        _, ran = blocks_run(model, lambda k=keeping, m=moved: backprop()(k, m, batch, 1))
        assert set(ran) == expected


def test_a_head_alone_needs_no_block_twice(loaded):
    model, params, rows = loaded
    keeping = models.loss_fn(model, params, keep=1_000_000)
    head = {n: v for n, v in params.items() if n in keeping.head}
    batch = tasks.collate(rows, range(4))
    once = backprop()(keeping, head, batch, 1)
    again, ran = blocks_run(model, lambda: backprop()(keeping, head, batch, 1))
    assert ran == []
    assert all(torch.equal(once.dense[n], again.dense[n]) for n in head)


def test_other_batches_are_told_apart_and_the_bound_holds(loaded):
    model, params, rows = loaded
    moved = of_layer(params, 2)
    small = models.loss_fn(model, params, keep=32 * 4 * 10 * 2)  # 32 wide, 4 bytes, some ten tokens, two rows
    for indices in ((0, 1), (2, 3), (1, 0)):
        batch = tasks.collate(rows, indices)
        kept, plain = (backprop()(fn, moved, batch, 1) for fn in (small, models.loss_fn(model, params)))
        assert kept.loss == plain.loss
    assert 0 < small.prefix.held <= small.prefix.limit
    assert len(small.prefix.answers) < 3


def test_nothing_is_kept_unless_asked_or_under_dropout(loaded):
    model, params, rows = loaded
    batch, moved = tasks.collate(rows, range(4)), of_layer(params, 2)
    for fn in (models.loss_fn(model, params), models.loss_fn(model, params, dropout=True, keep=1_000_000)):
        fn(moved, batch, 1)
        fn.cut(batch, 1 if fn.dropout else None, 1).trunk(moved)
        assert not fn.prefix.answers
    assert fn.prefix.latest[1] is None


@pytest.mark.parametrize("exact", [False, True])
def test_chunks_of_directions_share_the_prefix(loaded, exact):
    model, params, rows = loaded
    moved, batch = of_layer(params, 2), tasks.collate(rows, range(4))
    fixed = {n: v for n, v in params.items() if n not in moved}
    chunked = forward(directions=6, chunk=2, exact_head=exact)
    parts, ran = blocks_run(model, lambda: chunked(models.loss_fn(model, fixed), moved, batch, 1))
    whole = forward(directions=6, exact_head=exact)(models.loss_fn(model, fixed), moved, batch, 1)
    assert ran.count(0) == ran.count(1) == 1
    assert [t.coefficient for t in parts.terms] == [t.coefficient for t in whole.terms]


def test_same_batches_come_again_in_another_order():
    once = list(tasks.shuffled(range(20), 3, seed=1, epochs=1))
    twice = list(tasks.shuffled(range(20), 3, seed=1, epochs=2, same=True))
    assert twice[:7] == once
    assert sorted(twice[7:]) == sorted(once)
    assert twice[7:] != once
    anew = list(tasks.shuffled(range(20), 3, seed=1, epochs=2))[7:]
    assert sorted(row for batch in anew for row in batch) == list(range(20))


def test_steps_are_counted_over_epochs():
    assert len(list(tasks.shuffled(range(5), 2, seed=1, epochs=0, steps=8))) == 8


# Cuts. Every family is tiny and random: two blocks, float64.

CUT = [family for family in FAMILIES if family != "t5-encoder"]  # T5's classifier is an encoder and a decoder
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def made(family, adapter=None, dropout=True, **changes):
    """(loss function, values, batch) of a family's classifier with LoRA."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = base(family, **changes)
        module.config.use_cache = False
        wrapped = adapters.wrap(module, adapter or adapters.lora(r=2, targets=tuple(FAMILIES[family][2])))
        params = {n: v.double() + 0.3 * torch.randn(v.shape).double() for n, v in wrapped.params.items()}
        head = frozenset(name for unit in wrapped.units if unit.head for name in unit.params)
        return ModelLoss(wrapped.module, head, {}, dropout=dropout), params, batch(family)


def close(a, b):
    """To the rounding of the loss, which is a float32, and of what the models themselves do in float32."""
    return torch.allclose(a, b, rtol=2e-4, atol=2e-6)


def layer_of(name):
    """The number of the block that a value belongs to."""
    return int(next(part for part in name.split(".") if part.isdigit()))


@quiet
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("family", CUT)
def test_a_cut_loss_is_the_whole_loss_at_every_depth(family, seed):
    """Values, masks, gradients by name and tangents; the part above by reverse mode, that below by forward mode."""
    fn, params, rows = made(family)
    whole, truth = fn(params, rows, seed), true_gradient(params, rows, fn, seed)
    for top, share in {0: 0.0, 1: 0.5, 2: 1.0, -1: 1.0}.items():
        if family == "albert" and top == 1:
            continue  # its layers share one set of weights, so only the ends can be cut
        cut = fn.cut(rows, seed, top)
        above = {name for name in params if name in cut.above}
        outside = {n for n in params if n in fn.head or (top and layer_of(n) >= 2 - (top % 3))}
        assert above == outside
        assert cut.share == share
        assert not cut.both & set(params)
        below = tree.without(params, above)
        along = noise.stack([1, 2], below) if below else {}
        with torch.no_grad():
            features = cut.trunk(params)
        assert float(cut.head(params, features)) == float(whole)
        leaves = [value.clone().requires_grad_() for value in features]
        values = {name: params[name].clone().requires_grad_() for name in params if name in above}
        grads = torch.autograd.grad(cut.head({**params, **values}, tuple(leaves)), [*leaves, *values.values()],
                                    allow_unused=True)  # fmt: skip
        for name, grad in zip(values, grads[len(leaves) :], strict=True):
            assert close(grad, truth[name]), name
        if below:
            _, tangents = jvp(cut.trunk, params, along)
            used = [(t, g) for t, g in zip(tangents, grads, strict=False) if g is not None]
            slopes = sum((t * g).flatten(1).sum(1) for t, g in used)
            expected = sum((along[n].double() * truth[n]).flatten(1).sum(1) for n in below)
            assert close(slopes.double(), expected)


@quiet
@pytest.mark.parametrize("family", ["bert", "gpt2", "deberta-v2", "llama"])
@pytest.mark.parametrize("top", [1, 2])
def test_an_exact_top_of_a_model_is_its_gradient_and_leaves_the_scalars(family, top):
    fn, params, rows = made(family, dropout=False)
    truth = true_gradient(params, rows, fn)
    for checkpoint in (False, True):
        exact = forward(directions=2, exact_top=top, checkpoint=checkpoint)(fn, params, rows, 4)
        assert set(exact.dense) == {n for n in params if n in fn.head or layer_of(n) >= 2 - top}
        assert all(close(exact.dense[name], truth[name]) for name in exact.dense)
        for term in exact.terms:
            along = noise.direction(term.seed, tree.without(params, exact.dense))
            slope = sum(float((along[n].double() * truth[n]).sum()) for n in along)
            assert term.coefficient == pytest.approx(slope / 2, rel=2e-4, abs=1e-6)
        assert len(exact.terms) == (2 if top == 1 else 0)


@quiet
def test_masks_are_drawn_and_differ_between_seeds():
    fn, params, rows = made("bert")
    losses = {float(fn(params, rows, seed)) for seed in (None, 3, 4, 5)}
    assert len(losses) == 4
    assert float(fn(params, rows, 3)) == float(fn(params, rows, 3))


@quiet
def test_the_layers_of_albert_have_masks_of_their_own():
    """They are one module called twice; with equal masks a permutation of its calls would not matter."""
    fn, params, rows = made("albert")
    states = []
    group = fn._layout.blocks[0]
    handle = group.register_forward_hook(lambda *a: states.append(torch.get_rng_state()))
    fn(params, rows, 3)
    handle.remove()
    assert len(states) == 2
    assert not torch.equal(*states)


@quiet
def test_checkpointing_keeps_the_masks():
    fn, params, rows = made("bert")
    plain, again = (backprop(checkpoint=c)(fn, params, rows, 3) for c in (False, True))
    assert plain.loss == again.loss
    assert all(torch.allclose(plain.dense[n], again.dense[n], rtol=1e-9, atol=1e-12) for n in params)


@quiet
def test_a_checkpointed_top_keeps_the_masks_too():
    fn, params, rows = made("bert")
    plain, again = (forward(exact_top=2, checkpoint=c)(fn, params, rows, 3) for c in (False, True))
    assert plain.loss == again.loss
    assert all(torch.allclose(plain.dense[n], again.dense[n], rtol=1e-9, atol=1e-12) for n in plain.dense)


@quiet
def test_layers_that_share_their_weights_are_refused_between_them():
    fn, params, rows = made("albert")
    for estimator in (forward(exact_top=1), two_block()):
        with pytest.raises(ValueError, match=r"albert_layers.* is read below the cut and above it"):
            estimator(fn, params, rows, 0)
    head = {name: value for name, value in params.items() if name in fn.head}
    estimate = forward(exact_top=1)(fn, head, rows, 0)
    assert set(estimate.dense) == set(head)


@quiet
def test_blocks_that_hand_on_more_than_the_hidden_state_are_refused():
    """T5's first block makes the position bias that the later ones are given."""
    sizes = {**FAMILIES["t5-encoder"][1], "decoder_start_token_id": 0, "eos_token_id": 2}
    module = adapters.wrap(
        hf.T5ForSequenceClassification(hf.T5Config(**sizes)), adapters.lora(targets=("q", "v"))
    ).module
    rows = {"input_ids": torch.tensor([[5, 6, 2], [7, 8, 2]])}
    with pytest.raises(ValueError, match="hand on more than the hidden state"):
        ModelLoss(module, frozenset(), {}).cut(rows, None, 1)


@quiet
def test_a_value_that_all_blocks_are_given_is_refused():
    """DeBERTa's norm of its relative positions is made before the blocks and read in each of them."""
    fn, params, rows = made("deberta-v2", adapters.bitfit(), norm_rel_ebd="layer_norm")
    both = fn.cut(rows, None, 1).both & set(params)
    assert both == {name for name in params if name.endswith("encoder.LayerNorm.bias")}
    assert len(both) == 1
    with pytest.raises(ValueError, match=r"encoder\.LayerNorm\.bias is read below the cut and above it"):
        two_block()(fn, params, rows, 0)


@quiet
@pytest.mark.parametrize(
    ("family", "before", "behind"),
    [
        ("bert", ["embeddings.LayerNorm.bias"], ["pooler.dense.bias"]),
        ("gpt2", [], ["ln_f.bias"]),
        ("electra", ["embeddings.LayerNorm.bias", "embeddings_project.bias"], []),
        ("opt", [], ["final_layer_norm.bias"]),
    ],
)
def test_values_outside_the_blocks_are_on_the_side_that_reads_them(family, before, behind):
    fn, params, rows = made(family, adapters.bitfit(), dropout=False)
    truth = true_gradient(params, rows, fn)
    for top in (1, 2):
        above = fn.cut(rows, None, top).above
        outside = {name: name in above for name in params if not any(part.isdigit() for part in name.split("."))}
        for end in before:
            assert [side for name, side in outside.items() if name.endswith(end)] == [False]
        for end in behind:
            assert True in [side for name, side in outside.items() if name.endswith(end)]
        estimate = forward(directions=1, exact_top=top)(fn, params, rows, 4)
        assert all(close(g, truth[n]) for n, g in estimate.dense.items())
        for term in estimate.terms:
            along = noise.direction(term.seed, {n: params[n] for n in term.block})
            slope = sum(float((along[n].double() * truth[n]).sum()) for n in along)
            assert term.coefficient == pytest.approx(slope, rel=2e-4, abs=1e-6)


@quiet
def test_a_depth_that_is_not_there_is_refused():
    fn, _, rows = made("bert")
    for top in (3, -2):
        with pytest.raises(ValueError, match=f"top = {top}, but BertModel has 2 blocks"):
            fn.cut(rows, None, top)


def test_a_models_blocks_are_listed_once(loaded):
    model, _, rows = loaded
    one, two = (models.loss_fn(model, {}) for _ in range(2))
    assert one._layout is two._layout is layout_of(model.module)
    one.cut(tasks.collate(rows, range(2)), None, 1)
    looked = blocks_run(model, lambda: two.cut(tasks.collate(rows, range(4)), None, 2))[1]
    assert looked == []


# What the two-block estimator runs of a real model of three blocks: each of them counted.

RUNS = [
    ("joint", "central", lambda p1, p2, f1, f2: 2 * p1 * (f1 + p2 * f2)),
    ("joint", "forward", lambda p1, p2, f1, f2: 1 + p1 * (f1 + p2 * f2)),
    ("joint", "jvp", lambda p1, p2, f1, f2: 1),
    ("decoupled", "central", lambda p1, p2, f1, f2: f1 + 2 * p1 + 2 * p2 * f2),
    ("decoupled", "forward", lambda p1, p2, f1, f2: 1 + p1 + p2 * f2),
    ("decoupled", "jvp", lambda p1, p2, f1, f2: 1),
]


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize(("pairing", "scheme", "formula"), RUNS)
def test_two_blocks_run_what_they_count(loaded, pairing, scheme, formula, top):
    model, params, rows = loaded
    fn, rows = models.loss_fn(model, {}), tasks.collate(rows, range(4))
    fn.cut(rows, None, top)  # the first cut looks at the model once
    estimator = two_block(top=top, p1=2, p2=3, pairing=pairing, scheme=scheme)
    estimate, ran = blocks_run(model, lambda: estimator(fn, params, rows, 1))
    expected = formula(2, 3, 1 - top / 3, top / 3)
    assert len(ran) / 3 == pytest.approx(expected)
    assert estimate.passes.value == pytest.approx(expected)
    low = [block for block in ran if block < 3 - top]
    sides = {"central": 2, "forward": 1, "jvp": 0}[scheme]
    once = {"joint": scheme != "central", "decoupled": True}[pairing]
    assert len(low) == (3 - top) * (2 * sides + once)  # once a direction of block 1 and side, never for each of block 2


def test_a_checkpointed_top_runs_its_blocks_again_on_the_way_back(loaded):
    model, params, rows = loaded
    fn, rows = models.loss_fn(model, {}), tasks.collate(rows, range(4))
    fn.cut(rows, None, 2)
    for checkpoint in (False, True):
        estimator = forward(exact_top=2, checkpoint=checkpoint)
        estimate, ran = blocks_run(model, lambda e=estimator: e(fn, params, rows, 1))
        assert [ran.count(block) for block in range(3)] == [1, 1 + checkpoint, 1 + checkpoint]
        assert estimate.passes.value == pytest.approx(len(ran) / 3)


def test_two_blocks_of_a_model_estimate_its_derivatives(loaded):
    model, params, rows = loaded
    fn, rows = models.loss_fn(model, {}), tasks.collate(rows, range(4))
    truth = true_gradient(params, rows, fn)
    for scheme, near in (("central", 0.02), ("jvp", 1e-4)):
        estimate = two_block(top=2, p1=1, p2=2, mu=3e-3, scheme=scheme)(fn, params, rows, 5)
        slopes = []
        for term in estimate.terms:
            along = noise.direction(term.seed, {n: params[n] for n in term.block})
            slopes.append(sum(float((along[n].double() * truth[n]).sum()) for n in along))
        expected = [slopes[0] + slopes[1], slopes[0] + slopes[2]]
        got = [2 * term.coefficient for term in estimate.terms[1:]]
        assert got == pytest.approx(expected, rel=near, abs=near * max(map(abs, expected)))
    assert {layer_of(n) for n in estimate.terms[0].block} == {0}


def test_a_kept_prefix_serves_cuts_too(loaded):
    model, params, rows = loaded
    moved = {n: v for n, v in params.items() if ".layer.1." in n or ".layer.2." in n or "modules_to_save" in n}
    fixed = {n: v for n, v in params.items() if n not in moved}
    plain, keeping = models.loss_fn(model, fixed), models.loss_fn(model, fixed, keep=1_000_000)
    rows = tasks.collate(rows, range(4))
    all_above = two_block(top=3)
    for estimator in (two_block(top=1), all_above, forward(exact_top=1), central_difference(exact_head=True)):
        expected = estimator(plain, moved, rows, 1)
        estimator(keeping, moved, rows, 1)
        got, ran = blocks_run(model, lambda e=estimator: e(keeping, moved, rows, 1))
        assert got.terms == expected.terms
        assert got.loss == expected.loss
        whole = blocks_run(model, lambda e=estimator: e(plain, moved, rows, 1))[1]
        # With all blocks above the cut none is left that a prefix could stand for.
        assert ran.count(0) == (whole.count(0) if estimator is all_above else 0)
        assert ran.count(2) == whole.count(2)
