"""Finetuning a causal language model on texts, or on completions of prompts (instructions and their answers).

    loss = - mean over the completions' tokens of log p(token | what is before it), in float32
    metric: log_likelihood = - loss, nats a token, over all rows at once; perplexity = exp(loss)

Tokens of a prompt are read and not learnt. Nothing outside the trunk is trained. Cost: logits over the vocabulary for
the tokens that are learnt alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spryfl.data.columns import Needs
from spryfl.data.examples import Examples
from spryfl.tasks.record import AT, Rows, Task, wide
from spryfl.types import Batch

NEXT = "labels_next"  # (sequences, length) the token that follows
_COLUMNS = Needs(
    texts=("completion", "response", "output", "answer", "text"),
    pairs=(),
    label=False,
    extra={"prompt": ("prompt", "instruction", "question"), "input": ("input",)},
    optional=("prompt", "input"),
)


def causal_lm(between: str = "\n", end: bool = True) -> Task:
    """Completions of prompts, or whole texts where no column is a prompt.

    Args:
        between: put after the prompt, and between an instruction and its input.
        end: the model learns to end the text, with the tokenizer's end-of-text token.
    """
    return Task(
        auto="AutoModelForCausalLM",
        metric="log_likelihood",
        encode=lambda tokenizer, examples, max_length: _encode(tokenizer, examples, max_length, between, end),
        loss=lambda output, batch: _losses(output, batch).sum() / max(_tokens(batch), 1),
        answers=_sums,
        score=_score,
        say=lambda answer, truth, names: _said(*answer),
        needs=_COLUMNS,
        head=False,
        terms=_tokens,
    )


def _encode(tokenizer: Any, examples: Examples, max_length: int, between: str, end: bool) -> Rows:
    if not examples.text:
        return Rows((), (), 0, tokenizer.pad_token_id)
    inputs, cut = [], 0
    stop = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    before = [_prompt(examples, row, between) for row in range(len(examples.text))]
    prompts = tokenizer(before, verbose=False)["input_ids"]
    alone, after = (
        tokenizer(list(examples.text), add_special_tokens=special, verbose=False)["input_ids"]
        for special in (True, False)
    )
    for row, text in enumerate(before):
        prompt = prompts[row] if text else []
        learnt = (after if text else alone)[row] + stop
        kept, own = _fitted(prompt, learnt, max_length, tokenizer.bos_token_id)
        cut += (len(kept), len(own)) != (len(prompt), len(learnt))
        inputs.append((_shifted(kept, own),))
    return Rows(tuple(inputs), (None,) * len(inputs), cut, tokenizer.pad_token_id)


def _prompt(examples: Examples, row: int, between: str) -> str:
    parts = [examples.extra[name][row] for name in ("prompt", "input") if name in examples.extra]
    return "".join(f"{part}{between}" for part in parts if part)


def _fitted(prompt: list[int], learnt: list[int], most: int, first: int | None) -> tuple[list[int], list[int]]:
    """Prompt and completion in `most` + 1 tokens, as the last is no input: the prompt gives way down to half of them.

    A prompt loses its beginning, but for a token that opens every text; a completion its end.
    """
    own = learnt[: max(most + 1 - len(prompt), (most + 1) // 2)]
    room = most + 1 - len(own)
    opening = prompt[:1] if prompt[:1] == [first] else []
    kept = prompt if len(prompt) <= room else opening + prompt[len(prompt) - room + len(opening) :]
    return kept, own


def _shifted(prompt: list[int], learnt: list[int]) -> dict[str, Any]:
    """Each place is asked for the token after it, where that one is learnt; nothing is before a text's first token."""
    ids = prompt + learnt
    at = [int(place + 1 >= len(prompt)) for place in range(len(ids) - 1)]
    if not at:  # a text of one token: there is nothing to learn
        at, ids = [0], [*ids, *ids]
    return {"input_ids": ids[:-1], "attention_mask": [1] * len(at), AT: at, NEXT: ids[1:]}


def _losses(output: Any, batch: Batch) -> Tensor:
    """- log p of each learnt token, (tokens,)."""
    return F.cross_entropy(wide(output.logits), batch[NEXT][batch[AT] > 0], reduction="none")


def _tokens(batch: Batch) -> int:
    return int((batch[AT] > 0).sum())


def _sums(output: Any, batch: Batch) -> list[tuple[float, int]]:
    """(sum of the losses, tokens) of each row."""
    wanted = batch[AT] > 0
    losses = _losses(output, batch).double()
    sums = torch.zeros(len(wanted), dtype=losses.dtype, device=losses.device)
    sums = torch.index_add(sums, 0, wanted.nonzero()[:, 0], losses)
    return list(zip(sums.tolist(), wanted.sum(1).tolist(), strict=True))


def _score(answers: Sequence[tuple[float, int]], truths: Sequence[Any]) -> dict[str, float]:
    """Over all tokens of all rows."""
    loss = sum(total for total, _ in answers) / max(sum(count for _, count in answers), 1)
    return {"log_likelihood": -loss, "perplexity": _perplexity(loss)}


def _said(total: float, tokens: int) -> str:
    return f"perplexity {_perplexity(total / tokens):.3f}" if tokens else "(one token: nothing to foresee)"


def _perplexity(loss: float) -> float:
    return exp(loss) if loss < 700 else inf
