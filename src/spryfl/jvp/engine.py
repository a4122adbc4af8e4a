"""`jvp`: a function's value and its derivatives in K directions, in one run of the function.

    value = f(params)        tangents[k] = d/dt f(params + t directions[k]) at t = 0

Cost: one pass of values for all K, and one pass of tangents per direction from the first perturbed value on: 1 + K
share passes. Memory: the values and K tangents that are live at one moment; nothing is kept for a backward pass.
Chunks of K bound it. The arithmetic is forward-mode automatic differentiation: Wengert, A simple automatic derivative
evaluation program, CACM 7 (1964).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .dual import Dual, demote, promoted
from .memory import keep_freed, pool

Function = Callable[[dict[str, Tensor]], Any]


def jvp(
    f: Function, params: Mapping[str, Tensor], directions: Mapping[str, Tensor], *, chunk: int | None = None
) -> tuple[Any, Any]:
    """A function's value and its derivatives in K directions: tangents[k] = d/dt f(params + t directions[k]) at t = 0.

    Args:
        f: from named tensors to a tensor or a tuple of tensors; typically `torch.func.functional_call` on a model. It
            is run once per chunk, without a gradient graph. What it draws at random it must seed itself, so that
            chunks agree.
        params: name -> tensor, all that `f` reads from its argument.
        directions: name -> (K, *shape of the parameter), for the perturbed names; the others' tangents are zero.
        chunk: directions at once, K where None. A smaller one bounds memory and costs one more run of values per chunk.

    Returns:
        value, what `f` returns, and tangents, (K, *value.shape) for each tensor of it; zero where it does not depend
        on what was perturbed.

    Raises:
        ValueError: a name or a shape does not fit.
        NotImplementedError: an operation has no derivative here or in torch; the message names it.

    Example:
        >>> value, tangents = jvp(lambda p: (p["w"] ** 2).sum(), {"w": torch.ones(3)}, {"w": torch.eye(3)})
        >>> tangents
        tensor([2., 2., 2.])
    """
    k = check(params, directions, chunk)
    step = chunk or k
    runs = [run(f, params, {n: d[i : i + step] for n, d in directions.items()}) for i in range(0, k, step)]
    value = runs[0][0]
    if isinstance(value, tuple):
        return value, tuple(torch.cat([t[i] for _, t in runs]) for i in range(len(value)))
    return value, runs[0][1] if len(runs) == 1 else torch.cat([t for _, t in runs])


def check(params: Mapping[str, Tensor], directions: Mapping[str, Tensor], chunk: int | None) -> int:
    """K, or a ValueError that says what does not fit."""
    if not directions:
        raise ValueError("directions is empty. Give at least one name of params with a tensor of shape (K, *shape).")
    unknown = sorted(directions.keys() - params.keys())
    if unknown:
        raise ValueError(
            f"directions has names that params lacks: {', '.join(unknown)}.\n    params has: {some(params)}."
        )
    counts = {n: len(d) if d.dim() else 0 for n, d in directions.items()}
    k = next(iter(counts.values()))
    for name, d in directions.items():
        if d.shape != (k, *params[name].shape) or k == 0:
            raise ValueError(
                f'directions["{name}"] has shape {tuple(d.shape)}; {(k or "K", *params[name].shape)} is needed:'
                " K >= 1, the same for all names, then the parameter's shape."
            )
        if not params[name].is_floating_point():
            raise ValueError(f'params["{name}"] is {params[name].dtype}; only floating-point values have directions.')
    if any(isinstance(t, Dual) for t in (*params.values(), *directions.values())):
        raise ValueError("jvp inside jvp: second derivatives are not supported.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk = {chunk}; it is a number of directions: at least 1, or None for all at once.")
    return k


def some(names: Mapping[str, Any], limit: int = 8) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f", ... ({len(listed)} in all)" if len(listed) > limit else "")


def run(f: Function, params: Mapping[str, Tensor], directions: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """One run of f for one chunk of directions."""
    k = len(next(iter(directions.values())))
    keep_freed()
    tokens = promoted.set([]), pool.set({})
    try:
        with torch.no_grad():
            point = {n: start(p, directions[n]) if n in directions else p.detach() for n, p in params.items()}
            return result(f(point), k)
    finally:
        for x in promoted.get():
            demote(x)
        promoted.reset(tokens[0])
        pool.reset(tokens[1])


def start(p: Tensor, d: Tensor) -> Dual:
    return Dual(p.detach(), d.detach().to(p).unbind())


def result(y: Any, k: int) -> tuple[Any, Any]:
    """What f returned, as plain values and stacked tangents."""
    if isinstance(y, Dual):
        return y.value, torch.stack(y.tangents)
    if isinstance(y, Tensor):
        return y.detach(), y.new_zeros(1).expand(k, *y.shape)
    if isinstance(y, tuple):
        parts = [result(e, k) for e in y]
        return tuple(v for v, _ in parts), tuple(t for _, t in parts)
    raise ValueError(f"f returned {type(y).__name__}; a tensor or a tuple of tensors is needed.")
