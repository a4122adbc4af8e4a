"""Rules of products: d(ab) = da b + a db, each term only where its tangent is not zero.

A frozen weight has none, so a linear map costs its value's product and one more per direction: the 2.0 of the
arithmetic, where the stock rule multiplies a tangent of zeros as well. Accumulation goes into the first product's
memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import empty
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
    if foreign(weight):
        return _foreign_linear(op, input, weight, bias)
    x, w, y = input, weight, op.func(input, weight, bias)

    def push(input: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        out = None if input is None else _times(input, w)
        out = out if weight is None else _add_product(out, x, weight)
        if out is None:
            assert bias is not None
            return bias.expand(y.shape).clone()
        return out if bias is None else add_into(out, bias)

    return y, push


def foreign(weight: Tensor) -> bool:
    """Whether a tensor answers torch's functions itself, as a library's quantized ones do."""
    own: Any = type(weight).__torch_function__
    return type(weight) is not Tensor and own is not torch._C._disabled_torch_function_impl


def _foreign_linear(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Push]:
    """The library's product for the value and for each tangent: what is stored stays quantized."""
    if getattr(weight, "act_quant_kwargs", None) is not None:
        raise ValueError(
            f"spryfl.jvp: this {type(weight).__name__} rounds its inputs too, and what rounds has no derivative.\n"
            "    Quantize the weights alone, or pack the model: spryfl pack."
        )

    def times(x: Tensor, bias: Tensor | None) -> Tensor:
        with torch._C._EnableTorchFunction():  # the engine has switched it off, for its own tensors' sake
            return op.func(x, weight, bias)

    def push(input: Tensor | None, weight: None = None, bias: Tensor | None = None) -> Tensor:
        if input is not None:
            return times(input, bias)
        assert bias is not None
        return bias.expand(y.shape).clone()

    y = times(x, bias)
    return y, push


def _times(dx: Tensor, w: Tensor) -> Tensor:
    """dx w^T, in memory that an earlier layer used where it can be."""
    shape = (*dx.shape[:-1], w.shape[0])
    if dx.dtype != w.dtype or w.dim() != 2 or dx.dim() < 2 or torch.is_autocast_enabled(dx.device.type):
        return F.linear(dx, w)
    out = empty(shape, dx.dtype, dx.device)
    torch.mm(dx.reshape(-1, dx.shape[-1]), w.t(), out=out.view(-1, shape[-1]))
    return out


def _add_product(out: Tensor | None, x: Tensor, dw: Tensor) -> Tensor:
    """out + x dw^T, inside one matrix product where memory and types allow."""
    if out is None:
        return F.linear(x, dw)
    if out.dtype == x.dtype == dw.dtype and out.is_contiguous() and out.dim() > 1:
        out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), dw.t())
        return out
    return out + F.linear(x, dw)


@rule("addmm", "baddbmm", "addmv", "addbmm")
def add_product(op: Op, *args: Any, beta: float = 1, alpha: float = 1, **named: Any) -> tuple[Tensor, Push]:
    (c, a, b), scale = (*args, *named.values()), {"beta": beta, "alpha": alpha}
    y = op.func(c, a, b, **scale)
    none = y.new_zeros(()).expand(y.shape)

    def push(*tangents: Any, beta: None = None, alpha: None = None, **named: Any) -> Tensor:
        dc, da, db = *tangents, *named.values()
        if da is None and db is None:
            return (dc * scale["beta"]).expand(y.shape).clone()
        out = op.func(none if dc is None else dc, *((da, b) if da is not None else (a, db)), **scale)
        return op.func(out, a, db, beta=1, alpha=scale["alpha"]) if da is not None and db is not None else out

    return y, push


@rule("addcmul")
def addcmul(op: Op, *args: Any, value: float = 1, **named: Any) -> tuple[Tensor, Push]:
    (c, a, b), times = (*args, *named.values()), value
    y = op.func(c, a, b, value=value)

    def push(*tangents: Any, value: None = None, **named: Any) -> Tensor:
        dc, da, db = *tangents, *named.values()
        out = None if dc is None else dc.expand(y.shape).clone()
        out = out if da is None else add_into(out, da * b * times)
        return out if db is None and out is not None else add_into(out, a * db * times)

    return y, push
