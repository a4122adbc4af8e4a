"""The rule of scaled dot-product attention, in blocks of queries, so that memory grows with tokens x block.

    s = c q k^T + mask    p = softmax(s)    o = p v
    ds = c (dq k^T + q dk^T) + dmask        dp = p (ds - <p, ds>)        do = dp v + p dv

Per direction four products against the value's two: the least there is, as p is needed in any case. Grouped queries
share their key head by counting as more rows of queries; keys and values are never repeated. Causal blocks stop at
their last visible key. Dropout draws one mask for the value and all tangents, the same draw as torch's own where it
fits one allocation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextvars import ContextVar
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .registry import Op, rule

BLOCK = 1 << 17  # scores held at once: 512 KiB of float32, well inside a core's L2 cache
SOME: ContextVar[int | None] = ContextVar("SOME", default=None)  # pieces of a call that are run; None for all
MASK_LIMIT = 1 << 26  # bytes of one dropout mask; above it the mask is drawn block by block


class Shape(NamedTuple):
    """Sizes of one attention: batch, key heads, queries per key head, queries, keys, widths of a key and of a value."""

    batch: int
    heads: int
    group: int
    queries: int
    keys: int


class Block(NamedTuple):
    """One piece of work: these batch items, these queries, the keys before `keys`."""

    items: slice
    queries: slice
    keys: int


def blocks(s: Shape, causal: bool) -> Iterator[Block]:
    """Pieces of at most BLOCK scores (one query of one batch item at the least), whole batch items where they fit."""
    rows = max(1, min(s.queries, BLOCK // (s.heads * s.group * s.keys)))
    items = max(1, BLOCK // (s.heads * s.group * s.keys * s.queries)) if rows == s.queries else 1
    for b in range(0, s.batch, items):
        for t in range(0, s.queries, rows):
            end = min(t + rows, s.queries)
            yield Block(slice(b, b + items), slice(t, end), min(end, s.keys) if causal else s.keys)


def query_rows(q: Tensor, s: Shape, at: Block) -> Tensor:
    """(batch, heads * group, queries, d) -> (items * heads, group * rows, d)."""
    part = q[at.items, :, at.queries]
    return part.reshape(part.shape[0] * s.heads, s.group * part.shape[2], part.shape[3])


def key_rows(k: Tensor, at: Block) -> Tensor:
    """(batch, heads, keys, d) -> (items * heads, visible keys, d)."""
    part = k[at.items, :, : at.keys]
    return part.reshape(-1, *part.shape[2:])


def mask_rows(mask: Tensor, s: Shape, at: Block) -> Tensor:
    """(batch | 1, all heads | 1, queries | 1, keys | 1) -> broadcastable to (items, heads, group, rows, visible
    keys)."""
    part = mask[at.items] if mask.shape[0] > 1 else mask
    part = part[:, :, at.queries] if mask.shape[2] > 1 else part
    part = part[..., : at.keys] if mask.shape[3] > 1 else part
    return part.unsqueeze(1) if part.shape[1] == 1 else part.unflatten(1, (s.heads, s.group))


class Masks(NamedTuple):
    """What is added to the scores, where no query sees a key, and what dropout keeps."""

    bias: Tensor | None  # boolean (True: visible) or additive
    causal: bool
    dropout: float
    keep: Tensor | None  # boolean, for all scores
    blind: Tensor | None  # boolean, keys dimension 1: the queries that see no key, where there are any


def add_scores(total: Tensor | None, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """total + scale q k^T in one product, the scale inside it."""
    room = q.new_empty(*q.shape[:2], k.shape[1]) if total is None else total
    return room.baddbmm_(q, k.transpose(1, 2), beta=0 if total is None else 1, alpha=scale)


def probabilities(q: Tensor, k: Tensor, scale: float, m: Masks, s: Shape, at: Block) -> Tensor:
    """softmax(scale q k^T + mask) of one block; rows that see no key are zero, as torch has it."""
    scores = add_scores(None, q, k, scale)
    wide = scores.view(-1, s.heads, s.group, at.queries.stop - at.queries.start, at.keys)
    if m.causal and at.keys > at.queries.start:
        ranks = torch.arange(at.queries.start, at.queries.stop, device=q.device).unsqueeze(1)
        wide.masked_fill_(torch.arange(at.keys, device=q.device) > ranks, -math.inf)
    if m.bias is None:
        return torch.softmax(scores, -1)
    bias = mask_rows(m.bias, s, at)
    if bias.dtype == torch.bool:  # as numbers it is one addition; a fill by a broadcast mask is six times slower
        bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -math.inf)
    p = torch.softmax(wide.add_(bias), -1)
    return (p if m.blind is None else p.masked_fill_(mask_rows(m.blind, s, at), 0)).view(scores.shape)


def sightless(bias: Tensor | None) -> Tensor | None:
    """The queries that a mask leaves without a key, or None where there are none."""
    if bias is None:
        return None
    blind = ~bias.any(-1, keepdim=True) if bias.dtype == torch.bool else bias.amax(-1, keepdim=True) == -math.inf
    return blind if bool(blind.any()) else None


def kept(p: Tensor, m: Masks, s: Shape, at: Block) -> Tensor | None:
    """Dropout's factors for one block, or None."""
    if m.dropout == 0.0:
        return None
    if m.keep is None:
        return torch.empty_like(p).bernoulli_(1 - m.dropout).div_(1 - m.dropout)
    part = m.keep[at.items, :, at.queries, : at.keys]
    return part.reshape(p.shape).to(p.dtype).div_(1 - m.dropout)


def draw(s: Shape, p: float, like: Tensor) -> Tensor | None:
    shape = (s.batch, s.heads * s.group, s.queries, s.keys)
    if p == 0.0 or math.prod(shape) > MASK_LIMIT:
        return None
    return torch.empty(shape, dtype=torch.bool, device=like.device).bernoulli_(1 - p)


def blank(q: Tensor, width: int) -> Tensor:
    """An output (batch, all heads, queries, width) whose memory order is (batch, queries, heads, width), as the
    models read it."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], width).transpose(1, 2)


def put(out: Tensor, o: Tensor, at: Block) -> None:
    part = out[at.items, :, at.queries]
    part.copy_(o.view(part.shape))


class Point(NamedTuple):
    """Where the derivative is taken: the arguments in four dimensions and what is fixed."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    masks: Masks
    shape: Shape


class Tangent(NamedTuple):
    """One direction; None is zero."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    mask: Tensor | None


def score_tangent(x: Point, d: Tangent, q: Tensor, k: Tensor, at: Block) -> Tensor | None:
    """ds = c (dq k^T + q dk^T) + dmask of one block, or None where it is zero."""
    ds: Tensor | None = None
    if d.q is not None:
        ds = add_scores(ds, query_rows(d.q, x.shape, at), k, x.scale)
    if d.k is not None:
        ds = add_scores(ds, q, key_rows(d.k, at), x.scale)
    if d.mask is not None:
        rows = at.queries.stop - at.queries.start
        wide = (-1, x.shape.heads, x.shape.group, rows, at.keys)
        bias = mask_rows(d.mask, x.shape, at)
        full = q.new_zeros(q.shape[0], q.shape[1], at.keys) if ds is None else ds
        full.view(wide).add_(bias)
        ds = full
    return ds


def output_tangent(
    d: Tangent, ds: Tensor | None, p: Tensor, keep: Tensor | None, v: Tensor, at: Block
) -> Tensor | None:
    """do = dp v + p dv of one block."""
    out: Tensor | None = None
    if ds is not None:
        dp = torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype)  # symmetric Jacobian: backward is forward
        out = torch.bmm(dp if keep is None else dp.mul_(keep), v)
    if d.v is not None:
        dv, weights = key_rows(d.v, at), p if keep is None else p * keep
        out = torch.bmm(weights, dv) if out is None else out.baddbmm_(weights, dv)
    return out


def attend(x: Point, directions: list[Tangent]) -> tuple[Tensor, list[Tensor]]:
    """o and its tangents, block by block: a block's probabilities serve the value and every direction, then are
    gone."""
    y, *dy = (blank(x.q, x.v.shape[-1]) for _ in range(1 + len(directions)))
    for at in islice(blocks(x.shape, x.masks.causal), SOME.get()):
        q, k, v = query_rows(x.q, x.shape, at), key_rows(x.k, at), key_rows(x.v, at)
        p = probabilities(q, k, x.scale, x.masks, x.shape, at)
        keep = kept(p, x.masks, x.shape, at)
        put(y, torch.bmm(p if keep is None else p * keep, v), at)
        for out, d in zip(dy, directions, strict=True):
            do = output_tangent(d, score_tangent(x, d, q, k, at), p, keep, v, at)
            assert do is not None
            put(out, do, at)
    return y, dy


def four(x: Tensor | None, dims: int) -> Tensor | None:
    """An argument of 2, 3 or 4 dimensions in the (batch, heads, tokens, width) form; `dims` are the query's."""
    if x is None or (dims == 4 and x.dim() == 4):
        return x
    if dims == 3:
        x = x.unsqueeze(0) if x.dim() == 2 else x
        return x.unsqueeze(1)
    return x[(None,) * (4 - x.dim())]


def sizes(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> Shape:
    """The sizes, or NotImplementedError where only torch's broadcasting helps."""
    heads = k.shape[1]
    plain = q.dim() == 4 and q.shape[0] == k.shape[0] == v.shape[0] and heads == v.shape[1]
    if not plain or (q.shape[1] % heads if grouped else q.shape[1] != heads):
        raise NotImplementedError
    return Shape(q.shape[0], heads, q.shape[1] // heads, q.shape[2], k.shape[2])


@rule("scaled_dot_product_attention")
def attention(
    op: Op, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: give attn_mask or is_causal=True, not both.")
    dims = query.dim()
    q, k, v, bias = (four(lowered(a), dims) for a in (query, key, value, attn_mask))
    assert q is not None
    assert k is not None
    assert v is not None
    shape = sizes(q, k, v, enable_gqa)
    masks = Masks(bias, is_causal, dropout_p, draw(shape, dropout_p, q), sightless(bias))
    point = Point(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, masks, shape)
    directions = [Tangent(*(four(lowered(t), dims) for t in arguments(*a, **kw))) for a, kw in op.directions]
    with torch.autocast(q.device.type, enabled=False):
        y, dy = attend(point, directions)
    form = (*query.shape[:-1], value.shape[-1])
    return y.reshape(form), [t.reshape(form) for t in dy]


def arguments(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> tuple[Any, Any, Any, Any]:
    return query, key, value, attn_mask


def lowered(x: Tensor | None) -> Tensor | None:
    """In autocast's type where autocast is on: attention is one of its operations."""
    if x is None or not x.is_floating_point() or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
