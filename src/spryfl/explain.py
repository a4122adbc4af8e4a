"""A method in words and numbers: its choices by their builders' own words, its costs as rows of a table.

Cost: some milliseconds; with a model's name its configuration is opened, never its weights.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from spryfl import train
from spryfl.choices import EXCHANGES, HEADS, REGISTRIES, SHARING, ClientClass, Method, builder, parties
from spryfl.costs import DRAW, Costs, Shapes, shapes
from spryfl.methods import named
from spryfl.types import Passes

_UNKNOWN = "unknown"
_PROSE = ("name", "summary", "paper")
_MEANINGS: Mapping[str, Mapping[Any, str]] = {"exchange": EXCHANGES, "head": HEADS, "sharing": SHARING}
Row = tuple[str, ...]


def choices(method: Method) -> list[Row]:
    """(choice, value, what it does) for each choice, as its builder says it; the formula follows from them."""
    lines: list[Row] = []
    for what, value in vars(method).items():
        if what in REGISTRIES:
            lines.append((what, said(value), _does(builder(what, value["kind"]), value)))
        elif what == "classes":
            lines += [(f"class {one.name}", otherwise(one), "") for one in value]
        elif what not in _PROSE:
            lines.append((what, said(value), _MEANINGS.get(what, {}).get(value, "")))
    return lines


def otherwise(one: ClientClass) -> str:
    """Who a class of clients is and what it does otherwise than the method, in one line."""
    usual = vars(ClientClass(""))
    given = {key: value for key, value in vars(one).items() if key != "name" and value != usual[key]}
    return ", ".join(f"{key} {said(value)}" for key, value in given.items())


def said(value: Any) -> str:
    """A choice with its options, as `kind(option=value)`."""
    if not isinstance(value, Mapping):
        return str(value)
    options = ", ".join(f"{key}={item}" for key, item in value.items() if key != "kind")
    return f"{getattr(value['kind'], '__name__', value['kind'])}({options})"


def _does(make: Any, options: Mapping[str, Any]) -> str:
    """The first line of a builder's text; where that is no formula, its file's lines for it and its options too."""
    first = (inspect.getdoc(make) or str(make)).splitlines()[0]
    block = re.search(r"(?:^ {4}.*\n)+", inspect.getdoc(inspect.getmodule(make)) or "", re.MULTILINE)
    if "=" in first or not block:
        return first
    usual = {name: p.default for name, p in inspect.signature(make).parameters.items()}
    words = {getattr(make, "__name__", ""), *(v for v in {**usual, **options}.values() if isinstance(v, str))}
    lines = (line.strip() for line in block[0].splitlines())
    return "\n".join([first, *(re.sub(r"\s{2,}", "  ", line) for line in lines if line.partition(" ")[0] in words)])


def costs(method: Method, given: Shapes, clients: int, cohort: int, steps: int) -> Costs:
    """The costs of a method at given shapes."""
    for name, value in (("clients", clients), ("cohort", cohort), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} = {value}; a round needs at least 1.")
    if cohort > clients:
        raise ValueError(f"cohort = {cohort} clients a round, but clients = {clients}. Lower the cohort.")
    if (top := _top(method)) > given.layers:
        raise ValueError(
            f"{method.name} is cut below the last {top} blocks, and there are {given.layers}. Lower its top."
        )
    return train.predicted(method, given, clients, cohort, steps)


def _top(method: Method) -> int:
    """How many of the last blocks lie above the method's cut."""
    estimators = [one.estimator for one in parties(method)]
    return max(max(one.get("exact_top", 0), one.get("top", 0)) for one in estimators)


def listed(method: Method, given: Shapes, clients: int, cohort: int, steps: int) -> Row:
    """`brief` of a method's costs; unknown where the model has too few blocks for it."""
    return ("?", "?") if _top(method) > given.layers else brief(costs(method, given, clients, cohort, steps))


def table(made: Costs) -> list[Row]:
    """(what, by the paper, true) of a method's costs; a round's are for one client and the mean over late rounds."""
    n, late, first = max(made.clients, 1), made.round, made.first
    up = down = begin = caught = replayed = _UNKNOWN
    if late and first and made.headers:
        up = f"{_bytes(late.up / n)} and {_bytes(made.headers.up)} of header"
        down = f"{_bytes(late.down / n)} and {_bytes(made.headers.down)} of header"
        begin = _bytes(first.down / n)
        caught, replayed = _draws(late.caught_up / n), _draws(late.replayed)
    paper_down, paper_up = (_values(count / n) for count in made.paper) if made.paper else (_UNKNOWN, _UNKNOWN)
    about = "" if made.sure else "about "
    return [
        ("passes a step", "", about + says(made.passes)),
        ("TFLOPs a step", _tera(made.paper_flops, ""), about + _tera(made.flops)),
        ("up, a client a round", paper_up, up),
        ("down, a client a round", paper_down, down),
        ("down, its first round", "", begin),
        ("client draws a round", "", _draws(made.drawn) if made.drawn is not None else _UNKNOWN),
        ("client draws to catch up", "", caught),
        ("server draws a round", "", replayed),
        ("server, GFLOPs a round", "", _UNKNOWN if made.server is None else f"{made.server / 1e9:.3g}"),
    ]


def brief(made: Costs) -> Row:
    """(passes of a step, bytes up a client and a round)."""
    count = "".join(f"{value:.3g}{sign}" for value, sign in zip(made.passes or (), "vtb", strict=False) if value)
    return count or "?", _bytes(made.round.up / max(made.clients, 1)) if made.round else "?"


def says(passes: Passes | None) -> str:
    """Passes in words."""
    if passes is None:
        return _UNKNOWN
    return ", ".join(f"{value:.4g} {kind}" for kind, value in passes._asdict().items() if value)


def shown(given: Shapes, clients: int, cohort: int, steps: int) -> str:
    """The shapes in one line."""
    adapter = sum(unit.size for unit in given.units if not unit.head)
    return (
        f"{given.layers} blocks, {given.width} wide, {adapter:,} adapter values, {given.values - adapter:,} in the "
        f"head of {given.labels} classes; batches of {given.rows} x {given.tokens} tokens, {steps} steps a round, "
        f"{cohort} of {clients} clients a round"
    )


def gradient(method: Method) -> str:
    """The estimator in a word or two."""
    checkpoint = ", checkpointed" if method.estimator.get("checkpoint") else ""
    return said(method.estimator).partition("(")[0] + checkpoint


def trainers(method: Method) -> str:
    """Who trains what in a word."""
    return said(method.assignment).partition("(")[0] if method.sharing == "federated" else method.sharing


def changed(name: str, changes: Sequence[str]) -> Method:
    """A row, with other choices as `spryfl run --set method.KEY=VALUE` takes them."""
    row = named(name)
    if not changes:
        return row
    from spryfl import config  # it takes seconds, and a row as it stands needs none of it

    given: dict[str, Any] = {"method": {"name": name}}
    for one in changes:
        if not one.startswith("method."):
            raise ValueError(f'--set "{one}" has no effect on a method. Give method.KEY=VALUE.')
        given = config.merge(given, config.assignment(one))
    return config.parse(given).method


def sized(model: str, numbers: dict[str, int | None], tokens: int, batch: int, labels: int, rank: int) -> Shapes:
    """Shapes from numbers, RoBERTa-Large's where none is given, or from the configuration of a model."""
    own: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    if not model:
        return shapes(**own, tokens=tokens, batch=batch, labels=labels, rank=rank)
    if own:
        raise ValueError(f'--{next(iter(own))} has no effect with --model "{model}", which has its own. Remove it.')
    from spryfl import adapters, models  # opening a model takes seconds; numbers need none of it

    classes = tuple(str(i) for i in range(labels))
    return models.shapes(model, classes, adapters.lora(r=rank), rows=batch, tokens=tokens)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _values(count: float) -> str:
    return f"{count:,.0f} values" if count else "none"


def _draws(count: float) -> str:
    seconds = DRAW * count
    return f"{_values(count)}, {seconds:.{0 if seconds >= 10 else 2}f} s" if count else "none"


def _tera(count: float | None, otherwise: str = _UNKNOWN) -> str:
    return otherwise if count is None else f"{count / 1e12:.3g}"
