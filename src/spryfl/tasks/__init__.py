"""Task types: what a model is asked, what it is trained on, how it is measured.

`TASKS` maps the names that users type to builders: options -> `Task`. To add one, write a file with a builder that
returns a `Task` and give the builder as `kind`, or name it here. Costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from spryfl import registry
from spryfl.data.columns import Needs
from spryfl.tasks.causal_lm import causal_lm
from spryfl.tasks.classification import classification
from spryfl.tasks.multiple_choice import multiple_choice
from spryfl.tasks.multirc import multirc
from spryfl.tasks.prompted import prompted, prompted_choice
from spryfl.tasks.question_answering import question_answering
from spryfl.tasks.record import AT, OF, TARGETS, Rows, Task, lengths
from spryfl.tasks.rows import by_length, collate, count, encode, inputs, parts, shuffled

TASKS: dict[str, Callable[..., Task]] = {
    "classification": classification,
    "prompted": prompted,
    "multiple_choice": multiple_choice,
    "prompted_choice": prompted_choice,
    "question_answering": question_answering,
    "multirc": multirc,
    "causal_lm": causal_lm,
}


def build(choice: Mapping[str, Any]) -> Task:
    """The task that a choice names: {"kind": key or builder, option: value, ...}.

    Args:
        choice: {"kind": a key of TASKS or a builder, and its options by name}.

    Raises:
        ValueError: no key is so, or an option is out of its range.

    >>> build({"kind": "classification"}).metric
    'accuracy'
    """
    return registry.made("task", TASKS, choice)


__all__ = [
    "AT",
    "OF",
    "TARGETS",
    "TASKS",
    "Needs",
    "Rows",
    "Task",
    "build",
    "by_length",
    "classification",
    "collate",
    "count",
    "encode",
    "inputs",
    "lengths",
    "parts",
    "shuffled",
]
