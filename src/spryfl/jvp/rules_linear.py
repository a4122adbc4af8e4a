"""Rules of operations that are linear in their tensors: shapes, casts, sums, look-ups, joins. dy = f(dx), at f's own
price."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Op, Push, constant, rule

# Linear in the first argument and in nothing else.
LINEAR = """
view reshape transpose t T mT adjoint permute expand expand_as unsqueeze squeeze flatten unflatten ravel contiguous
clone to float double half bfloat16 type type_as cpu cuda __getitem__ select narrow split split_with_sizes
tensor_split chunk unbind sum mean cumsum flip roll gather index_select take_along_dim tril triu repeat
repeat_interleave tile diagonal diag_embed movedim view_as reshape_as unfold neg real positive squeeze_copy nansum
trace masked_select rot90 sum_to_size broadcast_to unsafe_chunk
""".split()  # noqa: SIM905

constant(
    """
    shape dtype device ndim layout is_cuda is_cpu is_sparse is_quantized is_meta is_mps is_xpu requires_grad grad
    grad_fn is_leaf data itemsize nbytes names is_nested is_mkldnn is_xla is_vulkan output_nr _version _base
    retains_grad is_mtia is_maia is_ipu size dim stride numel nelement element_size storage_offset is_contiguous
    is_floating_point is_complex is_signed get_device is_inference is_pinned is_same_size is_shared __len__ __bool__
    __float__ __int__ __index__ __repr__ __str__ __format__ __contains__ item tolist numpy __array__ ndimension
    has_names is_conj is_neg is_coalesced data_ptr untyped_storage storage dense_dim detach eq ne lt le gt ge __eq__
    __ne__ __lt__ __le__ __gt__ __ge__ equal allclose isclose isnan isinf isfinite isneginf isposinf isreal
    logical_not logical_and logical_or logical_xor __and__ __or__ __xor__ __invert__ bitwise_not bitwise_and
    bitwise_or any all argmax argmin argsort sign signbit sgn floor ceil round trunc floor_divide __floordiv__
    count_nonzero nonzero unique searchsorted bucketize bincount zeros_like ones_like full_like empty_like rand_like
    randn_like randint_like bernoulli new_zeros new_ones new_full new_empty new_tensor new_empty_strided one_hot bool
    int long short char byte is_tensor is_nonzero heaviside result_type can_cast finfo tensor multinomial is_same_size
    requires_grad_ argwhere histc result_type promote_types is_storage
    """
)


# bitsandbytes' product with a 4-bit weight: linear in its first argument, whose tangent torch loses in silence.
LIBRARIES = ("bitsandbytes.gemv_4bit.default",)


@rule(*LINEAR, *LIBRARIES)
def linear_map(op: Op, first: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Push]:
    def push(d: Tensor, *_: Any, **__: Any) -> Any:
        return op.func(d, *args, **kwargs)

    return op.func(first, *args, **kwargs), push


@rule("cat", "stack", "hstack", "vstack")
def join(op: Op, tensors: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Push]:
    y = op.func(tensors, *args, **kwargs)

    def push(d: Any, *_: Any, **__: Any) -> Tensor:
        parts = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(tensors, d, strict=True)]
        return op.func([p.to(y.dtype) for p in parts], *args, **kwargs)

    return y, push


@rule("where")
def where(op: Op, *args: Any) -> tuple[Tensor, Push]:
    if len(args) != 3:
        raise TypeError("torch.where with a condition alone gives indices, which have no tangent: use torch.nonzero.")
    middle = op.func is torch.Tensor.where  # x.where(condition, other)
    condition, x, other = (args[1], args[0], args[2]) if middle else args

    def push(*tangents: Tensor | None) -> Tensor:
        dx, do = tangents[0 if middle else 1], tangents[2]
        return torch.where(condition, 0.0 if dx is None else dx, 0.0 if do is None else do)

    return torch.where(condition, x, other), push


@rule("masked_fill")
def masked_fill(op: Op, input: Tensor, mask: Tensor, value: Any) -> tuple[Tensor, Push]:
    def push(d: Tensor | None, _: None = None, value: Tensor | None = None) -> Tensor:
        fill = 0.0 if value is None else value
        return torch.where(mask, fill, 0.0 if d is None else d)

    return input.masked_fill(mask, value), push


@rule("embedding")
def embedding(op: Op, input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Any:
    index = input

    def push(input: None, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        return F.embedding(index, weight)

    return F.embedding(input, weight, padding_idx, *args, **kwargs), push


@rule("pad")
def pad(op: Op, input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> tuple[Tensor, Push]:
    def push(d: Tensor, *_: Any, **__: Any) -> Tensor:
        return F.pad(d, pad, mode)  # the border is a constant: its tangent is zero

    return F.pad(input, pad, mode, value), push


@rule("dropout")
def dropout(
    op: Op, input: Tensor, p: float = 0.5, training: bool = True, *_: Any, train: bool = True
) -> tuple[Tensor, Push]:
    if not (training and train) or p == 0.0:
        return input, lambda d, *_, **__: d
    mask = F.dropout(
        torch.ones_like(input), p, True
    )  # the draw that torch's dropout makes, so the same mask for a seed
    return input * mask, lambda d, *_, **__: d * mask
