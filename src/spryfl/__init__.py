"""Finetune language models across clients whose data stays private and whose memory is small.

    spryfl.finetune(...)      a model and a data set in, a history out
    spryfl.Experiment         all that decides a run, TOML in and out
    spryfl.Method             a federated method as a record of choices; spryfl.methods has the named ones
    spryfl.export(...)        a saved adapter in, a folder that transformers opens alone out
    spryfl.plain              the estimators in a training loop of one's own
    spryfl.jvp.jvp            the forward-mode engine alone

Importing this costs nothing: what needs torch or transformers is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spryfl.api import finetune
    from spryfl.config import Experiment
    from spryfl.merging import export
    from spryfl.methods import ClientClass, Method

# bitsandbytes, which peft imports where it is installed, warns of a kernel that nothing here would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["ClientClass", "Experiment", "Method", "export", "finetune"]

_HOME = {
    "finetune": "api",
    "Experiment": "config",
    "Method": "methods",
    "ClientClass": "methods",
    "export": "merging",
}
# Modules whose names are public: the reference is made of them, and a test reads their docstrings.
_MODULES = (
    *("adapters", "aggregate", "assign", "estimators", "jvp", "merging", "methods", "noise", "optimizers", "packing"),
    *("partition", "plain", "tasks", "testing", "types"),
)


def modules() -> tuple[str, ...]:
    """Names of the public modules beside `spryfl` itself."""
    return _MODULES


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"spryfl.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"spryfl.{name}")
    raise AttributeError(f"module 'spryfl' has no attribute {name!r}")
