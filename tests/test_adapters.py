"""Units, saved adapters and the loss function on small random models of six families."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from jvp.families import FAMILIES, enliven
from peft import PeftModel

from spryfl import adapters, models
from spryfl.estimators import backprop, forward
from spryfl.noise import direction

HERE = ("bert", "roberta", "distilbert", "albert", "opt", "gpt2")
# PEFT asks transformers for a name that is on its way out; where this package opens a model, it keeps that quiet.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
LABELS = ("no", "perhaps", "yes")
LAYERS = 2
# family -> (prefix of a layer, names of its LoRA units, the head's units)
UNITS = {
    "bert": ("bert.encoder.layer.{}.", ["attention.self.query", "attention.self.value"], ["classifier"]),
    "roberta": (
        "roberta.encoder.layer.{}.",
        ["attention.self.query", "attention.self.value"],
        ["classifier.dense", "classifier.out_proj"],
    ),
    "distilbert": (
        "distilbert.transformer.layer.{}.",
        ["attention.q_lin", "attention.v_lin"],
        ["pre_classifier", "classifier"],
    ),
    "opt": ("model.decoder.layers.{}.", ["self_attn.v_proj", "self_attn.q_proj"], ["score"]),
    "gpt2": ("transformer.h.{}.", ["attn.c_attn"], ["score"]),
}
ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention."


# family -> what its defaults, meant for wide models, must be on a model 16 wide
NARROW = {"vb_lora": {"length": 4}, "lora_xs": {"r": 3}, "vera": {"r": 12}}


def built(kind, **options):
    """The adapter of a family, small."""
    return adapters.ADAPTERS[kind](**{**NARROW.get(kind, {}), **options})


class Pad:
    """What `settled` and `prepare` ask of a tokenizer."""

    pad_token_id = 1


def base(family, dropout=0.0):
    """The same small float32 model at every call."""
    name, sizes, *_ = FAMILIES[family]
    noisy = {"albert": {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}}
    rates = {
        "bert": noisy["albert"],
        "roberta": noisy["albert"],
        "distilbert": {"dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": dropout},
        "opt": {"dropout": dropout, "attention_dropout": dropout},
        "gpt2": {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout},
        **noisy,
    }
    torch.manual_seed(3)
    config = getattr(hf, f"{name}Config")(**{**sizes, **rates[family]})
    return enliven(getattr(hf, f"{name}ForSequenceClassification")(config)).eval()


def prepared(family, adapter=None, dropout=0.0):
    module = models.settled(base(family, dropout), Pad())
    return models.prepare(module, Pad(), LABELS, adapter or adapters.lora(), seed=1)


def moved(model):
    """Values away from their start, so that B is not zero."""
    g = torch.Generator().manual_seed(5)
    return {name: value + 0.3 * torch.randn(value.shape, generator=g) for name, value in model.params.items()}


def batch():
    g = torch.Generator().manual_seed(7)
    ids = torch.randint(4, 60, (3, 11), generator=g)
    mask = torch.ones_like(ids)
    ids[1, 7:], mask[1, 7:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}


def names(units, head):
    return [unit.name for unit in units if unit.head is head]


def gradient(loss, params):
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    found = torch.autograd.grad(loss(leaves), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def along(term, true):
    """<gradient, v> for the direction v of a term."""
    v = direction(term.seed, {name: true[name] for name in term.block}, term.distribution)
    return sum(float((true[name] * value).sum()) for name, value in v.items())


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


class TestUnits:
    @pytest.mark.parametrize("family", UNITS)
    def test_lora_makes_one_unit_of_each_adapted_map_in_model_order(self, family):
        prefix, maps, head = UNITS[family]
        units = prepared(family).units
        assert names(units, head=False) == [prefix.format(i) + one for i in range(LAYERS) for one in maps]
        assert names(units, head=True) == head
        assert all(len(unit.params) == 2 for unit in units if not unit.head)

    def test_layers_that_share_weights_share_the_unit(self):
        units = prepared("albert").units
        assert names(units, head=False) == [ALBERT + "query", ALBERT + "value"]
        assert names(units, head=True) == ["classifier"]

    @pytest.mark.parametrize("family", HERE)
    @pytest.mark.parametrize("kind", adapters.ADAPTERS)
    def test_every_value_is_in_exactly_one_unit(self, family, kind):
        model = prepared(family, built(kind))
        listed = [name for unit in model.units for name in unit.params]
        assert sorted(listed) == sorted(model.params)
        assert len(set(listed)) == len(listed)
        assert all(unit.size == sum(model.params[n].numel() for n in unit.params) for unit in model.units)
        assert all(value.dtype == torch.float32 for value in model.params.values())
        assert not any(value.requires_grad for value in model.module.parameters())
        assert any(unit.head for unit in model.units)

    @pytest.mark.parametrize("family", HERE)
    def test_lora_starts_as_the_model_it_is_put_on(self, family):
        model, plain = prepared(family), base(family)
        assert all(not value.any() for name, value in model.params.items() if "lora_B" in name)
        inputs = {name: value for name, value in batch().items() if name != "labels"}
        with torch.no_grad():
            assert torch.equal(models.logits(model, model.params, batch()), plain(**inputs).logits)

    def test_targets_and_layers_are_chosen(self):
        model = prepared("bert", adapters.lora(r=2, targets=("key", "output.dense"), layers=(0,)))
        prefix = "bert.encoder.layer.0."
        ends = ["attention.self.key", "attention.output.dense", "output.dense"]
        assert names(model.units, head=False) == [prefix + end for end in ends]
        assert all(model.params[n].shape[0] == 2 for unit in model.units for n in unit.params if "lora_A" in n)

    def test_ia3_makes_one_unit_of_each_vector(self):
        model = prepared("bert", adapters.ia3(("key", "value", "output.dense"), ("output.dense",)))
        units = [unit for unit in model.units if not unit.head]
        assert len(units) == 4 * LAYERS
        assert all(len(unit.params) == 1 for unit in units)
        sizes = {u.name.rpartition(".")[0].rpartition(".")[2]: u.size for u in units if u.name.endswith("dense")}
        assert sizes == {"output": 24}  # the factor on the inputs; the attention's own output has 16
        assert all(bool((model.params[n] == 1).all()) for unit in units for n in unit.params)

    def test_bitfit_makes_one_unit_of_each_layers_biases(self):
        model = prepared("bert", adapters.bitfit())
        layers = [name for name in names(model.units, head=False) if ".layer." in name]
        assert layers == [f"bert.encoder.layer.{i}" for i in range(LAYERS)]
        assert all(name.endswith("bias") for unit in model.units if not unit.head for name in unit.params)
        biases = {name for name, _ in base("bert").named_parameters() if name.endswith("bias") and "bert" in name}
        assert len([n for unit in model.units if not unit.head for n in unit.params]) == len(biases)

    def test_the_head_alone(self):
        model = prepared("roberta", adapters.head())
        assert names(model.units, head=False) == []
        assert names(model.units, head=True) == ["classifier.dense", "classifier.out_proj"]

    @pytest.mark.parametrize("make", [adapters.lora, adapters.ia3])
    def test_missing_targets_are_answered_with_what_is_there(self, make):
        said = r"\['nope'\].*OPTFor.* 2 layers.*: k_proj, v_proj, q_proj, out_proj, fc1, fc2"
        with pytest.raises(ValueError, match=said) as error:
            prepared("opt", make(targets=("nope",)))
        assert "\n" not in str(error.value)

    def test_layers_that_are_not_there(self):
        with pytest.raises(ValueError, match=r"layers \[7\]"):
            prepared("bert", adapters.lora(targets=("query",), layers=(7,)))

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"targets": ("query", "nope")}, r"targets \['nope'\]"),
            ({"targets": ("query",), "layers": (1, 7)}, r"layers \[7\]"),
        ],
    )
    def test_a_target_without_effect_is_an_error(self, options, said):
        with pytest.raises(ValueError, match=said):
            prepared("bert", adapters.lora(**options))

    @pytest.mark.parametrize(("options", "said"), [({"r": 0}, "r = 0"), ({"dropout": 1.0}, "dropout = 1.0")])
    def test_options_of_lora_are_checked(self, options, said):
        with pytest.raises(ValueError, match=said):
            adapters.lora(**options)

    def test_options_of_ia3_are_checked(self):
        with pytest.raises(ValueError, match="must be among targets"):
            adapters.ia3(("key",), ("fc1",))


class TestSaved:
    @pytest.mark.parametrize("family", HERE)
    @pytest.mark.parametrize("kind", adapters.ADAPTERS)
    def test_peft_reads_back_the_same_logits_and_head(self, family, kind, tmp_path):
        model = prepared(family, built(kind))
        values = moved(model)
        expected = models.logits(model, values, batch())
        models.save_adapter(model, values, tmp_path, {"labels": LABELS})
        read = PeftModel.from_pretrained(base(family), str(tmp_path)).eval()
        inputs = {name: value for name, value in batch().items() if name != "labels"}
        with torch.inference_mode():
            assert torch.equal(read(**inputs).logits, expected)
        with torch.no_grad():
            assert not torch.equal(base(family)(**inputs).logits, expected)
        assert json.loads((tmp_path / models.CARD).read_text())["labels"] == list(LABELS)

    @pytest.mark.parametrize("kind", adapters.ADAPTERS)
    def test_a_saved_adapter_is_a_start(self, kind, tmp_path):
        model = prepared("roberta", built(kind))
        values = moved(model)
        models.save_adapter(model, values, tmp_path, {})
        again = prepared("roberta", str(tmp_path))
        assert again.units == model.units
        assert same(again.params, values)

    def test_saving_moves_no_value_and_asks_no_network(self, tmp_path, monkeypatch, recwarn, capsys):
        def refuse(*args, **kwargs):
            raise AssertionError("the network was asked")

        monkeypatch.setattr("socket.socket.connect", refuse)
        monkeypatch.setattr("socket.getaddrinfo", refuse)
        model = prepared("bert")._replace(source="somebody/some-model")
        before = {name: value.clone() for name, value in model.module.state_dict().items()}
        models.save_adapter(model, moved(model), tmp_path, {})
        assert same(model.module.state_dict(), before)
        assert not recwarn.list
        assert capsys.readouterr() == ("", "")
        assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == (
            "somebody/some-model"
        )

    def test_carry_writes_values_into_the_module(self):
        model = prepared("bert")
        values = moved(model)
        models.carry(model, values)
        inputs = {name: value for name, value in batch().items() if name != "labels"}
        with torch.inference_mode():
            assert torch.equal(model.module(**inputs).logits, models.logits(model, values, batch()))


class TestLoss:
    @pytest.mark.parametrize("family", HERE)
    def test_the_parts_of_a_cut_are_the_whole(self, family):
        model = prepared(family)
        loss, values = models.loss_fn(model, {}), moved(model)
        trunk, head = loss.cut(batch())
        torch.testing.assert_close(head(values, trunk(values)), loss(values, batch()), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("family", HERE)
    def test_the_loss_is_the_models_own(self, family):
        model = prepared(family)
        with torch.no_grad():
            theirs = base(family)(**batch()).loss
        torch.testing.assert_close(models.loss_fn(model, {})(model.params, batch()).detach(), theirs)

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    @pytest.mark.parametrize("family", HERE)
    def test_checkpointing_changes_no_gradient(self, family, dropout):
        model = prepared(family, dropout=dropout)
        loss, values = models.loss_fn(model, {}, dropout=bool(dropout)), moved(model)
        plain = gradient(lambda p: loss(p, batch(), 11), values)
        again = gradient(lambda p: loss.checkpointed(p, batch(), 11), values)
        assert all(bool(torch.isfinite(value).all()) for value in plain.values())
        assert same(plain, again)

    @pytest.mark.parametrize("family", HERE)
    def test_checkpointing_computes_a_block_twice(self, family):
        model, calls = prepared(family), []
        layers = next(m for m in model.module.modules() if isinstance(m, torch.nn.ModuleList))
        norm = next(m for m in layers.modules() if isinstance(m, torch.nn.LayerNorm))
        norm.register_forward_pre_hook(lambda *_: calls.append(1))
        loss = models.loss_fn(model, {})
        gradient(lambda p: loss(p, batch()), model.params)
        plain = len(calls)
        gradient(lambda p: loss.checkpointed(p, batch()), model.params)
        assert len(calls) == 3 * plain

    @pytest.mark.parametrize("family", HERE)
    def test_a_seed_is_a_mask(self, family):
        model = prepared(family, dropout=0.3)
        loss, off = models.loss_fn(model, {}, dropout=True), models.loss_fn(model, {})
        values = moved(model)
        at = [float(loss(values, batch(), seed)) for seed in (1, 1, 2)]
        assert at[0] == at[1] != at[2]
        assert float(loss(values, batch())) == float(off(values, batch(), 1)) == float(off(values, batch(), 2))
        trunk, head = loss.cut(batch(), 4)
        assert float(head(values, trunk(values))) == float(head(values, trunk(values)))

    @pytest.mark.parametrize("family", HERE)
    def test_nothing_of_the_module_or_the_generators_is_moved(self, family):
        model = prepared(family, dropout=0.3)
        loss, values = models.loss_fn(model, {}, dropout=True), moved(model)
        before = {name: value.clone() for name, value in model.module.state_dict().items()}
        kept, state = {n: v.clone() for n, v in values.items()}, torch.get_rng_state()
        loss(values, batch(), 1)
        gradient(lambda p: loss.checkpointed(p, batch(), 1), values)
        for estimate in (backprop(), forward(exact_head=True), forward()):
            estimate(loss, values, batch(), 1)
        assert same(model.module.state_dict(), before)
        assert same(values, kept)
        assert torch.equal(torch.get_rng_state(), state)
        for module in model.module.modules():
            assert not module.training
            assert "forward" not in vars(module)
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())

    def test_an_error_inside_leaves_the_module_as_it_was(self):
        model = prepared("bert", dropout=0.3)
        loss = models.loss_fn(model, {}, dropout=True)
        broken = {**batch(), "input_ids": torch.full((3, 11), 10_000)}
        state = torch.get_rng_state()
        for call in (loss, loss.checkpointed, lambda p, b, s: loss.cut(b, s).trunk(p)):
            with pytest.raises(IndexError):
                call(model.params, broken, 3)
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(m.training or "forward" in vars(m) or m._forward_hooks for m in model.module.modules())

    def test_fixed_values_take_part_and_are_not_trained(self):
        model = prepared("bert")
        values = moved(model)
        mine = {name: value for name, value in values.items() if "lora" in name}
        fixed = {name: value for name, value in values.items() if name not in mine}
        torch.testing.assert_close(
            models.loss_fn(model, fixed)(mine, batch()), models.loss_fn(model, {})(values, batch()), rtol=0, atol=0
        )


class TestEstimates:
    @pytest.mark.parametrize("family", HERE)
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_terms_are_the_gradient_along_their_direction(self, family, dropout):
        model = prepared(family, dropout=dropout)
        loss, values = models.loss_fn(model, {}, dropout=bool(dropout)), moved(model)
        made = forward(directions=3)(loss, values, batch(), 9)
        true = gradient(lambda p: loss(p, batch(), 9), values)
        assert len(made.terms) == 3
        assert not made.dense
        for term in made.terms:
            assert 3 * term.coefficient == pytest.approx(along(term, true), rel=1e-3, abs=1e-4)

    @pytest.mark.parametrize("family", HERE)
    def test_an_exact_head_is_autograds(self, family):
        model = prepared(family)
        loss, values = models.loss_fn(model, {}), moved(model)
        made = forward(directions=2, exact_head=True)(loss, values, batch(), 9)
        true = gradient(lambda p: loss(p, batch()), values)
        assert set(made.dense) == loss.head
        for name in loss.head:
            torch.testing.assert_close(made.dense[name], true[name], rtol=1e-4, atol=1e-5)
        for term in made.terms:
            assert not loss.head.intersection(term.block)
            assert 2 * term.coefficient == pytest.approx(along(term, true), rel=1e-3, abs=1e-4)

    @pytest.mark.parametrize("family", HERE)
    def test_backprop_is_autograds(self, family):
        model = prepared(family)
        loss, values = models.loss_fn(model, {}), moved(model)
        true = gradient(lambda p: loss(p, batch()), values)
        assert same(backprop()(loss, values, batch(), 0).dense, true)
        assert same(backprop(checkpoint=True)(loss, values, batch(), 0).dense, true)
