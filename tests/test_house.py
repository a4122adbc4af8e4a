"""The house keeps its shape: imports only go down, functions stay short, files say what they are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spryfl

SOURCE = Path(spryfl.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# From the bottom to the top. A file imports from lower ranks alone; what stands in one group may import each other.
RANKS: list[list[str]] = [
    ["types"],
    ["tree", "noise", "wire", "jvp", "hub", "registry"],
    ["data"],
    ["estimators", "assign", "optimizers", "aggregate", "privacy", "partition", "adapters", "tasks", "backbone"],
    ["classes", "seeds", "rules"],
    ["hooks", "choices", "trace", "options", "provenance", "firstbatch"],
    ["layout", "ledger", "methods", "sections"],
    ["loss", "costs", "opened", "named", "plain"],
    ["models", "config", "journal"],
    ["client", "server", "packing", "merging"],
    ["footprint", "figures"],
    ["train", "plan"],
    ["sizing"],
    ["engines", "testing", "probe"],
    ["job"],
    ["api", "report", "screen", "explain", "advice"],
    ["flower"],
    ["pictures", "page", "foretold", "track"],
    ["compare"],
    ["tune"],
    ["sites"],
    ["commands"],
    ["cli"],
]
# A folder is one place: files import each other downwards.
PACKAGES = (
    *("costs", "jvp", "backbone", "data", "estimators", "engines", "tasks", "adapters", "footprint"),
    *("flower", "sites", "commands", "page"),
)
HUGGING_FACE = {"transformers", "peft", "datasets", "tokenizers", "accelerate"}
MAY_USE = {
    "transformers": {"adapters", "layout", "opened", "models", "packing", "named"},
    "peft": {"adapters"},
    "datasets": {"data"},
    "matplotlib": {"pictures"},
    "jinja2": {"page"},
    "tensorboard": {"track"},
    "rich": {"commands", "screen"},
    "typer": {"commands"},
    "pydantic": {"config", "options", "sections"},
    "flwr": {"flower"},
    "optuna": {"tune"},
    "cryptography": {"sites"},
    "bitsandbytes": {"backbone"},
}


def place(path: Path) -> str:
    """The file's place in RANKS: its own name, or its folder's."""
    return _place(path.relative_to(SOURCE).with_suffix("").parts)


def _place(parts: tuple[str, ...]) -> str:
    """An engine that needs what is above the loop, as Flower's does, stands higher than its folder."""
    return "flower" if parts[0] == "engines" and parts[-1].startswith("flower") else parts[0]


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it, but for the sake of types."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def own(name: str) -> str | None:
    """The place of one of our own modules that an import names."""
    parts = tuple(name.split("."))
    return _place(parts[1:3]) if parts[0] == "spryfl" and len(parts) > 1 else None


RANK = {name: i for i, group in enumerate(RANKS) for name in group}


def modules() -> list[Path]:
    return [path for path in FILES if path != SOURCE / "__init__.py"]


def test_every_file_has_a_place():
    assert {place(path) for path in modules()} == set(RANK)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_only_go_down(path):
    here = place(path)
    for name in imports(path):
        there = own(name)
        if there in RANK and not (there == here and here in PACKAGES):
            assert RANK[there] < RANK[here], f"{path.name} (rank {RANK[here]}) imports {name} (rank {RANK[there]})"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_foreign_packages_stay_where_they_belong(path):
    for name in imports(path):
        allowed = MAY_USE.get(name.split(".")[0])
        assert allowed is None or place(path) in allowed, f"{path.name} imports {name}"


def test_the_report_reads_files_alone():
    used = {name.split(".")[0] for name in imports(SOURCE / "report.py")}
    assert not used & {"spryfl", "torch", "matplotlib"}


def test_pictures_are_made_from_what_the_report_read():
    used = imports(SOURCE / "pictures.py")
    assert {own(name) for name in used} - {None} == {"report"}
    assert "torch" not in {name.split(".")[0] for name in used}


@pytest.mark.parametrize("path", sorted((SOURCE / "page").glob("*.py")), ids=lambda p: p.name)
def test_the_page_is_made_from_what_the_report_read(path):
    used = imports(path)
    assert {own(name) for name in used} - {None} <= {"report", "page"}
    assert not {name.split(".")[0] for name in used} & {"torch", "matplotlib"}


def test_client_and_server_do_not_know_each_other():
    assert "client" not in {own(name) for name in imports(SOURCE / "server.py")}
    assert "server" not in {own(name) for name in imports(SOURCE / "client.py")}


def test_a_device_needs_torch_alone():
    """client, server, train and the mathematics import with nothing of Hugging Face, pydantic or a plotting library."""
    hidden = [*sorted(HUGGING_FACE), "pydantic", "matplotlib", "typer", "rich", "pyarrow", "tomli_w"]
    wanted = ["client", "server", "train", "estimators", "methods", "engines.simulate", "jvp", "testing"]
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden})); import importlib\n"
    code += f"[importlib.import_module('spryfl.' + name) for name in {wanted}]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def functions() -> list[tuple[str, int]]:
    """(name, lines of code without the docstring) of every function."""
    out = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                documented = ast.get_docstring(node) is not None
                start = node.body[0].end_lineno if documented else node.lineno
                lines = (node.end_lineno or 0) - (start or 0) + (1 if documented else 0) + (0 if documented else 1)
                out.append((f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}", lines))
    return out


def test_functions_are_short():
    """Half under ten lines, nine in ten under forty, none over sixty, the docstring not counted."""
    sizes = sorted(lines for _, lines in functions())
    offenders = [f"{name}: {lines} lines" for name, lines in functions() if lines > 60]
    assert not offenders, "\n".join(offenders)
    assert sizes[len(sizes) // 2] < 10
    assert sizes[len(sizes) * 9 // 10] < 40


def test_files_are_short_and_say_what_they_are():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, f"{path.name} is too long"
        assert ast.get_docstring(ast.parse(text)), f"{path.name} does not say what it is"


def test_nothing_asks_for_a_method_by_name():
    from spryfl.methods import METHODS

    names = set(METHODS) - {"head_only", "alone", "pooled"}  # these are also words of a setting
    for path in modules():
        if place(path) in ("methods", "config", "commands"):  # the table, the default experiment, help texts
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                strings = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                assert not strings & names, f"{path.name}:{node.lineno} compares with {strings & names}"


def test_no_function_has_the_name_of_its_module():
    for path in modules():
        if path.parent.name in PACKAGES:  # an estimator's file and its builder share the name that users type
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert path.stem not in names - {"train"}, path.name


def test_nobody_reads_or_moves_a_global_generator():
    """torch.manual_seed stands in one place, where the generator's state is forked around it."""
    for path in modules():
        text = path.read_text(encoding="utf-8")
        global_random = r"^import random$[\s\S]*\brandom\.(seed|shuffle|random|sample|choice|randrange)\("
        for word in (r"manual_seed\(", r"\bnp\.random", r"torch\.(rand|randn|randint|randperm)\(", global_random):
            if re.search(word, text, re.MULTILINE):
                assert (path.name, word) == ("hooks.py", r"manual_seed\("), f"{path.name}: {word}"
