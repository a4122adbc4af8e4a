"""A text classification set that is on every machine that can run this: which package does this paragraph come from?

The rows are paragraphs of English prose out of the docstrings of installed packages. The sources are parsed, never
imported, and nothing is fetched or stored. So that the answer cannot be read off, a paragraph is dropped when it says
the name of one of the packages, or the name of one of their modules that is not ordinary English (a word that the
prose of fewer than three of the packages uses); of a dotted path only its last part stays.

A module is wholly on the training side or wholly on the test side, and a paragraph that repeats half of another's
four-word runs is left out before the split. Modules that stand beside each other in the tree form a group of at
least `GROUP_SIZE` training rows: a natural client. The order of everything is that of SHA-256, so the set depends on
the installed versions and on nothing else.

Costs 5 to 10 seconds on one core: the files of a package are parsed in that order until it has enough.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

STANDARD_LIBRARY = "python"
PACKAGES = ("pandas", STANDARD_LIBRARY, "sympy", "torch", "transformers")  # the classes, in id order
TRAIN_PER_CLASS = 800
TEST_PER_CLASS = 200
PER_MODULE = 60  # rows of one module at most: no file may be a class of its own
GROUP_SIZE = 30  # training rows of a group at least
SHORTEST, LONGEST = 60, 400  # characters of a paragraph
ENOUGH = 1.5  # paragraphs parsed per paragraph used: those that say a name are dropped after the parsing

# Said in a paragraph, these give the answer away: names, aliases of imports, makers.
GIVEAWAYS_TEXT = """
    python cpython stdlib torch pytorch torchvision torchaudio sympy mpmath numpy np ndarray ndarrays scipy pandas pd
    matplotlib mpl plt pyplot transformers huggingface tensorflow tf jax jnp keras pyarrow pa sklearn datasets peft
    tokenizers safetensors accelerate ipython jupyter
"""
GIVEAWAYS = frozenset(GIVEAWAYS_TEXT.split())
SKIPPED_FOLDERS_TEXT = """
    test tests testing _testing site-packages dist-packages idlelib lib2to3 ensurepip turtledemo _vendor vendored
    externals lib-dynload __pycache__
"""
SKIPPED_FOLDERS = frozenset(SKIPPED_FOLDERS_TEXT.split())
MOST_BYTES = 400_000  # longer files are mostly generated
SPARSE = 5_000  # bytes of source per docstring: above it a file is not worth its parsing

HEADING = re.compile(r"^(?:[-=~^*+]{3,}|[A-Z][A-Za-z ]{2,30}\n[-=~^]{3,})\n?", re.MULTILINE)
NOT_PROSE = re.compile(
    r"^(?:>>>|\.\.|:|@|[-*+•|]\s|\+-|\(?\d+[.)]\s|#|```|Args|Returns?\b:?$|Raises|Yields?:|Example|Note:|Shape)|^\s"
    r"|https?:|www\.|\(c\)|[Cc]opyright|[Ll]icensed?\b|TODO|FIXME",
    re.MULTILINE,
)
ROLE = re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)(?:\s*<[^`]*>)?`")
CODE = re.compile(r"`+([^`]*)`+_*")
DOTTED = re.compile(r"(?<![\w.])\.?(?:[A-Za-z_]\w+\.)*\.?(?<=\.)(?=[A-Za-z_]\w+)")
EMPHASIS = re.compile(r"(?<!\w)\*{1,2}([^*\n]+?)\*{1,2}(?!\w)")
SYMBOLS = re.compile(
    r"[=<>{}\[\]|\\@#$^~*+`]|\(\)|->|--|[A-Za-z]\.[A-Za-z](?<!e\.g)(?<!i\.e)|\bself\b|\.(?:py|txt|json|so|h|cpp)\b"
)
WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
IDENTIFIER = re.compile(r"\w*_\w*|\w*[a-z][A-Z]\w*|\w*\d\w*")
SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
ENGLISH_TEXT = """
    a an the is are be of to in for that this it and or with as by on if not can will
"""
ENGLISH = frozenset(ENGLISH_TEXT.split())


Run = tuple[str, str, str, str]  # four words that follow each other


class Row(NamedTuple):
    """One paragraph, where it was found, and where it goes."""

    text: str
    label: int  # index into PACKAGES
    module: str  # dotted path of the file it stands in
    group: str  # neighbouring modules of one package


def build() -> tuple[tuple[Row, ...], tuple[Row, ...], str]:
    """Training rows, test rows, and a sentence that says which versions were read. Both sides hold balanced classes."""
    with _collector_paused():
        seen: set[Run] = set()
        pools = [list(_pool(label, package, seen)) for label, package in enumerate(PACKAGES)]
    users = _users(pools)
    sides = [_split([row for row in rows if not _says_a_name(row, users)]) for rows in pools]
    for package, (train, test) in zip(PACKAGES, sides, strict=True):
        if len(train) < TEST_PER_CLASS:  # the test side fills first
            raise ValueError(
                f"docstrings: the installed {package} gives only {len(train) + len(test)} paragraphs of prose.\n"
                "    Its source files may be missing (a stripped or zipped installation). Use data of your own:"
                " a .parquet, .csv or .jsonl file."
            )
    n_train = min(len(train) for train, _ in sides)
    train_rows = tuple(row for train, _ in sides for row in _grouped(train[:n_train]))
    return train_rows, tuple(row for _, test in sides for row in _grouped(test)), versions()


def versions() -> str:
    """The installations that were read, with their versions."""
    found = (
        f"Python {platform.python_version()}" if p == STANDARD_LIBRARY else f"{p} {importlib.metadata.version(p)}"
        for p in PACKAGES
    )
    return "paragraphs from the docstrings of " + ", ".join(found)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Syntax trees are many small objects without cycles: collecting garbage meanwhile doubles the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _order(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _root(package: str) -> Path:
    """The folder of a package's sources, found without importing it."""
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise ValueError(f"docstrings: {package} is not installed. Install spryfl with its dependencies.")
    return Path(spec.origin).parent


def _modules(package: str) -> list[tuple[str, Path]]:
    """(dotted module, file) of a package, in the order of SHA-256."""
    root = _root(package)
    found = []
    for file in root.rglob("*.py"):
        inside = file.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(inside.parts) and not inside.name.startswith(("test_", "conftest")):
            parts = [package, *inside.with_suffix("").parts]
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), file))
    return sorted(found, key=lambda item: _order(item[0]))


def _pool(label: int, package: str, seen: set[Run]) -> Iterator[Row]:
    """Paragraphs of a package, at most PER_MODULE of a module, until there are enough."""
    wanted = ENOUGH * (TRAIN_PER_CLASS + TEST_PER_CLASS)
    for module, file in _modules(package):
        if wanted <= 0:
            return
        texts = sorted({text for doc in _docstrings(file) for text in paragraphs(doc)}, key=_order)
        chosen = [text for text in texts[:PER_MODULE] if _is_new(text, seen)]
        wanted -= len(chosen)
        yield from (Row(text, label, module, "") for text in chosen)


def _is_new(text: str, seen: set[Run]) -> bool:
    """First come, first kept: a paragraph with half of its four-word runs seen before is a copy, of whatever class."""
    words = re.findall(r"[a-z]+", text.lower())
    runs = set(zip(words, words[1:], words[2:], words[3:], strict=False))
    new = 2 * len(runs & seen) < len(runs)
    seen |= runs
    return new


def _docstrings(file: Path) -> Iterator[str]:
    """Docstrings of the module, its classes, their methods and its functions."""
    source = file.read_bytes()
    if len(source) > min(MOST_BYTES, SPARSE * (source.count(b'"""') // 2)):
        return
    try:
        with warnings.catch_warnings():  # an invalid escape in somebody's source is not our user's business
            warnings.simplefilter("ignore")
            waiting: list[ast.AST] = [ast.parse(source)]
    except (SyntaxError, ValueError):  # templates and files for another version of Python
        return
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if doc := ast.get_docstring(node, clean=False):
                yield inspect.cleandoc(doc)
            if isinstance(node, ast.Module | ast.ClassDef):
                waiting.extend(node.body)


def paragraphs(doc: str) -> Iterator[str]:
    """The paragraphs of English prose in a docstring, without markup; tables, code and lists are left out."""
    for block in re.split(r"\n\s*\n", doc):
        block = HEADING.sub("", block).strip("\n")
        if NOT_PROSE.search(block):
            continue
        yield from filter(_is_prose, _pieces(_plain(block)))


def _plain(block: str) -> str:
    """Markup and paths off: :class:`~torch.nn.Linear` and ``nn.Linear`` become Linear."""
    text = EMPHASIS.sub(r"\1", CODE.sub(r"\1", ROLE.sub(r"\1", block)))
    text = " ".join(DOTTED.sub("", text).split())
    return re.sub(r"\s*:+$", ".", text)


def _pieces(text: str) -> list[str]:
    """Runs of whole sentences, each as long as LONGEST allows."""
    pieces = [""]
    for sentence in SENTENCE_END.split(text):
        if pieces[-1] and len(pieces[-1]) + len(sentence) >= LONGEST:
            pieces.append("")
        pieces[-1] = f"{pieces[-1]} {sentence}".strip()
    return pieces


def _is_prose(text: str) -> bool:
    """Ordinary sentences: capital, full stop, hardly any identifiers, a fair share of English's small words."""
    if not SHORTEST <= len(text) <= LONGEST or not text[0].isupper() or text[-1] not in ".!?" or SYMBOLS.search(text):
        return False
    words = [word.lower() for word in WORD.findall(text)]
    small = sum(word in ENGLISH for word in words)
    letters = sum(c.isalpha() or c in " ,.'" for c in text)
    return (
        len(words) >= 10
        and small >= 0.15 * len(words)
        and letters >= 0.93 * len(text)
        and sum(1 for _ in IDENTIFIER.finditer(text)) <= 0.06 * len(words)
        and text.isascii()
    )


def _words(text: str) -> set[str]:
    """The words of a text as names are compared: lower case, and the parts of hyphens and underscores too."""
    whole = set(re.findall(r"[a-z0-9_]+", text.lower()))
    return whole | {part for word in whole for part in word.split("_") if part}


def _users(pools: Iterable[list[Row]]) -> Counter[str]:
    """In how many packages' prose a word stands, for all parts of the modules' names."""
    modules = {part for rows in pools for row in rows for part in _words(row.module)}
    return Counter(
        word for rows in pools for word in modules.intersection(*[set().union(*(_words(r.text) for r in rows))])
    )


def _says_a_name(row: Row, modules: Mapping[str, int]) -> bool:
    """Whether a text gives its package away; `modules` counts, by part of a module's name, the packages that say it."""
    words, own = _words(row.text), _words(row.module)
    return (
        not GIVEAWAYS.isdisjoint(words)
        or any(word in modules and modules[word] < (3 if word in own else 2) for word in words)
        or "hugging face" in row.text.lower()
    )


def _split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(train, test): whole modules go to the test side until it is full, the others to the training side."""
    train: list[Row] = []
    test: list[Row] = []
    for _, of_module in groupby(rows, key=lambda row: row.module):  # the pool holds a module's rows together
        (test if len(test) < TEST_PER_CLASS else train).extend(of_module)
    return train[:TRAIN_PER_CLASS], test[:TEST_PER_CLASS]


def _grouped(rows: list[Row]) -> list[Row]:
    """Neighbouring modules, in the order of their names, joined until a group has GROUP_SIZE rows."""
    rows = sorted(rows, key=lambda row: (row.module, row.text))
    groups: list[list[Row]] = []
    for row in rows:
        full = groups and len(groups[-1]) >= GROUP_SIZE and groups[-1][-1].module != row.module
        if not groups or full:
            groups.append([])
        groups[-1].append(row)
    if len(groups) > 1 and len(groups[-1]) < GROUP_SIZE:
        groups[-2].extend(groups.pop())
    return [row._replace(group=_span(group)) for group in groups for row in group]


def _span(group: list[Row]) -> str:
    """The name of a group: its module, or the first and the last of them."""
    first, last = group[0].module, group[-1].module
    return first if first == last else f"{first} to {last}"
