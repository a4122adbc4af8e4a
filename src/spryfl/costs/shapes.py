"""The sizes that a prediction needs: of a network, of its trainable values, and of one batch. Costs nothing.

`shapes(...)` makes them from a few numbers: an encoder with a pair (A, B) of LoRA on some maps of every block and a
head of two maps, as RoBERTa has. `models.shapes(...)` makes them from a Hugging Face configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from spryfl.tree import block
from spryfl.types import Unit


class Shapes(NamedTuple):
    """A network of equal blocks, what of it is trained, and a batch."""

    layers: int  # blocks, as often as they are called
    width: int  # values of a hidden state a token
    inner: int  # width of the feed-forward part
    heads: int  # of attention
    kv_heads: int  # fewer than heads with grouped queries
    head_size: int  # values of one attention head
    vocabulary: int
    tokens: int  # of a row, padding included
    rows: int  # of a batch
    labels: int
    units: tuple[Unit, ...]  # all that is trainable; the head's are marked
    gated: bool = False  # three maps in the feed-forward part, not two
    products: bool = True  # a unit is a pair of matrices (LoRA), not a factor or a bias
    shared: bool = False  # one set of values for all blocks (ALBERT)
    pooler: bool = False  # a frozen map of the first token before the head
    norm_first: bool = False  # a block ends in a map and a sum, not in a norm
    every_token: bool = False  # the head runs over all tokens (decoders), not over one a row

    @property
    def values(self) -> int:
        """Trainable values."""
        return size(self.units)

    @property
    def positions(self) -> int:
        """Tokens of a batch."""
        return self.rows * self.tokens


def size(units: Sequence[Unit]) -> int:
    """Values in some units."""
    return sum(unit.size for unit in units)


def place(unit: Unit) -> int:
    """The number of the block that a unit of the trunk lies in, by its name; -1 before all blocks."""
    return block(unit.name)


def sides(shapes: Shapes, mine: Sequence[Unit], top: int) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
    """Which of a client's units lie below a cut under the last `top` blocks, and which above; -1 for all blocks."""
    at = 0 if top == -1 else shapes.layers - top
    above = tuple(unit for unit in mine if unit.head or place(unit) >= at)
    return tuple(unit for unit in mine if unit not in above), above


def shapes(
    layers: int = 24,
    width: int = 1024,
    tokens: int = 128,
    batch: int = 8,
    labels: int = 4,
    rank: int = 1,
    maps: Sequence[str] = ("query", "value"),
    vocabulary: int = 50265,
) -> Shapes:
    """An encoder of RoBERTa's form; without arguments RoBERTa-Large as the Spry paper finetunes it, four classes.

    Args:
        layers: blocks.
        width: values of a hidden state a token; the feed-forward part is four times as wide, attention heads have 64.
        tokens: tokens of a row.
        batch: rows of a batch.
        labels: classes.
        rank: r of LoRA.
        maps: the square maps of each block that LoRA is put on.
        vocabulary: tokens that there are.

    >>> from spryfl.costs import shapes
    >>> given = shapes()
    >>> sum(unit.size for unit in given.units if not unit.head), sum(unit.size for unit in given.units if unit.head)
    (98304, 1053700)
    """
    for name, value in (("layers", layers), ("width", width), ("tokens", tokens), ("batch", batch), ("rank", rank)):
        if value < 1:
            raise ValueError(f"{name} = {value}; a cost needs at least 1.")
    if labels < 2:
        raise ValueError(f"labels = {labels}; a classifier has at least 2.")
    adapters = tuple(
        _unit(f"model.encoder.layer.{i}.attention.self.{name}", 2 * rank * width, ("lora_A.default", "lora_B.default"))
        for i in range(layers)
        for name in maps
    )
    kept, sort = ("modules_to_save.default",), "classifier"
    head = (
        _unit(f"{sort}.dense", width * width + width, kept)._replace(head=True),
        _unit(f"{sort}.out_proj", width * labels + labels, kept)._replace(head=True),
    )
    heads = max(1, width // 64)
    return Shapes(
        layers=layers,
        width=width,
        inner=4 * width,
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        vocabulary=vocabulary,
        tokens=tokens,
        rows=batch,
        labels=labels,
        units=adapters + head,
    )


def _unit(name: str, values: int, parts: Sequence[str]) -> Unit:
    """A unit with names as PEFT gives them, so that headers have their length."""
    return Unit(name, tuple(f"base_model.model.{name}.{part}.weight" for part in parts), values)
