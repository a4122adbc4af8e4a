"""The table of forward-mode rules: which functions of torch have one, and in what form a rule is written.

A rule computes an operation's value once and hands back a `push`, the operation's derivative at that point:

    rule(op, *args, **kwargs) -> (y, push)          push(*tangents, **tangents) -> dy

`push` takes the operation's own arguments with each replaced by its tangent in ONE direction, or by None where that
tangent is zero or has no meaning (a shape, a mask); the engine calls it once per direction. So the value and whatever
the derivative needs (softmax's probabilities, GELU's slope) are computed once for all K, and no product with a
tangent of zeros is ever formed. A returned dy must be new memory, save for operations that return a view of their
input. A rule that must see all directions beside the value (attention, whose probabilities are gone after each block)
returns the list of its K tangents in place of `push`. A rule that does not cover a call raises NotImplementedError,
and torch's own forward mode takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Push = Callable[..., Any]


class Op(NamedTuple):
    """The operation that was called, and the tangents of its arguments in each direction: what `push` will be called
    with."""

    func: Callable[..., Any]
    directions: list[tuple[tuple[Any, ...], dict[str, Any]]]


Rule = Callable[..., tuple[Any, Push | list[Any]]]
R = TypeVar("R", bound=Callable[..., Any])

RULES: dict[str, Rule] = {}  # by the operation's plain name
OWN: dict[Callable[..., Any], Rule] = {}  # of functions that are not torch's
CONSTANT: set[str] = set()  # no derivative: shapes, comparisons, roundings, new tensors, `detach`
ALIASES = {
    "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div", "negative": "neg", "absolute": "abs",
    "concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "swapdims": "transpose", "moveaxis": "movedim",
    "__rmul__": "mul", "__radd__": "add", "__mul__": "mul", "__add__": "add", "__sub__": "sub", "__truediv__": "div",
    "__matmul__": "matmul", "__neg__": "neg", "__abs__": "abs", "__pow__": "pow", "__rsub__": "__rsub__",
    "__rtruediv__": "__rdiv__", "special_expm1": "expm1", "clip": "clamp",
}  # fmt: skip
OWNERS = (torch, torch.Tensor, F, torch._C._nn, torch.special, torch.linalg)


def rule(*names: str) -> Callable[[R], R]:
    """Register the decorated rule under the names of the operations that it serves."""

    def register(body: R) -> R:
        RULES.update(dict.fromkeys(names, body))
        return body

    return register


def rule_for(func: Callable[..., Any]) -> Callable[[R], R]:
    """Register the decorated rule for a function of one's own, which the engine then calls in its place.

    The function must ask `torch.overrides.has_torch_function` about its tensors first, and hand itself to
    `handle_torch_function`, as torch's own Python functions do.

    Args:
        func: the function that is called.

    Example:
        >>> def double(x):
        ...     if torch.overrides.has_torch_function_unary(x):
        ...         return torch.overrides.handle_torch_function(double, (x,), x)
        ...     return torch.from_numpy(2 * x.numpy())  # what no tangent could follow
        >>> @rule_for(double)
        ... def double_rule(op, x):
        ...     return op.func(x), lambda dx: 2 * dx
    """

    def register(body: R) -> R:
        OWN[func] = body
        return body

    return register


def constant(names: str) -> None:
    """Declare operations, names parted by blanks, whose result has no tangent whatever its arguments' are."""
    CONSTANT.update(names.split())


def callables(name: str) -> Iterator[Any]:
    """Every form in which torch offers an operation: function, method, property."""
    for owner in OWNERS:
        found = getattr(owner, name, None)
        if callable(found):
            yield found
        elif owner is torch.Tensor and found is not None and hasattr(found, "__get__"):
            yield found.__get__


def table(names: Iterable[str]) -> dict[Any, str]:
    """callable -> plain name, for all forms and aliases of `names`."""
    wanted = set(names)
    spelled = [(n, n) for n in wanted] + [(a, n) for a, n in ALIASES.items() if n in wanted]
    return {form: name for spelling, name in spelled for form in callables(spelling)}


def add_into(total: Tensor | None, term: Tensor) -> Tensor:
    """total + term, into total's memory where that holds the sum."""
    if total is None:
        return term
    fits = total.shape == torch.broadcast_shapes(total.shape, term.shape) and total.dtype == term.dtype
    return total.add_(term) if fits else total + term
