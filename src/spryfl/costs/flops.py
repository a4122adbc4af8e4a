"""Floating-point operations of a step, predicted from shapes; and counted, to hold the prediction against.

A product of (m, k) and (k, n) counts 2 m n k, nothing else counts. n tokens in the batch, T in a row, width h,
a = heads x their size, g = key-value heads x their size, f feed-forward:

    block, value      2 n h (2 a + 2 g) + 2 n h f (2, gated 3) + 4 n T a + 2 n (values of its LoRA pairs)
    block, tangent    the same with attention twice and the moved pairs twice: what is frozen has no tangent
    block, backward   as the tangent: the transposed products, and none for the gradient of a frozen weight
    first moved block the maps into its attention have no tangent and hand no gradient on; earlier blocks have none
    head              2 rows (its values); moved, and fed by something that moves: twice

Where several value passes run over one batch, what lies before the first moved block runs once. A checkpointed backward
pass runs the values of its blocks again, but for a last map that nothing after it in the block needs the answer of.
Held against a count: backprop within 0.2 %, the others within 2 % at ranks to 2; at rank 16 tangents are predicted up
to 7 % high. Cost: nothing; counting costs some microseconds an operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from spryfl.costs.shapes import Shapes, place, size
from spryfl.types import Unit


def attention(shapes: Shapes) -> int:
    """Products of queries with keys and of weights with values, one block and one batch."""
    return 4 * shapes.positions * shapes.tokens * shapes.heads * shapes.head_size


def maps(shapes: Shapes) -> tuple[int, int]:
    """The frozen linear maps of one block: (into attention, after it)."""
    into = (shapes.heads + 2 * shapes.kv_heads) * shapes.head_size * shapes.width
    after = shapes.heads * shapes.head_size * shapes.width
    feed = (3 if shapes.gated else 2) * shapes.width * shapes.inner
    return 2 * shapes.positions * into, 2 * shapes.positions * (after + feed)


def block_value(shapes: Shapes, block: int) -> int:
    """One block forward."""
    return sum(maps(shapes)) + attention(shapes) + _pairs(shapes, shapes.units, block)


def block_change(shapes: Shapes, block: int, mine: Sequence[Unit], first: int) -> int:
    """One tangent, or one backward pass, of one block; `first` is the first that has any."""
    if block < first:
        return 0
    into, after = maps(shapes)
    all_pairs, moved = _pairs(shapes, shapes.units, block), _pairs(shapes, mine, block)
    if block > first:
        return into + after + 2 * attention(shapes) + all_pairs + moved
    # Queries and values of the block change, its input does not: three of four products, and A of each pair once.
    return after + 3 * attention(shapes) // 2 + 3 * moved // 2


def value(shapes: Shapes, begin: int, end: int) -> int:
    """Blocks `begin` to `end` forward."""
    return sum(block_value(shapes, block) for block in range(begin, end))


def change(shapes: Shapes, mine: Sequence[Unit], begin: int, end: int, first: int) -> int:
    """One tangent, or one backward pass, through blocks `begin` to `end`."""
    return sum(block_change(shapes, block, mine, first) for block in range(begin, end))


def head_value(shapes: Shapes) -> int:
    """The head forward, and a pooler before it."""
    return _head(shapes, shapes.units) + _pooler(shapes)


def head_change(shapes: Shapes, mine: Sequence[Unit], fed: bool) -> int:
    """One tangent, or one backward pass, of the head; `fed`: of what comes from the trunk too."""
    whole = _head(shapes, shapes.units) + _pooler(shapes) if fed else 0
    return whole + _head(shapes, mine)


def first_moved(shapes: Shapes, mine: Sequence[Unit]) -> int:
    """The first block with a unit of these; -1 if one lies before all blocks, the number of blocks if there is none."""
    return min((0 if shapes.shared else place(unit) for unit in mine if not unit.head), default=shapes.layers)


def unneeded(shapes: Shapes) -> int:
    """The part of a block that is not run again on the way back: a frozen last map is followed by a sum alone."""
    return 2 * shapes.positions * shapes.inner * shapes.width if shapes.norm_first else 0


class _Products(TorchDispatchMode):
    """Adds up the operations of what runs while it is on, by PyTorch's own formulas."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


@contextmanager
def counted_flops() -> Iterator[Callable[[], int]]:
    """Counts what runs inside the block: `with counted_flops() as flops: ...; flops()`.

    It counts matrix products, but not inside the fused attention of a CPU: load the model with eager attention.
    """
    with _Products() as products:
        yield lambda: products.total


def _pairs(shapes: Shapes, units: Sequence[Unit], block: int) -> int:
    """The products of the LoRA pairs of one block."""
    if not shapes.products:
        return 0
    here = [unit for unit in units if not unit.head and (shapes.shared or place(unit) == block)]
    return 2 * shapes.positions * size(here)


def _head(shapes: Shapes, units: Sequence[Unit]) -> int:
    reads = shapes.positions if shapes.every_token else shapes.rows
    return 2 * reads * size([unit for unit in units if unit.head])


def _pooler(shapes: Shapes) -> int:
    return 2 * shapes.rows * shapes.width**2 if shapes.pooler else 0
