"""The predicted footprint against the count of a real step, of real small models of several families."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers

from spryfl import adapters, choices, methods, models, noise, tasks, tree
from spryfl.backbone import CODECS, nbytes, pack
from spryfl.costs import peak_memory
from spryfl.footprint import footprint, held, outlined, prefix_bytes, process, step
from spryfl.footprint import predict as predicting
from spryfl.footprint.outline import sample
from spryfl.loss import ModelLoss

TASK = tasks.classification()
ROWS, TOKENS = 4, 48
GAP = 0.03  # of the real count; what is left is the batch's own masks, some kB
SMALL = {"num_labels": 2, "vocab_size": 300, "pad_token_id": 0, "num_attention_heads": 4, "hidden_size": 64}
FAMILIES = {
    "bert": ("BertConfig", {**SMALL, "intermediate_size": 256}),
    "roberta": ("RobertaConfig", {**SMALL, "intermediate_size": 256}),
    "llama": ("LlamaConfig", {**SMALL, "intermediate_size": 176, "num_key_value_heads": 2}),
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 256, "word_embed_proj_dim": 64}),
    "qwen2": ("Qwen2Config", {**SMALL, "intermediate_size": 176, "num_key_value_heads": 2}),
}


def forward(k=1, head="shared", **more):
    return methods.spry(head=head, estimator={"kind": "forward", "directions": k, **more})


def two_block(scheme):
    return methods.named("fedspzo", estimator={"kind": "two_block", "top": 2, "p1": 1, "p2": 2, "scheme": scheme})


WAYS = {
    "backprop": methods.fedavg(),
    "checkpointed": methods.named("fedavg_checkpointed"),
    "forward": forward(),
    "forward, K = 4": forward(4),
    "in chunks": forward(4, chunk=2),
    "exact head": forward(head="exact"),
    "exact top": forward(exact_top=2),
    "exact top, checkpointed": forward(exact_top=3, checkpoint=True),
    "central": methods.named("fedmezo"),
    "forward difference": methods.named("fedmezo", estimator={"kind": "forward_difference", "directions": 2}),
    "two blocks": two_block("central"),
    "two blocks, jvp": two_block("jvp"),
}


@pytest.fixture(autouse=True)
def _process(monkeypatch):
    monkeypatch.setattr(predicting, "process", lambda: 1000)


def config(family, layers):
    kind, values = FAMILIES[family]
    return getattr(transformers, kind)(**values, num_hidden_layers=layers)


def outline(family, layers, precision="", adapter=None):
    return outlined(family, config(family, layers), ("0", "1"), adapter or adapters.lora(), TASK, precision)


def late(of, layers):
    """The head, and what lies in the last two blocks."""
    ends = tuple(f".{i}." for i in range(layers - 2, layers))
    return [unit for unit in of.units if unit.head or any(end in unit.name for end in ends)]


def real(family, layers, method, mine, micro_batch=0, precision="", adapter=None):
    """(the count of one real step, bytes of the prefix)."""
    base = models.empty(config(family, layers), TASK)
    if precision:
        trunk = getattr(base, base.base_model_prefix)
        for parent in list(trunk.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is torch.nn.Linear:
                    setattr(parent, name, pack(child, precision))
    made = adapters.wrap(base, adapter or adapters.lora())
    names = [name for unit in made.units if unit in mine for name in unit.params]
    head = frozenset(name for unit in made.units if unit.head for name in unit.params)
    fixed = tree.without(made.params, names)
    loss = ModelLoss(made.module, head, fixed, task=TASK, micro_batch=micro_batch)
    batch = sample(TASK, made.module.config, ROWS, TOKENS)
    with peak_memory() as count:
        step(choices.build(method), loss, tree.select(made.params, names), batch)
    return count(), prefix_bytes(loss)


def same(found, expected):
    assert found == pytest.approx(expected, rel=GAP, abs=12_000)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_holds_what_was_foretold(way):
    family = "llama" if len(way) % 2 else "roberta"
    of = outline(family, 6)
    for mine in (of.units, late(of, 6)):
        count, prefix = real(family, 6, WAYS[way], mine)
        found = footprint(of, WAYS[way], mine, rows=ROWS, tokens=TOKENS)
        same(found.step, count)
        assert found.prefix == prefix
        assert min(found) >= 0


@pytest.mark.parametrize("way", ["backprop", "forward, K = 4", "exact head"])
@pytest.mark.parametrize("numbers", [[5], [1, 2], [-1]])
def test_an_adapter_on_some_blocks_alone(numbers, way):
    """The short forms have it where the model has it; a client that moves the head alone is foretold too."""
    adapter = adapters.lora(layers=numbers)
    of = outline("roberta", 6, adapter=adapter)
    assert len([unit for unit in of.units if not unit.head]) == 2 * len(numbers)
    for mine in (of.units, [unit for unit in of.units if unit.head]):
        count, _ = real("roberta", 6, WAYS[way], mine, adapter=adapter)
        same(footprint(of, WAYS[way], mine, rows=ROWS, tokens=TOKENS).step, count)


@pytest.mark.parametrize("way", ["backprop", "forward, K = 4", "exact top"])
def test_cores_in_some_blocks(way):
    """Blocks with the same units, and other numbers of values in them, are not one kind."""
    adapter = adapters.graded(r=8, core=2, cores=(0, -4, -3), layers=(0, -4, -3, -2, -1))
    of = outline("roberta", 6, adapter=adapter)
    for mine in (of.units, late(of, 6), of.units[::3]):
        count, _ = real("roberta", 6, WAYS[way], mine, adapter=adapter)
        same(footprint(of, WAYS[way], mine, rows=ROWS, tokens=TOKENS).step, count)


def test_an_adapter_on_a_block_that_is_not_there():
    with pytest.raises(ValueError, match=r"layers \[9\]"):
        outline("roberta", 6, adapter=adapters.lora(layers=[9]))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layers", [4, 6])
def test_in_every_family(family, way, layers):
    of = outline(family, layers)
    for mine in (of.units, late(of, layers), of.units[::3]):
        count, _ = real(family, layers, WAYS[way], mine)
        same(footprint(of, WAYS[way], mine, rows=ROWS, tokens=TOKENS).step, count)


@pytest.mark.parametrize("way", ["forward", "in chunks", "exact top"])
def test_tangents_that_are_used_again_are_foretold(way, monkeypatch):
    """Large ones come from the engine's pool, which looks at who else holds a buffer."""
    of = outline("llama", 4)
    monkeypatch.setattr(sys.modules[__name__], "ROWS", 16)
    monkeypatch.setattr(sys.modules[__name__], "TOKENS", 128)
    count, _ = real("llama", 4, WAYS[way], of.units)
    same(footprint(of, WAYS[way], rows=16, tokens=128).step, count)


def test_directions_one_by_one_through_a_cut_hold_the_tangents_of_one():
    """What more of them hold is the directions themselves, and one more copy while they are drawn."""
    of = outline("roberta", 4)
    d = 4 * sum(unit.size for unit in of.units)
    one, eight, at_once = (
        real("roberta", 4, forward(k, head="exact", chunk=chunk), of.units)[0] for k, chunk in ((1, 0), (8, 1), (8, 0))
    )
    assert eight < one + 2 * 8 * d < at_once


@pytest.mark.parametrize("r", [1, 32])  # with many values the update holds most
@pytest.mark.parametrize("way", ["backprop", "checkpointed", "exact head"])
def test_in_pieces(way, r):
    adapter = adapters.lora(r)
    of = outline("roberta", 4, adapter=adapter)
    count, _ = real("roberta", 4, WAYS[way], of.units, micro_batch=1, adapter=adapter)
    found = footprint(of, WAYS[way], rows=ROWS, tokens=TOKENS, micro_batch=1)
    same(found.step, count)
    whole = footprint(of, WAYS[way], rows=ROWS, tokens=TOKENS).step
    assert found.step < whole or (r > 1 and found.step == whole)


def test_packed_matrices_count_as_their_codec_says():
    pytest.importorskip("bitsandbytes")
    of = outline("llama", 4, "4bit")
    count, _ = real("llama", 4, WAYS["forward"], of.units, precision="4bit")
    same(footprint(of, WAYS["forward"], rows=ROWS, tokens=TOKENS).step, count)
    shapes = [(64, 64)] * 2 + [(32, 64)] * 2 + [(176, 64)] * 2 + [(64, 176)]
    assert of.blocks == (sum(nbytes("4bit", shape) for shape in shapes),) * 4
    norms = 4 * 64 * (2 * 4 + 1)
    rotary = held(of).backbone - sum(of.blocks) - norms
    assert 0 <= rotary < 1000 + 4 * 64 * 2  # its table, and the head as it came


def test_streaming_leaves_two_blocks():
    of = outline("llama", 6, "bfloat16")
    whole, streamed = held(of), held(of, stream=True)
    assert whole.backbone - streamed.backbone == sum(of.blocks)
    assert streamed.buffers == 2 * of.blocks[0]
    with pytest.raises(ValueError, match="not packed"):
        held(outline("llama", 2), stream=True)


def test_parts_are_what_they_say():
    of = outline("roberta", 4)
    d = 4 * sum(unit.size for unit in of.units)
    plain = footprint(of, WAYS["backprop"], rows=ROWS, tokens=TOKENS)
    assert plain.tangents == 0
    assert plain.gradients == pytest.approx(3 * d, abs=500)  # the gradient and AdamW's two moments
    assert plain.adapters == 2 * d
    spry, four = (footprint(of, forward(k), rows=ROWS, tokens=TOKENS) for k in (1, 4))
    assert spry.activations == four.activations < plain.activations
    assert 0 < spry.tangents < four.tangents
    assert footprint(of, forward(4), rows=ROWS, tokens=TOKENS, parts=False).total == four.total
    plain_model = models.empty(config("roberta", 4), TASK)
    values = {id(v): v.nbytes for v in (*plain_model.parameters(), *plain_model.buffers())}
    assert plain.backbone == sum(values.values())


def test_no_phantom_is_left_behind():
    of = outline("bert", 2)
    footprint(of, forward(), rows=2, tokens=8)
    like = {"a": torch.zeros(3000)}
    assert noise.direction(7, like)["a"].abs().sum() > 0
    assert type(noise.direction(7, like)["a"]) is torch.Tensor


def test_numbers_that_cannot_be():
    of = outline("bert", 2)
    with pytest.raises(ValueError, match="rows = 0"):
        footprint(of, forward(), rows=0, tokens=8)
    with pytest.raises(ValueError, match="cut below the last 3 blocks"):
        footprint(of, forward(exact_top=3), rows=2, tokens=8)
    with pytest.raises(ValueError, match=next(iter(CODECS))):
        outline("bert", 2, "3bit")


@pytest.mark.slow
def test_a_process_is_measured():
    assert 50e6 < process() < 2e9
