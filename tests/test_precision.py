"""Models that are not in float32 through and through: packed, in half precision, quantized by other libraries."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)
from transformers.pytorch_utils import Conv1D

import spryfl
from spryfl import adapters, firstbatch, models, tasks
from spryfl.backbone import Packed, adopt, pack, packed
from spryfl.estimators import backprop, forward
from spryfl.jvp import jvp
from spryfl.loss import ModelLoss
from spryfl.types import Directional, Estimate, Passes, Piece, Scalars

WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
CONFIGS = {
    "bert": BertConfig(vocab_size=50, **WIDE),
    "roberta": RobertaConfig(vocab_size=50, pad_token_id=1, **WIDE),
    "llama": LlamaConfig(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, **WIDE),
    "gpt2": GPT2Config(
        vocab_size=50, n_embd=64, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
}  # fmt: skip
SMALL = {
    "lora_xs": {"r": 4},
    "vera": {"r": 8},
    "uni_lora": {"d": 16},
    "vb_lora": {"length": 32},
    "fourierft": {"n": 10},
}
IDS = torch.arange(3, 35).view(2, 16)
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.tensor([0, 1])}


def opened(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS[kind]).eval()
    model.config.use_cache = False
    return model


def put_packed(model: nn.Module, precision: str) -> tuple[nn.Module, nn.Module]:
    """The model with every linear map of its trunk packed, and one with the decoded weights in ordinary maps."""
    other = copy.deepcopy(model)
    for name, layer in list(model.base_model.named_modules()):
        if isinstance(layer, nn.Linear | Conv1D):
            made = pack(layer, precision)
            plain = nn.Linear(made.in_features, made.out_features, bias=made.bias is not None)
            plain.load_state_dict({"weight": made.weight.clone(), **made.state_dict()})
            parent, _, last = name.rpartition(".")
            setattr(model.base_model.get_submodule(parent), last, made)
            setattr(other.base_model.get_submodule(parent), last, plain)
    return model, other


def adapted(model: nn.Module, family: str) -> tuple[ModelLoss, dict, dict]:
    """(loss, values away from their start, three directions), the same for models of the same shapes."""
    torch.manual_seed(1)
    made = adapters.wrap(model, adapters.build({"kind": family, **SMALL.get(family, {})}))
    head = frozenset(name for unit in made.units if unit.head for name in unit.params)
    loss = ModelLoss(made.module, head, {}, task=tasks.classification())
    params = {name: value + 0.05 * torch.randn_like(value) for name, value in made.params.items()}
    return loss, params, {name: torch.randn(3, *value.shape) for name, value in params.items()}


def along(gradient, directions):
    return torch.stack([sum((gradient[n] * d[k]).sum() for n, d in directions.items()) for k in range(3)])


COMBINATIONS = [("bert", family) for family in adapters.ADAPTERS]
COMBINATIONS += list(itertools.product(["llama", "gpt2"], ["lora", "lora_xs", "ia3"]))


@pytest.mark.parametrize(("kind", "family"), COMBINATIONS)
def test_every_adapter_goes_on_a_packed_model(kind, family, monkeypatch):
    """Loss, jvp, backprop and checkpointed backprop equal those of the decoded weights in ordinary layers."""
    monkeypatch.setattr(packed, "CHUNK", 1)
    sides = [adapted(model, family) for model in put_packed(opened(kind), "4bit")]
    assert sides[0][1].keys() == sides[1][1].keys()
    (loss, params, directions), (plain, same, _) = sides
    assert all(torch.equal(params[name], same[name]) for name in params)
    truth = backprop()(plain, same, BATCH, 0)
    for estimator in (backprop(), backprop(checkpoint=True)):
        found = estimator(loss, params, BATCH, 0)
        assert found.loss == pytest.approx(truth.loss, rel=1e-6)
        for name, value in truth.dense.items():
            torch.testing.assert_close(found.dense[name], value, rtol=1e-4, atol=1e-6)
    slopes = jvp(lambda p: loss(p, BATCH), params, directions)[1]
    torch.testing.assert_close(slopes, along(truth.dense, directions), rtol=1e-4, atol=1e-5)


def test_putting_an_adapter_on_decodes_nothing(monkeypatch):
    """PEFT looks at every target's weight, for its device and type: at 7B sizes that would be minutes."""
    model, _ = put_packed(opened("bert"), "4bit")
    decoded = []
    monkeypatch.setattr(packed.Matrix, "whole", lambda *_: decoded.append(1))
    for family in ("lora", "lora_fa", "vera", "ia3", "bitfit"):
        adapters.wrap(copy.deepcopy(model), adapters.build({"kind": family}))
    assert not decoded


def test_merging_an_adapter_into_a_packed_model_is_refused():
    model, _ = put_packed(opened("bert"), "4bit")
    made = adapters.wrap(model, adapters.lora())
    with pytest.raises(ValueError, match="nothing can be merged"):
        made.module.merge_and_unload()


@pytest.mark.parametrize(
    ("kind", "family", "dtype"),
    [
        *(("bert", one, torch.bfloat16) for one in adapters.ADAPTERS),
        *((kind, "lora", torch.bfloat16) for kind in ("roberta", "llama")),
        *(("bert", one, torch.float16) for one in ("lora", "bitfit")),
    ],
)
def test_half_precision_below_float32_adapters_and_head(kind, family, dtype):
    """Forward mode and both ways of backprop, to the precision of what lies below; loss and gradients are float32."""
    loss, params, directions = adapted(opened(kind).to(dtype), family)
    assert {value.dtype for value in params.values()} == {torch.float32}
    truth, again = (backprop(checkpoint=c)(loss, params, BATCH, 0) for c in (False, True))
    assert {value.dtype for value in truth.dense.values()} == {torch.float32}
    assert all(torch.equal(value, again.dense[name]) for name, value in truth.dense.items())
    value, slopes = jvp(lambda p: loss(p, BATCH), params, directions)
    assert value.dtype == torch.float32
    size = sum(float(g.square().sum()) for g in truth.dense.values()) ** 0.5
    torch.testing.assert_close(slopes, along(truth.dense, directions), rtol=0, atol=0.02 * size)
    exact = forward(exact_head=True)(loss, params, BATCH, 0)
    assert exact.loss == pytest.approx(float(value), rel=1e-2)


def test_half_precision_agrees_with_float32():
    wide, params, _ = adapted(opened("bert"), "lora")
    half, _, _ = adapted(opened("bert").bfloat16(), "lora")
    a, b = (backprop()(loss, params, BATCH, 0) for loss in (wide, half))
    assert a.loss == pytest.approx(b.loss, rel=1e-2)
    cosine = sum((a.dense[n] * b.dense[n]).sum() for n in params) / (
        along(a.dense, {n: g.unsqueeze(0).expand(3, *g.shape) for n, g in a.dense.items()})[0].sqrt()
        * along(b.dense, {n: g.unsqueeze(0).expand(3, *g.shape) for n, g in b.dense.items()})[0].sqrt()
    )
    assert cosine > 0.99


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny):
    """The folder of a BERT 64 wide, with the tokenizer of the tiny one."""
    folder = tmp_path_factory.mktemp("small-bert")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=len(tokenizer), **WIDE))
    for value in model.parameters():
        if value.dim() > 1:
            value.data.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantized(folder, config) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, quantization_config=config)


def bits(eight: bool = False, **options):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True) if eight else BitsAndBytesConfig(load_in_4bit=True, **options)


BITS = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {},
    "8": {"eight": True},
}


@pytest.mark.parametrize("options", BITS.values(), ids=BITS)
def test_what_bitsandbytes_quantized_is_taken_over_value_by_value(small, options):
    from peft.utils.integrations import dequantize_module_weight

    model = quantized(small, bits(**options))
    layer = model.bert.encoder.layer[1].intermediate.dense
    truth = dequantize_module_weight(layer).float()
    bias = layer.bias.detach().float()
    adopt(model)
    made = model.bert.encoder.layer[1].intermediate.dense
    assert isinstance(made, Packed)
    torch.testing.assert_close(made.weight.clone(), truth, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(made.bias, bias, rtol=0, atol=0)
    assert sum(part.nbytes for part in made.matrix.parts().values()) < truth.nbytes / (3 if "eight" in options else 6)


@pytest.mark.parametrize("double", [False, True])
def test_a_layer_that_ran_before_is_taken_over_too(small, double):
    """On some CPUs a first product puts the codes into another order, and rounds the scales to bfloat16."""
    model = quantized(small, bits(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double))
    fresh = adopt(copy.deepcopy(model)).bert.encoder.layer[0].output.dense.weight.clone()
    with torch.no_grad():
        model.eval().bert(input_ids=IDS % 20)
    found = adopt(model).bert.encoder.layer[0].output.dense.weight.clone()
    torch.testing.assert_close(found, fresh, rtol=2**-8, atol=0)


def test_other_blocks_are_refused():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(96, 8, quant_type="nf4")).to("cpu")
    with pytest.raises(ValueError, match="0 is quantized by bitsandbytes in blocks of 64, in rows of 96"):
        adopt(model)


@pytest.mark.parametrize(
    ("kind", "method"), [*((kind, "spry") for kind in ("bfloat16", *BITS)), ("bfloat16", "fedavg"), ("8", "fedavg")]
)
def test_finetune_takes_such_a_model(kind, method, small, reviews, tmp_path):
    if kind == "bfloat16":
        model = AutoModelForSequenceClassification.from_pretrained(small, num_labels=2, dtype=torch.bfloat16)
    else:
        model = quantized(small, bits(**BITS[kind]))
    made = spryfl.finetune(
        model, str(reviews), tokenizer=AutoTokenizer.from_pretrained(small), method=method,
        adapter={"kind": "lora", "targets": ["query", "value"]}, partition={"clients": 4},
        train={"rounds": 2, "cohort": 2, "batch_size": 4, "steps": 1}, folder=tmp_path / "run",
    )  # fmt: skip
    assert len(made.records) == 3
    assert all(torch.isfinite(value).all() for value in made.params.values())
    plain = made.model.module.get_base_model().classifier.modules_to_save["default"]
    assert type(plain) is nn.Linear
    assert plain.weight.dtype == torch.float32
    names = made.model.labels
    again = models.prepare(*models.load(str(small), names), names, str(tmp_path / "run" / "adapter"))
    assert all(torch.equal(again.params[name], value) for name, value in made.params.items())


@pytest.mark.parametrize("precision", ["8bit", "float32"])
def test_a_packed_head_is_made_an_ordinary_one_where_it_is_trained(precision):
    model = opened("bert")
    model.classifier = pack(model.classifier, precision)
    truth = model.classifier.weight.clone()
    made = adapters.wrap(model, adapters.head())
    assert torch.equal(made.params["base_model.model.classifier.modules_to_save.default.weight"], truth)


class Whole:
    def pieces(self, batch, seed=None):
        return (Piece(1.0, batch, seed, 0),)


class Staircase(Whole):
    """A loss that rounds: smooth at large, flat in the small."""

    def __call__(self, params, batch, seed=None):
        return ((params["w"] ** 2).sum() * 4).round() / 4


class Smooth(Whole):
    def __call__(self, params, batch, seed=None):
        return (params["w"] ** 2).sum()


def estimate(slope: float, dense=()) -> Estimate:
    term = Directional(3, slope, ("w",), "gaussian")
    if dense:
        return Estimate(1.0, dict(dense), passes=Passes(1, 0, 1))
    return Estimate(1.0, {}, (term,), Passes(1, 1, 0), Scalars(1, 0, 0, slope**2, abs(slope)))


def test_a_derivative_is_held_against_differences():
    from spryfl import noise

    params = {"w": torch.linspace(-1, 1, 7)}
    v = noise.direction(3, params)["w"]
    truth = float((2 * params["w"] * v).sum())
    firstbatch.check(estimate(truth), Smooth(), params, {})
    firstbatch.check(estimate(0, {"w": 2 * params["w"]}.items()), Smooth(), params, {})
    for wrong in (0.0, -truth, 1.5 * truth):
        with pytest.raises(ValueError, match="is lost on the way"):
            firstbatch.check(estimate(wrong), Smooth(), params, {})
    with pytest.raises(ValueError, match="is lost on the way"):
        firstbatch.check(estimate(0, {"w": torch.zeros(7)}.items()), Smooth(), params, {})


def test_a_loss_without_a_slope_is_refused():
    params = {"w": torch.full((4,), 0.01)}
    with pytest.raises(ValueError, match=r"is not smooth|is lost"):
        firstbatch.check(estimate(0.5), Staircase(), params, {})


def test_differences_need_no_derivative():
    found = estimate(0.0)._replace(passes=Passes(2, 0, 0))
    firstbatch.check(found, Staircase(), {"w": torch.ones(3)}, {})


def test_what_is_doubted():
    plain, ours = opened("bert"), put_packed(opened("bert"), "8bit")[0]
    assert not any(map(adapters.foreign, [*plain.modules(), *ours.modules()]))
    plain.bert.pooler.dense.weight = nn.Parameter(Foreign(torch.ones(6, 5, dtype=torch.int8), 0.1), requires_grad=False)
    assert sum(map(adapters.foreign, plain.modules())) == 1


class Foreign(torch.Tensor):
    """A weight that answers torch's functions itself, as torchao's do: stored in int8, products as of its values."""

    @staticmethod
    def __new__(cls, codes, scale):
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes, made.scale = codes, scale
        return made

    def __init__(self, codes, scale): ...

    def dequantize(self):
        return self.codes * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, w, b = (*args, None)[:3]
            return func(x, w.dequantize(), b)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Foreign(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{func}")


def test_a_weight_that_multiplies_itself_has_its_tangents():
    weight = Foreign(torch.randint(-9, 9, (6, 5), dtype=torch.int8), 0.1)
    x, bias = torch.randn(4, 5), torch.randn(6)
    directions = {"x": torch.randn(3, 4, 5), "bias": torch.randn(3, 6)}
    for names in (("x",), ("bias",), ("x", "bias")):
        some = {name: directions[name] for name in names}
        found, truth = (
            jvp(lambda p, w=w: nn.functional.linear(p["x"], w, p["bias"]), {"x": x, "bias": bias}, some)
            for w in (weight, weight.dequantize())
        )
        torch.testing.assert_close(found, truth)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "works"),
    [
        ("Int8WeightOnlyConfig", True),
        ("Float8WeightOnlyConfig", True),
        ("Int8DynamicActivationInt8WeightConfig", False),
    ],
)
def test_torchao(name, works, small, reviews):
    """Not a dependency: runs where it is installed. Weight-only models work; rounded activations are refused."""
    library = pytest.importorskip("torchao.quantization")
    model = AutoModelForSequenceClassification.from_pretrained(small, num_labels=2)
    library.quantize_(model.bert.encoder, getattr(library, name)())

    def run():
        return spryfl.finetune(
            model, str(reviews), tokenizer=AutoTokenizer.from_pretrained(small), method="spry",
            adapter={"kind": "lora", "targets": ["query", "value"]}, partition={"clients": 4},
            train={"rounds": 1, "cohort": 2, "batch_size": 4, "steps": 1},
        )  # fmt: skip

    if works:
        assert len(run().records) == 2
    else:
        with pytest.raises(ValueError, match="rounds its inputs too"):
            run()
