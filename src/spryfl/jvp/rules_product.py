"""Rules of products: d(ab) = da b + a db, each term only where its tangent is not zero.

A frozen weight has none, so a linear map costs its value's product and one more per direction: the 2.0 of the arithmetic, where the
stock rule multiplies a tangent of zeros as well. Accumulation goes into the first product's memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Op, Push, add_into, rule


@rule("mul", "matmul", "mm", "bmm", "mv", "dot", "outer", "inner", "vdot")
def product(op: Op, *args: Any, **kwargs: Any) -> tuple[Tensor, Push]:
    a, b = *args, *kwargs.values()

    def push(*tangents: Any, **named: Any) -> Tensor:
        da, db = *tangents, *named.values()
        left = None if da is None else op.func(da, b)
        if db is None:
            assert left is not None
            return left
        return add_into(left, op.func(a, db))

    return op.func(a, b), push


@rule("einsum")
def einsum(op: Op, equation: str, *operands: Any) -> tuple[Tensor, Push]:
    flat = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands

    def push(_: None, *tangents: Any) -> Tensor:
        if len(tangents) == 1 and isinstance(tangents[0], list | tuple):
            tangents = tuple(tangents[0])
        total = None
        for i, d in enumerate(tangents):
            if d is not None:
                total = add_into(total, torch.einsum(equation, *flat[:i], d, *flat[i + 1 :]))
        assert total is not None
        return total

    return torch.einsum(equation, *flat), push


@rule("linear")
def linear(op: Op, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Push]:
    x, w, y = input, weight, op.func(input, weight, bias)

    def push(input: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        out = None if input is None else F.linear(input, w)
        out = out if weight is None else _add_product(out, x, weight)
        if out is None:
            assert bias is not None
            return bias.expand(y.shape).clone()
        return out if bias is None else add_into(out, bias)

    return y, push


def _add_product(out: Tensor | None, x: Tensor, dw: Tensor) -> Tensor:
    """out + x dw^T, inside one matrix product where memory and types allow."""
    if out is None:
        return F.linear(x, dw)
    if out.dtype == x.dtype == dw.dtype and out.is_contiguous() and out.dim() > 1:
        out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), dw.t())
        return out
    return out + F.linear(x, dw)


@rule("addmm", "baddbmm", "addmv", "addbmm")
def add_product(op: Op, input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> tuple[Tensor, Push]:
    y = op.func(input, a, b, beta=beta, alpha=alpha)
    empty = y.new_zeros(()).expand(y.shape)

    def push(di: Tensor | None, da: Tensor | None = None, db: Tensor | None = None, **_: Any) -> Tensor:
        out = None if di is None else (di * beta).to(y.dtype).expand(y.shape)
        for left, right in ((da, b), (a, db)):
            if left is not None and right is not None:
                base, scale = (empty, 0) if out is None else (out, 1)
                out = op.func(base, left, right, beta=scale, alpha=alpha)
        assert out is not None
        return out.clone() if da is None and db is None else out

    return y, push


@rule("addcmul")
def addcmul(op: Op, input: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> tuple[Tensor, Push]:
    def push(di: Tensor | None, da: Tensor | None = None, db: Tensor | None = None, **_: Any) -> Tensor:
        out = None if di is None else di.clone()
        if da is not None:
            out = add_into(out, da * b * value)
        if db is not None:
            out = add_into(out, a * db * value)
        assert out is not None
        return out

    return torch.addcmul(input, a, b, value=value), push
