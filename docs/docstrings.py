"""Docstrings as the site shows them: examples as code, arguments and a record's fields explained one by one."""

from __future__ import annotations

import re
from typing import Any

import griffe

_PLAIN = re.compile(r"^Example:\n((?:    .*\n?|\n)+)", re.MULTILINE)
_TOGETHER = re.compile(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*(?:\n\1 +.*)*)$", re.MULTILINE)


class Shown(griffe.Extension):
    """Changes what is parsed; the sources stay as they are."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)
        elif isinstance(obj, griffe.Attribute) and (said := comment(obj)):
            obj.docstring = griffe.Docstring(said, parent=obj)


def comment(obj: griffe.Attribute) -> str:
    """What stands behind a record's field as a comment: in the sources that is where fields are explained."""
    line = obj.source.splitlines()[0] if obj.source else ""
    code, _, said = line.partition("  # ")
    return said if ":" in code and not said.startswith(("noqa", "type:")) else ""


def shown(text: str) -> str:
    """A docstring with its examples in fences and its arguments one by one."""
    text = _TOGETHER.sub(lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")), text)
    text = _PLAIN.sub(
        lambda m: m[0] if ">>> " in m[1] else f"Example:\n    ```python\n{m[1].rstrip()}\n    ```\n\n", text
    )
    out: list[str] = []
    inside = ""
    for line in text.split("\n"):
        begins = re.match(r"( *)>>> ", line)
        if begins and not inside:
            inside = f"{begins[1]}```"
            out.append(f"{inside}pycon")
        elif inside and not line.strip():
            out.append(inside)
            inside = ""
        out.append(line)
    return "\n".join([*out, inside] if inside else out)
