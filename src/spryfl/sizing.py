"""What classes of clients do in the memory that they state: chosen once, by the planner, when a run is set up.

    memory = "2GB"      estimator, head policy, micro-batch, streaming: the planner's best that fits (plan.fitting)
                        units: all that the method deals out where some gradient is exact; else one a round, in turn

One unit a round, as estimates along random directions have an error that grows with the values moved together, and a
client steps several times on what it holds. What was chosen stands in config.toml in place of the budget, and
`chosen_for` says for what; so a run goes on, and can be run again, without the planner. Cost: the planner's, 2 to 5 s a
class; nothing where no class states its memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spryfl import adapters, choices, options, tasks
from spryfl.backbone.store import is_packed
from spryfl.classes import ClientClass
from spryfl.config import Experiment
from spryfl.estimators import DENSE
from spryfl.models import resolve as place
from spryfl.tasks import Rows
from spryfl.types import Unit

if TYPE_CHECKING:
    from spryfl.footprint import Outline
    from spryfl.plan import Planned

ONE: Mapping[str, Any] = {"kind": "few", "units": 1}


def settled(experiment: Experiment, labels: Sequence[str], data: Rows) -> Experiment:
    """The experiment with each class's memory turned into what fits it.

    Args:
        experiment: as it was asked for.
        labels: names of the classes that the task tells apart.
        data: the training rows; a local batch is planned as long as the longest of them.

    Raises:
        ValueError: nothing fits a class; it says the smallest need and what would lower it.
    """
    method = experiment.method
    if not any(one.memory for one in method.classes):
        return experiment
    if experiment.model.adapter:
        raise ValueError(
            f'memory of a class of clients with model.adapter = "{experiment.model.adapter}": the planner builds the '
            f"adapter anew. Give its kind and options in [adapter], or state the class's estimator."
        )
    from spryfl.footprint import outline  # with the planner it takes seconds, and most runs need none of it

    m, task = experiment.model, tasks.build(experiment.task)
    of = outline(m.name, tuple(labels), adapters.build(experiment.adapter), task=task, attention=m.attention)
    lengths = tasks.lengths(data)
    most, tokens = experiment.train.batch_size, max(lengths, default=experiment.data.max_length)
    rows = most * len(lengths) // len(data.inputs) if lengths else most
    made = tuple(_chosen(one, experiment, of, rows, tokens) if one.memory else one for one in method.classes)
    settled_ = replace(method, classes=made)
    choices.build(settled_)
    return experiment.model_copy(update={"method": settled_})


def _chosen(one: ClientClass, experiment: Experiment, of: Outline, rows: int, tokens: int) -> ClientClass:
    """A class with what fits its memory in place of it."""
    planned = _planned(one, experiment, of, None, rows, tokens)
    assignment = one.assignment
    if not (assignment or _exact(planned)):
        trunk = [unit for unit in of.units if not unit.head]
        mine = [max(trunk, key=lambda unit: unit.size), *(unit for unit in of.units if unit.head)]
        planned, assignment = _planned(one, experiment, of, mine, rows, tokens), dict(ONE)
    setting = planned.setting
    return replace(
        one,
        estimator=options.resolve("estimator", choices.REGISTRIES["estimator"], setting.method.estimator),
        assignment=assignment,
        head="" if setting.method.head == experiment.method.head else setting.method.head,
        micro_batch=setting.micro_batch,
        stream=setting.stream and not experiment.model.stream,
        memory="",
        chosen_for=one.memory,
    )


def _planned(
    one: ClientClass, experiment: Experiment, of: Outline, mine: Sequence[Unit] | None, rows: int, tokens: int
) -> Planned:
    from spryfl import plan

    streams = is_packed(place(experiment.model.name)[0])
    try:
        method = replace(experiment.method, classes=())
        return plan.fitting(options.nbytes(one.memory), of, method, mine, rows=rows, tokens=tokens, stream=streams)
    except ValueError as error:
        raise ValueError(f'method.classes: "{one.name}" with memory = "{one.memory}": {error}') from None


def _exact(planned: Planned) -> bool:
    """Whether the gradient of some units of the trunk is exact."""
    estimator = planned.setting.method.estimator
    return estimator["kind"] in DENSE or bool(estimator.get("exact_top"))
