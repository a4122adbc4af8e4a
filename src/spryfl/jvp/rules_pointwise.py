"""Rules of pointwise operations: dy = f'(x) dx.

For one direction the slope and the product are one fused kernel where torch has it (GELU, SiLU, tanh, sigmoid: the
kernels of its backward pass, which for a diagonal Jacobian are its forward mode too). For several, the slope is
computed once and multiplied K times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .memory import empty
from .registry import Op, Push, add_into, rule

ATEN = torch.ops.aten

# name -> d(dx, x, y): dx times the slope. Given dx = 1 it is the slope.
SLOPES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "exp": lambda d, x, y: d * y,
    "log": lambda d, x, y: d / x,
    "log1p": lambda d, x, y: d / (x + 1),
    "expm1": lambda d, x, y: d * (y + 1),
    "sqrt": lambda d, x, y: d / (2 * y),
    "rsqrt": lambda d, x, y: d * y.pow(3).mul_(-0.5),
    "reciprocal": lambda d, x, y: d * y.square().neg_(),
    "square": lambda d, x, y: d * (2 * x),
    "abs": lambda d, x, y: d * x.sgn(),
    "sin": lambda d, x, y: d * x.cos(),
    "cos": lambda d, x, y: d * x.sin().neg_(),
    "erf": lambda d, x, y: d * x.square().neg_().exp_().mul_(2 / torch.pi**0.5),
    "tanh": lambda d, x, y: ATEN.tanh_backward(d, y),
    "sigmoid": lambda d, x, y: ATEN.sigmoid_backward(d, y),
    "relu": lambda d, x, y: ATEN.threshold_backward(d, y, 0),
    "silu": lambda d, x, y: ATEN.silu_backward(d, x),
}


def _slope(d: Callable[[Any, Tensor, Tensor], Tensor], op: Op, x: Tensor, y: Tensor) -> Push:
    """dx -> dx f'(x): fused for one direction, through a slope kept for several."""
    if len(op.directions) == 1:
        return lambda dx, *_, **__: d(dx.to(y.dtype), x, y)
    slope = d(torch.ones_like(y), x, y)
    return lambda dx, *_, **__: (
        torch.mul(dx, slope, out=empty(y.shape, y.dtype, y.device)) if dx.dtype == y.dtype else dx * slope
    )


def _unary(d: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Push]]:
    def body(op: Op, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Push]:
        y = op.func(x)  # `inplace=` is the dispatcher's matter
        return y, _slope(d, op, x, y)

    return body


for _name, _d in SLOPES.items():
    rule(_name)(_unary(_d))


@rule("gelu")
def gelu(op: Op, input: Tensor, *, approximate: str = "none") -> tuple[Tensor, Push]:
    y = op.func(input, approximate=approximate)

    def slope(d: Tensor, x: Tensor, y: Tensor) -> Tensor:
        room = empty(y.shape, y.dtype, y.device)
        return ATEN.gelu_backward.grad_input(d, x, approximate=approximate, grad_input=room)

    return y, _slope(slope, op, input, y)


@rule("pow")
def power(op: Op, input: Any, exponent: Any) -> tuple[Tensor, Push]:
    y = torch.pow(input, exponent)

    def push(dx: Tensor | None, dp: Tensor | None = None) -> Tensor:
        out = (
            None if dx is None else dx * (2 * input if _is(exponent, 2) else exponent * torch.pow(input, exponent - 1))
        )
        if dp is None:
            assert out is not None
            return out
        log = torch.as_tensor(input, dtype=y.dtype, device=y.device).log()
        return add_into(out, dp * torch.where(y == 0, 0, y * log))

    return y, push


def _is(exponent: Any, value: float) -> bool:
    return not isinstance(exponent, Tensor) and exponent == value


@rule("__rpow__")
def reversed_power(op: Op, exponent: Tensor, base: Any) -> tuple[Tensor, Push]:
    y, push = power(op, base, exponent)
    return y, lambda d, db=None: push(db, d)


@rule("add", "sub")
def add(op: Op, input: Any, other: Any, *, alpha: float = 1) -> tuple[Tensor, Push]:
    scale, sign = {} if alpha == 1 else {"alpha": alpha}, 1 if op.func.__name__ in ("add", "__radd__") else -1
    y = op.func(input, other, **scale)

    def push(input: Tensor | None, other: Tensor | None = None, **_: None) -> Tensor:
        if other is None:
            assert input is not None
            return input.expand(y.shape).clone()
        return (other * (sign * alpha)).expand(y.shape) if input is None else op.func(input, other, **scale)

    return y, push


@rule("__rsub__")
def reversed_sub(op: Op, a: Tensor, b: Any) -> tuple[Tensor, Push]:
    return op.func(a, b), lambda da, db=None: -da if db is None else add_into(None if da is None else -da, db.clone())


@rule("div")
def divide(op: Op, input: Any, other: Any, *, rounding_mode: str | None = None) -> tuple[Tensor, Push]:
    by, y = other, torch.div(input, other, rounding_mode=rounding_mode)

    def push(input: Tensor | None, other: Tensor | None = None, **_: None) -> Tensor:
        if rounding_mode is not None:
            return torch.zeros_like(y)
        out = None if input is None else input / by
        if other is None:
            assert out is not None
            return out
        return add_into(out, (y * other).div_(by).neg_())

    return y, push


@rule("__rdiv__")
def reversed_divide(op: Op, a: Tensor, b: Any) -> tuple[Tensor, Push]:
    y, push = divide(op, b, a)
    return y, lambda da, db=None: push(db, da)


@rule("clamp", "clamp_min", "clamp_max")
def clamp(op: Op, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Push]:
    if any(isinstance(bound, Tensor) for bound in (*args, *kwargs.values())):
        raise NotImplementedError  # bounds may have tangents
    y = op.func(input, *args, **kwargs)
    inside = y == input
    return y, lambda d, *_, **__: d * inside
