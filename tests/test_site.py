"""The site's pages: all in the navigation, every relative link leads somewhere; what it shows of docstrings."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What git keeps; a checkout may hold runs/ and other folders beside it.
ABOVE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
BELOW = [path for folder in ("docs", "experiments", "benchmarks") for path in sorted((ROOT / folder).rglob("*.md"))]
PAGES = [*ABOVE, *BELOW]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def loaded(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(path: Path) -> set[str]:
    """What the headings of a page are called in a link, as GitHub and the site do."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if "docs/reference/" in str(target.resolve()):  # made when the site is built
            assert target.stem in {"index", "spryfl", *(f"spryfl.{name}" for name in __import__("spryfl").modules())}
            continue
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_navigation_has_every_page():
    told = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(told) == len(set(told))
    there = {str(path.relative_to(ROOT)).replace("README.md", "index.md") for path in PAGES}
    linked_below = {one for one in there if one.startswith("experiments/") and one != "experiments/index.md"}
    wanted = (there - linked_below) | {"docs/reference/index.md"}
    assert not wanted - set(told), "give each of these a line under nav in mkdocs.yml"
    assert not set(told) - wanted, "these are in the navigation and not there"


def test_everything_that_the_site_is_made_of_is_in_the_sdist():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    inside = set(told["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    site = loaded("build_site")
    assert {*site.WANTED, *site.SHOWN, "mkdocs.yml", "Makefile"} <= inside


def test_the_extras_are_those_that_the_readme_names():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for extra in set(told) - {"test"}:
        assert f"(extra `{extra}`)" in readme, extra


def test_links_to_folders_become_links_to_their_pages(tmp_path):
    site = loaded("build_site")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "README.md").write_text("x")
    (tmp_path / "a.md").write_text("[a](one) [b](one/README.md#x) [c](https://e.org/README.md) [d](two.md)")
    expected = "[a](one/index.md) [b](one/index.md#x) [c](https://e.org/README.md) [d](two.md)"
    assert site.linked(tmp_path / "a.md") == expected


def test_faults_are_found(tmp_path, monkeypatch):
    """A broken link, a missing place, something fetched from elsewhere, and a public name without its entry."""
    site = loaded("build_site")
    monkeypatch.setattr(site, "SITE", tmp_path)
    monkeypatch.setattr(site, "modules", lambda: {"spryfl.plain": importlib.import_module("spryfl.plain")})
    (tmp_path / "a.html").write_text(
        '<a href="b.html">x</a><a href="#here">x</a><a href="#there">x</a><p id="here">'
        '<script src="https://cdn.example.org/x.js"></script><h2 id="spryfl.plain.backward">'
    )
    assert site.faults() == [
        "a.html fetches https://cdn.example.org/x.js",
        "a.html: no file for b.html",
        "a.html: no place #there",
        "spryfl.plain.PlainLoss is not in the reference",
    ]


def test_docstrings_as_they_are_shown():
    pytest.importorskip("griffe")
    shown = loaded("docstrings").shown
    assert shown("One.\n\nArgs:\n    a, b: as c's\n        and d's.") == (
        "One.\n\nArgs:\n    a: as c's\n        and d's.\n    b: as c's\n        and d's."
    )
    assert shown("One.\n\n>>> f()\n2\n\nTwo.") == "One.\n\n```pycon\n>>> f()\n2\n```\n\nTwo."
    assert "```python\n    x = f()\n    ```" in shown("One.\n\nExample:\n    x = f()")


def test_a_field_is_explained_by_its_comment(tmp_path):
    griffe = pytest.importorskip("griffe")
    (tmp_path / "one.py").write_text(
        "class A:\n    size: int  # rows\n    name: str = ''\n    other: int = 3  # noqa: X\n"
    )
    fields = griffe.load("one", search_paths=[tmp_path])["A"].members
    explained = loaded("docstrings").comment
    assert {name: explained(field) for name, field in fields.items()} == {"size": "rows", "name": "", "other": ""}
