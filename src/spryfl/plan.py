"""What a client can run in so many bytes, best first.

    progress      sum over the moved units of w_u (1 if its gradient is exact, else cos^2), w_u one unit's share of them
    cos^2         M K / (d + M K)      K directions over d values, M clients that move them with directions of their own
    score         progress / operations of a step

The law is E cos^2 of an estimate to the gradient (Gaussian directions, estimators/forward.py): the share of the best
possible step that an estimate of so few scalars makes. It takes every unit for equally useful and counts no time but
operations, so it ranks ways to a gradient on one client and foretells no accuracy. What fits comes first; among equals
what is not streamed, then the larger micro-batch. Cost: some steps on tensors without storage, 2 to 5 s.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from spryfl.choices import Method, build, builder
from spryfl.costs import Step, passes, step_flops, work
from spryfl.footprint import Footprint, Outline, footprint, held, shapes
from spryfl.server import deal
from spryfl.types import Passes, Unit

NEAR = 0.93  # a batch is tried when this part of its bound, so many times what one row takes, is within the budget


class Setting(NamedTuple):
    """How one client takes its steps."""

    method: Method  # its estimator and its head
    micro_batch: int = 0  # rows at once; 0 = the whole batch
    stream: bool = False


class Planned(NamedTuple):
    """A setting and what is foretold of it."""

    setting: Setting
    footprint: Footprint
    passes: Passes | None  # of a step; None where the estimator is unknown
    flops: float | None
    progress: float | None  # of a step, 1 is the exact gradient's
    fits: bool = True

    @property
    def score(self) -> float:
        """Progress for an operation; 0 where it is unknown."""
        return self.progress / self.flops if self.progress is not None and self.flops else 0.0


class Client:
    """A client as a plan needs it: its model, its units, its batch, how many others move the same, its memory."""

    def __init__(
        self,
        of: Outline,
        mine: Sequence[Unit] | None,
        rows: int,
        tokens: int,
        clients: int = 1,
        budget: int = 0,
        stream: bool = True,
    ) -> None:
        self.of, self.rows, self.tokens, self.clients, self.budget = of, rows, tokens, clients, budget
        self.mine = tuple(of.units if mine is None else mine)
        self.stream = stream and bool(of.blocks)

    @cached_property
    def shapes(self) -> Any:
        """Of model and batch."""
        return shapes(self.of)._replace(rows=self.rows, tokens=self.tokens)

    def footprint(self, setting: Setting, parts: bool = True) -> Footprint:
        """What a setting holds, by part; in less time where the parts need not be told apart."""
        own: dict[str, Any] = {"micro_batch": setting.micro_batch, "stream": setting.stream, "parts": parts}
        return footprint(self.of, setting.method, self.mine, rows=self.rows, tokens=self.tokens, **own)

    def need(self, setting: Setting) -> int:
        """What a setting holds; where the model alone is above the budget, no step is run for that."""
        idle = held(self.of, setting.stream).total
        if self.budget and idle > self.budget:
            return idle
        return self.footprint(setting, parts=False).total

    def fits(self, setting: Setting) -> bool:
        """Whether a setting stays below the budget; any does where there is none."""
        return not self.budget or self.need(setting) <= self.budget

    @property
    def least(self) -> Setting:
        """What takes least of a method, but for the method itself."""
        return Setting(Method(""), 1 if self.rows > 1 else 0, self.stream)

    def planned(self, setting: Setting) -> Planned:
        """A setting with all that is foretold of it."""
        step = work(setting.method, self.shapes)(self.mine)
        return Planned(
            setting,
            self.footprint(setting),
            passes(self.shapes, step) if step else None,
            step_flops(self.shapes, step, self.mine) if step else None,
            progress(step, self.mine, self.clients) if step else None,
            self.fits(setting),
        )


def progress(step: Step, mine: Sequence[Unit], clients: int) -> float:
    """The share of the best step that an estimate makes: 1 on exact units, M K / (d + M K) on the others.

    Args:
        step: what one estimate does.
        mine: the units that are moved, each as useful as another.
        clients: M, that move them with directions of their own.
    """
    if not mine:
        return 0.0
    exact = len([unit for unit in mine if unit in step.dense])
    scalars, values = step.terms, sum(unit.size for unit in mine if unit not in step.dense)
    found = clients * scalars / (values + clients * scalars) if scalars else 0.0
    return (exact + (len(mine) - exact) * found) / len(mine)


def fitting(
    budget: int,
    of: Outline,
    method: Method,
    mine: Sequence[Unit] | None = None,
    *,
    rows: int,
    tokens: int,
    clients: int = 1,
    stream: bool = True,
) -> Planned:
    """The best setting of a client that fits its memory, the method's local optimizer kept.

    Args:
        budget: bytes of anonymous memory of the client's process, its imports included.
        of: the model, from `footprint.outline`.
        method: whose choices hold but for the estimator and the head.
        mine: the units that the client moves; all without.
        rows, tokens: of a local batch.
        clients: that move these units in a round.
        stream: whether blocks may be read from the disk as they are needed; only a packed model can.

    Returns:
        the setting: `planned.setting.method.estimator`, `.head`, `.micro_batch`, `.stream`. The same for the same
        arguments, on machines whose processes are equally large after the imports.

    Raises:
        ValueError: nothing fits; it says the smallest need and what would lower it.
    """
    client = Client(of, mine, rows, tokens, clients, budget, stream)
    tried = []
    for way in by_score(client, ways(method, of)):
        for setting in placed(client, way):
            tried.append(setting)
            if client.fits(setting):
                return client.planned(setting)
    raise ValueError(too_small(client, tried))


def by_score(client: Client, methods: Sequence[Method]) -> list[Method]:
    """Methods by their score alone, which hangs on no memory."""

    def score(method: Method) -> float:
        step = work(method, client.shapes)(client.mine)
        return progress(step, client.mine, client.clients) / step_flops(client.shapes, step, client.mine) if step else 0

    return sorted(methods, key=lambda method: -score(method))


def ranked(rows: Sequence[Planned]) -> list[Planned]:
    """Best first: what fits, the highest score, not streamed, the larger pieces; what does not fit by its need."""

    def order(one: Planned) -> tuple[Any, ...]:
        if not one.fits:
            return 1, one.footprint.total
        return 0, -one.score, one.setting.stream, -(one.setting.micro_batch or 10**9), one.footprint.total

    return sorted(rows, key=order)


def ways(method: Method, of: Outline) -> list[Method]:
    """The method with each way to a gradient, from the exact one to the one of least memory."""
    seeded = method.estimator if "directions" in method.estimator else {"kind": "forward", "directions": 1}
    count = seeded["directions"]
    head = "shared" if method.head == "exact" else method.head
    ends: list[dict[str, Any]] = [{"kind": "backprop"}, {"kind": "backprop", "checkpoint": True}]
    differences = {"kind": "central_difference", "directions": count}
    return [
        *(replace(method, estimator=end, head=head) for end in ends),
        *variants(replace(method, estimator={"kind": "forward", "directions": count}), of),
        replace(method, estimator=differences),
    ]


def variants(method: Method, of: Outline) -> list[Method]:
    """The method with each useful setting of its estimator: what its builder can do is asked of its arguments."""
    known = inspect.signature(builder("estimator", method.estimator["kind"])).parameters
    own, out = dict(method.estimator), [method]
    if "checkpoint" in known and "directions" not in known:
        out += [replace(method, estimator={**own, "checkpoint": not own.get("checkpoint", False)})]
    if own.get("directions", 1) > 1 and "chunk" in known and not own.get("chunk"):
        out += [replace(method, estimator={**own, "chunk": 1})]
    if "exact_head" in known and method.head != "exact":
        out += [replace(method, head="exact")]
    if "exact_top" in known and not own.get("exact_top") and of.layers > 1:
        top = 3 * of.layers // 4 or 1  # `placed` makes it as low as a budget asks
        out += [replace(method, estimator={**own, "exact_top": top, "checkpoint": True})]
    return out


def placed(client: Client, method: Method) -> Iterator[Setting]:
    """How a method is run by a client: as it is where that fits, else with what takes less, the cheapest first.

    Smaller micro-batches cost next to nothing; streaming costs reading; a top of fewer exact blocks costs progress.
    Where nothing fits it is what takes least. A method that cannot be on this model is left out.
    """
    try:
        least = client.least._replace(method=method)
        if not client.fits(least):
            least = least._replace(method=_dialled(client, method))
        streams = (False, True) if client.stream else (False,)
        found = (_pieces(client, least._replace(stream=stream)) for stream in streams)
        yield next((one for one in found if one is not None), least)
    except ValueError as error:
        if "cut" not in str(error) and "read below" not in str(error):
            raise


def _dialled(client: Client, method: Method) -> Method:
    """Of a method with an exact top that does not fit, the same with the most blocks that fit; at least one."""
    top = method.estimator.get("exact_top", 0)
    if top < 2:
        return method

    def at(blocks: int) -> Method:
        return replace(method, estimator={**method.estimator, "exact_top": blocks})

    low, high = 1, top
    while low < high:
        middle = -(-(low + high) // 2)
        if client.fits(client.least._replace(method=at(middle))):
            low = middle
        else:
            high = middle - 1
    return at(low)


def _pieces(client: Client, least: Setting) -> Setting | None:
    """The largest micro-batch that fits: the whole batch, its half, ... one row. None where not even that does.

    What k rows take is at most k times what one takes, so what that bound allows needs no run.
    """
    if not client.budget:
        return least._replace(micro_batch=0)
    if not client.fits(least):
        return None
    idle = held(client.of, least.stream).total
    each = client.need(least) - idle
    sizes = [0, *(client.rows >> shift for shift in range(1, client.rows.bit_length()))]
    for size in sizes:
        whole = least._replace(micro_batch=size)
        if idle + (size or client.rows) * each <= client.budget or size == 1 or (not size and client.rows == 1):
            return whole
        if idle + NEAR * (size or client.rows) * each <= client.budget and client.fits(whole):
            return whole
    return least


def heaviest(method: Method, of: Outline, cohort: int) -> tuple[Unit, ...]:
    """The units of the client of a round that moves the most values."""
    dealt = deal(of.units, range(cohort), build(method), 1)
    return max(dealt.values(), key=lambda mine: sum(unit.size for unit in mine))


def too_small(client: Client, tried: Sequence[Setting]) -> str:
    """What to say where nothing fits: the smallest need, where it goes, and what would lower it."""
    steps = [(work(one.method, client.shapes)(client.mine), one) for one in tried]
    cheap = [one for step, one in steps if step and not (step.above.backward or step.below.backward)]
    best = min(map(client.planned, cheap or tried), key=lambda one: one.footprint.total)
    need, of = best.footprint, client.of
    largest = sorted(zip(need._fields, need, strict=True), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {shown(size)}" for name, size in largest if size)
    return (
        f"nothing fits in {shown(client.budget)}: the smallest need is {shown(need.total)}, for {said(best.setting)} "
        f"({parts}). What would lower it: {'; '.join(_lower(client, best, of))}."
    )


def _lower(client: Client, best: Planned, of: Outline) -> Iterator[str]:
    """What would lower the smallest need, with numbers where they follow."""
    held, step = best.footprint, best.footprint.step
    if of.precision != "4bit":
        yield (
            f"4 bits, streamed (spryfl pack MODEL DIR, then --model DIR): of the backbone's {shown(held.backbone)} two "
            "blocks stay"
        )
    elif not best.setting.stream:
        yield f"streaming: the blocks' {shown(sum(of.blocks))} become {shown(2 * max(of.blocks))}"
    if client.tokens > 1 and step:
        yield f"fewer tokens: half of {client.tokens} takes off up to {shown((held.activations + held.tangents) // 2)}"
    if client.rows > 1 and best.setting.micro_batch != 1:
        yield "a smaller micro-batch"
    if len(client.mine) > 1:
        yield f"fewer units than {len(client.mine)}: gradient and optimizer take {shown(held.gradients)}"
    if held.process > client.budget:
        yield f"nothing, as the imports alone take {shown(held.process)} here: at least that is needed"


def said(setting: Setting) -> str:
    """A setting in words."""
    choice = setting.method.estimator
    kind = str(getattr(choice["kind"], "__name__", choice["kind"])).replace("_", " ")
    words = [kind]
    for key, form in (
        ("directions", "K = {}"),
        ("chunk", "{} at once"),
        ("exact_top", "exact top {}"),
        ("top", "top {}"),
    ):
        if choice.get(key):
            words.append(form.format(choice[key]))
    if choice.get("checkpoint"):
        words.append("checkpointed")
    if setting.method.head == "exact":
        words.append("exact head")
    if setting.micro_batch:
        words.append(f"micro-batch {setting.micro_batch}")
    if setting.stream:
        words.append("streamed")
    return ", ".join(words)


def shown(count: float) -> str:
    """Bytes with a unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
