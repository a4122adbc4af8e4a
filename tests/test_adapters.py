"""Units, saved adapters and the loss function on small random models of six families."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers as hf
from jvp.families import FAMILIES, enliven, loss_of
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from spryfl import adapters, cli, journal, models
from spryfl.adapters import core
from spryfl.estimators import backprop, forward
from spryfl.jvp import jvp
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
MAPS = UNITS["bert"][1]
ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention."


# family -> what its defaults, meant for wide models, must be on a model 16 wide
NARROW = {"vb_lora": {"length": 4}, "lora_xs": {"r": 3}, "graded": {"r": 1, "core": 3}, "vera": {"r": 12}}


# families of which neither A nor B can be 0
OFF_BASE = {"uni_lora", "vb_lora"}
SHARED = {
    "uni_lora": {"unilora_theta_d": 256},
    "vb_lora": {"vblora_vector_bank": 16 * 4},
}
# values of a LoRA-like adapter on one map of 16 inputs and 16 outputs, by the definition of each
A_MAP = {
    "lora": 16 + 16,
    "lora_fa": 16,
    "lora_xs": 3 * 3,
    "vera": 12 + 16,
    "tiny_lora": 16,
    "vb_lora": 2 * (4 + 4) * 16,
    "fourierft": 100,
}
FLOAT32_INSIDE = {"llama"}  # its norm computes in float32; so does FourierFT


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
    config = getattr(hf, f"{name}Config")(**{**sizes, **rates.get(family, {})})
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


def close(one, other):
    """Equal to float32 rounding, of the largest entry."""
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * max(1.0, float(other.abs().max())))


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

    @pytest.mark.parametrize("family", HERE)
    @pytest.mark.parametrize("kind", sorted(adapters.ADAPTERS.keys() - OFF_BASE))
    def test_every_other_starts_as_the_model_it_is_put_on(self, family, kind):
        exact = {"std": 0.0} if kind in ("lora_xs", "graded") else {}
        model, plain = prepared(family, built(kind, **exact)), base(family)
        inputs = {name: value for name, value in batch().items() if name != "labels"}
        with torch.no_grad():
            assert torch.equal(models.logits(model, model.params, batch()), plain(**inputs).logits)

    @pytest.mark.parametrize("kind", adapters.ADAPTERS)
    def test_equal_seeds_make_equal_adapters(self, kind):
        one, other = prepared("bert", built(kind)), prepared("bert", built(kind))
        assert same(one.params, other.params)
        assert same(one.module.state_dict(), other.module.state_dict())  # what is fixed, too

    @pytest.mark.parametrize("kind", A_MAP)
    def test_a_map_has_so_many_values(self, kind):
        units = prepared("bert", built(kind)).units
        maps = [unit for unit in units if not unit.head and unit.name not in SHARED.get(kind, {})]
        assert [unit.name for unit in maps] == [UNITS["bert"][0].format(i) + one for i in range(LAYERS) for one in MAPS]
        assert {unit.size for unit in maps} == {A_MAP[kind]}

    @pytest.mark.parametrize("kind", SHARED)
    def test_a_shared_value_is_one_unit_and_is_counted_once(self, kind):
        units = prepared("bert", built(kind)).units
        assert {u.name: u.size for u in units if u.name in SHARED[kind]} == SHARED[kind]

    def test_a_tied_vector_is_one_unit(self):
        model = prepared("bert", built("tiny_lora", tying=1.0, u=5))
        assert [(u.name, u.size) for u in model.units if not u.head] == [("tinylora_v.0", 5)]

    @pytest.mark.parametrize("kind", [*SHARED, "tiny_lora"])
    def test_a_shared_value_acts_in_every_map(self, kind):
        """Its derivative is the sum of those by the maps: where the layers from one on are cut off, it differs."""
        options = {"tying": 1.0} if kind == "tiny_lora" else {}
        whole, part = prepared("bert", built(kind, **options)), prepared("bert", built(kind, layers=(0,), **options))
        name = next(n for n in whole.params if n.endswith(("theta_d.default", "bank.default", "v.default.0")))
        found = [gradient(lambda p, m=m: models.loss_fn(m, {})(p, batch()), moved(m))[name] for m in (whole, part)]
        assert bool(found[0].any())
        assert not torch.allclose(*found)

    @pytest.mark.parametrize("kind", sorted(adapters.ADAPTERS.keys() - {"ia3", "bitfit", "head"}))
    def test_every_family_of_maps_chooses_targets_and_layers(self, kind):
        more = {"cores": (1,)} if kind == "graded" else {}
        model = prepared("bert", built(kind, targets=("key",), layers=(1,), **more))
        found = model.module.base_model.targeted_module_names
        assert found == ["bert.encoder.layer.1.attention.self.key"]
        with pytest.raises(ValueError, match=r"\['nope'\].*BertFor.*query, key, value, dense"):
            prepared("bert", built(kind, targets=("nope",)))

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

    @pytest.mark.parametrize(
        ("kind", "options", "said"),
        [
            ("lora_fa", {"r": 0}, "r = 0 of lora_fa"),
            ("lora_fa", {"dropout": -0.1}, "dropout = -0.1 of lora_fa"),
            ("lora_xs", {"r": -1}, "r = -1 of lora_xs"),
            ("lora_xs", {"std": -1.0}, "std = -1.0"),
            ("graded", {"core": 0}, "core = 0 of graded"),
            ("graded", {"std": -1.0}, "std = -1.0 of graded"),
            ("graded", {"cores": ()}, "cores = \\[\\] of graded"),
            ("graded", {"cores": (0, 2), "layers": (1, 2)}, "each among `layers`"),
            ("vera", {"seed": -1}, "seed = -1 of vera; it must be 0 or more"),
            ("tiny_lora", {"u": 0}, "u = 0"),
            ("tiny_lora", {"tying": 1.5}, "tying = 1.5"),
            ("uni_lora", {"d": 0}, "d = 0"),
            ("uni_lora", {"bound": 0.0}, "bound = 0.0"),
            ("vb_lora", {"topk": 17}, "topk = 17.*vectors = 16"),
            ("fourierft", {"n": 0}, "n = 0"),
        ],
    )
    def test_options_are_checked_before_a_model_is_there(self, kind, options, said):
        with pytest.raises(ValueError, match=said):
            adapters.ADAPTERS[kind](**options)

    @pytest.mark.parametrize(
        ("kind", "options", "said"),
        [
            ("lora_xs", {"r": 17}, "r = 17 of lora_xs is more than the 16 of .*query"),
            ("vb_lora", {"length": 5}, "does not fit BertFor.*must be divisible"),
            ("fourierft", {"n": 257}, "does not fit BertFor.*256"),
            ("lora_xs", {"targets": ("word_embeddings",)}, "plain matrix; Embedding has none"),
        ],
    )
    def test_options_that_do_not_fit_the_model(self, kind, options, said):
        with pytest.raises(ValueError, match=said) as error:
            prepared("bert", built(kind, **options))
        assert "\n" not in str(error.value)

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

    @pytest.mark.parametrize("family", ["bert", "gpt2"])
    @pytest.mark.parametrize("kind", adapters.ADAPTERS)
    def test_merged_it_is_the_same_model(self, kind, family, tmp_path):
        model = prepared(family, built(kind))
        values = moved(model)
        models.save_adapter(model, values, tmp_path, {})
        merged = PeftModel.from_pretrained(base(family), str(tmp_path)).merge_and_unload().eval()
        inputs = {name: value for name, value in batch().items() if name != "labels"}
        with torch.no_grad():
            close(merged(**inputs).logits, models.logits(model, values, batch()))

    @pytest.mark.parametrize("family", HERE)
    @pytest.mark.parametrize("kind", adapters.ADAPTERS)
    def test_training_goes_on_where_it_was(self, kind, family, tmp_path):
        model = prepared(family, built(kind))
        values = moved(model)
        models.save_adapter(model, values, tmp_path, {})
        again = prepared(family, str(tmp_path))
        assert again.units == model.units
        assert same(again.params, values)
        one, other = (gradient(lambda p, m=m: models.loss_fn(m, {})(p, batch()), values) for m in (model, again))
        assert same(one, other)

    @pytest.mark.parametrize("kind", adapters.ADAPTERS)
    def test_carried_values_are_saved_by_peft_itself(self, kind, tmp_path):
        """What the README says: history.model.module.save_pretrained(folder)."""
        model = prepared("bert", built(kind))
        values = moved(model)
        models.carry(model, values)
        model.module.save_pretrained(str(tmp_path))
        read = PeftModel.from_pretrained(base("bert"), str(tmp_path)).eval()
        inputs = {name: value for name, value in batch().items() if name != "labels"}
        with torch.inference_mode():
            assert torch.equal(read(**inputs).logits, models.logits(model, values, batch()))

    @pytest.mark.parametrize("kind", ["lora_xs", "lora_fa", "graded"])
    def test_a_folder_that_was_changed_since(self, kind, tmp_path):
        """Trained on as a plain LoRA, it is one; without the note beside it, it opens as one."""
        model = prepared("bert", built(kind))
        models.save_adapter(model, moved(model), tmp_path, {})
        other = PeftModel.from_pretrained(base("bert"), str(tmp_path), is_trainable=True)
        for name, value in other.named_parameters():
            value.data += 0.5 * ("lora_B" in name)
        other.save_pretrained(str(tmp_path))
        with pytest.raises(ValueError, match=r"was changed after trained.safetensors .* remove trained.safetensors"):
            prepared("bert", str(tmp_path))
        (tmp_path / adapters.TRAINED).unlink()
        assert all(len(unit.params) == 2 for unit in prepared("bert", str(tmp_path)).units if not unit.head)

    def test_the_note_of_another_adapter_goes(self, tmp_path):
        for kind in ("lora_fa", "lora"):
            model = prepared("bert", built(kind))
            models.save_adapter(model, moved(model), tmp_path, {})
        assert prepared("bert", str(tmp_path)).units == model.units


class TestGraded:
    """LoRA-XS in the named layers, LoRA in the others, each as the family it is of."""

    def test_each_layer_is_as_its_family_makes_it(self):
        options = {"core": 3, "core_alpha": 6.0, "cores": (1,), "std": 0.0, "targets": ("query",)}
        graded = prepared("bert", adapters.graded(2, 4.0, **options))
        own = {unit.name: unit.size for unit in graded.units if not unit.head}
        assert list(own.values()) == [2 * (16 + 16), 3 * 3]
        lora = prepared("bert", adapters.lora(r=2, alpha=4.0, targets=("query",), layers=(0,)))
        cores = prepared("bert", adapters.lora_xs(r=3, alpha=6.0, targets=("query",), layers=(1,)))
        values = moved(graded)
        for other, layer in ((lora, 0), (cores, 1)):
            still = {n: v if f"layer.{layer}." in n or "lora_" not in n else 0 * v for n, v in values.items()}
            a = {name: still[name] for name in other.params}
            torch.testing.assert_close(models.logits(graded, still, batch()), models.logits(other, a, batch()))

    def test_layers_may_be_counted_from_the_end(self, tmp_path):
        front = prepared("bert", adapters.graded(1, core=2, cores=(LAYERS - 2,), layers=(LAYERS - 2, LAYERS - 1)))
        end = prepared("bert", adapters.graded(1, core=2, cores=(-2,), layers=(-2, -1)))
        assert front.units == end.units
        models.save_adapter(end, moved(end), tmp_path, {})
        assert prepared("bert", str(tmp_path)).units == end.units

    def test_another_pattern_of_ranks_is_left_as_it_is(self):
        own = adapters.Adapter(lambda head: LoraConfig(r=2, rank_pattern={"query": 3}, modules_to_save=list(head)))
        assert {unit.size for unit in prepared("bert", own).units if not unit.head} == {3 * 32, 2 * 32}

    def test_a_layer_that_the_model_lacks(self):
        with pytest.raises(ValueError, match=r"found nothing for layers \[7\]"):
            prepared("bert", adapters.graded(r=1, core=2, cores=(7,)))


class TestLoraXs:
    """W x + (alpha/r) U S R V^T x, against torch.linalg.svd."""

    def made(self, family="bert", **options):
        model = prepared(family, adapters.lora_xs(r=3, alpha=6.0, **options))
        return model, moved(model)

    @pytest.mark.parametrize(
        ("family", "path"), [("bert", "encoder.layer.1.attention.self.value"), ("gpt2", "h.0.attn.c_attn")]
    )
    def test_its_update_is_the_definitions(self, family, path, tmp_path):
        model, values = self.made(family)
        models.save_adapter(model, values, tmp_path, {})
        read = PeftModel.from_pretrained(base(family), str(tmp_path)).base_model.model.base_model.get_submodule(path)
        weight = read.get_base_layer().weight.detach()
        weight = weight.T if family == "gpt2" else weight
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        core_value = next(value for name, value in values.items() if f"{path}.lora_B" in name)
        sign = torch.diag(
            (vh[:3] * read.lora_A.default.weight.detach()).sum(1)
        )  # of each vector; they are unique but for it
        torch.testing.assert_close(sign.abs(), torch.eye(3), rtol=0, atol=1e-4)
        update = 2.0 * (u[:, :3] * s[:3]) @ sign @ core_value @ sign @ vh[:3]
        found = read.get_delta_weight("default").detach()
        close(found.T if family == "gpt2" else found, update)

    def test_it_is_saved_as_a_plain_lora_of_rank_r(self, tmp_path):
        model, values = self.made()
        models.save_adapter(model, values, tmp_path, {})
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6.0)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert {n.rpartition("lora_")[2] for n in saved if "lora_" in n} == {"A.weight", "B.weight"}
        assert set(load_file(tmp_path / adapters.TRAINED)) == {name for name in values if "lora_" in name}

    def test_r_starts_small_and_random(self):
        model = prepared("bert", adapters.lora_xs(r=16))
        cores = torch.cat([value.flatten() for name, value in model.params.items() if "lora_B" in name])
        assert float(cores.std()) == pytest.approx(1e-5, rel=0.1)

    def test_it_does_not_fit_another_base_model(self, tmp_path):
        model, values = self.made()
        models.save_adapter(model, values, tmp_path, {})
        other = models.settled(base("bert"), Pad())
        for value in other.parameters():
            value.data *= 1.1
        with pytest.raises(ValueError, match="belongs to another model"):
            models.prepare(other, Pad(), LABELS, str(tmp_path))

    def test_it_holds_no_second_copy_of_a_weight(self):
        model, _ = self.made()
        plain = sum(value.numel() for value in base("bert").parameters())
        held = {id(t): t.numel() for t in (*model.module.parameters(), *model.module.buffers())}
        maps = 2 * LAYERS
        head = sum(unit.size for unit in model.units if unit.head)
        others = sum(value.numel() for value in base("bert").buffers())
        assert sum(held.values()) == plain + others + head + maps * (3 * (16 + 16) + 3 * 3)

    @pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
    def test_the_randomised_decomposition_is_the_exact_one(self, shape, monkeypatch):
        u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        weight = (u * 0.8 ** torch.arange(60)) @ vh
        exact = core.leading(weight, 4)
        monkeypatch.setattr(core, "EXACT", 0)
        monkeypatch.setattr(core, "MORE", 8)  # fewer than there are, so that it is an approximation
        torch.testing.assert_close(core.leading(weight, 4), exact, rtol=0, atol=1e-4)

    def test_the_sign_of_a_singular_vector_is_fixed(self):
        weight = torch.randn(30, 20)
        rows = core.leading(weight, 5)
        torch.testing.assert_close(core.leading(-weight, 5), rows)
        assert bool((rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all())


class TestLoraFa:
    def test_b_alone_is_trained_and_a_is_lora_s(self):
        model, plain = prepared("bert", adapters.lora_fa(r=2)), prepared("bert", adapters.lora(r=2))
        assert all("lora_B" in name for unit in model.units if not unit.head for name in unit.params)
        state = model.module.state_dict()
        for name, value in plain.params.items():
            if "lora_A" in name:
                assert bool(value.any())
                assert torch.equal(state[name], value)

    def test_a_is_saved_with_it(self, tmp_path):
        model = prepared("bert", adapters.lora_fa(r=2))
        models.save_adapter(model, moved(model), tmp_path, {})
        saved = load_file(tmp_path / "adapter_model.safetensors")
        own = {name.replace(".default", ""): value for name, value in model.module.state_dict().items()}
        firsts = [name for name in saved if "lora_A" in name]
        assert len(firsts) == 2 * LAYERS
        assert all(torch.equal(saved[name], own[name]) for name in firsts)


class TestForwardMode:
    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
    @pytest.mark.parametrize("kind", adapters.ADAPTERS)
    def test_jvp_is_autograds_gradient_along_a_direction(self, family, kind):
        """In float64, every value of the adapter and the head perturbed in three directions."""
        model = prepared(family, built(kind))
        loss = loss_of(model.module.double(), batch())
        g = torch.Generator().manual_seed(5)
        values = {n: v.double() + 0.3 * torch.randn(v.shape, generator=g).double() for n, v in model.params.items()}
        along = {n: torch.randn(3, *v.shape, generator=g).double() for n, v in values.items()}
        true = gradient(loss, values)
        expected = sum((true[n] * along[n]).flatten(1).sum(1) for n in values)
        value, tangents = jvp(loss, values, along)
        exact = 1e-5 if family in FLOAT32_INSIDE or kind == "fourierft" else 1e-9
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(value, loss(values), rtol=exact, atol=exact)
        torch.testing.assert_close(tangents, expected, rtol=0, atol=exact * scale)
        assert all(bool(true[n].any()) for n in values)  # every value counts: a comparison of zeros proves nothing

    @pytest.mark.parametrize("kind", adapters.ADAPTERS)
    @pytest.mark.parametrize("options", [{"exact_head": True}, {"exact_top": 1}])
    def test_an_exact_part_is_autograds_and_the_rest_its_slope(self, kind, options):
        model = prepared("bert", built(kind, **({"tying": 0.5} if kind == "tiny_lora" else {})))
        loss, values = models.loss_fn(model, {}), moved(model)
        if "exact_top" in options and kind in SHARED:
            with pytest.raises(ValueError, match="is read below the cut and above it"):
                forward(**options)(loss, values, batch(), 9)
            return
        made = forward(directions=2, **options)(loss, values, batch(), 9)
        true = gradient(lambda p: loss(p, batch()), values)
        for name, value in made.dense.items():
            torch.testing.assert_close(value, true[name], rtol=1e-4, atol=1e-4)
        for term in made.terms:
            assert 2 * term.coefficient == pytest.approx(along(term, true), rel=2e-3, abs=2e-3)
        assert {*made.dense, *(name for term in made.terms for name in term.block)} == set(values)


class TestLoss:
    @pytest.mark.parametrize("family", HERE)
    def test_the_parts_of_a_cut_are_the_whole(self, family):
        model = prepared(family)
        loss, values = models.loss_fn(model, {}), moved(model)
        trunk, head, *_ = loss.cut(batch())
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

    @pytest.mark.parametrize("kind", adapters.ADAPTERS)
    def test_checkpointing_changes_no_gradient_of_any_adapter(self, kind):
        """A value that several blocks share is still the one passed in when a block is computed again."""
        model = prepared("bert", built(kind), dropout=0.3)
        loss, values = models.loss_fn(model, {}, dropout=True), moved(model)
        plain = gradient(lambda p: loss(p, batch(), 11), values)
        assert same(plain, gradient(lambda p: loss.checkpointed(p, batch(), 11), values))

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
        trunk, head, *_ = loss.cut(batch(), 4)
        assert float(head(values, trunk(values))) == float(head(values, trunk(values)))

    @pytest.mark.parametrize(
        ("family", "kind"), [*((f, "lora") for f in HERE), *(("bert", kind) for kind in adapters.ADAPTERS)]
    )
    def test_nothing_of_the_module_or_the_generators_is_moved(self, family, kind):
        model = prepared(family, built(kind), dropout=0.3)
        loss, values = models.loss_fn(model, {}, dropout=True), moved(model)
        before = {name: value.clone() for name, value in model.module.state_dict().items()}
        parameters = {name: (id(value), value._version) for name, value in model.module.named_parameters()}
        kept, state = {n: v.clone() for n, v in values.items()}, torch.get_rng_state()
        loss(values, batch(), 1)
        gradient(lambda p: loss.checkpointed(p, batch(), 1), values)
        for estimate in (backprop(), forward(exact_head=True), forward()):
            estimate(loss, values, batch(), 1)
        assert same(model.module.state_dict(), before)
        assert {name: (id(value), value._version) for name, value in model.module.named_parameters()} == parameters
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


class TestRuns:
    """`spryfl run --set adapter.kind=...`, `spryfl resume`, and a start from the folder they leave."""

    @pytest.mark.parametrize(
        "kind",
        [pytest.param(k, marks=[] if k in ("graded", "vb_lora") else pytest.mark.slow) for k in adapters.ADAPTERS],
    )
    def test_a_run_that_is_interrupted_goes_on_to_the_same_adapter(self, kind, tiny, reviews, tmp_path, monkeypatch):
        monkeypatch.setattr("spryfl.pictures.curves", lambda runs, path: None)
        words = ["--model", tiny, "--data", reviews, "--clients", 4, "--cohort", 2, "--rounds", 2, "--out", tmp_path]
        words += ["--set", "data.train_rows=40", "--set", "data.test_rows=20", "--set", "train.steps=2"]
        new = ["--set", f"adapter.kind={kind}", *{"vb_lora": ["--set", "adapter.length=16"]}.get(kind, [])]
        assert self.spryfl(monkeypatch, "run", *words, *new, "--name", "whole") == 0
        self.interrupted(monkeypatch, "run", *words, *new, "--name", "cut")
        whole, cut = tmp_path / "whole" / "adapter", tmp_path / "cut" / "adapter"
        assert not cut.exists()
        assert self.spryfl(monkeypatch, "resume", tmp_path / "cut") == 0
        assert {path.name: path.read_bytes() for path in cut.iterdir()} == {
            path.name: path.read_bytes() for path in whole.iterdir()
        }
        assert (cut / adapters.TRAINED).exists() == (kind in ("lora_fa", "lora_xs", "graded"))
        assert self.spryfl(monkeypatch, "run", *words, "--set", f"model.adapter={cut}", "--name", "on") == 0
        states = (journal.load(journal.open_folder(tmp_path / name), journal.NEWEST)[0] for name in ("whole", "on"))
        first, on = ({name: value.shape for name, value in state.params.items()} for state in states)
        assert list(first.items()) == list(on.items())

    @staticmethod
    def spryfl(monkeypatch, *arguments):
        """The command line in this process; its exit code."""
        monkeypatch.setattr(sys, "argv", ["spryfl", *(str(one) for one in arguments)])
        try:
            cli.main()
        except SystemExit as error:
            return error.code or 0
        return 0

    def interrupted(self, monkeypatch, *arguments):
        """The command, interrupted once the first round is saved."""
        keep = journal.save

        def save(opened, which, state, progress):
            keep(opened, which, state, progress)
            if state.round == 1 and which == journal.NEWEST:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(journal, "save", save)
            assert self.spryfl(patch, *arguments) != 0
