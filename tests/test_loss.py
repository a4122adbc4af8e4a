"""A kept prefix: the same bits, fewer blocks run, within its bound; batches that come again."""

from __future__ import annotations

import pytest
import torch

from spryfl import adapters, models, tasks
from spryfl.data.examples import Examples
from spryfl.estimators import backprop, forward


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
