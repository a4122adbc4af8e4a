"""A tiny random BERT with a tokenizer of its own, and a file of labelled sentences: nothing here needs a download."""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side; tiny products gain nothing from threads

import csv
import random
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

torch.set_num_threads(1)

GOOD = ["good", "fine", "lovely", "bright", "warm"]
BAD = ["bad", "poor", "dull", "cold", "sad"]
PLAIN = ["the", "film", "was", "a", "day", "we", "saw", "in", "town", "and", "they", "said", "it"]


@pytest.fixture(autouse=True)
def _own_generators():
    """No test may move PyTorch's global generator for the next."""
    with torch.random.fork_rng():
        yield


@pytest.fixture(autouse=True)
def _own_process():
    """What a command says of its process, fresh when it stands alone, holds for no later test in this one."""
    yield
    if "spryfl.footprint.process" in sys.modules:
        sys.modules["spryfl.footprint.process"]._here.clear()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The folder of a random BERT of 3 layers, 32 wide, whose vocabulary is the words above."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate(special + GOOD + BAD + PLAIN)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config)
        # A random network's features barely differ between texts; larger weights make them differ.
        for value in model.parameters():
            if value.dim() > 1:
                value.data.mul_(4.0)
        model.save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Rows (text, label, group): one good or bad word among plain ones."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(["bad", "good"])
        words = draw.choices(PLAIN, k=draw.randint(3, 9))
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if label == "good" else BAD))
        rows.append((" ".join(words), label, f"site {draw.randrange(12)}"))
    return rows


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> Path:
    """A folder with train.csv (240 rows) and test.csv (80): text, label, site."""
    folder = tmp_path_factory.mktemp("reviews")
    for name, count, seed in (("train", 240, 1), ("test", 80, 2)):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "site"])
            writer.writerows(sentences(count, seed))
    return folder


@pytest.fixture
def spryfl(monkeypatch, capsys):
    """`spryfl(*arguments)` in this process -> (exit code, standard output, standard error)."""
    from spryfl import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["spryfl", *(str(one) for one in arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call
