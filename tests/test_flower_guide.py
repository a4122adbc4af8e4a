"""Every command of docs/flower.md, in the order of the page, on loopback: host and ports are all that is changed."""

from __future__ import annotations

import contextlib
import csv
import re
import shlex
import shutil
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import sentences

from spryfl.config import Experiment, parse
from spryfl.sites import folder, processes, typed

PAGE = Path(__file__).parents[1] / "docs" / "flower.md"
HOST, PORT = "superlink.example.org", 8443
APP = Path("fed")


class Block(NamedTuple):
    """Commands to type in one place."""

    where: str
    lines: list[str]


def blocks() -> list[Block]:
    found = []
    for text in re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        head, *lines = text.strip().splitlines()
        assert head.startswith("# "), f"a block that does not say where: {head}"
        found.append(Block(head.removeprefix("# "), lines))
    return found


def experiment() -> str:
    text, private = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    parse(tomllib.loads(textwrap.dedent(private)))  # a setting of its own, beside the file
    return text


def test_no_command_stands_outside_of_a_block():
    prose = re.sub(r"```.*?```", "", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.findall(r"^\s*\$? ?(?:spryfl|flwr|flower-\w+) .*$", prose, re.MULTILINE)


def test_the_page_says_what_init_says(tmp_path):
    """Apart from the paths of a site, and what is typed before there is a folder."""
    (tmp_path / "experiment.toml").write_text(experiment())
    made = typed.federation(APP, f"{HOST}:{PORT}", APP / "tls")
    walk = folder.walk(made, Experiment.load(tmp_path / "experiment.toml"))
    said = {typed.line(step.words) for step in walk if not step.where.startswith("site")}
    lines = {typed.line(shlex.split(line)) for block in blocks() for line in block.lines}
    assert said - lines == set()
    [words] = [shlex.split(line) for line in lines if line.startswith("flower-supernode")]
    site = typed.supernode(made._replace(tls=Path()), 0, typed.node(0, "site0.csv"))
    assert {w.removeprefix("./") for w in site} - {"--host", "127.0.0.1", "--port", "9094"} == set(words)


@pytest.fixture
def desk(tmp_path) -> Path:
    """The SuperLink's machine and two sites, a folder each, with what the page says lies there."""
    rows = [(text, label, f"site{i % 5 // 3}") for i, (text, label, _) in enumerate(sentences(100, 3))]
    here = tmp_path / "superlink"
    write(here / "reviews" / "train.csv", rows)
    write(here / "reviews" / "test.csv", sentences(40, 4))
    for i in range(2):
        write(tmp_path / f"site{i}" / f"site{i}.csv", [row for row in rows if row[2] == f"site{i}"])
    (here / "experiment.toml").write_text(experiment())
    return tmp_path


def write(path: Path, rows: list[tuple[str, str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label", "site"), *rows])


@pytest.mark.slow
@pytest.mark.flower
def test_every_command_of_the_page_runs(desk):
    port = processes.free_ports(4)
    seen: list[str] = []
    with contextlib.ExitStack() as started:

        def type_(line: str, where: Path, site: int | None = None) -> None:
            words = shlex.split(local(line, port))
            if words[0] == "export":
                assert words[1] == f"FLWR_HOME=$PWD/{APP / typed.HOME}"  # which is what `call` and `running` set
                return
            seen.append(words[0])
            if words[0] == "flower-supernode":
                words += ["--port", str(port + 2 + (site or 0))]  # on machines of their own each has the usual one
            if words[0].startswith("flower-"):
                at = int(words[words.index("--port") + 1])
                started.enter_context(processes.running(words, APP, where, processes.answers(at)))
                return
            said = processes.call(words, APP, where)
            assert words[:2] != ["flwr", "list"] or '"finished:completed"' in said, said

        for block in blocks():
            if block.where == "site 0":
                for i in range(2):
                    carry(desk, i)
                    for line in block.lines:
                        type_(re.sub(r"(node|site|partition-id=)0", rf"\g<1>{i}", line), desk / f"site{i}", i)
                # From here on the SuperLink's machine has one row of each class, as the page says.
                classes = [("a row", name, "nowhere") for name in ("bad", "good")]
                write(desk / "superlink" / "reviews" / "train.csv", classes)
                continue
            assert block.where.removeprefix("the SuperLink's machine, ") in ("terminal 1", "terminal 2")
            for line in block.lines:
                type_(line, desk / "superlink")
        processes.finished(typed.SITES, APP, desk / "superlink")  # the run that went on
    assert seen.count("flower-supernode") == seen.count("flower-superlink") == 2
    assert set(seen) == {"spryfl", "flwr", "flower-superlink", "flower-supernode"}


def local(line: str, port: int) -> str:
    """A command of the page on this machine."""
    line = line.replace(HOST, "localhost").replace("0.0.0.0", "127.0.0.1")
    return line.replace(str(PORT + 1), str(port + 1)).replace(str(PORT), str(port))


def carry(desk: Path, site: int) -> None:
    """What the page says is carried to a site."""
    here, there = desk / "superlink" / APP, desk / f"site{site}"
    for name in ("ca.crt", f"node{site}"):
        shutil.copy2(here / "tls" / name, there / name)
    shutil.copytree(here, there / APP, ignore=shutil.ignore_patterns("tls", ".flwr"))
