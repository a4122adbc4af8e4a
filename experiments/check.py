"""Are the numbers in the documents those in the result files? `python experiments/check.py`, `--write` renews them.

Every table of README.md and of experiments/ says in a comment above it where its numbers are from:

    <!-- check: summary table.json -->      as `spryfl compare` writes it: all methods and columns
    <!-- check: target table.json -->       what it took to come to the target
    <!-- check: methods table.json ; method <- label ; accuracy <- mean±sd accuracy 4 ; each <- each accuracy 4 -->
    <!-- check: methods table.json ; method <- label ; accuracy <- mean±sd accuracy 4 ; all <- each accuracy 4 -->
    <!-- check: rows results.json ; adapter <- name ; d <- values 0 -->
                                            a row an object of a JSON list (or of its "rows"); KEY, with DIGITS a number
    <!-- check: copy table.md 1 -->         the first table of a Markdown file that a command wrote
    <!-- check: record ; why -->            the table is itself the only record: nothing to hold it against
    <!-- check: words -->                   a table without results

and a number in a sentence stands between two comments: FILE#PATH and a format, a difference or a multiple where asked:

    <!--= experiments/a/table.json#methods.spry.mean.accuracy .2f -->0.75<!--/-->
    <!--= table.json#methods.a.mean.accuracy - table.json#methods.b.mean.accuracy * 100 +.1f -->+3.1<!--/-->
    <!--= results.json#top2.accuracy .3f -->0.830<!--/-->       of a list the object whose "row" is top2, or a place

Paths are beside the document. A table without such a comment is a mistake too. Needs Python alone; costs nothing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"<!-- check: (.*?) -->\s*")
VALUE = re.compile(r"(<!--= (.*?) -->)(.*?)(<!--/-->)", re.DOTALL)
# Digits of the columns of a comparison, as `spryfl report` shows them; any other is a metric, with four.
DIGITS = {"round": 0, "MB up": 2, "MB down": 2, "Flower MB": 2, "epsilon": 2, "passes": 0, "peak MB": 1, "seconds": 0}
DIGITS |= {"failed": 0}
ALONG = {"rounds": 0, "passes": 0, "MB up and down": 2, "seconds": 0}

Table = list[tuple[str, ...]]  # head first


class Wrong(NamedTuple):
    """A mistake in a document."""

    where: str
    what: str


def documents(root: Path = ROOT) -> list[Path]:
    """All that is checked."""
    return [root / "README.md", *sorted((root / "experiments").rglob("README.md"))]


def check(document: Path, write: bool = False) -> list[Wrong]:
    """The mistakes of one document; with `write` tables and values are renewed first."""
    text = document.read_text(encoding="utf-8")
    renewed, wrong = _values(text, document)
    renewed, more = _tables(renewed, document)
    if write and renewed != text:
        document.write_text(renewed, encoding="utf-8")
        return check(document)
    return wrong + more


def _values(text: str, document: Path) -> tuple[str, list[Wrong]]:
    wrong = []

    def renewed(found: re.Match[str]) -> str:
        try:
            value = _value(found[2], document.parent)
        except ValueError as error:
            wrong.append(Wrong(_line(text, found.start(), document), str(error)))
            return found[0]
        if value != found[3]:
            wrong.append(Wrong(_line(text, found.start(), document), f"{found[3]} stands there, it is {value}"))
        return f"{found[1]}{value}{found[4]}"

    return VALUE.sub(renewed, text), wrong


def _value(said: str, folder: Path) -> str:
    """PATH [- PATH] [* number] FORMAT as text."""
    *expression, form = said.split()
    factor = 1.0
    if "*" in expression:
        at = expression.index("*")
        factor, expression = float(expression[at + 1]), expression[:at]
    places = [word for word in " ".join(expression).split(" - ") if word]
    numbers = [_found(place.strip(), folder) for place in places]
    return format((numbers[0] - sum(numbers[1:])) * factor, form)


def _found(place: str, folder: Path) -> float:
    file, hash_, path = place.partition("#")
    if not hash_:
        raise ValueError(f"{place!r} is no FILE#PATH")
    value: Any = _read(folder / file)
    for part in path.split("."):
        try:
            name = part.replace("%20", " ")
            value = _row(value, name) if isinstance(value, list) else value[name]
        except (KeyError, IndexError, ValueError, TypeError):
            raise ValueError(f"{file} has no {path} (at {part!r})") from None
    return float(value)


def _row(rows: Sequence[Any], part: str) -> Any:
    """By its name, or its place."""
    named = [one for one in rows if isinstance(one, dict) and one.get("row") == part]
    return named[0] if named else rows[int(part)]


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else text
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None


def _line(text: str, at: int, document: Path) -> str:
    return f"{document.parent.name}/{document.name}:{text.count(chr(10), 0, at) + 1}"


def _tables(text: str, document: Path) -> tuple[str, list[Wrong]]:
    lines, wrong, out = text.split("\n"), [], []
    for start, stop in _blocks(lines):
        mark = next((line for line in reversed(lines[:start]) if line.strip()), "")
        found, where = MARK.fullmatch(mark), f"{document.parent.name}/{document.name}:{start + 1}"
        new = lines[start:stop]
        if not found:
            wrong.append(Wrong(where, "this table does not say where its numbers are from (<!-- check: ... -->)"))
        else:
            try:
                made = _made(found[1], document.parent)
            except ValueError as error:
                wrong.append(Wrong(where, str(error)))
                made = None
            if made is not None:
                new = markdown(made)
                wrong += [Wrong(where, one) for one in _differences(lines[start:stop], new)]
        out.append((start, stop, new))
    where = f"{document.parent.name}/{document.name}"
    wrong += [Wrong(f"{where}:{i + 1}", "no table stands below this comment") for i in _lonely(lines)]
    for start, stop, new in reversed(out):
        lines[start:stop] = new
    return "\n".join(lines), wrong


def _lonely(lines: Sequence[str]) -> Iterator[int]:
    """Places of comments that no table follows."""
    for i, line in enumerate(lines):
        below = next((other for other in lines[i + 1 :] if other.strip()), "")
        if MARK.fullmatch(line) and not below.startswith("|"):
            yield i


def _blocks(lines: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(first line, line after the last) of each table, code left out."""
    start, code = None, False
    for i, line in enumerate([*lines, ""]):
        code ^= line.startswith("```")
        inside = line.startswith("|") and not code
        if inside and start is None:
            start = i
        if not inside and start is not None:
            yield start, i
            start = None


def _differences(old: Sequence[str], new: Sequence[str]) -> list[str]:
    if len(old) != len(new):
        return [f"it has {len(old) - 2} rows, the result file {len(new) - 2}"]
    return [f"{a}\n    is by the result file\n    {b}" for a, b in zip(old, new, strict=True) if a != b]


def markdown(table: Table) -> list[str]:
    """The lines of a table, head first."""
    head, *rows = table
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _made(said: str, folder: Path) -> Table | None:
    """The table that a comment asks for; None where there is nothing to hold it against."""
    first, *columns = [part.strip() for part in said.split(" ; ")]
    kind, _, rest = first.partition(" ")
    if kind in ("record", "words"):
        if kind == "record" and not columns:
            raise ValueError("check: record needs a reason: <!-- check: record ; the runs were not kept -->")
        return None
    if kind == "copy":
        file, _, number = rest.partition(" ")
        return _copied(_read(folder / file), int(number or 1))
    makers = {"summary": _summary, "target": _target, "methods": _methods, "rows": _rows}
    if kind not in makers:
        raise ValueError(f"check: {kind} is unknown. Possible: {', '.join(makers)}, copy, record, words.")
    pairs = [(head.strip(), of.strip()) for head, arrow, of in (c.partition("<-") for c in columns) if arrow]
    return makers[kind](_read(folder / rest), pairs)


def _copied(text: str, number: int) -> Table:
    lines = text.split("\n")
    start, stop = [*_blocks(lines)][number - 1]
    rows = [tuple(cell.strip() for cell in line.strip().strip("|").split(" | ")) for line in lines[start:stop]]
    return [rows[0], *rows[2:]]


def _summary(facts: Mapping[str, Any], _: Any) -> Table:
    methods = facts["methods"]
    names = list(next(iter(methods.values()))["mean"])
    table: Table = [("runs", "seeds", "state", *names)]
    for label, own in methods.items():
        cells = (_cell(own, name, DIGITS.get(name, 4)) for name in names)
        table.append((label, str(len(own["runs"])), _state(own["runs"]), *cells))
    return table


def _state(runs: Sequence[Mapping[str, Any]]) -> str:
    complete = sum(run["state"] == "complete" for run in runs)
    return "complete" if runs and complete == len(runs) else f"{complete} of {len(runs)} complete"


def _cell(own: Mapping[str, Any], name: str, digits: int) -> str:
    """Mean ± sample standard deviation over the runs that have the number, made anew from the runs."""
    found = [run[name] for run in own["runs"] if run.get(name) is not None]
    if not found:
        return "-"
    spread = f"{stdev(found):.{digits}f}" if len(found) > 1 else ""
    shown = spread and (float(spread) or digits == 4)
    return f"{mean(found):.{digits}f}" + (f" ± {spread}" if shown else "")


def _target(facts: Mapping[str, Any], _: Any) -> Table:
    if "target" not in facts:
        raise ValueError("the result file has no target: spryfl report FOLDER --target 0.8")
    table: Table = [("runs", f"to {facts['target']['value']:g}", "reached", *ALONG)]
    for label, numbers in facts["target"]["methods"].items():
        for name, one in numbers.items():
            cells = (_said(one[what], digits) for what, digits in ALONG.items())
            table.append((label, name, f"{one['reached']} of {one['of']}", *cells))
    return table


def _said(one: Mapping[str, float | None], digits: int) -> str:
    if one["mean"] is None:
        return "-"
    return f"{one['mean']:.{digits}f}" + (f" ± {one['sd']:.{digits}f}" if one["sd"] else "")


def _methods(facts: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> Table:
    table: Table = [tuple(head for head, _ in columns)]
    for label, own in facts["methods"].items():
        table.append(tuple(_of_method(label, own, of) for _, of in columns))
    return table


def _of_method(label: str, own: Mapping[str, Any], of: str) -> str:
    if of in ("label", "seeds", "state"):
        return {"label": label, "seeds": str(len(own["runs"])), "state": _state(own["runs"])}[of]
    kind, _, rest = of.partition(" ")
    name, _, digits = rest.rpartition(" ")
    found = [run[name] for run in own["runs"] if run.get(name) is not None]
    if kind not in ("mean", "sd", "mean±sd", "each") or not digits.isdecimal():
        raise ValueError(f"{of!r} is none of label, seeds, state, mean, sd, mean±sd, each COLUMN DIGITS")
    if not found:
        return "-"
    if kind == "each":
        return ", ".join(f"{value:.{digits}f}" for value in found)
    spread = f"{stdev(found):.{digits}f}" if len(found) > 1 else "-"
    both = f"{mean(found):.{digits}f} ± {spread}"
    return {"mean": f"{mean(found):.{digits}f}", "sd": spread, "mean±sd": both}[kind]


def _rows(facts: Any, columns: Sequence[tuple[str, str]]) -> Table:
    table: Table = [tuple(head for head, _ in columns)]
    for row in facts["rows"] if isinstance(facts, Mapping) else facts:
        table.append(tuple(_of_row(row, of) for _, of in columns))
    return table


def _of_row(row: Mapping[str, Any], of: str) -> str:
    key, _, digits = of.rpartition(" ")
    name, number = (key, int(digits)) if key and digits.isdecimal() else (of, None)
    if name not in row:
        raise ValueError(f"a row of the result file has no {name!r}: it has {', '.join(row)}")
    value = row[name]
    if value is None:
        return "-"
    return str(value) if number is None else f"{value:.{number}f}"


def main(arguments: Sequence[str]) -> int:
    """Prints each mistake; 1 if there is one."""
    named = [Path(word) for word in arguments if not word.startswith("-")]
    wrong = [one for document in named or documents() for one in check(document, "--write" in arguments)]
    for where, what in wrong:
        print(f"{where}: {what}")
    print(f"{len(named or documents())} documents, {len(wrong)} mistakes")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
