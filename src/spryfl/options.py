"""The options of a choice are its builder's arguments: filled in, checked by type and by the builder itself.

    {"kind": "lora", "r": 4} and lora(r: int = 1, ...) -> {"kind": "lora", "r": 4, "alpha": 1.0, ...}

So a new builder needs nothing here. An unknown key is an error that says which there are. Costs nothing.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)  # true is no 1, "10" no 10
_WRITTEN = {"int_type": "3", "float_type": "0.5", "bool_type": "true or false", "string_type": '"a text"'}  # in TOML


def spelled(key: str, value: Any) -> Any:
    """A choice given by its name alone, written out: "lora" is {"kind": "lora"}."""
    return {"name" if key == "method" else "kind": value} if isinstance(value, str) else value


def nbytes(text: str) -> int:
    """How many bytes a size is: a number above 0 and its unit.

    >>> nbytes("800MB"), nbytes("1.5 GiB"), nbytes("2g")
    (800000000, 1610612736, 2000000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(i?)b?\s*", text.lower())
    if not found or not float(found[1]):
        raise ValueError(f'memory = "{text}" is no size. Give a number above 0 and a unit: 6GB, 800MB, 1.5GiB.')
    return int(float(found[1]) * (1024 if found[3] else 1000) ** (1 + "kmgt".index(found[2])))


def resolve(what: str, registry: Mapping[str, Callable[..., Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """A choice with all its options filled in and checked against its builder's signature and the builder itself."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} = {given!r}: give a section with a kind, one of: {', '.join(registry)}.")
    kind: Any = given.get("kind")
    if callable(kind):
        return _fitted(what, kind, given)
    if kind not in list(registry):
        shown = "is missing" if kind is None else f'= "{kind}" is unknown{nearest(str(kind), registry)}'
        raise ValueError(f"{what}.kind {shown}. Possible: {', '.join(registry)}; from Python a builder of yours too.")
    checked = _checked(what, kind, registry[kind], {k: v for k, v in given.items() if k != "kind"})
    return {"kind": kind, **checked}


def _fitted(what: str, builder: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A choice by a builder of the user's own, its options checked against the builder's signature and the builder."""
    options, signature = {key: value for key, value in given.items() if key != "kind"}, inspect.signature(builder)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"{what} ({title(builder)}): {error}. It takes {signature}.") from None
    builder(**options)
    return {"kind": builder, **options}


def _checked(what: str, kind: str, builder: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(builder, eval_str=True)
    # The head policy is one setting for all estimators, method.head; it sets this argument.
    arguments = {n: p for n, p in signature.parameters.items() if n != "exact_head"}
    fields: dict[str, Any] = {n: (p.annotation, p.default) for n, p in arguments.items()}
    values = typed(fields, options, f"{what} ({kind})")
    builder(**values)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def typed(fields: dict[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of fields (name -> type and default), of the right types; unknown names are errors."""
    schema = create_model("Given", __config__=STRICT, **fields)
    tuples = {name for name, (type_, _) in fields.items() if get_origin(type_) is tuple}  # TOML has lists alone
    values = {key: tuple(value) if key in tuples and isinstance(value, list) else value for key, value in given.items()}
    try:
        return schema(**values).model_dump()
    except ValidationError as error:
        raise ValueError("\n".join(told(one, schema, where) for one in error.errors())) from None


def title(builder: Callable[..., Any]) -> str:
    return getattr(builder, "__qualname__", type(builder).__qualname__)


def told(error: Any, model: type[BaseModel], where: str = "") -> str:
    """One pydantic error as: what was given, what is possible, what to do."""
    path = [str(part) for part in error["loc"]]
    place = ".".join(filter(None, [where, *path])) or "the experiment"
    if error["type"] == "extra_forbidden":
        keys = _keys(model, path[:-1])
        possible = f"Possible: {', '.join(keys)}." if keys else "It takes no options."
        return f"unknown key {place}{nearest(path[-1], keys)}. {possible}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "model_type":
        return f"{place} = {error['input']!r}: it is a section, [{place}]. Its keys: {', '.join(_keys(model, path))}."
    if error["type"] == "dict_type":
        return f"{place} = {error['input']!r}: it is a section, [{place}], with a kind."
    said = error["msg"].replace("tuple", "list")
    written = f", written as {_WRITTEN[error['type']]}" if error["type"] in _WRITTEN else ""
    return f"{place} = {error['input']!r}: {said[0].lower()}{said[1:]}{written}."


def _keys(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    for part in path:
        inner = model.model_fields[part].annotation
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else model
    return [field.alias or name for name, field in model.model_fields.items()]


def nearest(given: str, possible: Iterable[str]) -> str:
    match = difflib.get_close_matches(given, list(possible), n=1)
    return f" (did you mean {match[0]}?)" if match else ""
