"""Every public name says what it is: one line, its arguments, what it raises, where it is from; its examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import spryfl

SOURCE = Path(spryfl.__file__).parent
MODULES = ["spryfl", *(f"spryfl.{name}" for name in spryfl.modules())]
# Tables of choices: whoever is in one of them is from somewhere, and its page or file says where.
TABLES = {
    "spryfl.estimators": "ESTIMATORS",
    "spryfl.adapters": "ADAPTERS",
    "spryfl.optimizers": "OPTIMIZERS",
    "spryfl.assign": "ASSIGNMENTS",
    "spryfl.methods": "METHODS",
}


def public(module: ModuleType) -> dict[str, Any]:
    """What a module offers: its `__all__`, or what is defined in it and has no underscore."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
    return {name: getattr(module, name) for name in names}


def everything() -> list[tuple[str, Any]]:
    """(full name, function or class) of every public one, each once."""
    found: dict[int, tuple[str, Any]] = {}
    for name in MODULES:
        for own, value in public(importlib.import_module(name)).items():
            if inspect.isfunction(value) or inspect.isclass(value):
                found.setdefault(id(value), (f"{name}.{own}", value))
    return list(found.values())


EVERYTHING = everything()
each = pytest.mark.parametrize(("name", "value"), EVERYTHING, ids=[name for name, _ in EVERYTHING])


def arguments(value: Any) -> list[str]:
    """Names of what a caller gives to a function, or to a class that has a constructor of its own."""
    if inspect.isclass(value):
        if getattr(value, "_is_protocol", False):
            return []
        if "__init__" not in vars(value) or "__dataclass_fields__" in vars(value):
            return []
        value = value.__init__
    signature = inspect.signature(value)
    return [name for name in signature.parameters if name != "self"]


def raises(value: Any) -> bool:
    """Whether a `raise` stands in the function itself, not in one that it returns."""
    if not inspect.isfunction(value):
        return False
    (own,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body

    def inside(node: ast.AST) -> bool:
        return any(
            isinstance(child, ast.Raise) or inside(child)
            for child in ast.iter_child_nodes(node)
            if not isinstance(child, ast.FunctionDef | ast.Lambda)
        )

    return inside(own)


def section(doc: str, title: str) -> str:
    """What stands under a heading of a docstring."""
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n?|\n)*)", doc, re.MULTILINE)
    return found.group(1) if found else ""


@each
def test_one_line_says_what_it_is(name, value):
    doc = inspect.getdoc(value) or ""
    assert doc, f"{name} has no docstring"
    first, _, rest = doc.partition("\n")
    assert not rest or rest.startswith("\n"), f"{name}: a blank line must follow the first"
    assert first[-1] in ".:", f"{name}: the first line is no sentence: {first!r}"
    assert not doc.startswith(f"{value.__name__}("), f"{name} has the docstring that Python makes up"


@each
def test_every_argument_is_explained(name, value):
    told = section(inspect.getdoc(value) or "", "Args")
    heads = {one.strip().lstrip("*") for line in re.findall(r"^ {4}([*\w, ]+):", told, re.M) for one in line.split(",")}
    missing = [one for one in arguments(value) if one not in heads]
    assert not missing, f"{name}: Args: says nothing of {missing}"


@each
def test_what_it_raises_is_said(name, value):
    doc = inspect.getdoc(value) or ""
    assert not raises(value) or section(doc, "Raises") or "Error" in doc, f"{name} raises, and no Raises: says so"


@pytest.mark.parametrize("name", TABLES)
def test_the_source_of_each_choice_is_named(name):
    """A paper's number, or the file's own first lines that have it; a choice of ours says what it does."""
    module = importlib.import_module(name)
    for key, value in getattr(module, TABLES[name]).items():
        if TABLES[name] == "METHODS":
            assert re.search(r"\d{4}|baseline|ours|-", value.paper), f"{key} names no paper"
            continue
        home = inspect.getdoc(importlib.import_module(value.__module__)) or ""
        texts = (inspect.getdoc(value) or "") + home + (inspect.getdoc(module) or "")
        assert re.search(r"arXiv|et al\.|ours|of this package", texts), f"{name}.{key} names no source"


EXAMPLES = [
    "spryfl.finetune",
    "spryfl.export",
    "spryfl.Experiment",
    "spryfl.Method",
    "spryfl.jvp.jvp",
    "spryfl.methods.named",
    "spryfl.testing.check_estimator",
    "spryfl.plain.backward",
    "spryfl.estimators.forward",
    "spryfl.adapters.lora",
    "spryfl.noise.direction",
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_main_entry_points_have_an_example(name):
    home, _, own = name.rpartition(".")
    doc = inspect.getdoc(getattr(importlib.import_module(home), own)) or ""
    assert ">>> " in doc or "Example:\n" in doc


WITH_EXAMPLES = sorted(path for path in SOURCE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_examples_in_docstrings_run(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not found.failed


def test_a_public_module_is_where_it_says():
    for name in MODULES:
        assert inspect.getdoc(importlib.import_module(name))
    with pytest.raises(AttributeError, match="no attribute 'nothing_here'"):
        spryfl.nothing_here  # noqa: B018
