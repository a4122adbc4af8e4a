"""The experiment as a record: defaults, TOML there and back, changes, and one clear message for every mistake."""

from __future__ import annotations

import tomllib

import pytest

from spryfl import methods, options
from spryfl.adapters import ADAPTERS
from spryfl.config import Experiment, assignment, merge, nested, parse
from spryfl.methods import METHODS, Method
from spryfl.partition import PARTITIONS


def refused(given):
    """The message of a mistake: one line a mistake, nothing of pydantic's own words."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse(given)
    assert type(error.value) is ValueError
    said = str(error.value)
    assert "pydantic" not in said
    assert "validation error" not in said
    return said


class TestDefaults:
    def test_the_default_experiment(self):
        made = Experiment()
        assert (made.model.name, made.data.name, made.partition.clients, made.train.cohort) == (
            "minilm",
            "docstrings",
            40,
            8,
        )
        assert (made.method.name, made.method.head, made.method.estimator["directions"]) == ("spry", "shared", 1)
        assert made.partition.split == {"kind": "natural"}
        assert made.adapter["kind"] == "lora"
        assert made.adapter["r"] == 1
        assert made.name == "spry-docstrings"

    def test_a_named_method_is_its_row(self):
        made = parse({"method": "spry"})
        assert (made.method.head, made.method.estimator["directions"]) == ("shared", 1)

    def test_changes_without_a_name_change_the_default_method(self):
        made = parse({"method": {"head_lr": 2.0}})
        assert (made.method.name, made.method.head, made.method.head_lr) == ("spry", "shared", 2.0)

    def test_files_are_split_by_dirichlet_and_groups_naturally(self):
        assert parse({"data": {"name": "a.csv"}}).partition.split == {"kind": "dirichlet", "alpha": 1.0}
        assert parse({"data": {"name": "a.csv", "group": "user"}}).partition.split == {"kind": "natural"}

    def test_few_clients_make_a_small_cohort(self):
        assert parse({"partition": {"clients": 5}}).train.cohort == 5
        assert parse({"partition": {"clients": 500}}).train.cohort == 8

    def test_epochs_take_the_place_of_steps(self):
        assert parse({"train": {"epochs": 3}}).train.steps == 0
        assert parse({"train": {"steps": 3}}).train.epochs == 0

    def test_it_is_frozen(self):
        with pytest.raises(ValueError, match="frozen"):
            Experiment().seed = 3

    def test_names_make_folders(self):
        assert parse({"name": "a/b"}).name == "a-b"


class TestToml:
    @pytest.mark.parametrize("name", METHODS)
    def test_every_row_comes_back(self, name):
        made = parse({"method": name})
        again = parse(tomllib.loads(made.toml()))
        assert again.as_dict() == made.as_dict()
        assert again.toml() == made.toml()
        assert methods.build(again.method)._fields == methods.build(made.method)._fields

    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"train": {"steps": 4, "cohort": 2, "drop_clients": 0.25}, "partition": {"clients": 3}},
            {"data": {"name": "a.csv", "test": "b.csv"}},
            {"data": {"name": "a.csv", "test_share": 0.3, "text": "wörter", "group": "user"}},
            {"model": {"name": "a", "adapter": "runs/b/adapter"}},
            {"adapter": {"kind": "ia3", "targets": ["k", "v"], "feedforward": ["v"]}},
            {"adapter": {"kind": "lora", "layers": [0, 2]}, "partition": {"split": {"kind": "iid"}}},
            {"method": {"name": "spry", "estimator": {"distribution": "sphere"}, "schedule": "linear"}},
        ],
    )
    def test_an_experiment_comes_back_equal(self, given, tmp_path):
        made = parse(given)
        (tmp_path / "a.toml").write_text(made.toml(), encoding="utf-8")
        again = Experiment.load(tmp_path / "a.toml")
        assert again.as_dict() == made.as_dict()

    @pytest.mark.parametrize("kind", ADAPTERS)
    def test_every_adapter_is_resolved(self, kind):
        made = parse({"adapter": {"kind": kind}})
        assert made.adapter["kind"] == kind
        assert parse(tomllib.loads(made.toml())).adapter == made.adapter

    @pytest.mark.parametrize("kind", PARTITIONS)
    def test_every_partition_is_resolved(self, kind):
        assert parse({"partition": {"split": {"kind": kind}}}).partition.split["kind"] == kind

    def test_a_choice_may_be_given_by_its_kind_alone(self):
        made = parse({"adapter": "ia3", "partition": {"split": "iid"}, "method": {"server_optimizer": "sgd"}})
        assert (made.adapter["kind"], made.partition.split, made.method.server_optimizer["kind"]) == (
            "ia3",
            {"kind": "iid"},
            "sgd",
        )

    def test_a_file_and_changes(self, tmp_path):
        path = tmp_path / "a.toml"
        path.write_text('seed = 3\n[train]\nrounds = 5\n[method]\nname = "fedavg"\n', encoding="utf-8")
        made = Experiment.load(path, {"train": {"rounds": 7}, "method": {"name": "fedyogi"}})
        assert (made.seed, made.train.rounds, made.method.name) == (3, 7, "fedyogi")

    @pytest.mark.parametrize(
        ("raw", "said"),
        [
            (b"\xff\xfe", "is not UTF-8 .byte 0"),
            (b"seed = = 3", "is not valid TOML: .*line 1"),
        ],
    )
    def test_a_file_that_cannot_be_read(self, raw, said, tmp_path):
        (tmp_path / "a.toml").write_bytes(raw)
        with pytest.raises(ValueError, match=said):
            Experiment.load(tmp_path / "a.toml")

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match=r"nope\.toml cannot be read: No such file"):
            Experiment.load(tmp_path / "nope.toml")
        with pytest.raises(ValueError, match=r"cannot be read: .* Give the path"):
            Experiment.load(tmp_path)


class TestChanges:
    @pytest.mark.parametrize(
        ("text", "meant"),
        [
            ("seed=3", {"seed": 3}),
            ("train.rounds=10", {"train": {"rounds": 10}}),
            ("a.b.c=0.5", {"a": {"b": {"c": 0.5}}}),
            ("a.b=true", {"a": {"b": True}}),
            ('a.b=["x", "y"]', {"a": {"b": ["x", "y"]}}),
            ("a.b=some words", {"a": {"b": "some words"}}),
            ("a.b = c", {"a": {"b": "c"}}),
            ("a.b=", {"a": {"b": ""}}),
            ("a.b=c=d", {"a": {"b": "c=d"}}),
        ],
    )
    def test_an_assignment(self, text, meant):
        assert assignment(text) == meant

    @pytest.mark.parametrize("text", ["seed", "=3", ""])
    def test_what_is_no_assignment(self, text):
        with pytest.raises(ValueError, match=r"is not of the form a\.b=c"):
            assignment(text)

    def test_nested(self):
        assert nested("a", 1) == {"a": 1}
        assert nested("a.b", 1) == {"a": {"b": 1}}

    def test_merging_goes_deep(self):
        assert merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": 4}) == {"a": {"b": 1, "c": 3}, "d": 4}

    def test_merging_leaves_what_it_is_given(self):
        base = {"a": {"b": 1}}
        merge(base, {"a": {"b": 2}})
        assert base == {"a": {"b": 1}}

    @pytest.mark.parametrize("naming", ["kind", "name"])
    def test_another_kind_or_name_starts_anew(self, naming):
        base = {"x": {naming: "one", "r": 8}}
        assert merge(base, {"x": {naming: "two"}}) == {"x": {naming: "two"}}
        assert merge(base, {"x": {naming: "one", "s": 1}}) == {"x": {naming: "one", "r": 8, "s": 1}}

    def test_other_data_keep_their_settings(self):
        base = {"data": {"name": "a.csv", "max_length": 64}}
        assert merge(base, {"data": {"name": "b.csv"}}) == {"data": {"name": "b.csv", "max_length": 64}}

    def test_a_choice_by_its_name_takes_changes(self):
        base = {"method": "fedavg", "adapter": "ia3"}
        assert merge(base, {"method": {"head_lr": 2.0}})["method"] == {"name": "fedavg", "head_lr": 2.0}
        assert merge(base, {"adapter": {"kind": "lora", "r": 2}})["adapter"] == {"kind": "lora", "r": 2}
        assert merge(base, {"method": "spry"})["method"] == "spry"

    def test_another_estimator_starts_from_its_own_defaults(self):
        made = parse({"method": {"name": "spry", "estimator": {"kind": "backprop"}}})
        assert made.method.estimator == {"kind": "backprop", "checkpoint": False}

    def test_an_option_keeps_the_others_of_the_row(self):
        made = parse({"method": {"name": "fedyogi", "server_optimizer": {"lr": 0.5}}})
        assert made.method.server_optimizer["kind"] == "yogi"
        assert made.method.server_optimizer["lr"] == 0.5


class TestMethod:
    def test_by_name_record_or_mapping(self):
        row = parse({"method": "fedavg"}).as_dict()
        assert parse({"method": {"name": "fedavg"}}).as_dict() == row
        assert parse({"method": METHODS["fedavg"]}).as_dict() == row

    def test_a_record_of_ones_own(self):
        mine = Method("mine", estimator={"kind": "forward", "directions": 8}, server_optimizer={"kind": "adam"})
        made = parse({"method": mine})
        assert made.name == "mine-docstrings"
        assert made.method.estimator["directions"] == 8
        assert made.method.estimator["distribution"] == "gaussian"
        assert parse(tomllib.loads(made.toml())).as_dict() == made.as_dict()

    def test_a_record_with_a_builder_of_ones_own(self):
        build = METHODS["fedavg"].local_optimizer["kind"]
        from spryfl.optimizers import OPTIMIZERS

        mine = Method("mine", local_optimizer={"kind": OPTIMIZERS[build], "lr": 0.1})
        made = parse({"method": mine})
        assert made.method.local_optimizer["kind"] is OPTIMIZERS[build]
        assert 'kind = "spryfl.optimizers.adamw"' in made.toml()

    def test_functions_that_make_rows(self):
        assert methods.spry(directions=8, head="exact").estimator["directions"] == 8
        assert methods.fedavg(schedule="linear").schedule == "linear"
        with pytest.raises(ValueError, match="unknown"):
            methods.named("fedprox")

    def test_a_record_is_checked_too(self):
        assert "directions = 0" in refused({"method": methods.spry(directions=0)})
        assert "head" in refused({"method": methods.spry(head="none")})


# what is given -> what the message must say: what was given, what is possible, what to do
MISTAKES = [
    ({"sead": 1}, ["unknown key sead", "did you mean seed?", "Possible: schema, name, seed"]),
    ({"train": {"round": 1}}, ["unknown key train.round", "did you mean rounds?", "Possible: rounds, cohort"]),
    ({"data": {"txt": "a"}}, ["unknown key data.txt", "did you mean text?"]),
    ({"model": {"zzz": "a"}}, ["unknown key model.zzz.", "Possible: name, revision"]),
    ({"partition": {"splits": {}}}, ["unknown key partition.splits", "did you mean split?"]),
    (
        {"partition": {"split": {"kind": "dirichlet", "alpa": 1}}},
        ["partition.split (dirichlet).alpa", "did you mean alpha?"],
    ),
    ({"partition": {"split": {"kind": "iid", "alpha": 1}}}, ["unknown key partition.split (iid).alpha"]),
    ({"partition": {"split": {"kind": "dirichle"}}}, ['"dirichle" is unknown', "did you mean dirichlet?", "natural"]),
    ({"partition": {"split": {"alpha": 1.0}}}, ["partition.split.kind is missing", "Possible: iid"]),
    ({"adapter": {"kind": "lorra"}}, ['adapter.kind = "lorra" is unknown', "did you mean lora?", "bitfit, head"]),
    ({"adapter": {"kind": "lora", "rank": 2}}, ["unknown key adapter (lora).rank", "Possible: r, alpha"]),
    ({"adapter": {"kind": "head", "r": 2}}, ["unknown key adapter (head).r", "takes no options"]),
    ({"adapter": {"kind": "lora", "r": 0}}, ["r = 0 of lora", "1 or more"]),
    ({"adapter": {"q": 2}}, ["unknown key adapter (lora).q"]),
    ({"task": {"words": ["a", "b"]}}, ["task.kind is missing"]),
    ({"adapter": {"kind": "lora", "r": "big"}}, ["adapter (lora).r = 'big'", "integer"]),
    ({"method": "sprry"}, ['method "sprry" is unknown', "did you mean spry?", "Possible: spry, spry_per_iteration"]),
    ({"method": {"name": "spry", "heads": "exact"}}, ["method.heads is unknown", "did you mean head?"]),
    ({"method": {"head": "exactly"}}, ['method.head = "exactly"', "Possible: shared, split, exact"]),
    ({"method": {"sharing": "x"}}, ['method.sharing = "x"', "federated, pooled, alone"]),
    ({"method": {"schedule": "x"}}, ['method.schedule = "x"', "constant"]),
    ({"method": {"head_lr": 0.0}}, ["method.head_lr = 0.0", "above 0"]),
    ({"method": {"head_lr": "big"}}, ["method.head_lr = 'big'", "number"]),
    ({"method": {"name": "spry", "head": 3}}, ["method.head = 3", "string"]),
    ({"method": {"estimator": {"kind": "forwards"}}}, ["method.estimator.kind", "did you mean forward?", "backprop"]),
    ({"method": {"estimator": {"direction": 2}}}, ["unknown key method.estimator (forward).direction", "directions?"]),
    ({"method": {"estimator": {"directions": 0}}}, ["directions = 0", "at least 1"]),
    ({"method": {"estimator": {"distribution": "cauchy"}}}, ["cauchy", "gaussian, rademacher, sphere"]),
    ({"method": {"estimator": {"exact_head": True}}}, ["exact_head", "unknown"]),
    ({"method": {"estimator": 3}}, ["method.estimator = 3", "kind"]),
    ({"method": {"name": "fedavg", "head": "exact"}}, ['head = "exact"', '"backprop"', 'head = "shared"']),
    ({"method": {"name": "head_only", "head": "split"}}, ['head = "split"', "nothing to train", 'head = "shared"']),
    (
        {"method": {"name": "fedavg", "aggregate": "krum"}, "train": {"cohort": 4}},
        ["train.cohort = 4", "krum"],
    ),
    ({"method": {"name": "spry", "aggregate": "krum"}}, ["krum", 'assignment "everyone"']),
    ({"method": 3}, ["method = 3", "spry, spry_per_iteration"]),
    ({"method": ["spry"]}, ["method = ['spry']"]),
    ({"method": {"name": 3}}, ['method "3" is unknown']),
    ({"partition": {"split": {"kind": "dirichlet", "alpha": 0.0}}}, ["alpha = 0.0", "above 0"]),
    ({"partition": {"clients": 0}}, ["partition.clients = 0", "greater than or equal to 1"]),
    ({"partition": {"clients": 4}, "train": {"cohort": 5}}, ["train.cohort = 5", "partition.clients = 4", "Lower"]),
    ({"train": {"steps": 2, "epochs": 1}}, ["train.epochs = 1 has no effect", "train.steps = 2", "Remove one"]),
    ({"method": {"name": "fedavg", "gate": 1.0}, "train": {"steps": 1}}, ["method.gate = 1.0", "train.steps = 1"]),
    ({"method": {"name": "fedsgd", "gate": 1.0}}, ["method.gate = 1.0", "train.steps = 1 local batch"]),
    ({"method": {"name": "fedavg", "guide": True}}, ["method.guide = True", "candidates = 1", "for forward, central"]),
    ({"method": {"name": "fedkseed", "head_lr": 2.0}}, ['seeds = "pool"', 'here exchange "scalars"', "head_lr = 2"]),
    (
        {"method": {"name": "fedkseed", "local_optimizer": {"momentum": 0.9}}},
        ['seeds = "pool"', 'local_optimizer "sgd" with momentum 0.9, server_optimizer "sgd",'],
    ),
    ({"compare": {}}, ["[compare] has no effect", "spryfl compare"]),
    ({"train": {"epochs": 0, "steps": 0}}, ["train.epochs = 0 and train.steps = 0", "Set one of them"]),
    ({"train": {"rounds": 0}}, ["train.rounds = 0", "greater than or equal to 1"]),
    ({"train": {"rounds": "many"}}, ["train.rounds = 'many'", "valid integer"]),
    ({"train": {"drop_clients": 1.0}}, ["train.drop_clients = 1.0", "less than 1"]),
    ({"train": 3}, ["train = 3", "[train]", "rounds"]),
    ({"seed": -1}, ["seed = -1"]),
    ({"seed": 1.5}, ["seed = 1.5"]),
    ({"schema": 2}, ["schema = 2", "reads schema 1"]),
    ({"device": 3}, ["device = 3"]),
    ({"data": {"name": "a.csv", "test": "b.csv", "test_share": 0.3}}, ["test_share", "data.test", "Remove one"]),
    ({"data": {"max_length": 1}}, ["data.max_length = 1"]),
    ({"model": {"attention": "fast"}}, ["model.attention = 'fast'", "'eager'"]),
    ({"model": {"name": "minilm", "adapter": "a"}, "adapter": {"kind": "ia3"}}, ["no effect with model.adapter"]),
    ({"adapter": 3}, ["adapter = 3", "kind"]),
    ({"train": {"rounds": True}}, ["train.rounds = True", "valid integer", "written as 3"]),
    ({"train": {"rounds": "10"}}, ["train.rounds = '10'", "valid integer", "written as 3"]),
    ({"train": {"rounds": 10.0}}, ["train.rounds = 10.0", "valid integer"]),
    ({"train": {"drop_clients": False}}, ["train.drop_clients = False", "valid number", "written as 0.5"]),
    ({"train": {"drop_clients": "0.5"}}, ["train.drop_clients = '0.5'", "valid number"]),
    ({"train": {"dropout": 1}}, ["train.dropout = 1", "valid boolean", "written as true or false"]),
    ({"train": {"dropout": "True"}}, ["train.dropout = 'True'", "valid boolean", "written as true or false"]),
    ({"seed": True}, ["seed = True", "valid integer"]),
    ({"data": {"text": 3}}, ["data.text = 3", "valid string", 'written as "a text"']),
    ({"partition": {"clients": "4"}}, ["partition.clients = '4'", "valid integer"]),
    ({"partition": {"split": {"kind": "dirichlet", "alpha": True}}}, ["(dirichlet).alpha = True", "valid number"]),
    ({"adapter": {"kind": "lora", "r": True}}, ["adapter (lora).r = True", "valid integer"]),
    ({"adapter": {"kind": "lora", "layers": [0, "1"]}}, ["adapter (lora).layers.1 = '1'", "valid integer"]),
    ({"adapter": {"kind": "lora", "layers": 1}}, ["adapter (lora).layers = 1", "valid list"]),
    ({"adapter": {"kind": "ia3", "targets": "key"}}, ["adapter (ia3).targets = 'key'", "valid list"]),
    ({"method": {"head_lr": True}}, ["method.head_lr = True", "valid number"]),
    ({"method": {"estimator": {"directions": "4"}}}, ["(forward).directions = '4'", "valid integer"]),
    ({"method": {"assignment": {"rotate": 1}}}, ["method.assignment (cyclic).rotate = 1", "valid boolean"]),
    (
        {"method": {"assignment": {"kind": "budget", "values": [8, True]}}},
        ["(budget).values.1 = True", "valid integer"],
    ),
    ({"method": {"assignment": "budget"}}, ["values = [] of budget", "how many values"]),
    ({"method": {"aggregate": {"kind": "krum", "keep": "2"}}}, ["method.aggregate (krum).keep = '2'", "integer"]),
]


@pytest.mark.parametrize(("given", "parts"), MISTAKES, ids=[str(given) for given, _ in MISTAKES])
def test_a_mistake_has_one_clear_message(given, parts):
    said = refused(given)
    for part in parts:
        assert part in said
    assert len(said.splitlines()) == 1


def test_a_whole_number_is_a_number_too():
    made = parse({"train": {"drop_clients": 0}, "method": {"head_lr": 2, "server_optimizer": {"lr": 1}}})
    assert (made.train.drop_clients, made.method.head_lr, made.method.server_optimizer["lr"]) == (0.0, 2.0, 1.0)
    assert all(isinstance(value, float) for value in (made.train.drop_clients, made.method.head_lr))


def test_options_of_the_usual_adapter_need_no_kind():
    assert parse({"adapter": {"r": 4}}).adapter == {**Experiment().adapter, "r": 4}
    assert parse({"adapter": {"kind": "lora_xs", "r": 4}}).adapter["kind"] == "lora_xs"


@pytest.mark.parametrize("values", [[8, 2], (8, 2)])
def test_a_list_of_options_comes_back(values):
    made = parse({"method": {"assignment": {"kind": "budget", "values": values}}})
    assert made.method.assignment == {"kind": "budget", "values": [8, 2]}
    assert parse(tomllib.loads(made.toml())).as_dict() == made.as_dict()


def test_several_mistakes_are_said_together():
    said = refused({"sead": 1, "train": {"rouns": 2, "cohort": 0}})
    assert len(said.splitlines()) == 3


@pytest.mark.parametrize(("text", "expected"), [
    ("6GB", 6e9), ("800 MB", 8e8), ("1.5GiB", 1.5 * 2**30), ("64kb", 64e3), ("3TB", 3e12), ("2g", 2e9),
])  # fmt: skip
def test_sizes(text, expected):
    assert options.nbytes(text) == expected


@pytest.mark.parametrize("text", ["", "6", "GB", "-2GB", "0MB", "1.2.3GB", "two", "6XB", "1e9B"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no size"):
        options.nbytes(text)
