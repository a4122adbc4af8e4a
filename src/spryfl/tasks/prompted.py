"""Prompts: a class is the word that a pretrained language model finds likeliest in a template. Nothing new is trained.

    masked   `{text} It was <mask>.`    score of a word = its logit at the mask
    causal   `{text} It was`            score of a word = its log-likelihood after the prompt, summed over its tokens
    loss = - log softmax over the words (score)[right one], the mean over the rows, in float32      metric: accuracy

A template with <mask> is for masked models, one without for causal ones. Where every word is a single token, one
sequence a row is enough, as the words' common normaliser leaves the softmax; otherwise there is one for each word.
Prompts: Schick and Schuetze 2021 (arXiv 2001.07676); Malladi et al. 2023 (arXiv 2305.17333). Logits over the vocabulary
are computed at the places that matter alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spryfl.data.examples import Examples
from spryfl.tasks.classification import accuracy, say_classes
from spryfl.tasks.multiple_choice import (
    FAR,
    Chosen,
    by_row,
    choice_needs,
    choices_of,
    chosen_accuracy,
    right,
    say_choice,
    softmaxed,
)
from spryfl.tasks.record import AT, TARGETS, Rows, Task, wide
from spryfl.tasks.template import MASK, Template, parsed
from spryfl.types import Batch

WORDS = "labels_words"  # (rows, words) the token of each word, where one sequence a row is enough
NEXT = "labels_next"  # (sequences, length) the token that follows, where it is one of a word's


def prompted(template: str = f"{{text}} It was {MASK}.", words: tuple[str, ...] = ("terrible", "great")) -> Task:
    """Classes as words: the model is any that AutoModelForMaskedLM or, without <mask>, AutoModelForCausalLM opens.

    Args:
        template: text with {text}, {pair} and names of further columns, and <mask> where a masked model is asked.
        words: one for each class, in the order of the classes' numbers.

    Raises:
        ValueError: the template has no column or two masks, a word comes twice, or is no single token of a masked
            model; as many words as classes are needed.

    >>> prompted("{text}? <mask>, {pair}", ("No", "Yes")).auto
    'AutoModelForMaskedLM'
    """
    if len(set(words)) < max(2, len(words)):
        raise ValueError(f"words = {list(words)} of prompted: two different words or more are needed, one a class.")

    def outputs(classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(classes) != len(words):
            raise ValueError(
                f"task.words has {len(words)} words ({', '.join(words)}) and the data {len(classes)} classes "
                f"({', '.join(classes)}). Give one word a class, in this order."
            )
        return ()

    made = parsed(template)
    task = _task(made)
    return task._replace(
        encode=lambda tokenizer, examples, max_length: _encode(
            made, tokenizer, examples, max_length, [words] * len(examples.text), examples.label
        ),
        score=accuracy,
        say=say_classes,
        outputs=outputs,
    )


def prompted_choice(template: str = "{text}", choices: tuple[str, ...] = ()) -> Task:
    """Multiple choice by likelihood: each row brings its own words or texts; the label is the number of the right one.

    Args:
        template: as in `prompted`; without <mask> the choices may be texts of any length.
        choices: the columns of the choices, in order; empty is one column that holds a list of texts.
    """
    made = parsed(template)
    task = _task(made)

    def encode(tokenizer: Any, examples: Examples, max_length: int) -> Rows:
        own = choices_of(examples, choices)
        truths = tuple(Chosen(*both) for both in zip(examples.label, own, strict=True))
        return _encode(made, tokenizer, examples, max_length, own, truths)

    return task._replace(encode=encode, score=chosen_accuracy, say=say_choice, needs=choice_needs(choices, task.needs))


def _task(template: Template) -> Task:
    """What both have in common."""
    return Task(
        auto="AutoModelForMaskedLM" if template.masked else "AutoModelForCausalLM",
        metric="accuracy",
        encode=lambda *args: Rows((), (), 0, 0),
        loss=lambda output, batch: F.cross_entropy(scores(output, batch), _labels(batch)),
        answers=lambda output, batch: softmaxed(scores(output, batch), batch),
        score=accuracy,
        say=say_classes,
        needs=template.needs(),
        head=False,
        terms=lambda batch: len(_labels(batch)),
    )


def scores(output: Any, batch: Batch) -> Tensor:
    """The words' scores, (rows, most words), in float32; `output.logits` is (wanted places, vocabulary)."""
    logits = wide(output.logits)
    if WORDS in batch:
        words = batch[WORDS]
        return logits.gather(1, words.clamp(min=0)).masked_fill(words < 0, FAR)
    wanted = batch[AT] > 0
    likelihood = -F.cross_entropy(logits, batch[NEXT][wanted], reduction="none")
    sums = torch.zeros(len(wanted), dtype=likelihood.dtype, device=wanted.device)
    return by_row(torch.index_add(sums, 0, wanted.nonzero()[:, 0], likelihood), batch)


def _labels(batch: Batch) -> Tensor:
    return batch[TARGETS] if WORDS in batch else right(batch)


def _encode(
    template: Template,
    tokenizer: Any,
    examples: Examples,
    max_length: int,
    words: Sequence[Sequence[str]],
    truths: Sequence[Any],
) -> Rows:
    make = _masked if template.masked else _causal
    inputs, cut = make(template, tokenizer, examples, max_length, words) if examples.text else ((), 0)
    return Rows(tuple(inputs), tuple(truths), cut, tokenizer.pad_token_id)


def _masked(
    template: Template, tokenizer: Any, examples: Examples, max_length: int, words: Sequence[Sequence[str]]
) -> tuple[list[Any], int]:
    """One sequence a row, with its mask's place and the tokens of its words."""
    if tokenizer.mask_token is None:
        raise ValueError(
            f'the template "{template.text}" has {MASK}, and the tokenizer has no mask token: it belongs to no masked '
            f"model. Leave {MASK} out, so that the words follow the prompt."
        )
    prompts, cut = template.filled(tokenizer, examples, max_length)
    table, inputs = tokenizer(prompts), []
    tokens = {word: _single(tokenizer, word) for word in dict.fromkeys(word for row in words for word in row)}
    for row, own in enumerate(words):
        ids = table["input_ids"][row]
        at = [int(token == tokenizer.mask_token_id) for token in ids]
        if sum(at) != 1:
            raise ValueError(f"row {row + 1} holds the mask token {tokenizer.mask_token} itself. Take it out.")
        targets = {AT: at, WORDS: [tokens[word] for word in own], TARGETS: examples.label[row]}
        inputs.append(({**{key: table[key][row] for key in table}, **targets},))
    return inputs, cut


def _single(tokenizer: Any, word: str) -> int:
    """The one token of a word inside a text; a ValueError if there is none."""
    for written in (f" {word}", word):
        ids = tokenizer.encode(written, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0]
    shown = tokenizer.convert_ids_to_tokens(tokenizer.encode(word, add_special_tokens=False))
    raise ValueError(
        f'the word "{word}" is not one token of this masked model, but: {", ".join(shown)}. A mask holds one token: '
        f"use another word, or a causal model and a template without {MASK}."
    )


def _causal(
    template: Template, tokenizer: Any, examples: Examples, max_length: int, words: Sequence[Sequence[str]]
) -> tuple[list[Any], int]:
    """A sequence for each word, its tokens marked; or one a row, where all words are single tokens."""
    different = {word for row in words for word in row}
    room = max(len(tokenizer.encode(f" {word}", add_special_tokens=False)) for word in different)
    prompts, cut = template.filled(tokenizer, examples, max_length - room)
    rows = _continued(tokenizer, prompts, words)
    single = all(len(word) == 1 for _, own in rows for word in own)
    made = [
        tuple({**sequence, TARGETS: label} for sequence in (_asked(*row) if single else _followed(*row)))
        for row, label in zip(rows, examples.label, strict=True)
    ]
    return made, cut


def _continued(
    tokenizer: Any, prompts: Sequence[str], words: Sequence[Sequence[str]]
) -> list[tuple[list[int], list[list[int]]]]:
    """For each row: tokens of the prompt as far as all words share them, and what follows for each word."""
    texts = []
    for prompt, own in zip(prompts, words, strict=True):
        glue = "" if prompt[-1:].isspace() else " "
        texts += [prompt, *(f"{prompt}{glue}{word}" for word in own)]
    ids = iter(tokenizer(texts)["input_ids"])
    made = []
    for prompt, own in zip(prompts, words, strict=True):
        before, after = next(ids), [next(ids) for _ in own]
        shared = min(_common(before, one) for one in after)
        if not shared or any(len(one) == shared for one in after):
            raise ValueError(f'no word can follow the prompt "{prompt[-60:]}": the template needs text before them.')
        made.append((before[:shared], [one[shared:] for one in after]))
    return made


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _asked(before: list[int], words: Sequence[list[int]]) -> tuple[dict[str, Any], ...]:
    """The prompt alone: its last place is asked for each word's token."""
    at = [0] * (len(before) - 1) + [1]
    return ({"input_ids": before, "attention_mask": [1] * len(before), AT: at, WORDS: [word[0] for word in words]},)


def _followed(before: list[int], words: Sequence[list[int]]) -> tuple[dict[str, Any], ...]:
    """The prompt and each word: a word's tokens are asked for at the places before them; its last is no input."""
    idle, made = [0] * (len(before) - 1), []
    for word in words:
        ids, at = before + word[:-1], idle + [1] * len(word)
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), AT: at, NEXT: [-1] * len(idle) + word})
    return tuple(made)
