"""Where tables of a corpus lie: files, a folder, the hub, data sets in memory. Each way ends in {split: Table}.

"train" is always among the splits; the others could be the test, in the order of preference, and are read only when
their columns are asked for (CSV and JSON: when they are found). The network is used by `hub` alone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from spryfl.data import tables
from spryfl.data.tables import Table
from spryfl.hub import reachable

POSSIBLE = (
    f"docstrings, a file ({', '.join(tables.READERS)}), a folder with train and test files,"
    ' or a hub name such as "nyu-mll/glue:sst2"'
)
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "validation", "valid", "val", "dev", "eval", "validation_matched")
SHARD = re.compile(r"(.+?)(-\d+-of-\d+)?")
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?")


def is_local(name: str) -> bool:
    """Whether a name means something on this machine; only what cannot is looked for on the hub."""
    looks_like_a_file = Path(name).suffix.lower() in tables.READERS or name.startswith((".", "/", "~"))
    return Path(name).exists() or looks_like_a_file or not HUB_NAME.fullmatch(name)


def files(path: Path, test: str) -> dict[str, Table]:
    if not path.exists():
        raise ValueError(f"data: {path} does not exist.\n    Possible: {POSSIBLE}.")
    if not test:
        return {"train": tables.read(path)}
    if path.resolve() == Path(test).resolve():
        raise ValueError(
            f"data: {path} is given for training and for the test.\n"
            "    Name another test file, or none: then a share of the rows is split off."
        )
    return {"train": tables.read(path), "test": tables.read(Path(test))}


def folder(path: Path, test: str) -> dict[str, Table]:
    """Files by the split that their name says; a folder that `datasets` saved is read by it."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        import datasets  # heavy, and most runs do not need it

        saved = datasets.load_from_disk(str(path))
        named = saved.items() if hasattr(saved, "keys") else [("train", saved)]
        return splits({key: in_memory(value, f"{path}: {key}") for key, value in named}, test, str(path))
    found: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in tables.READERS and (match := SHARD.fullmatch(file.stem)):
            found.setdefault(match[1], []).append(file)
    for split in set(found).intersection(TRAIN_NAMES + TEST_NAMES):
        names = [file.name for file in found[split]]
        if len(names) > 1 and any(file.stem == split for file in found[split]):
            raise ValueError(f"data: {path} holds {' and '.join(names)}: which one? Remove one or name a file.")
    return splits(found, test, str(path))


def splits(found: dict[str, Any], test: str, where: str) -> dict[str, Any]:
    """The training split and every one that could be the test, in order of preference."""
    train = next((name for name in TRAIN_NAMES if name in found), None)
    wanted = [test] if test else [name for name in TEST_NAMES if name in found]
    if train is None or (test and test not in found):
        raise ValueError(
            f'data: {where} has no "{test if train else "train"}". There: {", ".join(found) or "nothing readable"}.\n'
            f"    A folder needs train.*, and test.*, validation.* or dev.* if no share of train is to be split off;"
            f" possible files: {', '.join(tables.READERS)}."
        )
    if test == train:
        raise ValueError(f'data: "{train}" of {where} is given for training and for the test. Name another split.')
    return {"train": _table(found[train])} | {name: _table(found[name]) for name in wanted}


def _table(found: Any) -> Table:
    return found if isinstance(found, Table) else tables.joined([tables.read(file) for file in found])


def hub(name: str, test: str, revision: str) -> dict[str, Table]:
    import datasets  # heavy, and most runs do not need it

    if not os.environ.get("HF_HUB_OFFLINE") and not reachable():
        raise ValueError(
            f'data: "{name}" is no file here, and the Hugging Face hub cannot be reached.\n'
            "    Check the network, use a local file or docstrings, or set HF_HUB_OFFLINE=1 for a set kept from before."
        )
    match = HUB_NAME.fullmatch(name)
    assert match is not None  # is_local saw to it
    try:
        found = datasets.load_dataset(match["name"], match["config"], revision=revision or None)
    except Exception as error:  # the hub's client raises its own, the network's and the system's errors
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f'data: "{name}" is no file here and could not be had from the Hugging Face hub: {reason}\n'
            f"    Check the name (owner/name:config) and the network, or use a local file or docstrings."
        ) from error
    return splits({key: in_memory(value, f"{name}: {key}") for key, value in found.items()}, test, name)


def in_memory(dataset: Any, source: str) -> Table:
    features = getattr(dataset, "features", None)
    if features is None or not hasattr(dataset, "with_format") or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"data: {source} is a {type(dataset).__name__}; a datasets.Dataset or DatasetDict is needed.\n"
            "    Make one of a list with datasets.Dataset.from_list, of a stream with datasets.Dataset.from_generator."
        )
    plain = dataset.with_format(None)
    classes = {name: tuple(f.names) for name, f in features.items() if getattr(f, "names", None)}
    return Table(tuple(features), lambda name: list(plain[name]), classes, source)
