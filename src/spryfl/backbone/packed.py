"""A linear map whose frozen matrix is kept encoded and decoded a few rows at a time: y = x W^T + b.

    dy = dx W^T + db        dL/dx = (dL/dy) W

One product goes over chunks of output rows: a chunk is decoded once, multiplied by the value and by all K tangents (by
dL/dy on the way back), and gone. Neither the input nor W is kept for the way back, which asks for the encoded parts
again. So memory is one chunk beside what the parts take, wherever they are: `parts()` says where, for every product
anew. Computed in float32 whatever the precision; the bits of a product depend on the chunks alone. Cost: the product,
and one decoding a pass (codec.py), shared by K + 1 products.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from spryfl.backbone.codec import Parts, codec_of
from spryfl.jvp import rule_for
from spryfl.jvp.memory import again, empty

CHUNK = 4 << 20  # bytes of decoded rows; what fits a cache and comes without page faults
ROWS = 16  # chunks are multiples of it, so that each starts on a 64-byte line


@dataclass(frozen=True, eq=False)
class Matrix:
    """An encoded matrix (out, in): its precision, its shape, and who hands out its parts."""

    precision: str
    shape: tuple[int, int]
    parts: Callable[[], Parts]

    def chunks(self) -> Iterator[slice]:
        """Ranges of rows, as equal as multiples of 16 allow, of at most CHUNK decoded bytes (16 rows at the least)."""
        rows, width = self.shape
        most = max(ROWS, CHUNK // (4 * width) // ROWS * ROWS)
        count = -(-rows // most)
        step = -(-rows // (count * ROWS)) * ROWS
        return (slice(i, min(i + step, rows)) for i in range(0, rows, step))

    def decoder(self, device: torch.device) -> Callable[[slice], Tensor]:
        """Range of rows -> these rows, float32, on that device."""
        decode = codec_of(self.precision).decode
        parts = {name: part.to(device) for name, part in self.parts().items()}
        return lambda at: decode(parts, self.shape, at.start, at.stop)

    def whole(self, device: torch.device) -> Tensor:
        """The matrix, float32, in memory of its own: what the parts lie in may be another's after the next product."""
        if device.type == "meta":  # a model without storage, as it is planned with: nothing to decode
            return torch.empty(self.shape, device=device)
        return self.decoder(device)(slice(0, self.shape[0])).clone()

    def __deepcopy__(self, memo: Any) -> Matrix:
        return self  # it never changes, and its parts may be a file


def multiply(x: Tensor, bias: Tensor | None, matrix: Matrix) -> Tensor:
    """x W^T + b in x's type; (..., in) -> (..., out)."""
    if has_torch_function((x, bias)):
        return handle_torch_function(multiply, (x, bias), x, bias, matrix)
    return _Product.apply(x, bias, matrix)


def products(xs: Sequence[Tensor], bias: Tensor | None, matrix: Matrix, passing: bool) -> list[Tensor]:
    """x W^T for each x, plus b for the first: each chunk of W decoded once for all.

    `passing`: nobody keeps activations for a way back. Then chunks may use the same pages again; activations that stay
    would fill up a part of every hole that this leaves (Llama2-7B, plain backprop: 0.8 GB).
    """
    rows, width = matrix.shape
    flat = [x.reshape(-1, width).float() for x in xs]
    ys = [empty((*x.shape[:-1], rows), torch.float32, x.device) for x in xs]
    decode = matrix.decoder(xs[0].device)
    with again(CHUNK) if passing else nullcontext():
        for at in matrix.chunks():
            chunk = decode(at).t()
            for i, (x, y) in enumerate(zip(flat, ys, strict=True)):
                out = y.view(-1, rows)[:, at]
                if i or bias is None:
                    torch.mm(x, chunk, out=out)
                else:
                    torch.addmm(bias[at].float(), x, chunk, out=out)
            del chunk  # before the next is decoded
    return [y.to(x.dtype) for x, y in zip(xs, ys, strict=True)]


def pulled(g: Tensor, matrix: Matrix) -> Tensor:
    """g W; (..., out) -> (..., in)."""
    rows, width = matrix.shape
    flat = g.reshape(-1, rows).float()
    total = flat.new_zeros(len(flat), width)
    decode = matrix.decoder(g.device)
    for at in matrix.chunks():
        chunk = decode(at)
        total.addmm_(flat[:, at], chunk)
        del chunk
    return total.view(*g.shape[:-1], width).to(g.dtype)


class _Product(torch.autograd.Function):
    """`multiply` for backprop: nothing is kept but who hands out the parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        return products([x], bias, matrix, passing=not any(ctx.needs_input_grad))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        by_x, by_bias, _ = ctx.needs_input_grad
        return pulled(g, ctx.matrix) if by_x else None, g.reshape(-1, g.shape[-1]).sum(0) if by_bias else None, None


@rule_for(multiply)
def _multiply(op: Any, x: Tensor, bias: Tensor | None, matrix: Matrix) -> tuple[Tensor, list[Tensor]]:
    """Forward mode: all directions beside the value, so that W is decoded once."""
    dx = [args[0] for args, _ in op.directions if args[0] is not None]
    db = [args[1] for args, _ in op.directions if args[1] is not None]
    y, *dy = products([x, *dx], bias, matrix, passing=True)
    if not dx:
        return y, [d.to(y.dtype).expand(y.shape).clone() for d in db]
    for t, d in zip(dy, db or [None] * len(dy), strict=True):
        if d is not None:
            t += d
    return y, dy


class Packed(nn.Linear):
    """A frozen linear map without a weight of its own; float32, on top of encoded parts.

    Args:
        in_features, out_features: widths.
        bias: (out,), or None; a parameter, frozen at first.
        precision: a key of CODECS.
        parts: hands out the encoded matrix's parts, wherever they are at that moment; asked once a product.

    Raises:
        ValueError: the precision is unknown.

    Example:
        >>> layer = pack(nn.Linear(64, 32), "8bit")
        >>> layer(torch.zeros(4, 64)).shape, [name for name, _ in layer.named_parameters()]
        (torch.Size([4, 32]), ['bias'])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: Tensor | None,
        precision: str,
        parts: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        nn.Module.__init__(self)
        codec_of(precision)
        self.in_features, self.out_features = in_features, out_features
        self.matrix = Matrix(precision, (out_features, in_features), parts)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().float(), False))
        self.device = torch.device("cpu") if bias is None else bias.device

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The matrix in float32, decoded when something is computed with it; it cannot be written to."""
        return Decoded(self.matrix, self.device)

    def forward(self, input: Tensor) -> Tensor:
        return multiply(input, self.bias, self.matrix)

    def reset_parameters(self) -> None:
        """Nothing: the matrix is frozen."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.matrix.precision}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        super()._apply(fn, recurse)
        self.device = fn(torch.empty(0, device=self.device)).device
        return self


class Decoded(Tensor):
    """A packed matrix for those who want a tensor: shape, type and device at no cost, values once they are used."""

    @staticmethod
    def __new__(cls, matrix: Matrix, device: torch.device, cell: list[Tensor] | None = None) -> Decoded:
        made = Tensor._make_wrapper_subclass(cls, matrix.shape, dtype=torch.float32, device=device)
        made.matrix, made.cell = matrix, [] if cell is None else cell
        return made

    def __init__(self, matrix: Matrix, device: torch.device, cell: list[Tensor] | None = None) -> None: ...

    # It is no stranger to the jvp engine.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    matrix: Matrix
    cell: list[Tensor]  # the values, once decoded; shared by what `detach` makes of it

    def values(self) -> Tensor:
        """The values, decoded at the first call."""
        if not self.cell:
            self.cell.append(self.matrix.whole(self.device))
        return self.cell[0]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Decoded({tuple(self.shape)}, precision={self.matrix.precision})"

    def __deepcopy__(self, memo: Any) -> Decoded:
        return Decoded(self.matrix, self.device)

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, new: Tensor) -> None:
        raise _frozen(self)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore
        x: Any = args[0] if args else None
        if func is torch.ops.aten.detach.default:
            return cls(x.matrix, x.device, x.cell)
        if func._schema.is_mutable and isinstance(x, cls):
            raise _frozen(x)
        plain = torch.utils._pytree.tree_map_only(cls, cls.values, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def _frozen(weight: Decoded) -> ValueError:
    return ValueError(
        f"a matrix of {weight.matrix.precision} {tuple(weight.shape)} cannot be written to, so nothing can be merged "
        f"into it. Keep the adapter beside the model, or merge into a model in float32."
    )


def pack(layer: nn.Module, precision: str) -> Packed:
    """A `Packed` of a linear layer's values, held in memory.

    Args:
        layer: an nn.Linear, or transformers' Conv1D, whose weight is (in, out).
        precision: a key of CODECS.
    """
    given: Any = layer
    weight = given.weight.detach()
    weight = weight if isinstance(layer, nn.Linear) else weight.t()
    parts = codec_of(precision).encode(weight)
    return Packed(weight.shape[1], weight.shape[0], copy.deepcopy(given.bias), precision, lambda: parts)
