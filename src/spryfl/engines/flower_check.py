"""What comes from a client is checked against its instruction before anything uses it.

Whatever is wrong - bytes that are no update, too many of them, another round, another client, other names, shapes or
types, values that are not finite, other seeds, more examples than it has - the answer is dropped, and the round goes on
as if it had not come. Cost: one pass over the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from spryfl import server, wire
from spryfl.types import Instruction, Params, Passes, Scalars, Trace, Update

_SLACK, _NAME = 16_384, 64  # bytes of a header: of any, and more a name


class RefusedError(ValueError):
    """An answer that must not be used."""


class Expected(NamedTuple):
    """What the server knows of an answer before it comes."""

    values: Params  # names, shapes and types of all that is trainable
    examples: Mapping[int, int]  # client -> how many it trains on
    steps: Callable[[int], int]  # examples -> local batches
    seeded: Callable[[Instruction], tuple[int, frozenset[str]] | None]  # (scalars of a step, dense names); if known
    own_seeds: bool  # whether seeds may be the client's own


def largest(told: Instruction, expected: Expected) -> int:
    """More bytes than an honest answer has: twice the tensors that were asked for, and a header."""
    dense = sum(expected.values[name].nbytes for name in told.names)
    steps = expected.steps(expected.examples[told.client])
    known = expected.seeded(told) if told.fingerprint else (0, frozenset[str]())
    seeded = 2 * dense if known is None else steps * (known[0] * 12 + 8)
    return 2 * (dense + seeded) + _SLACK + _NAME * len(told.names)


def read(data: bytes, told: Instruction, expected: Expected) -> Update:
    """The update in these bytes; a RefusedError says why it is none that answers the instruction."""
    if len(data) > largest(told, expected):
        raise RefusedError(
            f"returns {len(data)} bytes, more than the {largest(told, expected)} that an answer can have"
        )
    try:
        message, beside = wire.load(data)
        if not isinstance(message, Update) or set(beside) != {"measured"} or beside["measured"].shape != (2,):
            raise RefusedError("returns a message that is no update")
        update = cast(Update, wire.decode(data))
        why = _untyped(update) or _foreign(update, told, expected) or server.objection(update, told, expected.values)
    except RefusedError:
        raise
    except Exception as error:  # whatever a sender may make of bytes, the server goes on
        raise RefusedError(f"returns bytes that are no update ({type(error).__name__}: {error})"[:300]) from None
    if why:
        raise RefusedError(why)
    return update


def _untyped(update: Update) -> str:
    """Whether a field holds what it cannot hold; types are the sender's choice."""
    whole = (update.round, update.client, update.examples, update.peak_bytes, update.held_out)
    real = (update.loss, update.seconds, update.correct_before, update.correct_after, update.variance)
    if not (all(_is(value, int) for value in whole) and all(_is(value, int, float) for value in real)):
        return "returns numbers of another type"
    if not (isinstance(update.params, Mapping) and all(isinstance(v, Tensor) for v in update.params.values())):
        return "returns no values by name"
    if not (_counts(update.passes, Passes) and _counts(update.scalars, Scalars)):
        return "returns no account of its work"
    counted = (*whole, update.seconds, update.correct_before, update.correct_after)
    if not all(math.isfinite(value) and value >= 0 for value in counted):
        return "returns numbers below 0, or not finite"
    return _untyped_trace(update.trace) if update.trace is not None else ""


def _untyped_trace(trace: Any) -> str:
    fits = (
        isinstance(trace, Trace)
        and isinstance(trace.scalars, Tensor)
        and trace.scalars.dtype == torch.float32
        and isinstance(trace.seeds, Tensor)
        and trace.seeds.dtype == torch.int64
        and all(_is(which, int) for which in trace.steps)
        and all(_is(value, int) for layout in trace.layouts for run in layout for value in (*run[0], run[2]))
    )
    return "" if fits else "returns a trace that is none"


def _is(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _counts(value: Any, kind: type) -> bool:
    numbers = isinstance(value, kind) and isinstance(value, tuple)
    return numbers and all(_is(n, int, float) and math.isfinite(n) and n >= 0 for n in cast(tuple, value))


def _foreign(update: Update, told: Instruction, expected: Expected) -> str:
    """Whether it speaks for another client, or claims what this one does not have."""
    if update.client != told.client:
        return f"answers as client {update.client}"
    if update.examples != expected.examples[told.client]:
        return f"claims {update.examples} examples, and has {expected.examples[told.client]}"
    if update.trace is None:
        return ""
    steps = expected.steps(update.examples)
    if len(update.trace.steps) != steps:
        return f"returns scalars of {len(update.trace.steps)} steps, asked for {steps}"
    if len(update.trace.seeds) and not expected.own_seeds:
        return "returns scalars on seeds of its own"
    known = expected.seeded(told)
    return "returns values where scalars were asked for" if known and set(update.params) != known[1] else ""
