"""Where a model's blocks are, and which of its values a cut between two of them has below and above.

A cut at call i lies before the i-th block that a forward pass calls. Only the hidden state h crosses it: what else the
later blocks are given (masks, positions) is made anew from the inputs. What a value is read for is seen, not guessed:

    stage j    from h after block j - 1 to h before block j          a value read there is below the cuts at i >= j
    stage j+1  block j itself, and all that it is given but h        above those at i <= j

by one pass over one row, in which each block hides its work from autograd, so that what reaches a stage is a short
graph of the values outside the blocks. Cost: that pass, once a model; the list of blocks, once a model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map
from transformers.modeling_layers import GradientCheckpointingLayer

from spryfl.hooks import visited
from spryfl.types import Batch

_H = object()  # where the hidden state stands in what a block answers


class Sides(NamedTuple):
    """What lies where about one cut."""

    at: int  # the cut is before this call of a block, 0 the first
    calls: int  # calls of blocks in one forward pass
    above: frozenset[str]  # names that only the part above reads
    both: frozenset[str]  # names that both parts read


class Seen(NamedTuple):
    """What one pass showed."""

    forms: tuple[Any, ...]  # what each call answered, the hidden state replaced by _H, other tensors by None
    stages: Mapping[str, frozenset[int]]  # name -> the stages that read it; behind the last block is the last stage
    handed: bool  # a block is given a tensor, not h, that an earlier one answered


class Layout:
    """The blocks of one model; `layout_of` gives the same one for the same module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)  # the model keeps its layout alive, not the other way round
        self._seen: Seen | None = None
        self._cuts: dict[int, Sides] = {}

    @cached_property
    def trunk(self) -> tuple[str, nn.Module]:
        """The language model without its task head, and its path."""
        module: Any = self._module()
        base = module.get_base_model()
        trunk = getattr(base, base.base_model_prefix)
        return next(path for path, inner in module.named_modules() if inner is trunk), trunk

    @cached_property
    def marked(self) -> tuple[tuple[str, nn.Module], ...]:
        """The blocks that transformers marks as such, in order, with their paths; one inside another is part of it."""
        path, trunk = self.trunk
        return tuple((f"{path}.{name}", block) for name, block in _marked(trunk))

    @cached_property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The marked blocks; where there are none (ALBERT), those of the trunk's first list."""
        return blocks_of(self.trunk[1])

    def first(self, names: Iterable[str], head: frozenset[str]) -> int:
        """How many marked blocks lie before all of `names`; 0 where one lies outside the blocks and the head."""
        paths = [path for path, _ in self.marked]
        places = [
            next((i for i, path in enumerate(paths) if name.startswith(path + ".")), 0)
            for name in names
            if name not in head
        ]
        return min(places, default=len(paths))

    def sides(self, top: int, inputs: Batch) -> Sides:
        """The cut below the last `top` blocks, -1 for below all of them; `inputs` are any that the model takes."""
        seen, name = self._looked(inputs), type(self.trunk[1]).__name__
        count = len(seen.forms)
        if seen.handed:
            raise ValueError(
                f"top = {top}: the blocks of {name} hand on more than the hidden state, so it cannot be cut between "
                f"them. Use top = 0, a cut before the head."
            )
        if not -1 <= top <= count:
            raise ValueError(
                f"top = {top}, but {name} has {count} blocks. Give top, or exact_top of forward mode, 0 (a cut before "
                f"the head) to {count}, or -1 for all."
            )
        at = 0 if top == -1 else count - top
        if at not in self._cuts:
            below = {name for name, stages in seen.stages.items() if min(stages) <= at}
            above = {name for name, stages in seen.stages.items() if max(stages) > at}
            self._cuts[at] = Sides(at, count, frozenset(above - below), frozenset(above & below))
        return self._cuts[at]

    def answer(self, call: int, h: Tensor) -> Any:
        """What a call answers, with h in its place."""
        assert self._seen is not None
        return tree_map(lambda leaf: h if leaf is _H else leaf, self._seen.forms[call])

    def _looked(self, inputs: Batch) -> Seen:
        """What one pass over the first row shows; made once."""
        if self._seen is None:
            module: Any = self._module()
            self._seen = _look(module, self.blocks, {name: value[:1] for name, value in inputs.items()})
        return self._seen


def blocks_of(trunk: nn.Module) -> tuple[nn.Module, ...]:
    """The blocks that transformers marks as such in a trunk; where there are none (ALBERT), those of its first list."""
    marked = tuple(block for _, block in _marked(trunk))
    return marked or next((tuple(m) for m in trunk.modules() if isinstance(m, nn.ModuleList)), ())


def _marked(trunk: nn.Module) -> list[tuple[str, nn.Module]]:
    """The marked blocks with their paths in the trunk; one inside another is part of it."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in trunk.named_modules():
        inside = any(name.startswith(outer + ".") for outer, _ in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found.append((name, module))
    return found


_LAYOUTS: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()


def layout_of(module: nn.Module) -> Layout:
    """The layout of a PEFT model; made at the first call for it."""
    return _LAYOUTS.setdefault(module, Layout(module))


def forget(module: nn.Module) -> None:
    """Lets go of a model's layout; the next call for it makes it anew."""
    _LAYOUTS.pop(module, None)


def parted(args: Any, kwargs: Any) -> tuple[Tensor, Any, Any]:
    """The hidden state among a block's arguments, and the others."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], args, {name: value for name, value in kwargs.items() if name != "hidden_states"}


class _Log:
    """What a pass shows: which stage reads which of `leaves`."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        self.names = {id(value): name for name, value in leaves.items()}
        self.stages: dict[str, set[int]] = {}
        self.forms: list[Any] = []
        self.called: list[nn.Module] = []
        self.others: list[Tensor] = []  # answered beside the hidden state
        self.handed = False

    def visit(self, call: int, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        h, *rest = parted(args, kwargs)
        given = [leaf for leaf in tree_leaves(rest) if isinstance(leaf, Tensor)]
        self.handed |= any(one is other for one in given for other in self.others)
        self.note([h], call)
        self.note(given, call + 1)
        with torch.no_grad():
            output = forward(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.others += tensors[1:]
        self.called.append(module)
        form = tree_map(lambda leaf: None if isinstance(leaf, Tensor) and leaf is not tensors[0] else leaf, output)
        self.forms.append(tree_map(lambda leaf: _H if leaf is tensors[0] else leaf, form))
        return output

    def note(self, tensors: Iterable[Tensor], stage: int) -> None:
        """The leaves that the graphs of these tensors begin with are read at this stage."""
        for name in (self.names.get(id(leaf)) for value in tensors for leaf in _leaves(value)):
            if name is not None:
                self.stages.setdefault(name, set()).add(stage)


def _look(module: nn.Module, blocks: Iterable[nn.Module], row: Batch) -> Seen:
    """One pass over one row; each block hides its own work from autograd."""
    own = dict(module.named_parameters())
    leaves: dict[str, Any] = {
        name: value.detach().requires_grad_() for name, value in own.items() if value.is_floating_point()
    }
    log = _Log(leaves)
    with torch.enable_grad(), visited(blocks, log.visit):
        output = functional_call(module, leaves, (), dict(row))
    log.note([leaf for leaf in tree_leaves(dict(output)) if isinstance(leaf, Tensor)], len(log.forms))
    inside = [{id(value) for value in block.parameters()} for block in log.called]
    for name, value in own.items():
        calls = {call + 1 for call, ids in enumerate(inside) if id(value) in ids}
        if calls:
            log.stages[name] = log.stages.get(name, set()) | calls
    stages = {name: frozenset(stages) for name, stages in log.stages.items()}
    return Seen(tuple(log.forms), stages, log.handed)


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """The tensors that a value's graph begins with."""
    if value.requires_grad and value.grad_fn is None:
        yield value
    seen: set[Any] = set()
    left = [value.grad_fn]
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        left += [before for before, _ in node.next_functions]
