"""The pages that show how to add something: their code is the examples' files, it runs, and it is enough."""

from __future__ import annotations

import ast
import csv
import functools
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch
from test_exchange import UNITS, equal, local, rounds, start
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import spryfl
from spryfl import (
    adapters,
    cli,
    client,
    journal,
    methods,
    models,
    noise,
    partition,
    server,
    tasks,
    testing,
    trace,
    wire,
)
from spryfl.data.examples import Examples
from spryfl.types import Directional

ROOT = Path(__file__).parents[1]
PAGES = {
    "add_an_estimator.md": "own_estimator.py",
    "add_an_adapter.md": "own_adapter.py",
    "add_a_task.md": "own_task.py",
    "add_an_engine.md": "own_engine.py",
}
ESTIMATORS = methods.REGISTRIES["estimator"]
REGISTRIES = {"own_estimator": ESTIMATORS, "own_adapter": adapters.ADAPTERS, "own_task": tasks.TASKS}
SMALL = {"train_rows": 48, "test_rows": 20}
FOUR = {"clients": 4, "split": {"kind": "iid"}}
SHORT = {"rounds": 2, "cohort": 2, "steps": 2, "eval_every": 1}


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(name):
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def recipe():
    """`recipe(name)`: the module that examples/name.py is."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def block_of(recipe, name, holding):
    """What the block of a page with this text in it defines, beside what the page's example does."""
    (code,) = [block for block in blocks(name) if holding in block and "__main__" not in block]
    made = dict(vars(recipe(Path(PAGES[name]).stem)))
    exec(compile(code, name, "exec"), made)
    return made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with train.csv and test.csv: two texts of the tiny model's words, and how alike they are, 0 or 5."""
    folder = tmp_path_factory.mktemp("pairs")
    words = ("good", "bad", "warm", "cold", "film", "town")
    rows = [[f"the {a} day", f"a {b}", 5 * (a == b)] for a in words for b in (*words, *[a] * 5)]
    for name, own in (("train", rows[: len(rows) * 3 // 4]), ("test", rows[len(rows) * 3 // 4 :])):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["sentence1", "sentence2", "score"], *own])
    return folder


@pytest.fixture
def choice(recipe, tiny, reviews, pairs):
    """`choice(name)`: the builder of an example, and `finetune`'s arguments that put it to use."""

    def of(name):
        module = recipe(name)
        common = {"partition": FOUR, "train": SHORT}
        if name == "own_estimator":
            chosen = {"estimator": {"kind": module.blockwise, "directions": 2}, "exchange": "scalars"}
            method = methods.named("fedavg", local_optimizer={"kind": "sgd", "lr": 0.1}, **chosen)
            narrow = {"kind": "lora", "layers": (2,)}
            return module.blockwise, str(reviews), {"method": method, "adapter": narrow, "reading": SMALL, **common}
        if name == "own_adapter":
            used = {"adapter": {"kind": module.layer_norms}, "method": "fedavg", "reading": SMALL}
            return module.layer_norms, str(reviews), {**used, **common}
        return module.similarity, str(pairs), {"task": {"kind": module.similarity}, "method": "fedavg", **common}

    return of


@pytest.mark.parametrize(("name", "example"), PAGES.items())
def test_a_page_shows_the_very_file(name, example):
    assert blocks(name)[0] == (ROOT / "examples" / example).read_text(encoding="utf-8")
    assert f"(../examples/{example})" in page(name)


@pytest.mark.parametrize("example", PAGES.values())
def test_an_example_uses_public_names_alone(example):
    for node in ast.walk(ast.parse((ROOT / "examples" / example).read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.attr] if isinstance(node, ast.Attribute) else []
        assert not [name for name in names if re.search(r"(^|\.)_", name)]


@pytest.mark.parametrize("name", REGISTRIES)
def test_a_builder_is_enough_from_python(name, choice, tiny, tmp_path):
    before = {what: dict(registry) for what, registry in REGISTRIES.items()}
    builder, data, settings = choice(name)
    history = spryfl.finetune(str(tiny), data, folder=tmp_path / "run", **settings)
    assert before == REGISTRIES
    assert builder not in [one for registry in REGISTRIES.values() for one in registry.values()]
    assert [record["round"] for record in history.records] == [0, 1, 2]
    assert history.records[-1]["test_loss"] != history.records[0]["test_loss"]
    assert f"{name}.{builder.__name__}" in (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", REGISTRIES)
def test_a_name_in_the_registry_is_enough_for_toml(name, choice, tiny, tmp_path, monkeypatch, capsys):
    builder, data, settings = choice(name)
    monkeypatch.setitem(REGISTRIES[name], "mine", builder)
    own = {"own_estimator": {"method": {"name": "fedavg", "exchange": "scalars", "estimator": {"kind": "mine"}}}}
    own |= {"own_adapter": {"adapter": {"kind": "mine"}}, "own_task": {"task": {"kind": "mine"}}}
    given = {"name": "run", "model": {"name": str(tiny)}, "data": {"name": data, **settings.get("reading", {})}}
    given |= {"method": "fedavg", "adapter": {"kind": "lora", "layers": [2]}, "partition": FOUR, "train": SHORT}
    (tmp_path / "it.toml").write_text(tomli_w.dumps({**given, **own[name]}), encoding="utf-8")
    run = tmp_path / "run"

    def spryfl_(*words):
        monkeypatch.setattr(sys, "argv", ["spryfl", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    spryfl_("run", "--config", tmp_path / "it.toml", "--out", tmp_path)
    assert journal.facts_of(journal.open_folder(run))["state"] == "complete"
    assert 'kind = "mine"' in (run / "config.toml").read_text(encoding="utf-8")
    said = spryfl_("predict", run, "the good day", *(["--pair", "a good"] if name == "own_task" else []))
    assert re.search(r"of 5\tthe good day" if name == "own_task" else r"(good|bad)=\d", said)


@pytest.mark.parametrize("name", REGISTRIES)
def test_a_wrong_option_of_ones_own_builder_is_a_value_error(name, choice, tiny):
    _, data, settings = choice(name)
    section = {"own_estimator": "method", "own_adapter": "adapter", "own_task": "task"}[name]
    given = settings[section]
    wrong = replace(given, estimator={**given.estimator, "k": 1}) if section == "method" else {**given, "k": 1}
    with pytest.raises(ValueError, match=r"unexpected keyword argument 'k'.*It takes \("):
        spryfl.finetune(str(tiny), data, **{**settings, section: wrong})


def test_examples_run_as_they_stand(recipe, tiny, reviews, pairs, monkeypatch, capsys):
    monkeypatch.setattr(testing, "check_estimator", lambda *a, **k: None)  # checked below
    recipe("own_estimator").main(str(tiny), str(reviews))
    recipe("own_adapter").main(str(tiny), str(reviews))
    recipe("own_task").main(str(tiny), str(pairs))
    said = capsys.readouterr().out
    assert "bytes_up" in said
    assert "units" in said
    assert "pearson" in said


# The estimator


def test_the_estimators_test_on_the_page(recipe):
    block_of(recipe, "add_an_estimator.md", "def test_blockwise")["test_blockwise"]()


@pytest.mark.parametrize("directions", [1, 12])
def test_the_estimator_is_what_it_claims(recipe, directions):
    own = recipe("own_estimator")
    claim = lambda gradient: own.variance(directions, gradient)  # noqa: E731
    testing.check_estimator(own.blockwise(directions), seeds=100, variance=claim)
    if directions == 1:
        with pytest.raises(AssertionError, match="what is claimed"):
            testing.check_estimator(own.blockwise(1), seeds=100, variance=lambda gradient: 2 * claim(gradient))


def with_own_seeds(recipe):
    """The example with seeds that do not follow the convention."""

    def builder(directions=2):
        inner = recipe("own_estimator").blockwise(directions)

        def estimate(loss_fn, params, batch, seed):
            return inner(loss_fn, params, batch, noise.child_seed(seed, "mine"))

        return estimate

    return builder


@pytest.mark.parametrize("follow", [True, False])
def test_scalars_end_in_the_bits_of_values_and_odd_seeds_travel(recipe, follow):
    builder = recipe("own_estimator").blockwise if follow else with_own_seeds(recipe)
    by = methods.Method("m", {"kind": builder, "directions": 2}, local_optimizer={"kind": "sgd", "lr": 0.05})
    values, scalars = (rounds(replace(by, exchange=kind)) for kind in ("weights", "scalars"))
    assert all(equal(one[0].params, two[0].params) for one, two in zip(values, scalars, strict=True))
    told = scalars[0][1][0]
    made = client.run(told, methods.build(replace(by, exchange="scalars")), local(told.client)).trace
    assert len(made.scalars) == 3 * 2 * 4  # steps, directions, tensors
    assert len(made.seeds) == (0 if follow else len(made.scalars))
    assert made.seeds.element_size() == 8


def test_odd_seeds_cost_eight_bytes_each(recipe):
    sizes = []
    for builder in (recipe("own_estimator").blockwise, with_own_seeds(recipe)):
        built = methods.build(methods.Method("m", {"kind": builder, "directions": 2}, exchange="scalars"))
        told = server.begin(server.init(start(), built, 1), UNITS, [0], built, seed=3)[0]
        update = client.run(told, built, local(0))
        sizes.append(len(wire.encode(update)))
    assert sizes[1] - sizes[0] == pytest.approx(8 * len(update.trace.scalars), abs=12)  # and a digit in the header


# A law of directions of one's own


@pytest.fixture
def sparse(recipe, monkeypatch):
    """The page's own law, in `noise.DISTRIBUTIONS` for one test."""
    before = trace.fingerprint()
    monkeypatch.setattr(noise, "DISTRIBUTIONS", dict(noise.DISTRIBUTIONS))
    block_of(recipe, "add_an_estimator.md", "DISTRIBUTIONS[")
    assert "sparse" in noise.DISTRIBUTIONS
    return before


def test_the_law_has_the_moments_that_the_page_says(sparse):
    drawn = noise.stack(list(range(4000)), {"w": torch.empty(5)}, "sparse")["w"].double()
    second = drawn.T @ drawn / len(drawn)
    assert torch.allclose(second, torch.eye(5, dtype=torch.float64), atol=4 * (7 / 4000) ** 0.5)
    assert sorted(set(drawn.flatten().round(decimals=4).tolist())) == [-2.8284, 0.0, 2.8284]
    claim = lambda gradient: (29 + 6) / 4 * sum(float(g.square().sum()) for g in gradient.values())  # noqa: E731
    estimator = ESTIMATORS["forward"](directions=4, distribution="sparse")
    testing.check_estimator(estimator, seeds=300, variance=claim)


def test_the_law_works_by_scalars_and_the_fingerprint_covers_it(sparse):
    assert trace.fingerprint() != sparse
    by = methods.Method("m", {"kind": "forward", "directions": 2, "distribution": "sparse"}, exchange="scalars")
    values, scalars = (rounds(replace(by, exchange=kind)) for kind in ("weights", "scalars"))
    assert all(equal(one[0].params, two[0].params) for one, two in zip(values, scalars, strict=True))
    told = scalars[0][1][0]._replace(fingerprint=sparse)  # a server without the law
    with pytest.raises(ValueError, match=r"noise\.DISTRIBUTIONS on both sides"):
        client.run(told, methods.build(by), local(told.client))


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (lambda e: e._replace(loss=torch.tensor(e.loss)), "plain floats"),
        (lambda e: e._replace(terms=tuple(t._replace(seed=-t.seed) for t in e.terms)), "63"),
        (lambda e: e._replace(terms=tuple(Directional(*t[:3], "mine") for t in e.terms)), r"noise\.DISTRIBUTIONS"),
        (lambda e: e.terms, "Give what the builder returns"),
    ],
)
def test_what_the_check_says_to_an_outsider(recipe, broken, law):
    inner = recipe("own_estimator").blockwise(2)
    with pytest.raises(AssertionError, match=law):
        testing.check_estimator(lambda *given: broken(inner(*given)), seeds=2)


# The adapter and the task


def classifier(tiny, labels=2):
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=labels)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    return model, tokenizer, dict(tokenizer(["the good day", "a film"], padding=True, return_tensors="pt"))


def test_the_adapters_test_on_the_page(recipe, tiny, tmp_path):
    model, _, batch = classifier(tiny)
    block_of(recipe, "add_an_adapter.md", "def test_layer_norms")["test_layer_norms"](model, batch, tmp_path)


def test_the_adapter_trains_the_norms_alone_and_its_folder_needs_no_file_of_ones_own(recipe, choice, tiny, tmp_path):
    _, data, settings = choice("own_adapter")
    history = spryfl.finetune(str(tiny), data, folder=tmp_path / "run", **settings)
    sizes = {unit.name: unit.size for unit in history.model.units if not unit.head}
    assert set(sizes.values()) == {64}  # weight and bias, 32 wide
    assert len(sizes) == 1 + 2 * 3  # the embeddings' norm, and two a layer
    opened = models.open_adapter(tmp_path / "run" / "adapter")
    assert all(torch.equal(opened.params[name], value) for name, value in history.params.items())


def test_the_tasks_test_on_the_page(recipe, tiny):
    model, tokenizer, _ = classifier(tiny, labels=1)
    examples = Examples(("the good day", "a"), ("a bad film in town", "film"), (0, 0), None, {"score": ("5", 1.5)})
    block_of(recipe, "add_a_task.md", "def test_similarity")["test_similarity"](model.eval(), tokenizer, examples)


def test_the_task_learns(recipe, choice, tiny):
    _, data, settings = choice("own_task")
    quick = methods.named("fedavg", local_optimizer={"kind": "adamw", "lr": 1e-2})
    longer = {**SHORT, "rounds": 4, "steps": 15}
    history = spryfl.finetune(str(tiny), data, **{**settings, "method": quick, "train": longer})
    assert history.records[-1]["squared_error"] < history.records[0]["squared_error"] / 2
    assert history.records[-1]["squared_error"] == pytest.approx(history.records[-1]["test_loss"], rel=1e-4)


# Builders elsewhere


def test_a_partition_of_ones_own():
    def dealt():
        return lambda labels, groups, clients, seed: tuple(tuple(range(i, len(labels), 2)) for i in range(2))

    made = spryfl.Experiment(partition={"clients": 2, "split": {"kind": dealt}})
    assert partition.build(made.partition.split)([0] * 6, None, 2, 0) == ((0, 2, 4), (1, 3, 5))
    assert "dealt" in made.toml()
    partial = functools.partial(partition.dirichlet, alpha=0.5)  # a builder without a name of its own
    made = spryfl.Experiment(partition={"clients": 2, "split": {"kind": partial}})
    assert "partial" in made.toml()
    assert partition.build(made.partition.split)([0, 1] * 9, None, 2, 0) == partition.dirichlet(0.5)(
        [0, 1] * 9, None, 2, 0
    )


def test_an_unknown_name_says_that_a_builder_will_do():
    with pytest.raises(ValueError, match=r'adapter = "lorra" is unknown.*or a builder of yours'):
        adapters.build({"kind": "lorra"})
    with pytest.raises(ValueError, match=r'adapter.kind = "own.norms" is unknown.*from Python a builder of yours'):
        spryfl.Experiment(adapter={"kind": "own.norms"})


# The page and the README on methods


def rows_of(text):
    """The names in the first column of the tables."""
    return {name for line in text.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", cell(line))}


def cell(line):
    return line.split("|")[1]


def test_the_page_has_every_row_and_its_paper():
    text = page("methods.md")
    table = text[text.index("## The rows") : text.index("## Where each is from")]
    assert rows_of(table) == set(methods.METHODS)
    numbers = {number for row in methods.METHODS.values() for number in re.findall(r"\d{4}\.\d{5}", row.paper)}
    assert not [number for number in numbers if number not in text]
    assert text.count("\n") <= 150


def test_the_rows_on_the_page_are_the_rows_choices():
    text = page("methods.md")
    lines = [line for line in text[text.index("## The rows") :].splitlines() if line.startswith("| `")]
    for line in lines[: len([x for x in lines if rows_of(x) & set(methods.METHODS)])]:
        _, names, gradient, who, up, local_, served, _ = (part.strip() for part in line.split("|"))
        for row in (methods.METHODS[name] for name in re.findall(r"`(\w+)`", names)):
            kind, k = row.estimator["kind"], row.estimator.get("directions", 1)
            words = {"forward": "forward mode", "central_difference": "central", "forward_difference": "forward diff"}
            assert words.get(kind, kind.replace("_", " ")[:9]) in gradient.replace("blocks", "block"), names
            assert f"K = {k}" in gradient or k == 1
            assert ("split" in who) == (row.assignment["kind"] == "cyclic")
            if row.sharing == "federated":
                assert (up == "scalars") == (row.exchange == "scalars")
                assert ("shared seeds" in gradient, "pool" in gradient) == tuple(
                    row.seeds["kind"] == one for one in ("shared", "pool")
                )
                plain = {"sgd": ("mean", "sum", "SGD"), "yogi": ("Yogi",), "adam": ("Adam",), "adamw": ("AdamW",)}
                assert any(word in served for word in plain[row.server_optimizer["kind"]]), names
            assert local_.lower() == row.local_optimizer["kind"], names


def test_the_page_names_every_option():
    text = page("methods.md")
    fields = set(methods.Method.__dataclass_fields__) - {"name", "estimator", "sharing", "summary", "paper"}
    wanted = fields | set(methods.REGISTRIES["assignment"]) | set(methods.REGISTRIES["aggregate"])
    wanted |= set(methods.REGISTRIES["seeds"]) | set(noise.DISTRIBUTIONS)
    assert not {word for word in wanted if f"`{word}`" not in text}


def test_the_readme_has_every_row_every_page_and_every_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert rows_of(text[text.index("## Methods") : text.index("## Comparing")]) == set(methods.METHODS)
    assert not [name for name in (*PAGES, "methods.md") if f"docs/{name})" not in text]
    tree = text[text.index("## The tree") :]
    source = Path(spryfl.__file__).parent
    files = {path.name for path in source.glob("*.py")} - {"__init__.py"}
    files |= {f"{path.parent.name}/" for path in source.glob("*/__init__.py")}
    assert not [name for name in files if f" {name}" not in tree]
    assert "not there yet" not in text
