"""A merged folder answers as the adapter did: every family, packed backbones too, by transformers or PEFT alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

import spryfl
from spryfl import cli, merging, models, packing, tasks
from spryfl.adapters import ADAPTERS, build
from spryfl.data.examples import Examples

TEXTS = ("the film was good", "a bad day in town", "they said it was dull")
OPTIONS = {"vb_lora": {"length": 16}, "lora_xs": {"r": 4}, "graded": {"r": 2}, "vera": {"r": 8}}


def adapter_of(name: str, folder: Path, kind: str = "lora", task=None, stream: bool = False) -> Path:
    """A saved adapter of that family on a model, its values and the head's moved at random."""
    task = task or tasks.classification()
    labels = ("bad", "good")
    base, tokenizer = models.load(name, labels, task=task, stream=stream)
    chosen = build({"kind": kind, **OPTIONS.get(kind, {})})
    made = models.prepare(base, tokenizer, labels, chosen, source=name, task=task)
    draw = torch.Generator().manual_seed(1)
    moved = {key: value + 0.3 * torch.randn(value.shape, generator=draw) for key, value in made.params.items()}
    told = {"kind": "classification"} if task.head else {"kind": "causal_lm"}
    card = {"model": name, "revision": "", "task": told, "labels": list(labels), "max_length": 32, "stream": stream}
    models.save_adapter(made, moved, folder, card)
    return folder


def answered(adapter: Path) -> torch.Tensor:
    """The logits that `spryfl predict` takes its answers from."""
    model = models.open_adapter(adapter)
    rows = model.task.encode(model.tokenizer, Examples(TEXTS, None, (0,) * len(TEXTS), None, {}), 32)
    return models.logits(model, model.params, tasks.collate(rows, range(len(TEXTS)), model.device))


def alone(folder: Path) -> torch.Tensor:
    """The same by transformers and nothing else."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model(**batch).logits.float()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_family_merges(kind, tiny, tmp_path):
    adapter = adapter_of(str(tiny), tmp_path / "adapter", kind)
    made = merging.export(adapter, tmp_path / "merged")
    expected = answered(adapter)
    assert torch.allclose(alone(tmp_path / "merged"), expected, rtol=0, atol=1e-5)
    assert made.difference < 1e-5 < made.scale
    base, _ = models.load(str(tiny), ("bad", "good"))
    with torch.inference_mode():  # the adapter does something, so agreement says something
        batch = AutoTokenizer.from_pretrained(tiny)(list(TEXTS), padding=True, return_tensors="pt")
        assert float((base.eval()(**batch).logits - expected).abs().max()) > 1e-2


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_family_opens_in_plain_peft_and_merges(kind, tiny, tmp_path):
    adapter = adapter_of(str(tiny), tmp_path / "adapter", kind)
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=2)
    opened = PeftModel.from_pretrained(base, adapter).eval()
    batch = AutoTokenizer.from_pretrained(tiny)(list(TEXTS), padding=True, return_tensors="pt")
    with torch.inference_mode():
        beside = opened(**batch).logits
        merged = opened.merge_and_unload(safe_merge=True)(**batch).logits
    expected = answered(adapter)
    assert torch.allclose(beside, expected, rtol=0, atol=1e-5)
    assert torch.allclose(merged, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["4bit", "8bit", "float32"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_packed_backbone_is_decoded(precision, stream, tiny, tmp_path):
    packing.pack(str(tiny), tmp_path / "packed", precision)
    adapter = adapter_of(str(tmp_path / "packed"), tmp_path / "adapter", stream=stream)
    merging.export(adapter, tmp_path / "merged")
    assert torch.allclose(alone(tmp_path / "merged"), answered(adapter), rtol=0, atol=1e-5)


@pytest.mark.parametrize("eight", [False, True])
def test_what_bitsandbytes_quantized_is_decoded(eight, tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = BertConfig.from_pretrained(tiny, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(tmp_path / "wide")
    how = BitsAndBytesConfig(load_in_8bit=True) if eight else BitsAndBytesConfig(load_in_4bit=True)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "wide", quantization_config=how)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    made = models.prepare(models.settled(base, tokenizer), tokenizer, ("bad", "good"), build({"kind": "lora_xs"}))
    models.carry(made, {name: value + 0.3 for name, value in made.params.items()})
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = made.module(**batch).logits
    merging.merged(made).save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert torch.allclose(alone(tmp_path / "merged"), expected, rtol=0, atol=1e-5)


def test_sixteen_bits_are_said_and_written(tiny, tmp_path):
    adapter = adapter_of(str(tiny), tmp_path / "adapter")
    made = merging.export(adapter, tmp_path / "merged", precision="bfloat16")
    assert made.difference > 1e-5  # rounding is there, and said
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert torch.allclose(alone(tmp_path / "merged"), answered(adapter), rtol=0.1, atol=0.1)


def test_a_backbone_in_sixteen_bits_comes_out_whole(tiny, tmp_path):
    """Its update would round away in bfloat16; in float32 the outputs differ by what 16-bit passes err."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=2, dtype=torch.bfloat16)
    model.bert.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "half")
    adapter = adapter_of(str(tmp_path / "half"), tmp_path / "adapter")
    made = merging.export(adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
    assert made.difference < 0.05 * made.scale


def test_a_language_model_generates_again(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    tokenizer.save_pretrained(tmp_path / "gpt")
    adapter = adapter_of(str(tmp_path / "gpt"), tmp_path / "adapter", task=tasks.causal_lm())
    made = merging.export(adapter, tmp_path / "merged")
    assert (made.auto, made.difference < 1e-5) == ("AutoModelForCausalLM", True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.use_cache
    said = model.generate(**tokenizer("the film", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert said.shape[1] >= 3


class TestWhatIsRefused:
    def test_a_folder_that_is_there(self, tiny, tmp_path):
        adapter = adapter_of(str(tiny), tmp_path / "adapter")
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / "mine.txt").write_text("kept")
        with pytest.raises(ValueError, match="is there already, and nothing in it was touched"):
            merging.export(adapter, tmp_path / "merged")
        assert [one.name for one in (tmp_path / "merged").iterdir()] == ["mine.txt"]

    def test_an_unknown_precision(self, tiny, tmp_path):
        with pytest.raises(ValueError, match=r"int4.*Possible: float32, bfloat16, float16"):
            merging.export(tmp_path, tmp_path / "merged", precision="int4")

    def test_no_adapter(self, tmp_path):
        with pytest.raises(ValueError, match="holds no adapter of spryfl"):
            merging.export(tmp_path, tmp_path / "merged")

    def test_weights_in_another_librarys_form(self, tiny, tmp_path, monkeypatch):
        adapter = adapter_of(str(tiny), tmp_path / "adapter")
        opened = models.open_adapter(adapter)
        monkeypatch.setattr("spryfl.adapters.foreign", lambda layer: isinstance(layer, torch.nn.Linear))
        with pytest.raises(ValueError, match="form of another library"):
            merging.merged(opened)


def test_a_run_and_the_command(tiny, reviews, tmp_path, monkeypatch, capsys):
    """From a run to a folder by the command; labels by name, and the answers of `spryfl predict`."""
    small = {"train_rows": 40, "test_rows": 20}
    spryfl.finetune(
        str(tiny),
        str(reviews),
        reading=small,
        method="fedavg",
        partition={"clients": 4},
        train={"rounds": 2, "cohort": 2},
        folder=tmp_path / "run",
    )
    monkeypatch.setattr("sys.argv", ["spryfl", "export", str(tmp_path / "run"), str(tmp_path / "merged")])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    out, err = capsys.readouterr()
    assert err == ""
    assert "AutoModelForSequenceClassification.from_pretrained" in out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert torch.allclose(alone(tmp_path / "merged"), answered(tmp_path / "run" / "adapter"), rtol=0, atol=1e-5)
    with pytest.raises(SystemExit) as refused:
        cli.main()
    assert (refused.value.code, "is there already" in capsys.readouterr().err) == (2, True)


def test_the_finished_model_trains_on(tiny, reviews, tmp_path):
    """A merged folder is a model like any other: it can be finetuned again."""
    adapter = adapter_of(str(tiny), tmp_path / "adapter")
    merging.export(adapter, tmp_path / "merged")
    small = {"train_rows": 40, "test_rows": 20}
    train, clients = {"rounds": 1, "cohort": 2}, {"clients": 2}
    history = spryfl.finetune(str(tmp_path / "merged"), str(reviews), reading=small, train=train, partition=clients)
    assert history.records[-1]["round"] == 1


def test_what_the_base_models_files_lack_is_drawn_again(tiny, reviews, tmp_path):
    """A pooler that was not saved is frozen at random; opened again, exported or trained on, it is the same one."""
    BertModel.from_pretrained(tiny, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "base")
    settings = {"reading": {"train_rows": 40, "test_rows": 20}, "partition": {"clients": 4}, "method": "fedavg"}
    settings["train"] = {"rounds": 1, "cohort": 2}
    first = spryfl.finetune(str(tmp_path / "base"), str(reviews), folder=tmp_path / "one", seed=5, **settings)
    start = {"name": str(tmp_path / "base"), "adapter": str(tmp_path / "one" / "adapter")}
    second = spryfl.finetune(start, str(reviews), folder=tmp_path / "two", seed=6, **settings)
    merging.export(tmp_path / "two" / "adapter", tmp_path / "merged")
    name = "bert.pooler.dense.weight"
    truth = first.model.module.get_base_model().get_parameter(name)
    assert not torch.equal(truth, AutoModelForSequenceClassification.from_pretrained(tiny).get_parameter(name))
    for adapter in (tmp_path / "one" / "adapter", tmp_path / "two" / "adapter"):
        assert torch.equal(models.open_adapter(adapter).module.get_base_model().get_parameter(name), truth)
    assert torch.equal(second.model.module.get_base_model().get_parameter(name), truth)
    assert torch.equal(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").get_parameter(name), truth
    )
