"""Torch's own forward mode for operations without a rule of ours: right, and once per direction.

Each direction runs the operation again on dual tensors of `torch.autograd.forward_ad`, from the same state of the
random generators, so a random operation draws one mask. Attention hidden inside a composite operation is given
torch's mathematical form, which has a derivative. Torch hands back no tangent where an operation has none to give;
that is an error here, never a zero.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import resolve_name

from .registry import Op


@cache
def prepare() -> None:
    """Let torch load its forward-mode formulas: done once, as its deprecation warnings on the way are none of the
    caller's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def stock(op: Op, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
    """Value and tangents of one operation by `forward_ad`."""
    prepare()
    cuda = [a.device for a in args if isinstance(a, Tensor) and a.is_cuda][:1]
    y, dy = None, []
    state = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in cuda)]
    for k, (t_args, t_kwargs) in enumerate(op.directions):
        if k:
            torch.set_rng_state(state[0])
            for d, s in zip(cuda, state[1:], strict=True):
                torch.cuda.set_rng_state(s, d)
        with forward_ad.dual_level(), sdpa_kernel([SDPBackend.MATH]):
            duals = dual(args, t_args), {n: dual(v, t_kwargs[n]) for n, v in kwargs.items()}
            y, d = parts(op, run(op, duals, args, kwargs))
            dy.append(d)
    return y, dy


def run(op: Op, duals: Any, args: Any, kwargs: Any) -> Any:
    try:
        return op.func(*duals[0], **duals[1])
    except (NotImplementedError, RuntimeError) as reason:
        op.func(*args, **kwargs)  # the caller's own mistake raises here, in torch's words
        raise missing(op) from reason


def missing(op: Op) -> NotImplementedError:
    name = resolve_name(op.func) or getattr(op.func, "__name__", repr(op.func))
    return NotImplementedError(
        f"spryfl.jvp: no forward-mode rule for {name}, neither here nor in torch: its tangent would be lost.\n"
        "    Use another operation, or .detach() its arguments if it is meant to be a constant."
    )


def dual(x: Any, t: Any) -> Any:
    """`x` with its tangents attached, in lists and tuples too."""
    if isinstance(t, Tensor):
        return forward_ad.make_dual(x, t.to(x.dtype))
    if isinstance(t, list | tuple) and any(e is not None for e in t):
        made = [dual(e, d) for e, d in zip(x, t, strict=True)]
        return made if isinstance(x, list) else tuple(made)
    return x


def parts(op: Op, y: Any) -> tuple[Any, Any]:
    """Dual tensors apart: plain values and their tangents."""
    if isinstance(y, Tensor):
        if not (y.is_floating_point() or y.is_complex()):
            return y, None
        value, t = forward_ad.unpack_dual(y)
        if t is None:
            raise missing(op)
        return value, t
    if isinstance(y, list | tuple):
        both = [parts(op, e) for e in y]
        made = [v for v, _ in both]
        return made if isinstance(y, list) else type(y)(made) if hasattr(y, "n_fields") else tuple(made), [
            d for _, d in both
        ]
    return y, None
