"""Packed folders: what is written is what is read, whole or not at all; a packed model is the model."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from jvp.families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from spryfl import adapters, models, opened, packing, tasks
from spryfl.backbone import CODECS, Packed, codec_of, nbytes
from spryfl.backbone.codec import ALIGN
from spryfl.backbone.store import FILE, REST, open_store
from spryfl.backbone.writing import Item, write_store

LABELS = ("bad", "good")


def nothing_beside(folder: Path) -> None:
    """No configuration and no tokenizer."""


def written(folder: Path, precision: str = "4bit", file: str = REST) -> dict[str, torch.Tensor]:
    """A folder with one matrix a block in two blocks, and two values; returns what went in."""
    draw = torch.Generator().manual_seed(0)
    values = {f"m{i}.weight": torch.randn(48, 100, generator=draw) for i in range(2)}
    values |= {"norm.weight": torch.randn(7, generator=draw), "table": torch.randn(9, 5, generator=draw).bfloat16()}
    items = [Item(f"m{i}.weight", f"block-{i:03d}.safetensors", (48, 100), torch.float32, True) for i in range(2)]
    items += [Item(key, file, tuple(values[key].shape), values[key].dtype, False) for key in ("norm.weight", "table")]

    def make(item):
        return codec_of(precision).encode(values[item.key]) if item.matrix else {"": values[item.key]}

    write_store(folder, precision, items, make, nothing_beside)
    return values


class TestAFolder:
    @pytest.mark.parametrize("precision", CODECS)
    def test_what_is_written_is_read(self, precision, tmp_path):
        values = written(tmp_path / "a", precision)
        store = open_store(tmp_path / "a")
        assert store.blocks == ("block-000.safetensors", "block-001.safetensors")
        for file in store.files:
            buffer = torch.empty(store.files[file].nbytes, dtype=torch.uint8)
            assert store.read(file, buffer)
            for source in (buffer, store.mapped(file)):
                for key, parts in store.views(file, source).items():
                    made = codec_of(precision).encode(values[key]) if store.tensors[key].matrix else {"": values[key]}
                    assert made.keys() == parts.keys()
                    assert all(torch.equal(made[name], part) for name, part in parts.items())

    @pytest.mark.parametrize("precision", CODECS)
    def test_every_part_begins_on_a_line_and_the_files_are_safetensors(self, precision, tmp_path):
        values = written(tmp_path / "a", precision)
        store = open_store(tmp_path / "a")
        for one in store.tensors.values():
            assert all(part.offset % ALIGN == 0 for part in one.parts.values())
        again = load_file(tmp_path / "a" / REST)
        assert torch.equal(again["table"], values["table"])
        block = load_file(tmp_path / "a" / "block-001.safetensors")
        parts = codec_of(precision).encode(values["m1.weight"])
        assert all(torch.equal(block[f"m1.weight.{name}"], part) for name, part in parts.items())

    def test_its_size_is_what_the_codec_says(self, tmp_path):
        written(tmp_path / "a", "8bit")
        file = tmp_path / "a" / "block-000.safetensors"
        (header,) = struct.unpack("<Q", file.read_bytes()[:8])
        assert (8 + header) % ALIGN == 0
        assert nbytes("8bit", (48, 100)) <= file.stat().st_size - 8 - header < nbytes("8bit", (48, 100)) + ALIGN

    def test_the_fingerprint_is_of_the_values(self, tmp_path):
        written(tmp_path / "a")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        written(tmp_path / "c", "8bit")
        a, b, c = (open_store(tmp_path / name).fingerprint for name in "abc")
        assert a == b != c


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        written(tmp_path / "a")
        return tmp_path / "a"

    @pytest.mark.parametrize("file", ["block-001.safetensors", REST])
    def test_a_missing_file_is_named(self, folder, file):
        (folder / file).unlink()
        with pytest.raises(ValueError, match=rf"{file} is missing.*pack the model again"):
            open_store(folder)

    @pytest.mark.parametrize("file", ["block-001.safetensors", REST])
    def test_a_file_cut_short_is_named(self, folder, file):
        size = (folder / file).stat().st_size
        with open(folder / file, "r+b") as opened_:
            opened_.truncate(size - 1)
        with pytest.raises(ValueError, match=rf"{file} has {size - 1} bytes and should have {size}"):
            open_store(folder)

    def test_one_cut_short_after_it_was_opened_is_named_too(self, folder):
        store = open_store(folder)
        buffer = torch.empty(store.files["block-001.safetensors"].nbytes, dtype=torch.uint8)
        with open(folder / "block-001.safetensors", "r+b") as file:
            file.truncate(10)
        with pytest.raises(ValueError, match=r"block-001.safetensors has 10 bytes"):
            store.read("block-001.safetensors", buffer)
        (folder / "block-001.safetensors").unlink()
        with pytest.raises(ValueError, match=r"block-001.safetensors is missing"):
            store.read("block-001.safetensors", buffer)

    @pytest.mark.parametrize("file", ["block-001.safetensors", REST])
    @pytest.mark.parametrize("at", [9, -1])  # in the header, in the data
    def test_one_changed_byte_is_found_and_its_file_named(self, folder, file, at):
        data = bytearray((folder / file).read_bytes())
        data[at] ^= 1
        (folder / file).write_bytes(data)
        store = open_store(folder)
        with pytest.raises(ValueError, match=rf"{file} is damaged: its checksum"):
            store.read(file, torch.empty(len(data), dtype=torch.uint8))
        with pytest.raises(ValueError, match=rf"{file} is damaged: its checksum"):
            store.mapped(file)

    def test_what_was_read_once_is_not_checked_again(self, folder, monkeypatch):
        store = open_store(folder)
        buffer = torch.empty(store.files[REST].nbytes, dtype=torch.uint8)
        store.read(REST, buffer)
        monkeypatch.setattr("hashlib.sha256", None)
        assert store.read(REST, buffer)
        store.mapped(REST)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"schema": 2}, "has schema 2; this version reads schema 1"),
            ({"schema": None}, "has schema None"),
            ({"precision": "3bit"}, '"3bit" is unknown'),
            ({"files": {"a": {}}}, "is damaged.*Pack|Copy"),
            ({"tensors": {"a": {"parts": {"": {"dtype": "X"}}}}}, "is damaged"),
        ],
    )
    def test_a_list_of_another_form_is_refused(self, folder, change, message):
        told = json.loads((folder / FILE).read_text())
        (folder / FILE).write_text(json.dumps({**told, **change}))
        with pytest.raises(ValueError, match=message):
            open_store(folder)

    @pytest.mark.parametrize("text", ["", "[]", '{"schema": 1'])
    def test_a_broken_list_is_refused(self, folder, text):
        (folder / FILE).write_text(text)
        with pytest.raises(ValueError, match=FILE):
            open_store(folder)

    def test_a_folder_without_one_is_none(self, tmp_path):
        with pytest.raises(ValueError, match=r"is no packed model.*spryfl pack"):
            open_store(tmp_path)


class TestUnfinished:
    def test_what_fails_leaves_nothing_that_opens(self, tmp_path):
        items = [Item(f"v{i}", REST, (4,), torch.float32, False) for i in range(3)]
        seen = []

        def make(item):
            seen.append(sorted(path.name for path in tmp_path.iterdir()))
            if item.key == "v2":
                raise KeyboardInterrupt
            return {"": torch.zeros(4)}

        with pytest.raises(KeyboardInterrupt):
            write_store(tmp_path / "a", "4bit", items, make, nothing_beside)
        assert seen == [["a.partial"]] * 3
        assert list(tmp_path.iterdir()) == []

    def test_a_killed_one_does_not_open_and_does_not_hinder_the_next(self, tmp_path):
        """Killed by the system in the middle: the folder is not there under its name."""
        code = (
            "import os, torch; from pathlib import Path; from spryfl.backbone.writing import Item, write_store\n"
            "items = [Item(f'v{i}', 'rest.safetensors', (4,), torch.float32, False) for i in range(3)]\n"
            "make = lambda item: os.kill(os.getpid(), 9) if item.key == 'v2' else {'': torch.zeros(4)}\n"
            f"write_store(Path({str(tmp_path / 'a')!r}), '4bit', items, make, lambda folder: None)"
        )
        assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -9
        assert [path.name for path in tmp_path.iterdir()] == ["a.partial"]
        with pytest.raises(ValueError, match="is no packed model"):
            open_store(tmp_path / "a.partial")
        written(tmp_path / "a")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        open_store(tmp_path / "a")

    def test_nothing_is_overwritten(self, tmp_path):
        written(tmp_path / "a")
        before = (tmp_path / "a" / FILE).read_bytes()
        with pytest.raises(ValueError, match="is there already"):
            written(tmp_path / "a", "8bit")
        assert (tmp_path / "a" / FILE).read_bytes() == before

    def test_a_full_disk_is_said_before_it_is_begun(self, tmp_path, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("D", (), {"free": 1000})())
        with pytest.raises(ValueError, match=r"would take 0\.00 GB, and the disk has 0.00 GB left"):
            written(tmp_path / "a")
        assert list(tmp_path.iterdir()) == []

    def test_a_tensor_unlike_its_announcement_is_refused(self, tmp_path):
        items = [Item("v", REST, (4,), torch.float32, False)]
        with pytest.raises(ValueError, match=r"v came as torch.float32 \(5,\)"):
            write_store(tmp_path / "a", "4bit", items, lambda item: {"": torch.zeros(5)}, nothing_beside)


# ---- models


def made(family: str, head: str = "Model", dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> nn.Module:
    """A small random model of a family, frozen."""
    name, sizes, *_ = FAMILIES[family]
    config = getattr(hf, f"{name}Config")(**{**sizes, **changes})
    torch.manual_seed(seed)
    kind = {"T5": "T5EncoderModel"}.get(name, f"{name}{head}")
    return getattr(hf, kind)(config).to(dtype).eval()


@pytest.fixture
def saved(tiny, tmp_path):
    """Saves a model with a tokenizer under a name; returns the folder."""

    def save(model: nn.Module, name: str = "whole", **options) -> str:
        model.save_pretrained(tmp_path / name, **options)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny / file, tmp_path / name)
        return str(tmp_path / name)

    return save


def both(folder: str, packed: str, seed: int = 5, **options):
    """The ordinary model and the packed one, each loaded for a task."""
    whole, made = (models.load(name, LABELS, seed=seed, **options)[0].eval() for name in (folder, packed))
    return whole.float(), made


def answer(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


IDS = torch.tensor([[4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4]])
PLAIN = ["bert", "roberta", "albert", "distilbert", "deberta-v2", "electra", "modernbert", "opt", "gpt2", "gpt-neox",
         "llama", "qwen2", "qwen3", "gemma2", "phi3"]  # fmt: skip


@pytest.mark.parametrize("family", PLAIN)
def test_a_model_packed_in_float32_is_the_model(family, saved, tmp_path):
    """Of every family, from a checkpoint of its trunk alone: same answers, same head, to the rounding of products."""
    folder = saved(made(family))
    packing.pack(folder, tmp_path / "p", "float32")
    whole, packed = both(folder, str(tmp_path / "p"))
    torch.testing.assert_close(answer(packed, IDS), answer(whole, IDS), rtol=1e-5, atol=1e-6)
    assert any(isinstance(module, Packed) for module in packed.modules())
    mine = dict(packed.named_parameters())
    trunk = {id(m) for m in opened.trunk_of(packed).modules()}
    for name, value in whole.named_parameters():
        if name in mine:
            assert torch.equal(mine[name].float(), value), name
            assert mine[name].dtype == torch.float32
        else:
            module = packed.get_submodule(name.rpartition(".")[0])
            assert isinstance(module, Packed), name
            assert id(module) in trunk
            turned = isinstance(whole.get_submodule(name.rpartition(".")[0]), Conv1D)
            weight = module.weight @ torch.eye(module.in_features)
            torch.testing.assert_close(weight.t() if turned else weight, value)


@pytest.mark.parametrize("family", ["bert", "llama", "opt", "gpt2", "roberta"])
def test_tables_in_sixteen_bits_are_looked_up_in_float32(family, saved, tmp_path):
    folder = saved(made(family, dtype=torch.bfloat16))
    packing.pack(folder, tmp_path / "p", "bfloat16")
    whole, packed = both(folder, str(tmp_path / "p"), seed=1)
    for name, value in packed.named_parameters():
        if name in dict(whole.named_parameters()):
            with torch.no_grad():  # a head drawn in 16 bits is another: take it over
                whole.get_parameter(name).copy_(value)
    tables = [m.weight for m in packed.modules() if isinstance(m, nn.Embedding)]
    assert {table.dtype for table in tables} == {torch.bfloat16}
    got = answer(packed, IDS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, answer(whole, IDS), rtol=1e-5, atol=1e-6)


class TestHeads:
    def test_a_missing_head_is_drawn_as_in_the_ordinary_model(self, saved, tmp_path):
        folder = saved(made("roberta"))
        packing.pack(folder, tmp_path / "p", "4bit")
        for seed in (1, 2):
            whole, packed = both(folder, str(tmp_path / "p"), seed)
            heads = {n: v for n, v in whole.named_parameters() if n.startswith("classifier")}
            assert len(heads) == 4
            assert all(torch.equal(v, packed.get_parameter(n)) for n, v in heads.items())

    def test_a_trained_head_is_kept_in_float32(self, saved, tmp_path):
        """Packed from a classifier and loaded as one, its head comes along; with other labels it is drawn anew."""
        model = made("roberta", "ForSequenceClassification", num_labels=2)
        folder = saved(model)
        packing.pack(folder, tmp_path / "p", "4bit")
        _, packed = both(folder, str(tmp_path / "p"))
        assert type(packed.classifier.dense) is nn.Linear
        assert torch.equal(packed.classifier.dense.weight, model.classifier.dense.weight)
        three = models.load(str(tmp_path / "p"), ("a", "b", "c"), seed=5)[0]
        whole = models.load(folder, ("a", "b", "c"), seed=5)[0]
        assert torch.equal(three.classifier.out_proj.weight, whole.classifier.out_proj.weight)

    @pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("opt", True), ("gpt2", True)])
    def test_a_map_to_words_is_packed_or_reads_the_table(self, family, tied, saved, tmp_path):
        folder = saved(made(family, {"gpt2": "LMHeadModel"}.get(family, "ForCausalLM"), tie_word_embeddings=tied))
        packing.pack(folder, tmp_path / "p", "4bit")
        packing.pack(folder, tmp_path / "q", "float32")
        task = tasks.causal_lm()
        whole, exact = both(folder, str(tmp_path / "q"), task=task)
        torch.testing.assert_close(answer(exact, IDS), answer(whole, IDS), rtol=1e-5, atol=1e-6)
        packed = models.load(str(tmp_path / "p"), LABELS, task=task)[0]
        words = packed.get_output_embeddings()
        assert isinstance(words, Packed)
        if tied:
            assert words.matrix.precision == "float32"
            table = packed.get_input_embeddings().weight
            assert words.matrix.parts()["weight"].data_ptr() == table.data_ptr()
        else:
            assert words.matrix.precision == "4bit"

    def test_a_classifier_from_a_causal_model_and_the_other_way_round(self, saved, tmp_path):
        folder = saved(made("llama", "ForCausalLM"))
        packing.pack(folder, tmp_path / "p", "float32")
        whole, packed = both(folder, str(tmp_path / "p"))
        torch.testing.assert_close(answer(packed, IDS), answer(whole, IDS), rtol=1e-5, atol=1e-6)

    def test_questions_find_a_trunk_of_another_name(self, saved, tmp_path):
        """Llama's trunk is called otherwise under the head for questions."""
        folder = saved(made("llama", "ForCausalLM"))
        packing.pack(folder, tmp_path / "p", "float32")
        task = tasks.question_answering()
        whole, packed = both(folder, str(tmp_path / "p"), task=task)
        inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        with torch.no_grad():
            torch.testing.assert_close(packed(**inputs).start_logits, whole(**inputs).start_logits)


class TestCheckpoints:
    def test_one_in_shards_is_packed_as_one_in_a_file(self, saved, tmp_path):
        model = made("llama")
        one, many = saved(model, "one"), saved(model, "many", max_shard_size="5KB")
        assert len(list(Path(many).glob("*.safetensors"))) > 2
        for name, folder in (("p", one), ("q", many)):
            packing.pack(folder, tmp_path / name, "8bit")
        for file in open_store(tmp_path / "p").blocks:
            assert load_file(tmp_path / "p" / file).keys() == load_file(tmp_path / "q" / file).keys()
        p, q = (models.load(str(tmp_path / name), LABELS, seed=1)[0] for name in "pq")
        assert torch.equal(answer(p, IDS), answer(q, IDS))
        assert not (tmp_path / "q" / "model.safetensors.index.json").exists()

    def test_older_names_are_followed(self, saved, tmp_path):
        """BERT's norms were once called gamma and beta."""
        folder = saved(made("bert"))
        file = Path(folder) / "model.safetensors"
        old = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in load_file(file).items()}
        old = {k.replace("LayerNorm.bias", "LayerNorm.beta"): v + 0.1 * ("gamma" in k) for k, v in old.items()}
        save_file(old, file, {"format": "pt"})
        packing.pack(folder, tmp_path / "p", "float32")
        whole, packed = both(folder, str(tmp_path / "p"))
        torch.testing.assert_close(answer(packed, IDS), answer(whole, IDS), rtol=1e-5, atol=1e-6)

    def test_what_the_class_has_no_place_for_is_said(self, saved, tmp_path):
        folder = saved(made("bert"))
        file = Path(folder) / "model.safetensors"
        save_file({**load_file(file), "other.weight": torch.ones(3)}, file, {"format": "pt"})
        assert packing.pack(folder, tmp_path / "p").left_out == ("other.weight",)

    @pytest.mark.parametrize("many", [False, True])
    def test_a_broken_or_missing_shard_is_named_and_nothing_is_left(self, many, saved, tmp_path):
        folder = Path(saved(made("llama"), **({"max_shard_size": "5KB"} if many else {})))
        file = sorted(folder.glob("*.safetensors"))[-1]
        file.write_bytes(file.read_bytes()[:-5])
        with pytest.raises(ValueError, match=rf"{file.name} is damaged or missing"):
            packing.pack(str(folder), tmp_path / "p")
        file.unlink()
        with pytest.raises(ValueError, match=rf"{file.name} is damaged or missing|has no model.safetensors"):
            packing.pack(str(folder), tmp_path / "p")
        assert not (tmp_path / "p").exists()
        assert not (tmp_path / "p.partial").exists()

    def test_what_cannot_be_packed_is_refused(self, saved, tmp_path):
        folder = saved(made("bert"))
        packing.pack(folder, tmp_path / "p")
        with pytest.raises(ValueError, match="is packed already"):
            packing.pack(str(tmp_path / "p"), tmp_path / "q")
        with pytest.raises(ValueError, match="is there already"):
            packing.pack(folder, tmp_path / "p")
        with pytest.raises(ValueError, match='"2bit" is unknown'):
            packing.pack(folder, tmp_path / "q", "2bit")
        told = json.loads((Path(folder) / "config.json").read_text())
        (Path(folder) / "config.json").write_text(json.dumps({**told, "quantization_config": {"quant_method": "gptq"}}))
        with pytest.raises(ValueError, match="is quantized already"):
            packing.pack(folder, tmp_path / "q")

    def test_weights_of_another_family_are_refused(self, saved, tmp_path):
        folder = saved(made("bert"))
        shutil.copy(Path(saved(made("gpt2"), "other")) / "model.safetensors", folder)
        with pytest.raises(ValueError, match="brings no weights for the layers"):
            packing.pack(folder, tmp_path / "p")

    def test_a_hub_name_is_packed_from_the_cache(self, saved, tmp_path, monkeypatch):
        folder = saved(made("bert"))
        asked = []

        def fetched(name, **options):
            asked.append((name, options["revision"]))
            return folder

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
        config = hf.AutoConfig.from_pretrained(folder)
        monkeypatch.setattr(hf.AutoConfig, "from_pretrained", lambda name, **options: config)
        packing.pack("someone/model", tmp_path / "p", revision="abc")
        assert asked == [("someone/model", "abc")]
        assert (tmp_path / "p" / "tokenizer.json").is_file()


class TestRandomStores:
    @pytest.mark.parametrize("family", ["llama", "opt", "roberta", "qwen2"])
    @pytest.mark.parametrize("precision", ["4bit", "float32"])
    def test_one_opens_and_computes(self, family, precision, tiny, tmp_path):
        tokenizer = hf.AutoTokenizer.from_pretrained(tiny)
        config = made(family).config
        before = torch.random.get_rng_state()
        packing.random_store(config, tmp_path / "r", precision, tokenizer=tokenizer)
        assert torch.equal(before, torch.random.get_rng_state())
        model = models.load(str(tmp_path / "r"), LABELS)[0].eval()
        out = answer(model, IDS)
        assert bool(out.isfinite().all())
        assert not torch.equal(out[0], out[1])
        store = open_store(tmp_path / "r")
        shapes = {key: tuple(v.shape) for key, v in hf.AutoModel.from_config(config).state_dict().items()}
        assert {key: one.shape for key, one in store.tensors.items()} == shapes

    def test_blocks_share_values_and_matrices_do_not(self, tiny, tmp_path):
        packing.random_store(made("llama").config, tmp_path / "r", "8bit")
        store = open_store(tmp_path / "r")
        blocks = [load_file(tmp_path / "r" / file) for file in store.blocks]
        first, second = ({k.partition(".self_attn.")[2]: v for k, v in block.items()} for block in blocks)
        assert torch.equal(first["q_proj.weight.weight"], second["q_proj.weight.weight"])
        assert not torch.equal(first["q_proj.weight.weight"], first["o_proj.weight.weight"])


PACKS = """
import sys, threading, torch, transformers as hf
from spryfl import packing
from spryfl.backbone import codec_of
hf.AutoModel.from_config(hf.LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                        num_attention_heads=1))
codec_of("8bit").encode(torch.ones(8, 64))
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
start, seen, over = anonymous(), [], threading.Event()
def watch():
    while not over.wait(0.002):
        seen.append(anonymous())
threading.Thread(target=watch, daemon=True).start()
packing.pack(sys.argv[1], sys.argv[2], "8bit")
over.set()
print(max(seen) - start)
"""


@pytest.mark.slow
def test_packing_holds_one_tensor_at_a_time(saved, tmp_path):
    """240 MB in 28 matrices and a table, in a process of its own: above its start a few of the largest matrix."""
    sizes = {"vocab_size": 20000, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
    config = hf.LlamaConfig(**sizes, num_attention_heads=8)
    folder = saved(hf.LlamaModel(config))
    assert (Path(folder) / "model.safetensors").stat().st_size > 220e6
    words = [sys.executable, "-c", PACKS, folder, str(tmp_path / "p")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    peak, largest = int(done.stdout.split()[-1]), 4 * 1024 * 2048
    assert peak < 6 * largest, peak / largest  # the encoding takes some copies of it


def test_an_adapter_of_a_packed_model_is_opened_again(saved, tmp_path):
    folder = saved(made("bert"))
    packing.pack(folder, tmp_path / "p", "4bit")
    base, tokenizer = models.load(str(tmp_path / "p"), LABELS, seed=1, stream=True)
    model = models.prepare(base, tokenizer, LABELS, adapters.lora(r=2), source=str(tmp_path / "p"), seed=2)
    params = {n: v + 0.1 for n, v in model.params.items()}
    card = {"model": str(tmp_path / "p"), "revision": "", "labels": list(LABELS), "max_length": 8, "stream": True}
    models.save_adapter(model, params, tmp_path / "a", card)
    again = models.open_adapter(tmp_path / "a")
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.tensor([0, 1])}
    assert torch.equal(models.logits(model, params, batch), models.logits(again, again.params, batch))
    assert opened.backbone_of(again.module).facts == opened.backbone_of(model.module).facts
    assert opened.backbone_of(again.module).facts["stream"]
