"""Choices by name: {"kind": a key or a builder, and its options} becomes what the builder makes. Costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Made = TypeVar("Made")


def made(what: str, registry: Mapping[str, Callable[..., Made]], choice: Mapping[str, Any]) -> Made:
    """What the builder of a choice makes of its options.

    Args:
        what: how the choice is called, for the message.
        registry: name -> builder.
        choice: {"kind": a name of the registry or a builder of one's own, option: value, ...}.

    Raises:
        ValueError: no builder has that name; it lists those that are there.

    >>> made("number", {"sum": lambda a, b=1: a + b}, {"kind": "sum", "a": 2})
    3
    """
    options = {key: value for key, value in choice.items() if key != "kind"}
    kind: Any = choice["kind"]
    if not callable(kind) and kind not in registry:
        raise ValueError(f'{what} = "{kind}" is unknown. Possible: {", ".join(registry)}, or a builder of yours.')
    return (kind if callable(kind) else registry[kind])(**options)
