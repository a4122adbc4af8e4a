"""Extractive question answering (SQuAD, also version 2): the answer is a span of the context, or there is none.

    loss = (- log p_start[s] - log p_end[e]) / 2, the mean over windows, in float32
    metrics: f1 and exact_match of the answers' words, the best over a row's right answers (Rajpurkar et al. 2016, 2018)

A context that is too long is read in overlapping windows, each a sequence. "No answer" is the span of one place outside
the context: the classification token of an encoder, an end-of-text token after the text of a decoder, whose first
places see nothing of it. A window without the answer teaches "no answer". A row has none if the null span's score, the
least over the windows, exceeds the best span's by `threshold`. Probabilities are over the context and that place alone.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spryfl.data.columns import Needs
from spryfl.data.examples import Examples
from spryfl.tasks.record import OF, Rows, Task, wide
from spryfl.types import Batch

FAR = -1e9  # the logit of a place that cannot be
START, END, NULL, CONTEXT = "labels_start", "labels_end", "labels_null", "labels_context"
_COLUMNS = Needs(
    texts=("question", "text"),
    pairs=(("question", "context"), ("question", "passage"), ("question", "paragraph")),
    label=False,
    extra={"answers": ("answers", "answers_text", "answer"), "starts": ("answers_start", "answer_start")},
    optional=("starts",),
)


class Passage(NamedTuple):
    """A row's truth: its context, where each window's tokens stand in it, the right answers (none: no answer)."""

    context: str
    offsets: tuple[Sequence[tuple[int, int]], ...]
    answers: tuple[str, ...]


class Span(NamedTuple):
    """A row's answer: the best span of all windows, and the null span's score."""

    window: int
    start: int
    end: int
    score: float
    null: float


def question_answering(stride: int = 32, longest: int = 30, threshold: float = 0.0) -> Task:
    """Spans of a context that answer a question; the model is any that AutoModelForQuestionAnswering opens.

    Args:
        stride: tokens that two neighbouring windows share.
        longest: most tokens of an answer.
        threshold: by how much "no answer" must be ahead, in logits.
    """
    if stride < 0 or longest < 1:
        raise ValueError(f"stride = {stride}, longest = {longest} of question_answering: 0 and 1 token are the least.")
    return Task(
        auto="AutoModelForQuestionAnswering",
        metric="f1",
        encode=lambda tokenizer, examples, max_length: _encode(tokenizer, examples, max_length, stride),
        loss=_loss,
        answers=lambda output, batch: _spans(output, batch, longest),
        score=lambda answers, truths: score(
            [text(a, t, threshold) for a, t in zip(answers, truths, strict=True)], [t.answers for t in truths]
        ),
        say=lambda answer, truth, names: text(answer, truth, threshold) or "(no answer)",
        needs=_COLUMNS,
    )


def _encode(tokenizer: Any, examples: Examples, max_length: int, stride: int) -> Rows:
    if examples.pair is None:
        raise ValueError("question answering needs a context. Name its column: data.pair, or --pair.")
    if not tokenizer.is_fast:
        raise ValueError("question answering needs a fast tokenizer, which says where a token stands in the text.")
    if stride > max_length // 2 - 4:
        raise ValueError(
            f"stride = {stride} with data.max_length = {max_length}: windows would hardly move on. Use a stride of at "
            f"most {max_length // 2 - 4}, or a larger max_length."
        )
    if not examples.text:
        return Rows((), (), 0, tokenizer.pad_token_id)
    golds = _golds(examples)
    windows, offsets = _windows(tokenizer, examples, max_length, stride, golds)
    truths = (
        Passage(context, tuple(places), tuple(answer for answer, _ in gold))
        for context, places, gold in zip(examples.pair, offsets, golds, strict=True)
    )
    cut = sum(len(own) > 1 for own in windows)  # into windows: nothing is lost
    return Rows(tuple(map(tuple, windows)), tuple(truths), cut, tokenizer.pad_token_id)


def _windows(
    tokenizer: Any, examples: Examples, max_length: int, stride: int, golds: Sequence[Sequence[tuple[str, int]]]
) -> tuple[list[list[dict[str, Any]]], list[list[Sequence[tuple[int, int]]]]]:
    """Each row's windows, and where the tokens of each stand in the context."""
    last = _last_token(tokenizer)
    questions = _shortened(tokenizer, examples.text, max_length // 2 - 4)
    table = tokenizer(
        questions,
        list(examples.pair or ()),
        truncation="only_second",
        max_length=max_length - (last is not None),
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows: list[list[dict[str, Any]]] = [[] for _ in questions]
    offsets: list[list[Sequence[tuple[int, int]]]] = [[] for _ in questions]
    places = table.pop("offset_mapping")
    for i, row in enumerate(table.pop("overflow_to_sample_mapping")):
        inside = [int(which == 1) for which in table.sequence_ids(i)]
        tokens = {key: list(table[key][i]) for key in table}
        if last is None:
            null = tokens["input_ids"].index(tokenizer.cls_token_id)
        else:
            null = len(inside)
            for values, more in ((inside, 0), (tokens["input_ids"], last), (tokens["attention_mask"], 1)):
                values.append(more)
        start, end = _place(places[i], inside, golds[row]) or (null, null)
        windows[row].append({**tokens, START: start, END: end, NULL: null, CONTEXT: inside})
        offsets[row].append(places[i])
    return windows, offsets


def _last_token(tokenizer: Any) -> int | None:
    """What ends a decoder's window; nothing where the tokenizer marks a text for classification."""
    if tokenizer.cls_token_id in tokenizer("a")["input_ids"]:
        return None
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "question answering needs a classification or an end-of-text token, to say `no answer`; this tokenizer "
            "adds no [CLS] and has no end-of-text token. Use another model."
        )
    return tokenizer.eos_token_id


def _shortened(tokenizer: Any, questions: Sequence[str], most: int) -> list[str]:
    """Questions of at most so many tokens; a decoder's tokenizer puts nothing between two texts, so a line ends."""
    table = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [offsets[most - 1][1] if len(offsets) > most else None for offsets in table["offset_mapping"]]
    glue = "" if tokenizer.sep_token else "\n"
    return [question[:end] + glue for question, end in zip(questions, ends, strict=True)]


def _place(
    places: Sequence[tuple[int, int]], inside: Sequence[int], golds: Sequence[tuple[str, int]]
) -> tuple[int, int] | None:
    """First and last token of the first right answer, if a window holds it whole."""
    context = [i for i, there in enumerate(inside) if there]
    if not golds or not context:
        return None
    first, after = golds[0][1], golds[0][1] + len(golds[0][0])
    if places[context[0]][0] > first or after > places[context[-1]][1]:
        return None
    start = next(i for i in context if places[i][1] > first)
    end = next(i for i in reversed(context) if places[i][0] < after)
    return (start, end) if start <= end else None  # an answer that no token holds, such as a stray blank


def _golds(examples: Examples) -> list[list[tuple[str, int]]]:
    """Right answers and where they start, row by row; empty where the question has none."""
    given = examples.extra.get("answers", ((),) * len(examples.text))
    starts = examples.extra.get("starts", (None,) * len(examples.text))
    assert examples.pair is not None
    return [
        _gold(row, answers, places, context)
        for row, (answers, places, context) in enumerate(zip(given, starts, examples.pair, strict=True), start=1)
    ]


def _gold(row: int, answers: Any, starts: Any, context: str) -> list[tuple[str, int]]:
    """One row's answers out of SQuAD's {text, answer_start}, a list with a list of starts, or one text."""
    if isinstance(answers, dict):
        answers, starts = answers["text"], answers.get("answer_start")
    texts = [answers] if isinstance(answers, str) else list(answers or ())
    given = [starts] if isinstance(starts, int) else starts
    places = [context.find(one) for one in texts] if given is None else list(given)
    found = [(one, place) for one, place in zip(texts, places, strict=True) if one]
    for one, place in found:
        if place < 0 or context[place : place + len(one)] != one:
            raise ValueError(
                f'row {row}: the answer "{one[:40]}" does not stand in its context at {place}. Correct the row, or '
                f"leave its answers empty if the question has none."
            )
    return found


def _possible(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Start and end logits over context and null place, (windows, length): padding and question cannot be answers."""
    places = torch.arange(batch[CONTEXT].shape[1], device=batch[CONTEXT].device)
    out = ~((batch[CONTEXT] > 0) | (places == batch[NULL].unsqueeze(1)))
    return wide(output.start_logits).masked_fill(out, FAR), wide(output.end_logits).masked_fill(out, FAR)


def _loss(output: Any, batch: Batch) -> Tensor:
    start, end = _possible(output, batch)
    return (F.cross_entropy(start, batch[START]) + F.cross_entropy(end, batch[END])) / 2


def _spans(output: Any, batch: Batch, longest: int) -> list[Span]:
    """The best span of each row: start <= end < start + longest, both in the context of one window."""
    start, end = _possible(output, batch)
    null = batch[NULL].unsqueeze(1)
    nulls = (start.gather(1, null) + end.gather(1, null)).squeeze(1)
    start, end = start.scatter(1, null, FAR), end.scatter(1, null, FAR)
    both = start.unsqueeze(2) + end.unsqueeze(1)
    band = torch.ones(both.shape[1:], dtype=torch.bool, device=both.device).triu().tril(longest - 1)
    scores, places = both.masked_fill(~band, 2 * FAR).flatten(1).max(1)
    length = both.shape[2]
    made: list[list[Span]] = [[] for _ in range(int(batch[OF].max()) + 1)]
    columns = (batch[OF].tolist(), places.tolist(), scores.tolist(), nulls.tolist())
    for row, place, best, none in zip(*columns, strict=True):
        made[row].append(Span(len(made[row]), place // length, place % length, best, none))
    return [max(own, key=lambda span: span.score)._replace(null=min(span.null for span in own)) for own in made]


def text(answer: Span, truth: Passage, threshold: float = 0.0) -> str:
    """The words of an answer; none where "no answer" is ahead by more than the threshold."""
    if answer.null - answer.score > threshold:
        return ""
    places = truth.offsets[answer.window]
    return truth.context[places[answer.start][0] : places[answer.end][1]].strip()


def score(said: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1 and exact match in [0, 1], the means over the rows."""
    pairs = [(one, [g for g in own if plain(g)] or [""]) for one, own in zip(said, golds, strict=True)]
    return {
        "f1": sum(max(f1(one, gold) for gold in own) for one, own in pairs) / len(pairs),
        "exact_match": sum(any(plain(one) == plain(gold) for gold in own) for one, own in pairs) / len(pairs),
    }


def plain(answer: str) -> str:
    """SQuAD's normal form: lower case, without punctuation and articles, single spaces.

    >>> plain("The  Eiffel-Tower, a!")
    'eiffeltower'
    """
    kept = "".join(sign for sign in answer.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def f1(said: str, gold: str) -> float:
    """The harmonic mean of precision and recall over words; equality where one of them has none.

    >>> f1("the cat sat", "a cat")
    0.6666666666666666
    """
    mine, theirs = plain(said).split(), plain(gold).split()
    if not mine or not theirs:
        return float(mine == theirs)
    shared = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * shared / (len(mine) + len(theirs))
