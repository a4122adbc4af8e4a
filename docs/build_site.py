"""Builds the documentation site into build/site, warnings as errors; fails where a public name is not in the reference.

    python docs/build_site.py

Pages are gathered under build/pages in the repository's own layout, README files as index pages, so that a relative
link works on the site as it works in the repository. The reference is made from `spryfl.modules()`: a page a module.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import spryfl

ROOT = Path(__file__).parents[1]
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"
WANTED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs", "experiments", "benchmarks")
SHOWN = ("examples", "tests", "src")  # sources that pages link to
KINDS = {".md", ".png", ".svg", ".py", ".toml", ".sh", ".json"}
OWN = {Path(__file__), Path(__file__).with_name("docstrings.py")}
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def public(module: ModuleType) -> dict[str, Any]:
    """What a module offers: its `__all__`, or what is defined in it and has no underscore."""
    names = getattr(module, "__all__", None)
    if names is None:
        own = lambda value: getattr(value, "__module__", None) == module.__name__  # noqa: E731
        names = [name for name, value in vars(module).items() if not name.startswith("_") and own(value)]
    return {name: getattr(module, name) for name in names}


def modules() -> dict[str, ModuleType]:
    """The public modules by their names."""
    return {name: importlib.import_module(name) for name in ("spryfl", *(f"spryfl.{m}" for m in spryfl.modules()))}


def home(module: str, name: str, value: Any) -> str:
    """Where a name is defined, which is how the reference finds it."""
    if inspect.isfunction(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{module}.{name}"


def reference(folder: Path) -> None:
    """Writes the reference's pages: an index, and a page a module with every public name of it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# Reference", "", "Made from the docstrings; a name that is missing here fails the build.", ""]
    seen: set[str] = set()
    for full, module in modules().items():
        text = [f"# {full}", "", "::: " + full, "    options:", "      show_root_heading: false", ""]
        names = public(module)
        for name, value in names.items():
            where = home(full, name, value)
            if where in seen or not (callable(value) or isinstance(value, dict)):
                continue
            seen.add(where)
            members = "      members: true\n" if inspect.isclass(value) else ""
            text += [f"::: {where}", "    options:", f"      heading: {full}.{name}", f"      toc_label: {name}"]
            text += [members] if members else [""]
        (folder / f"{full}.md").write_text("\n".join(text), encoding="utf-8")
        first = (inspect.getdoc(module) or "").split("\n")[0]
        lines.append(f"* [{full}]({full}.md): {first}")
    (folder / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def gather() -> None:
    """Copies the pages and what they show into build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for name in (*WANTED, *SHOWN):
        above = ROOT / name
        for path in sorted([above] if above.is_file() else above.rglob("*")):
            if path.is_file() and path.suffix in KINDS and path not in OWN and "__pycache__" not in path.parts:
                to = PAGES / named(path.relative_to(ROOT))
                to.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".md":
                    to.write_text(linked(path), encoding="utf-8")
                else:
                    shutil.copyfile(path, to)


def named(path: Path) -> Path:
    """A file's place on the site."""
    return path.with_name("index.md") if path.name == "README.md" else path


def linked(path: Path) -> str:
    """A page's text with its links to folders and to README files as the site has them."""

    def to(match: re.Match[str]) -> str:
        target = (path.parent / match[2]).resolve()
        if target.is_dir() and (target / "README.md").is_file():
            return f"{match[1]}{match[2].rstrip('/')}/index.md{match[3]}"
        return f"{match[1]}{re.sub(r'README.md$', 'index.md', match[2])}{match[3]}"

    return LINK.sub(to, path.read_text(encoding="utf-8"))


class Page(HTMLParser):
    """What a page has and asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []  # what a browser gets by itself
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.add(str(given["id"]))
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        if tag in ("script", "img", "iframe") and given.get("src"):
            self.fetched.append(str(given["src"]))
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.fetched.append(str(given.get("href")))


def faults() -> list[str]:
    """What is wrong with the built site: broken links, things fetched from elsewhere, missing public names."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in SITE.rglob("*.html")}
    found = []
    for path, page in pages.items():
        found += [f"{path.name} fetches {one}" for one in page.fetched if re.match(r"(https?:)?//", one)]
        for link in page.links:
            if re.match(r"(https?:)?//|mailto:", link) or path.name == "404.html":
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{path.relative_to(SITE)}: no file for {link}")
            elif anchor and target in pages and anchor not in pages[target].ids:
                found.append(f"{path.relative_to(SITE)}: no place {link}")
    ids = set().union(*(page.ids for page in pages.values()))
    for full, module in modules().items():
        for name, value in public(module).items():
            if (inspect.isfunction(value) or inspect.isclass(value)) and home(full, name, value) not in ids:
                found.append(f"{full}.{name} is not in the reference")
    return sorted(set(found))


def build() -> None:
    """The site by zensical; whatever it or the reader of docstrings has to say is an error."""
    words = [Path(sys.executable).with_name("zensical"), "build", "--clean", "--strict"]
    made = subprocess.run(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = [line for line in made.stdout.splitlines() if re.search(r"griffe: |Warning|Error|error", line)]
    if made.returncode or said:
        sys.exit("the site was not built:\n  " + "\n  ".join(said or made.stdout.splitlines()[-20:]))


def main() -> None:
    gather()
    reference(PAGES / "docs" / "reference")
    build()
    if wrong := faults():
        sys.exit("the site is not whole:\n  " + "\n  ".join(wrong))
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE / 'index.html'}")


if __name__ == "__main__":
    main()
