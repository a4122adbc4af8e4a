"""A prompt's template: literal text, names of columns in braces, and `<mask>`; filled in so that it fits.

What is too long is cut at the end of the row's longest column, never in the template. Cost: some microseconds a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import Any, NamedTuple

from spryfl.data.columns import TEXTS, Needs
from spryfl.data.examples import Examples

MASK = "<mask>"
ROLES = ("text", "pair")  # columns that the section [data] names


class Template(NamedTuple):
    """A template in pieces."""

    text: str
    pieces: tuple[tuple[str, str | None], ...]  # literal text, then a column's name
    columns: tuple[str, ...]
    masked: bool

    def needs(self) -> Needs:
        """The columns it names."""
        more = {name: (name,) for name in self.columns if name not in ROLES}
        texts = TEXTS if "text" in self.columns else (self.columns[0], *TEXTS)
        return Needs(texts=texts, extra=more)

    def filled(self, tokenizer: Any, examples: Examples, max_length: int) -> tuple[list[str], int]:
        """The prompt of each row in at most `max_length` tokens, and how many rows were cut."""
        columns = [_values(examples, name) for name in self.columns]
        rows = [[str(value) for value in row] for row in zip(*columns, strict=True)]
        prompts = [self._written(tokenizer, row) for row in rows]
        long = [i for i, ids in enumerate(tokenizer(prompts, verbose=False)["input_ids"]) if len(ids) > max_length]
        for i in long:
            prompts[i] = self._fitted(tokenizer, rows[i], max_length)
        return prompts, len(long)

    def _written(self, tokenizer: Any, row: Sequence[str]) -> str:
        values = dict(zip(self.columns, row, strict=True))
        return "".join(
            literal.replace(MASK, tokenizer.mask_token or "") + (values[name] if name else "")
            for literal, name in self.pieces
        )

    def _fitted(self, tokenizer: Any, row: list[str], max_length: int) -> str:
        """Cuts the longest column by what is too much, until it fits: cutting may move the tokens beside the cut."""
        row = list(row)
        while any(row):
            over = len(tokenizer(self._written(tokenizer, row), verbose=False)["input_ids"]) - max_length
            if over <= 0:
                return self._written(tokenizer, row)
            parts = [tokenizer(value, add_special_tokens=False, return_offsets_mapping=True) for value in row]
            ends = [[end for _, end in part["offset_mapping"]] for part in parts]
            longest = max(range(len(row)), key=lambda i: len(ends[i]))
            kept = len(ends[longest]) - over
            row[longest] = row[longest][: ends[longest][kept - 1]] if kept > 0 else ""
        raise ValueError(
            f'the template "{self.text}" alone does not fit into {max_length} tokens. Raise data.max_length.'
        )


def parsed(text: str) -> Template:
    """A template in pieces, or a ValueError that says what is wrong with it."""
    try:
        pieces = tuple((literal, name) for literal, name, _, _ in Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f'the template "{text}" cannot be read: {error}. Columns stand in braces: {{text}}.') from None
    columns = tuple(dict.fromkeys(name for _, name in pieces if name is not None))
    if not columns or not all(name.isidentifier() for name in columns):
        raise ValueError(f'the template "{text}" must name a column in braces, for example {{text}} or {{pair}}.')
    if text.count(MASK) > 1:
        raise ValueError(f'the template "{text}" has {text.count(MASK)} times {MASK}; one is asked for.')
    return Template(text, pieces, columns, MASK in text)


def _values(examples: Examples, name: str) -> Sequence[Any]:
    found = {"text": examples.text, "pair": examples.pair, **examples.extra}.get(name)
    if found is None:
        where = "data.pair names its column" if name == "pair" else "a column of that name, or --with, brings it"
        raise ValueError(f"the template needs {{{name}}}, which these rows do not have: {where}.")
    return found
