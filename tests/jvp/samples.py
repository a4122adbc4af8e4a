"""Calls of every operation that has a rule: name -> calls, each a function of tensors and the shapes it is called with.

A shape may be a ready tensor (positive values, say). `test_rules.py` holds each call against torch's own forward mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from spryfl.jvp.rules_linear import LINEAR
from spryfl.jvp.rules_pointwise import SLOPES

Call = tuple[Callable[..., Any], tuple[Any, ...]]
INDEX = torch.tensor([[2, 0, 1], [1, 1, 0]])
MASK = torch.tensor([[True, False, True, True], [False, True, True, False], [True, True, False, True]])
TARGET = torch.tensor([2, 0, -100, 3, 1])
M = (3, 4)  # the common matrix


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64) + 0.5


UNARY_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "view": (2, 6), "reshape": (-1,), "transpose": (0, 1), "permute": (1, 0), "expand": (2, 3, 4), "unsqueeze": (1,),
    "flatten": (0, 1), "unflatten": (1, (2, 2)), "to": (torch.float32,), "type": (torch.float32,), "select": (1, 2),
    "narrow": (1, 1, 2), "split": (2, 1), "split_with_sizes": ([1, 3], 1), "tensor_split": (2, 1), "chunk": (2, 1),
    "unsafe_chunk": (2, 1), "unbind": (1,), "sum": (-1,), "mean": (1, True), "nansum": (0,), "cumsum": (1,),
    "flip": ((0,),),
    "roll": (1, 0), "gather": (1, INDEX), "index_select": (1, torch.tensor([3, 0])), "take_along_dim": (INDEX[:1], 1),
    "repeat": (2, 1),
    "repeat_interleave": (2, 0), "tile": ((2, 1),), "movedim": (0, 1), "unfold": (1, 2, 1), "masked_select": (MASK,),
    "rot90": (1, (0, 1)), "sum_to_size": (1, 4), "broadcast_to": ((2, 3, 4),), "__getitem__": (slice(1, 3),),
    "expand_as": (torch.zeros(2, 3, 4),), "view_as": (torch.zeros(4, 3),), "reshape_as": (torch.zeros(12),),
    "type_as": (torch.zeros(1),),
}  # fmt: skip
PROPERTIES = {"T", "mT", "real"}


def linear_call(name: str) -> Call:
    if name in PROPERTIES:
        return (lambda x: getattr(x, name)), (M,)
    owner = torch if not hasattr(torch.Tensor, name) else torch.Tensor
    return (lambda x: getattr(owner, name)(x, *UNARY_ARGUMENTS.get(name, ()))), (M,)


SAMPLES: dict[str, list[Call]] = {name: [linear_call(name)] for name in LINEAR if name != "cuda"}
SAMPLES["__getitem__"] += [
    (lambda x: x[:, None, 1], (M,)),
    (lambda x: x[..., INDEX[0]], (M,)),
    (lambda x: x[torch.tensor([0, 2]), :, torch.tensor([1, 1])], ((3, 2, 4),)),
    (lambda x: x[MASK], (M,)),
]
SAMPLES["sum"] += [(lambda x: x.sum(), (M,)), (lambda x: torch.sum(x, dim=(0, 1), keepdim=True), (M,))]
SAMPLES["to"] += [(lambda x: x.to(dtype=torch.float64).to("cpu"), (M,))]
SAMPLES["view"] += [(lambda x: x.view(size=(12,)), (M,))]
SAMPLES |= {
    "cat": [(lambda x, y: torch.cat([x, torch.ones(1, 4, dtype=x.dtype), y]), (M, (2, 4)))],
    "stack": [(lambda x, y: torch.stack((x, y), dim=-1), (M, M))],
    "hstack": [(lambda x, y: torch.hstack((x, y)), (M, M))],
    "vstack": [(lambda x, y: torch.vstack((x, y)), (M, M))],
    "where": [
        (lambda x, y: torch.where(MASK, x, y), (M, (4,))),
        (lambda x, y: x.where(MASK, y), (M, M)),
        (lambda x: torch.where(MASK, x, -1.0), (M,)),
        (lambda x: torch.where(MASK, 2.0, x), (M,)),
    ],
    "masked_fill": [(lambda x: x.masked_fill(MASK, -9.0), (M,)), (lambda x, v: x.masked_fill(MASK, v), (M, ()))],
    "embedding": [
        (lambda w: F.embedding(INDEX, w), (M,)),
        (lambda w: F.embedding(input=INDEX, weight=w, padding_idx=1), (M,)),
    ],
    "pad": [
        (lambda x: F.pad(x, (1, 2), value=3.0), (M,)),
        (lambda x: F.pad(x, (1, 1), mode="reflect"), (M,)),
        (lambda x: F.pad(input=x, pad=(0, -1)), (M,)),
    ],
    "dropout": [(lambda x: F.dropout(x, 0.4, training=False), (M,)), (lambda x: F.dropout(x, p=0.0), (M,))],
    "mul": [
        (lambda x, y: x * y, (M, (4,))),
        (lambda x, y: torch.mul(x, other=y), ((3, 1), (1, 4))),
        (lambda x: 2 * x * 3.0, (M,)),
    ],
    "matmul": [
        (lambda x, y: x @ y, ((2, 3, 4), (4, 5))),
        (lambda x, y: torch.matmul(x, y), ((4,), (2, 4, 3))),
        (lambda x, y: torch.matmul(x, other=y), ((2, 1, 3, 4), (5, 4, 2))),
    ],
    "mm": [(lambda x, y: torch.mm(x, mat2=y), (M, (4, 2)))],
    "bmm": [(lambda x, y: torch.bmm(x, y), ((2, 3, 4), (2, 4, 2)))],
    "mv": [(lambda x, y: x.mv(y), (M, (4,)))],
    "dot": [(lambda x, y: x.dot(y), ((4,), (4,)))],
    "vdot": [(lambda x, y: x.vdot(y), ((4,), (4,)))],
    "outer": [(lambda x, y: torch.outer(x, y), ((3,), (4,)))],
    "inner": [(lambda x, y: torch.inner(x, y), (M, (2, 4)))],
    "einsum": [
        (lambda x, y, z: torch.einsum("ij,jk,k->ik", x, y, z), (M, (4, 2), (2,))),
        (lambda x, y: torch.einsum("bij,bkj->bik", [x, y]), ((2, 3, 4), (2, 5, 4))),
    ],
    "linear": [
        (lambda x, w, b: F.linear(x, w, b), ((2, 3, 4), (5, 4), (5,))),
        (lambda x, w: F.linear(x, weight=w), ((4,), (5, 4))),
        (lambda x, w, b: F.linear(x, w, bias=b), ((3, 4), (5, 4), (5,))),
        (lambda x, w: F.linear(x.transpose(0, 1), w), ((4, 3), (5, 4))),
    ],
    "addmm": [
        (lambda c, x, y: torch.addmm(c, x, y), ((2,), M, (4, 2))),
        (lambda c, x, y: torch.addmm(c, mat1=x, mat2=y, beta=0.5, alpha=2.0), ((3, 2), M, (4, 2))),
    ],
    "baddbmm": [
        (lambda c, x, y: c.baddbmm(batch1=x, batch2=y, beta=0.5, alpha=2.0), ((2, 3, 2), (2, 3, 4), (2, 4, 2))),
        (lambda c, x, y: torch.baddbmm(c, x, y, beta=0), ((1, 1, 2), (2, 3, 4), (2, 4, 2))),
    ],
    "addmv": [(lambda c, x, y: torch.addmv(c, x, y, alpha=3.0), ((3,), M, (4,)))],
    "addbmm": [(lambda c, x, y: torch.addbmm(c, x, y, beta=2.0), ((3, 2), (5, 3, 4), (5, 4, 2)))],
    "addcmul": [(lambda c, x, y: torch.addcmul(c, x, y, value=2.0), ((4,), M, (3, 1)))],
    "gelu": [
        (lambda x: F.gelu(x), (M,)),
        (lambda x: F.gelu(x, approximate="tanh"), (M,)),
        (lambda x: torch.nn.GELU()(x.t()), (M,)),
    ],
    "pow": [
        (lambda x: x**2, (M,)),
        (lambda x: x.pow(3), (M,)),
        (lambda x: torch.pow(x, -0.5), (positive(*M),)),
        (lambda x, p: x**p, (positive(*M), (4,))),
        (lambda p: torch.pow(2.0, p), (M,)),
        (lambda x: x**0, (M,)),
    ],
    "__rpow__": [(lambda p: 3.0**p, (M,))],
    "add": [
        (lambda x, y: x + y, (M, (4,))),
        (lambda x, y: torch.add(x, y, alpha=-2.0), ((1, 4), M)),
        (lambda x: 1.0 + x, (M,)),
        (lambda x, y: torch.add(input=x, other=y), (M, ())),
    ],
    "sub": [
        (lambda x, y: x - y, ((4,), M)),
        (lambda x, y: torch.subtract(x, y, alpha=2.0), (M, M)),
        (lambda x: x - 1, (M,)),
    ],
    "__rsub__": [(lambda x: 1.0 - x, (M,)), (lambda x, y: x.__rsub__(y), (M, M))],
    "div": [
        (lambda x, y: x / y, (M, positive(4))),
        (lambda x: x / 2, (M,)),
        (lambda x, y: torch.div(x, other=y), ((4,), positive(*M))),
    ],
    "__rdiv__": [(lambda x: 2.0 / x, (positive(*M),))],
    "clamp": [
        (lambda x: x.clamp(-0.5, 0.5), (M,)),
        (lambda x: torch.clamp(x, max=0.1), (M,)),
        (lambda x, low: torch.clamp(x, min=low), (M, (4,))),
    ],
    "clamp_min": [(lambda x: x.clamp_min(0.1), (M,))],
    "clamp_max": [(lambda x: x.clamp_max(0.1), (M,))],
    "layer_norm": [
        (lambda x, w, b: F.layer_norm(x, (4,), w, b), ((2, 3, 4), (4,), (4,))),
        (lambda x, w: F.layer_norm(x, normalized_shape=(3, 4), weight=w, eps=0.1), ((2, 3, 4), M)),
        (lambda x: F.layer_norm(x, [4]), (M,)),
        (lambda x, w, b: torch.layer_norm(x, (4,), weight=w, bias=b), (M, (4,), (4,))),
    ],
    "rms_norm": [
        (lambda x, w: F.rms_norm(x, (4,), w, 0.1), ((2, 3, 4), (4,))),
        (lambda x: F.rms_norm(x, (3, 4)), ((2, 3, 4),)),
        (lambda x, w: F.rms_norm(x, (4,), weight=w), (M, (4,))),
    ],
    "softmax": [
        (lambda x: F.softmax(x, dim=-1), (M,)),
        (lambda x: x.softmax(0), (M,)),
        (lambda x: torch.softmax(x.float(), 1, dtype=torch.float64), (M,)),
    ],
    "log_softmax": [(lambda x: F.log_softmax(x, dim=1), (M,)), (lambda x: x.log_softmax(0), (M,))],
    "logsumexp": [
        (lambda x: torch.logsumexp(x, 1), (M,)),
        (lambda x: x.logsumexp(dim=(0, 1), keepdim=True), (M,)),
    ],
    "cross_entropy": [
        (lambda x: F.cross_entropy(x, TARGET), ((5, 4),)),
        (lambda x: F.cross_entropy(x, TARGET, weight=torch.arange(1, 5).double(), reduction="sum"), ((5, 4),)),
        (lambda x: F.cross_entropy(x, TARGET, torch.arange(1, 5).double()), ((5, 4),)),
        (lambda x: F.cross_entropy(x.t().unsqueeze(0), TARGET.unsqueeze(0), reduction="none"), ((5, 4),)),
        (lambda x: F.cross_entropy(x, TARGET, label_smoothing=0.1), ((5, 4),)),
        (lambda x: F.cross_entropy(x, TARGET[0]), ((4,),)),
    ],
}
POSITIVE = {"log", "log1p", "sqrt", "rsqrt", "reciprocal"}


def unary(name: str) -> list[Call]:
    func = getattr(torch, name, None) or getattr(F, name)
    return [(lambda x: func(x), (positive(*M) if name in POSITIVE else M,))]


SAMPLES |= {name: unary(name) for name in SLOPES}
SAMPLES["relu"] += [(lambda x: F.relu(x), (M,))]

Q, KV, WIDE = (2, 4, 5, 6), (2, 4, 7, 6), (2, 7, 4, 6)
SEEN = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.3
BLIND = SEEN.clone()
BLIND[1, 0, 2] = False
BLIND_BIAS = torch.zeros(BLIND.shape).double().masked_fill_(~BLIND, -torch.inf)
attend = F.scaled_dot_product_attention
SAMPLES["scaled_dot_product_attention"] = [
    (lambda q, k, v: attend(q, k, v), (Q, KV, (2, 4, 7, 3))),
    (lambda q, k, v: attend(q, k, v, is_causal=True), (Q, KV, KV)),
    (lambda q, k, v: attend(q, k, v, attn_mask=SEEN, scale=0.3), (Q, KV, KV)),
    (lambda q, k, v: attend(q, k, v, attn_mask=BLIND), (Q, KV, KV)),
    (lambda q, k, v: attend(q, k, v, attn_mask=BLIND_BIAS), (Q, KV, KV)),
    (lambda q, k, v, m: attend(q, k, v, m), (Q, KV, KV, (1, 4, 5, 7))),
    (lambda q, k, v, m: attend(q, k, v, m), (Q, KV, KV, (5, 7))),
    (lambda q, k, v, m: attend(q, k, v, m), ((2, 5, 6), (2, 7, 6), (2, 7, 6), (2, 5, 7))),
    (lambda q, k, v: attend(q, k, v), ((5, 6), (7, 6), (7, 6))),
    (lambda q, k, v: attend(q, k, v, is_causal=True, enable_gqa=True), (Q, (2, 2, 7, 6), (2, 2, 7, 6))),
    (lambda q, k, v, m: attend(q, k, v, m, enable_gqa=True), (Q, (2, 2, 7, 6), (2, 2, 7, 6), (2, 4, 5, 7))),
    (lambda q, k, v: attend(q, k, v), (Q, (1, 4, 7, 6), (1, 4, 7, 6))),
    (lambda q, k, v: attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)), ((2, 5, 4, 6), WIDE, WIDE)),
]  # fmt: skip
