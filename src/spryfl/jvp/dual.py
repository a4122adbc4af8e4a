"""A tensor that carries K tangents, and what happens when torch's functions meet one.

    dual = value + sum_k eps_k tangent_k          f(dual) = f(value) + sum_k eps_k f'(value) tangent_k

`Dual` is a subclass of Tensor without memory of its own, so that model code takes it for a tensor and every function
of torch that it reaches comes to `__torch_function__` here. The function's own rule answers (registry.py), or torch's
forward mode (fallback.py). Where code goes round that door (TorchScript, compiled extensions), `__torch_dispatch__`
stops it with an error: no tangent is lost in silence. Functions of plain tensors never come here, so what lies before
the first perturbed value costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

from . import attention, rules_linear, rules_norm, rules_pointwise, rules_product  # noqa: F401  (they fill the table)
from .fallback import stock
from .registry import CONSTANT, OWN, RULES, Op, table

FORMS = table((*RULES, *CONSTANT))
IN_PLACE = {form: name for name in RULES for form in table([f"{name}_", f"__i{name}__"])}
promoted: ContextVar[list[Dual]] = ContextVar("promoted")  # plain tensors that were written into during this call


class Dual(Tensor):
    """A value and its K tangents, each of the value's shape and type."""

    value: Tensor
    tangents: tuple[Tensor, ...]

    @staticmethod
    def __new__(cls, value: Tensor, tangents: Iterable[Tensor]) -> Dual:
        made = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )
        made.value, made.tangents = value, tuple(tangents)
        return made

    def __init__(self, value: Tensor, tangents: Iterable[Tensor]) -> None: ...

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore
        raise NotImplementedError(
            f"spryfl.jvp: {func} was called from compiled code (TorchScript, a C++ extension): no tangent follows.\n"
            "    Call the plain Python version of that code."
        )


@cache
def inplace_position(func: Callable[..., Any]) -> int | None:
    """Where a Python function of torch takes `inplace`, its last argument; None where it has none."""
    names = list(inspect.signature(func, follow_wrapped=False).parameters) if inspect.isfunction(func) else []
    return names.index("inplace") if "inplace" in names else None


def values(x: Any) -> Any:
    """`x` with every Dual replaced by its value, in lists and tuples too."""
    if isinstance(x, Dual):
        return x.value
    if isinstance(x, list | tuple) and any(isinstance(e, Dual | list | tuple) for e in x):
        return [values(e) for e in x] if isinstance(x, list) else tuple(values(e) for e in x)
    return x


def tangents(x: Any, k: int) -> Any:
    """`x` with every Dual replaced by its k-th tangent and everything else by None."""
    if isinstance(x, Dual):
        return x.tangents[k]
    if isinstance(x, list | tuple):
        return [tangents(e, k) for e in x] if isinstance(x, list) else tuple(tangents(e, k) for e in x)
    return None


def parted(x: Any) -> tuple[Any, Any]:
    """A value, and its tangents by direction; None for those where there is no Dual in it."""
    if isinstance(x, Dual):
        return x.value, x.tangents
    if type(x) is not list and type(x) is not tuple:
        return x, None
    parts = [parted(e) for e in x]
    k = next((len(t) for _, t in parts if t is not None), 0)
    if not k:
        return x, None
    return type(x)(v for v, _ in parts), [type(x)(t and t[i] for _, t in parts) for i in range(k)]


def count(x: Any) -> int:
    """K of the first Dual in x, or 0."""
    if isinstance(x, Dual):
        return len(x.tangents)
    if isinstance(x, dict):
        x = tuple(x.values())
    return next((n for n in map(count, x) if n), 0) if isinstance(x, list | tuple) else 0


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One function of torch with a Dual among its arguments."""
    name = FORMS.get(func)
    if name in CONSTANT:
        return func(*values(args), **{k: values(v) for k, v in kwargs.items()})
    if func in IN_PLACE or func is Tensor.__setitem__ or _ends_in_place(func):
        return write(func, args, kwargs)
    if kwargs.get("out") is not None:
        raise NotImplementedError(
            f"spryfl.jvp: {resolve_name(func)} with out= is not supported. Use its result instead."
        )
    at = inplace_position(func)
    inplace = kwargs.get("inplace", False) or (at is not None and len(args) > at and args[at])
    kwargs = {k: v for k, v in kwargs.items() if k not in ("inplace", "out")}
    result = derive(func, name, args[:at], kwargs)
    return store(args[0], result, func) if inplace else result


def derive(func: Callable[..., Any], name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The function's value and tangents: by its rule, or by torch's forward mode."""
    parts, more = [parted(a) for a in args], {n: parted(v) for n, v in kwargs.items()}
    point, named = [v for v, _ in parts], {n: v for n, (v, _) in more.items()}
    k = next(len(t) for _, t in (*parts, *more.values()) if t is not None)
    directions = [
        (tuple([t and t[i] for _, t in parts]), {n: t and t[i] for n, (_, t) in more.items()}) for i in range(k)
    ]
    op = Op(func, directions)
    try:
        body = OWN.get(func) or RULES.get(name or str(func))  # a library's operator goes by its qualified name
        if body is None:
            raise NotImplementedError
        y, push = body(op, *point, **named)
    except NotImplementedError:
        y, push = stock(op, *point, **named)
    if args and isinstance(args[0], Dual) and y is args[0].value:
        return args[0]  # handed through: dropout in evaluation mode, a cast to the type it has
    return join(y, [push(*a, **kw) for a, kw in directions] if callable(push) else push)


def join(y: Any, dy: list[Any]) -> Any:
    """Value and tangents as one Dual, or a tuple of them; what has no tangent stays plain."""
    if isinstance(y, Tensor):
        return y if dy[0] is None else Dual(y, (fit(t, y) for t in dy))
    if isinstance(y, list | tuple):
        parts = [join(e, [None if d is None else d[i] for d in dy]) for i, e in enumerate(y)]
        return parts if isinstance(y, list) else type(y)(parts)
    return y


def fit(t: Tensor, y: Tensor) -> Tensor:
    """A tangent in its value's shape (a rule may return one that broadcasts to it) and type."""
    t = t if t.dtype == y.dtype else t.to(y.dtype)
    return t if t.shape == y.shape else t.expand(y.shape).clone()


def _ends_in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function that changes its first argument: its out-of-place form, then the result stored."""
    if func is Tensor.__setitem__:
        return set_item(*args)
    name = IN_PLACE.get(func, func.__name__.rstrip("_"))
    plain: Any = getattr(Tensor, name, None)
    if plain is None and name not in ("zero", "fill", "copy"):
        raise NotImplementedError(
            f"spryfl.jvp: no forward-mode rule for {resolve_name(func)}. Use its out-of-place form."
        )
    if name in ("zero", "fill", "copy"):
        new = args[1] if len(args) > 1 else 0.0
        return store(args[0], new, func)
    return store(args[0], call(plain, args, kwargs), func)


def store(x: Tensor, new: Any, func: Any) -> Tensor:
    """x[...] = new, values and tangents; a plain x becomes a Dual until the call ends."""
    set_item(x, ..., new, func)
    return x


def set_item(x: Tensor, index: Any, new: Any, func: Any = Tensor.__setitem__) -> None:
    if not isinstance(x, Dual):
        x = promote(x, count(new), func)
    x.value[values(index)] = values(new)
    x.tangents = tuple(t if _owns(t) else t.clone() for t in x.tangents)
    for k, t in enumerate(x.tangents):
        d = tangents(new, k)
        t[values(index)] = 0.0 if d is None else d


def _owns(t: Tensor) -> bool:
    """No two elements share memory, so that writing one changes one."""
    return all(stride != 0 or size <= 1 for size, stride in zip(t.shape, t.stride(), strict=True))


def promote(x: Tensor, k: int, func: Any) -> Dual:
    """Turn a plain tensor into a Dual with zero tangents where it stands: other names for it see the change."""
    if x._is_view():
        raise NotImplementedError(
            f"spryfl.jvp: {resolve_name(func)} writes a value with tangents into a view of a tensor that has none.\n"
            "    Write into the whole tensor, or build it with torch.cat."
        )
    plain = x.detach()
    x.__class__ = Dual
    x.value, x.tangents = plain, tuple(torch.zeros_like(plain) for _ in range(k))  # type: ignore[attr-defined]
    promoted.get().append(x)  # type: ignore[arg-type]
    return x  # type: ignore[return-value]


def demote(x: Dual) -> None:
    """Undo `promote`, with the values that were written."""
    del x.value, x.tangents
    x.__class__ = Tensor  # type: ignore[assignment]
