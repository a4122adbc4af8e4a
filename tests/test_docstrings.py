"""The set made of docstrings: balanced, modules on one side, answers not to be read off, the same in every process."""

from __future__ import annotations

import gc
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from spryfl.data import docstrings
from spryfl.data.docstrings import PACKAGES, Row, paragraphs

Sides = tuple[tuple[Row, ...], tuple[Row, ...], str]


def digest(sides: Sides) -> str:
    return hashlib.sha256(repr(sides).encode()).hexdigest()


@pytest.fixture(scope="session")
def sides() -> Sides:
    return docstrings.build()


def test_sizes_and_balance(sides: Sides) -> None:
    train, test, _ = sides
    for rows, least in ((train, 400), (test, 150)):
        counts = Counter(row.label for row in rows)
        assert set(counts) == set(range(len(PACKAGES)))
        assert len(set(counts.values())) == 1
        assert min(counts.values()) >= least


def test_modules_and_texts_are_on_one_side(sides: Sides) -> None:
    train, test, _ = sides
    assert not {row.module for row in train} & {row.module for row in test}
    texts = [re.sub(r"\W+", " ", row.text.lower()) for row in train + test]
    assert len(texts) == len(set(texts))


def test_no_text_shares_half_of_its_runs_with_the_other_side(sides: Sides) -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z]+", text.lower())
        return set(zip(words, words[1:], words[2:], words[3:], strict=False))

    known = [runs(row.text) for row in sides[0]]
    where: dict[tuple[str, ...], set[int]] = {}
    for i, of_row in enumerate(known):
        for run in of_row:
            where.setdefault(run, set()).add(i)
    for row in sides[1]:
        own = runs(row.text)
        shared = Counter(i for run in own for i in where.get(run, ()))
        assert all(count < 0.5 * max(len(own), len(known[i])) for i, count in shared.items()), row.text


def test_no_name_of_a_package_or_of_its_own_module(sides: Sides) -> None:
    names = {"numpy", "np", "pd", "tf", "pytorch", "huggingface", "cpython", *PACKAGES}
    unmistakable = {"asyncio", "argparse", "unittest", "distutils", "urllib", "inductor", "polys", "groupby", "llama"}
    for row in sides[0] + sides[1]:
        words = set(re.findall(r"[a-z0-9]+", row.text.lower()))
        assert not words & names, row
        assert not words & unmistakable & set(re.split(r"[._]", row.module)), row
        assert "hugging face" not in row.text.lower()
        assert row.module not in row.text
        assert not re.search(r"[A-Za-z_]{3,}\.[A-Za-z_]{3,}", row.text), row  # no dotted path


def test_texts_are_prose(sides: Sides) -> None:
    for row in sides[0] + sides[1]:
        assert docstrings.SHORTEST <= len(row.text) <= docstrings.LONGEST
        assert ">>>" not in row.text
        assert "`" not in row.text
        assert "\n" not in row.text
        assert "http" not in row.text
        assert row.text[-1] in ".!?"


def test_groups_make_forty_clients(sides: Sides) -> None:
    train = sides[0]
    sizes = Counter(row.group for row in train)
    assert len(sizes) >= 40
    assert min(sizes.values()) >= 15
    assert len({(row.group, row.label) for row in train}) == len(sizes)  # a group lies in one package
    assert len({(row.group, row.module) for row in train}) == len({row.module for row in train})


def test_another_process_makes_the_same_rows_and_imports_none_of_the_packages(sides: Sides) -> None:
    code = (
        "import hashlib, sys; from spryfl.data import docstrings; sides = docstrings.build();"
        "print(hashlib.sha256(repr(sides).encode()).hexdigest(),"
        " [name for name in ('pandas', 'sympy', 'torch', 'transformers') if name in sys.modules])"
    )
    source = str(Path(docstrings.__file__).parents[2])
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": source}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split(maxsplit=1) == [digest(sides), "[]\n"]


def test_the_collector_is_on_again(sides: Sides) -> None:
    assert gc.isenabled()
    assert "torch" in sides[2]


def test_markup_and_paths_come_off() -> None:
    doc = (
        "Return the :class:`~torch.nn.Linear` of ``os.path.join`` that is *used* in a call to np.stack with a `value`."
    )
    assert list(paragraphs(doc)) == ["Return the Linear of join that is used in a call to stack with a value."]


PROSE = "This is the first sentence of a text that is long enough to be kept as it is."


@pytest.mark.parametrize(
    "block",
    [
        ">>> " + PROSE,
        "x : int\n    " + PROSE,
        ".. note::\n   " + PROSE,
        ":param x: " + PROSE,
        "- " + PROSE,
        "1. " + PROSE,
        PROSE + "\nSee https://example.org for more.",
        "    " + PROSE,
        PROSE.removesuffix("."),
        PROSE.lower(),
        "Too short for the set.",
        "Set the a_b and c_d of e_f or the g_h and i_j of k_l in the m_n as if it is o_p.",
        "Alpha beta gamma delta epsilon zeta eta theta iota kappa lambda omikron sigma phi.",
        PROSE.replace("first", "x = [1]"),
    ],
)
def test_what_is_no_prose_is_left_out(block: str) -> None:
    assert list(paragraphs(f"{PROSE} First.\n\n{block}\n\n{PROSE} Last.")) == [f"{PROSE} First.", f"{PROSE} Last."]


def test_headings_come_off_and_long_paragraphs_become_pieces() -> None:
    assert list(paragraphs(f"Notes\n-----\n{PROSE}")) == [PROSE]
    pieces = list(paragraphs(" ".join([PROSE] * 12)))
    assert len(pieces) == 3
    assert " ".join(pieces) == " ".join([PROSE] * 12)


def test_groups_are_neighbours_by_name() -> None:
    counts = {"p.c": 20, "p.a": 20, "p.d": 40, "p.b": 15, "p.e": 5}
    rows = [Row(f"text {i}", 0, module, "") for module, count in counts.items() for i in range(count)]
    found = Counter(row.group for row in docstrings._grouped(rows))
    assert found == {"p.a to p.b": 35, "p.c to p.e": 65}  # p.e alone would be too small


def test_classes_are_balanced_by_the_scarcest(monkeypatch: pytest.MonkeyPatch) -> None:
    def pool(label: int, package: str, seen: set[docstrings.Run]) -> list[Row]:
        return [Row(f"text {i}", label, f"{package}.m{i // 3}", "") for i in range(25 + 10 * label)]

    monkeypatch.setattr(docstrings, "_pool", pool)
    monkeypatch.setattr(docstrings, "_users", lambda pools: {})
    monkeypatch.setattr(docstrings, "TRAIN_PER_CLASS", 30)
    monkeypatch.setattr(docstrings, "TEST_PER_CLASS", 10)
    train, test, _ = docstrings.build()
    assert Counter(row.label for row in train) == dict.fromkeys(range(5), 13)  # 25 less four modules of three
    assert Counter(row.label for row in test) == dict.fromkeys(range(5), 10)


def test_a_stripped_installation_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "_root", lambda package: tmp_path)
    with pytest.raises(ValueError, match="the installed pandas gives only 0 paragraphs"):
        docstrings.build()


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "PACKAGES", ("no_such_package_here",))
    with pytest.raises(ValueError, match="no_such_package_here is not installed"):
        docstrings.build()
