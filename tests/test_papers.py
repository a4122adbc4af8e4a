"""experiments/papers: each file is valid, plans, and runs two rounds on a small random model of the same family."""

from __future__ import annotations

import json
import random
import tomllib
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from spryfl import adapters, advice, config, footprint, job, tasks
from spryfl.api import prepared
from spryfl.compare import parse as compared

FOLDER = Path(__file__).parents[1] / "experiments" / "papers"
FILES = sorted(FOLDER.glob("*.toml"))
WORDS = "the film was good bad fine dull a day we saw in town and they said it"
WORDS = f"{WORDS} terrible great Yes No same word".split()
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LONG = {"max_position_embeddings": 500}
# The columns of each data set as the hub has them, with which splits; LABELS says how many classes its label has.
COLUMNS = {
    "fancyzhx/ag_news": (("text",), ("train", "test"), 4, "label"),
    "nyu-mll/glue:sst2": (("sentence",), ("train", "validation"), 2, "label"),
    "fancyzhx/yelp_polarity": (("text",), ("train", "test"), 2, "label"),
    "community-datasets/yahoo_answers_topics": (
        ("question_title", "question_content", "best_answer"),
        ("train", "test"),
        10,
        "topic",
    ),
    "stanfordnlp/snli": (("premise", "hypothesis"), ("train", "validation", "test"), 3, "label"),
    "nyu-mll/multi_nli": (
        ("premise", "hypothesis"),
        ("train", "validation_matched", "validation_mismatched"),
        3,
        "label",
    ),
    "aps/super_glue:multirc": (("paragraph", "question", "answer"), ("train", "validation"), 2, "label"),
    "rajpurkar/squad_v2": (("title", "context", "question"), ("train", "validation"), 0, "answers"),
    "nyu-mll/glue:rte": (("sentence1", "sentence2"), ("train", "validation"), 2, "label"),
    "aps/super_glue:wic": (("word", "sentence1", "sentence2"), ("train", "validation"), 2, "label"),
    "aps/super_glue:boolq": (("question", "passage"), ("train", "validation"), 2, "label"),
}


def given(file):
    return tomllib.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """family -> the folder of a small random model with a tokenizer."""
    special = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        bos_token="<s>",
        eos_token="</s>",
    )
    vocabulary = len(special + WORDS)
    made = {
        "roberta": hf.RobertaForMaskedLM(
            hf.RobertaConfig(
                vocab_size=vocabulary, intermediate_size=32, max_position_embeddings=300, pad_token_id=0, **SIZES
            )
        ),
        "llama": hf.LlamaForCausalLM(
            hf.LlamaConfig(vocab_size=vocabulary, intermediate_size=32, pad_token_id=0, **SIZES)
        ),
        "opt": hf.OPTForCausalLM(
            hf.OPTConfig(vocab_size=vocabulary, ffn_dim=32, word_embed_proj_dim=16, pad_token_id=0, **LONG, **SIZES)
        ),
    }
    out = {}
    for family, model in made.items():
        out[family] = str(tmp_path_factory.mktemp(family))
        model.save_pretrained(out[family])
        fast.save_pretrained(out[family])
    return out


def rows(name, split, count=48):
    """Rows of a data set's columns; every sixth of SNLI's has no label."""
    columns, _, classes, label = COLUMNS[name]
    draw = random.Random(f"{name} {split}")
    for i in range(count):
        row = {column: " ".join(draw.choices(WORDS[:17], k=draw.randint(4, 9))) for column in columns}
        row["word"] = "word" if "word" in columns else None
        if label == "answers":
            answer = row["context"].split()[1]
            found = {"text": [answer], "answer_start": [row["context"].index(answer)]}
            row["answers"] = found if i % 3 else {"text": [], "answer_start": []}
        else:
            row[label] = -1 if name == "stanfordnlp/snli" and i % 6 == 5 else i % classes
        yield {key: value for key, value in row.items() if value is not None}


def local(file, families, folder):
    """What a user's run has, with model and data in these places and few clients and rounds."""
    asked = given(file)
    name = asked["data"]["name"]
    for split in COLUMNS[name][1]:
        lines = "".join(json.dumps(row) + "\n" for row in rows(name, split))
        (folder / f"{split}.jsonl").write_text(lines)
    family = next(f for f in families if f in asked["model"]["name"].lower())
    changes = {
        "device": "cpu",
        "model": {"name": families[family]},
        "data": {"name": str(folder)},
        "partition": {"clients": 3},
        "train": {"rounds": 2, "cohort": 2, "eval_every": 1},
    }
    small = {"method": {"estimator": {"top": 1}}} if "top" in asked["method"]["estimator"] else {}
    return config.merge(config.merge(asked, changes), small)


def test_every_setting_of_the_issue_has_its_file():
    there = {(given(file)["method"]["name"], given(file)["data"]["name"].split("/")[1]) for file in FILES}
    spry = ("ag_news", "glue:sst2", "yelp_polarity", "yahoo_answers_topics", "snli", "multi_nli")
    spry += ("super_glue:multirc", "squad_v2")
    assert there >= {("spry", name) for name in spry}
    assert there >= {("fedspzo", name) for name in ("glue:sst2", "glue:rte", "super_glue:wic", "super_glue:boolq")}
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`{file.stem}`" in readme for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
class TestEach:
    def test_it_is_valid_and_says_the_commands_that_start_it(self, file):
        made = config.Experiment.load(file)
        assert made.name == file.stem
        assert f"spryfl run --config experiments/papers/{file.name}" in file.read_text(encoding="utf-8")
        assert made.as_dict()["train"]["batch_size"] == 8
        labels = next(
            line for line in file.read_text().splitlines() if "--methods" in line and "spryfl tune" not in line
        )
        labels = labels.partition("--methods ")[2].split()[0].split(",")
        assert len(compared(given(file), labels, [0, 1, 2]).runs) == 3 * len(labels)

    def test_it_plans_on_its_family(self, file, families, tmp_path):
        made = config.Experiment.load(None, local(file, families, tmp_path))
        names = ("0", "1")
        of = footprint.outline(made.model.name, names, adapters.build(made.adapter), task=tasks.build(made.task))
        answer = advice.advise(
            of, [made.method], rows=8, tokens=made.data.max_length, clients=3, cohort=2, steps=1, budget=0, every=True
        )
        assert answer.rows
        assert all(row.planned.footprint.total > 0 for row in answer.rows)

    def test_two_rounds_on_its_family(self, file, families, tmp_path):
        made = prepared(config.parse(local(file, families, tmp_path)))
        kept = list(job.run(made, *job.begin(made, None)))
        records, state = [record for record, _ in kept], kept[-1][1]
        assert [record["round"] for record in records] == [0, 1, 2]
        assert all(not record.get("failed") for record in records)
        assert all(record["loss"] > 0 for record in records[1:])
        moved = [name for name, value in state.params.items() if not torch.equal(value, made.model.params[name])]
        assert moved
        if file.stem == "spry_snli":
            assert any("without a label were left out" in note for note in made.corpus.notes)
