"""Rules of layer norm, RMS norm, softmax and cross entropy.

Layer norm's Jacobian, its weight w apart, is J = r (I - 1 1^T/n - x^ x^^T/n) with x^ the normalised value: symmetric,
so torch's one-pass kernel of the backward pass computes J dx, and the weight is one multiplication. Softmax's is
diag(p) - p p^T: symmetric too.

    layer norm   dy = w J dx + x^ dw + db                     softmax        dp = p (dx - <p, dx>)
    RMS norm     dy = w r (dx - x^ <x^, dx>/n) + x^ dw        cross entropy  dl_i = <p_i, dx_i> - dx_i[t_i]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Op, Push, add_into, rule

ATEN = torch.ops.aten


@rule("layer_norm")
def layer_norm(
    op: Op, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> tuple[Tensor, Push]:
    if torch.is_autocast_enabled(input.device.type) or any(
        p is not None and p.dtype != input.dtype for p in (weight, bias)
    ):
        raise NotImplementedError  # mixed types: torch knows the promotion
    x, shape, w = input.contiguous(), list(normalized_shape), weight
    y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)

    def push(input: Any, shape_: None = None, weight: Any = None, bias: Any = None, *_: Any, **__: Any) -> Any:
        out = None
        if input is not None:
            dx = input.contiguous()
            out = ATEN.native_layer_norm_backward(dx, x, shape, mean, rstd, None, None, [True, False, False])[0]
            out = out if w is None else out.mul_(w)
        if weight is not None:
            out = add_into(out, (x - mean).mul_(rstd).mul_(weight))
        if out is None:
            return bias.expand(y.shape).clone()
        return out if bias is None else out.add_(bias)

    return y, push


@rule("rms_norm")
def rms_norm(
    op: Op, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Push]:
    dims, w = tuple(range(-len(normalized_shape), 0)), weight
    tiny = torch.finfo(input.dtype).eps if eps is None else eps
    r = input.square().mean(dims, keepdim=True).add_(tiny).rsqrt_()
    unit = input * r

    def push(input: Any, shape_: None = None, weight: Any = None, *_: Any, **__: Any) -> Tensor:
        out = None
        if input is not None:
            out = (input - unit * (unit * input).mean(dims, keepdim=True)).mul_(r)
            out = out if w is None else out.mul_(w)
        return out if weight is None and out is not None else add_into(out, unit * weight)

    return F.rms_norm(input, normalized_shape, weight, eps), push


def _dim(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    dim = args[0] if args else kwargs.get("dim")
    return (0 if x.dim() in (0, 1, 3) else 1) if dim is None else dim  # torch's old default


@rule("softmax")
def softmax(op: Op, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Push]:
    p, dim = op.func(input, *args, **kwargs), _dim(input, args, kwargs)
    return p, lambda d, *_, **__: ATEN._softmax_backward_data(d.to(p.dtype), p, dim, p.dtype)


@rule("log_softmax")
def log_softmax(op: Op, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Push]:
    y, dim = op.func(input, *args, **kwargs), _dim(input, args, kwargs)
    p = y.exp()

    def push(d: Tensor, *_: Any, **__: Any) -> Tensor:
        d = d.to(y.dtype)
        return d - (p * d).sum(dim, keepdim=True)

    return y, push


@rule("logsumexp")
def logsumexp(op: Op, input: Tensor, dim: Any, keepdim: bool = False) -> tuple[Tensor, Push]:
    whole = torch.logsumexp(input, dim, keepdim=True)
    p = (input - whole).exp_()
    return torch.logsumexp(input, dim, keepdim), lambda d, *_, **__: (p * d).sum(dim, keepdim=keepdim)


@rule("cross_entropy")
def cross_entropy(
    op: Op, input: Tensor, target: Tensor, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> tuple[Tensor, Push]:  # fmt: skip
    if label_smoothing != 0.0 or target.is_floating_point() or size_average is not None or reduce is not None:
        raise NotImplementedError  # torch's own forward mode takes it
    value = F.cross_entropy(input, target, weight, ignore_index=ignore_index, reduction=reduction)
    classes = 0 if input.dim() == 1 else 1
    rows = input.movedim(classes, -1).reshape(-1, input.shape[classes])
    p, aim = rows.softmax(-1), target.reshape(-1)
    kept = (aim != ignore_index).to(rows.dtype)
    column = aim.masked_fill(aim == ignore_index, 0).unsqueeze(1)
    share = kept if weight is None else kept * weight[column.squeeze(1)]
    share = share / share.sum() if reduction == "mean" else share

    def push(d: Tensor, *_: Any, **__: Any) -> Tensor:
        d = d.movedim(classes, -1).reshape(rows.shape)
        mean = torch.bmm(p.unsqueeze(1), d.unsqueeze(2)).reshape(-1)  # <p_i, dx_i>, without their product in memory
        losses = (mean - d.gather(1, column).squeeze(1)) * share
        return losses.view(target.shape) if reduction == "none" else losses.sum()

    return value, push
