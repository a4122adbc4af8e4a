"""An experiment as one frozen record: TOML in and out, defaults filled in, every cross-check before any download.

The options of a choice (`[method.estimator]`, `[adapter]`, `[partition.split]`, ...) are its builder's arguments, so a
new builder needs nothing here. An unknown key and a setting without effect are errors. Costs nothing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self, get_type_hints

import tomli_w
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from spryfl import methods
from spryfl.adapters import ADAPTERS
from spryfl.backbone.store import check_streamed
from spryfl.classes import asked as asked_class
from spryfl.methods import METHODS, REGISTRIES, ClientClass, Method
from spryfl.options import STRICT, nearest, resolve, spelled, title, told, typed
from spryfl.partition import PARTITIONS
from spryfl.sections import DataSection, FlowerSection, ModelSection, PartitionSection, PrivacySection, TrainSection
from spryfl.tasks import TASKS, Task
from spryfl.tasks import build as build_task

SCHEMA = 1
_NAMING = ("kind", "name")  # a section that gives another one starts anew
_PROSE = ("summary", "paper")  # of a method: said of it, not chosen
_OWN_METHOD = ("estimator", "assignment", "local_optimizer", "server_optimizer")  # what one of one's own must choose
_DEFAULT_METHOD = "spry"
_DEFAULT_ADAPTER = "lora"
QUICKSTART = Path(__file__).with_name("quickstart.toml")  # what `spryfl run` does without arguments


class Experiment(BaseModel):
    """All that decides a run: `Experiment()` is the default one, `Experiment.load(path)` reads TOML.

    >>> Experiment(train={"rounds": 3}).train.rounds
    3
    """

    model_config = STRICT
    schema_: int = Field(SCHEMA, alias="schema")
    name: str = ""
    seed: int = Field(0, ge=0)
    device: str = "cpu"
    threads: int = Field(0, ge=0)  # 0 = PyTorch's choice
    model: ModelSection = ModelSection()
    task: dict[str, Any] = {"kind": "classification"}
    data: DataSection = DataSection()
    partition: PartitionSection = PartitionSection()
    adapter: dict[str, Any] = {"kind": _DEFAULT_ADAPTER}
    method: Method = Field(default_factory=lambda: _method({"name": _DEFAULT_METHOD}))
    train: TrainSection = TrainSection()
    flower: FlowerSection = FlowerSection()
    privacy: PrivacySection = PrivacySection()

    @field_validator("schema_")
    @classmethod
    def _known_schema(cls, value: int) -> int:
        if value != SCHEMA:
            raise ValueError(f"schema = {value}; this version reads schema {SCHEMA}. Use the version that wrote it.")
        return value

    @field_validator("method", mode="before")
    @classmethod
    def _full_method(cls, value: Any) -> Method:
        if isinstance(value, Method):
            return _resolved(value.__dict__)
        value = spelled("method", value)
        if not isinstance(value, Mapping):
            raise ValueError(f"method = {value!r}: give a section or a name, one of: {', '.join(METHODS)}.")
        return _method({"name": _DEFAULT_METHOD, **value})

    @field_validator("adapter", "task", mode="before")
    @classmethod
    def _full_choice(cls, value: Any, info: ValidationInfo) -> Any:
        value = spelled("adapter", value)
        usual = info.field_name == "adapter" and isinstance(value, Mapping) and value and "kind" not in value
        return {"kind": _DEFAULT_ADAPTER, **value} if usual else value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        adapter = {} if self.model.adapter else resolve("adapter", ADAPTERS, self.adapter)
        if self.model.adapter and "adapter" in self.model_fields_set and self.adapter:
            raise ValueError(
                f'[adapter] has no effect with model.adapter = "{self.model.adapter}": that one is loaded as it is. '
                f"Remove one of them."
            )
        task = resolve("task", TASKS, self.task)
        made = build_task(task)
        split = resolve("partition.split", PARTITIONS, self.partition.split or _usual_split(self.data, made))
        _consistent(self)
        _fitting(self, made, split)
        _private(self)
        train = _settled(self)
        if self.method.gate and train.steps == 1:
            raise ValueError(
                f"method.gate = {self.method.gate} needs a variance, and train.steps = 1 local batch a round has none. "
                f"Set train.steps to 2 or more."
            )
        methods.check_cohort(self.method, train.cohort)
        name = self.name or f"{self.method.name}-{Path(self.data.name).stem}"
        # The record is frozen for its users; here it is still being made.
        object.__setattr__(self, "task", task)
        object.__setattr__(self, "adapter", adapter)
        object.__setattr__(self, "partition", self.partition.model_copy(update={"split": split}))
        object.__setattr__(self, "train", train)
        object.__setattr__(self, "name", name.replace("/", "-"))
        return self

    @classmethod
    def load(cls, path: str | Path | None = None, changes: Mapping[str, Any] | None = None) -> Experiment:
        """Reads a TOML file (or nothing) with changes as a nested mapping; one ValueError says all that is wrong."""
        return parse(merge(read(path) if path else {}, changes or {}))

    def as_dict(self) -> dict[str, Any]:
        """Everything resolved, as plain values."""
        out = self.model_dump(by_alias=True, exclude={"method"})
        out["task"], out["adapter"] = _named(self.task), _named(self.adapter)
        out["partition"]["split"] = _named(self.partition.split)
        out["method"] = {key: _named(value) for key, value in asdict(self.method).items() if key not in _PROSE}
        out["method"].pop("classes")
        if self.method.classes:
            out["method"]["classes"] = [_said(one) for one in self.method.classes]
        return out

    def toml(self) -> str:
        """The resolved experiment; `spryfl run --config` runs it again as it is."""
        return tomli_w.dumps({key: value for key, value in self.as_dict().items() if value != {}})


def asked(experiment: Experiment) -> Experiment:
    """The experiment as it was asked for: memory of classes of clients in place of what was chosen for it."""
    classes = tuple(asked_class(one) for one in experiment.method.classes)
    return experiment.model_copy(update={"method": replace(experiment.method, classes=classes)})


def parse(given: Mapping[str, Any]) -> Experiment:
    """An experiment from nested plain values; every mistake in one ValueError, in the house's tone."""
    if "tune" in given:
        raise ValueError("[tune] has no effect on a single run. Remove it, or: spryfl tune --config FILE.")
    if "compare" in given:
        raise ValueError("[compare] has no effect on a single run. Remove it, or: spryfl compare --config FILE.")
    try:
        return Experiment(**given)
    except ValidationError as error:
        raise ValueError("\n".join(dict.fromkeys(told(one, Experiment) for one in error.errors()))) from None


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, `changes` over `base`. Another kind or method name starts anew: options of the old one go."""
    out = dict(base)
    for key, value in changes.items():
        old: Any = spelled(key, out.get(key)) if isinstance(value, Mapping) else None
        fits = isinstance(old, Mapping) and isinstance(value, Mapping)
        # Other data keep their settings: a length limit or a column may well suit them too.
        renamed = fits and key != "data" and any(old.get(k, value.get(k)) != value.get(k, old.get(k)) for k in _NAMING)
        out[key] = merge(old, value) if fits and not renamed else value
    return out


def assignment(text: str, option: str = "--set") -> dict[str, Any]:
    """`a.b=c` as {"a": {"b": c}}; c is TOML, or a text as it stands."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        shown = {"--set": ("a.b=c", "--set train.rounds=10")}.get(option, ("name=value", f"{option} word=plant"))
        raise ValueError(f'{option} "{text}" is not of the form {shown[0]}, for example {shown[1]}.')
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    return nested(key.strip(), parsed)


def nested(key: str, value: Any) -> dict[str, Any]:
    """`nested("a.b", c)` is {"a": {"b": c}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _named(value: Any) -> Any:
    """A choice as plain values: a builder of the user's own stands by its name."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    return {**value, "kind": f"{kind.__module__}.{title(kind)}"} if callable(kind) else value


def _said(one: ClientClass) -> dict[str, Any]:
    """A class of clients as plain values, without what it leaves open."""
    usual = vars(ClientClass(""))
    shown = {key: list(value) if isinstance(value, tuple) else _named(value) for key, value in vars(one).items()}
    return {key: value for key, value in shown.items() if vars(one)[key] != usual[key]}


def _method(given: Mapping[str, Any]) -> Method:
    """A row of the table with changes; a choice keeps the row's options unless it is given another kind.

    Another name than a row's is a method of one's own if it makes the main choices itself.
    """
    name = given["name"]
    if not isinstance(name, str) or (name not in METHODS and not set(_OWN_METHOD) <= set(given)):
        near = nearest(str(name), METHODS)
        raise ValueError(f'method "{name}" is unknown{near}. Possible: {", ".join(METHODS)}.')
    row = vars(METHODS.get(name) or Method(name))
    unknown = [key for key in given if key not in row or key in _PROSE]
    if unknown:
        keys = [key for key in row if key not in _PROSE]
        raise ValueError(f"method.{unknown[0]} is unknown{nearest(unknown[0], keys)}. Possible: {', '.join(keys)}.")
    choices = {what: _changed(row[what], spelled(what, given.get(what, {}))) for what in REGISTRIES}
    return _resolved({**row, **given, **choices})


def _changed(row: Mapping[str, Any], own: Any) -> Any:
    """A row's choice with one's own options, or one's own if it is of another kind."""
    same = isinstance(own, Mapping) and own.get("kind", row["kind"]) == row["kind"]
    return {**row, **own} if same else own


def _resolved(given: Mapping[str, Any]) -> Method:
    """A method whose choices have all their options, checked and built once."""
    choices: Any = {what: resolve(f"method.{what}", registry, given[what]) for what, registry in REGISTRIES.items()}
    types = get_type_hints(Method)
    plain = {key: value for key, value in given.items() if key not in (*REGISTRIES, "classes")}
    classes = _classes(given["classes"], {**plain, **choices})
    made = Method(**typed({key: (types[key], ...) for key in plain}, plain, "method"), **choices, classes=classes)
    methods.build(made)
    return made


def _classes(given: Any, method: Mapping[str, Any]) -> tuple[ClientClass, ...]:
    """Classes of clients, each with all options of its own choices; of one kind with the method's it keeps those."""
    if not isinstance(given, list | tuple):
        raise ValueError(f"method.classes = {given!r}: give a list of sections, [[method.classes]].")
    types, usual, out = get_type_hints(ClientClass), vars(ClientClass("")), []
    fields: Any = {key: (types[key], usual[key]) for key in usual if key not in REGISTRIES}
    for number, one in enumerate(given, 1):
        section = vars(one) if isinstance(one, ClientClass) else one
        if not isinstance(section, Mapping):
            raise ValueError(f"method.classes: {section!r} is no section. Give [[method.classes]] with a name.")
        where = f"method.classes ({section.get('name') or number})"
        plain = {key: value for key, value in section.items() if key not in REGISTRIES or key not in usual}
        own = {
            what: _own(what, section[what], method, where) for what in REGISTRIES if what in usual and what in section
        }
        out.append(ClientClass(**{**usual, **typed(fields, plain, where), **own}))
    return tuple(out)


def _own(what: str, given: Any, method: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A choice of one class of clients; empty where it is the method's."""
    changed = _changed(method[what], spelled(what, given))
    return resolve(f"{where}.{what}", REGISTRIES[what], changed) if given else {}


def _consistent(experiment: Experiment) -> None:
    """What two settings together must not be."""
    train, clients = experiment.train, experiment.partition.clients
    classes = experiment.method.classes
    methods.check_members(classes, clients)
    if experiment.model.stream or any(one.stream for one in classes):
        check_streamed(experiment.model.name)
    if experiment.model.stream and any(one.stream for one in classes):
        raise ValueError("method.classes: stream has no effect with model.stream: all clients stream. Remove one.")
    if train.cohort > clients and "cohort" in train.model_fields_set:
        raise ValueError(
            f"train.cohort = {train.cohort} clients a round, but partition.clients = {clients}. Lower the cohort."
        )
    there = len(methods.present(classes, clients))
    if train.cohort > there and "cohort" in train.model_fields_set:
        raise ValueError(
            f"train.cohort = {train.cohort} clients a round, but of {clients} clients {there} are not absent. "
            f"Lower the cohort."
        )
    if train.steps and train.epochs and "steps" in train.model_fields_set:
        raise ValueError(f"train.epochs = {train.epochs} has no effect with train.steps = {train.steps}. Remove one.")
    pieces = [("train.micro_batch", train.micro_batch)]
    pieces += [(f'micro_batch of class "{one.name}"', one.micro_batch) for one in classes]
    for what, rows in pieces:
        if rows > train.batch_size:
            raise ValueError(
                f"{what} = {rows} rows at once, of train.batch_size = {train.batch_size}. Lower it, or 0 for whole "
                f"batches."
            )
    if train.tries > 1 and not train.min_answers:
        raise ValueError(
            f"train.tries = {train.tries} has no effect without train.min_answers. Set that, or remove it."
        )
    if train.probe_every and not train.probe:
        raise ValueError(f"train.probe_every = {train.probe_every} has no effect without train.probe. Set that: rows.")
    if train.probe and experiment.method.sharing == "alone":
        raise ValueError('train.probe has no effect with method.sharing = "alone": there is no round\'s direction.')
    if train.keep_prefix and train.epochs == 1:
        raise ValueError("train.keep_prefix has no effect with one local epoch: no batch comes twice. Remove it.")
    if train.keep_prefix and train.dropout:
        raise ValueError("train.keep_prefix has no effect with train.dropout: the masks change. Remove one of them.")
    if not train.steps and not train.epochs:
        raise ValueError("train.epochs = 0 and train.steps = 0: no local training. Set one of them.")
    if experiment.method.assignment["kind"] == "nobody" and experiment.method.head == "split":
        raise ValueError('method.head = "split" with assignment "nobody" leaves nothing to train. Use head = "shared".')
    if experiment.data.test and experiment.data.test_share != DataSection.model_fields["test_share"].default:
        raise ValueError("data.test_share has no effect with data.test (a file of test rows). Remove one.")


def _private(experiment: Experiment) -> None:
    """What a promise of privacy asks of the rest: nothing may depend on single answers but their noisy sum."""
    method, train, given = experiment.method, experiment.train, experiment.privacy
    if not given.clip:
        if given != PrivacySection():
            raise ValueError("[privacy] has no effect without privacy.clip. Set it, or remove the section.")
        return
    for wrong, what in (
        (method.aggregate["kind"] != "mean", f'method.aggregate = "{method.aggregate["kind"]}": use "mean"'),
        (method.aggregate.get("weigh") == "variance", 'method.aggregate.weigh = "variance": answers weigh alike here'),
        (method.sharing != "federated", f'method.sharing = "{method.sharing}": use "federated"'),
        (method.gate > 0, f"method.gate = {method.gate}: it chooses by the answers; use 0"),
        (method.seeds["kind"] == "pool", 'method.seeds = "pool": use "own" or "shared"'),
        (
            method.exchange == "scalars" and (method.seeds["kind"] != "shared" or train.epochs),
            'method.exchange = "scalars" sends single answers on to others: use seeds "shared" with train.steps, where '
            'their sum is sent, or exchange "weights"',
        ),
        (train.probe > 0, "train.probe records what the rows' exact gradient is; use 0"),
        (train.rest > 0 or train.tries > 1, "train.rest and train.tries choose clients by what they did: use 0 and 1"),
    ):
        if wrong:
            raise ValueError(f"privacy.clip = {given.clip} promises that only the noisy sum counts, but {what}.")


def _usual_split(data: DataSection, task: Task) -> dict[str, Any]:
    """The partition where none is given: by groups, else unevenly by classes, else evenly."""
    if data.name == "docstrings" or data.group:
        return {"kind": "natural"}
    return {"kind": "dirichlet", "alpha": 1.0} if task.needs.label else {"kind": "iid"}


def _fitting(experiment: Experiment, task: Task, split: Mapping[str, Any]) -> None:
    """What a task's rows or head cannot give."""
    kind = experiment.task["kind"]
    if split["kind"] == "dirichlet" and not task.needs.label:
        raise ValueError(
            f'partition.split.kind = "dirichlet" has no effect with task "{kind}": its rows have no classes. '
            f'Use "iid", or "natural" with data.group.'
        )
    if experiment.data.label and not task.needs.label:
        raise ValueError(f'data.label has no effect with task "{kind}": its rows have no classes. Remove it.')
    if experiment.method.assignment["kind"] == "nobody" and not task.head:
        raise ValueError(
            f'method.assignment "nobody" trains the head alone, and task "{kind}" keeps the pretrained head: nothing '
            f"would be left to train. Use another assignment."
        )


def _settled(experiment: Experiment) -> TrainSection:
    """The rounds, with what follows from other settings: epochs take the place of steps, few clients make a cohort."""
    train, given = experiment.train, experiment.train.model_fields_set
    there = len(methods.present(experiment.method.classes, experiment.partition.clients))
    cohort = train.cohort if "cohort" in given else min(train.cohort, there)
    steps = 0 if train.epochs else train.steps
    if experiment.method.local_optimizer["kind"] == "none" and "steps" not in given:
        steps = 0 if train.epochs else 1  # a gradient a round, unless more batches are asked for
    return train.model_copy(update={"cohort": cohort, "steps": steps})


def read(path: str | Path) -> dict[str, Any]:
    """A TOML file as it stands, nothing checked."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"configuration {path} cannot be read: {reason}. Give the path of a TOML file.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"configuration {path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"configuration {path} is not valid TOML: {error}.") from None
