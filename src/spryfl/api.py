"""`finetune`, for Python: a model and a data set, or an Experiment, in; a history out. Costs what its rounds cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from spryfl import adapters, job, models, noise, server, tasks
from spryfl import data as source
from spryfl.config import Experiment, parse
from spryfl.job import Job
from spryfl.methods import Method
from spryfl.models import Model
from spryfl.types import Params


class History(NamedTuple):
    """What a run leaves in memory: its records, the final values, the model that carries them."""

    records: list[dict[str, Any]]
    params: Params
    model: Model
    folder: Path | None


def finetune(
    model: Experiment | nn.Module | str | None = None,
    data: Any = None,
    *,
    tokenizer: Any = None,
    reading: Mapping[str, Any] | None = None,
    method: Method | str | dict[str, Any] | None = None,
    folder: str | Path | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> History:
    """Finetunes a language model across simulated clients.

    Args:
        model: an Experiment (then nothing else of it may be given); a Hugging Face model with the task's head (a
            sequence classifier, where no task is given), which gets an adapter put on it in place; a folder, hub name
            or alias; a section, for example {"adapter": "runs/a/adapter"} to start from a saved one; nothing for the
            default.
        data: a `datasets.Dataset`, a `DatasetDict` with train and test, a pair (train, test), or a name as `--data`.
        tokenizer: the tokenizer of `model` where that is a module.
        reading: what the data section says beside the name: {"text": "body", "label": "stars", "max_length": 64}.
        method: a row's name, a `Method`, or changes as in TOML.
        folder: a new run folder; nothing is written without it.
        on_record: called with each round's record.
        settings: sections of an Experiment, for example train={"rounds": 10}, adapter={"kind": "lora", "r": 2},
            task="question_answering".

    Returns:
        The records, the final values, and the model that carries them (a PEFT model, in evaluation mode).

    Raises:
        ValueError: a setting that cannot be, before anything is downloaded.

    Example:
        history = spryfl.finetune("minilm", "reviews.csv", method=spryfl.methods.spry(directions=8), seed=1)
        history.model.module.save_pretrained("adapter")
    """
    if isinstance(model, Experiment):
        if any(beside is not None for beside in (data, tokenizer, reading, method)) or settings:
            raise ValueError(
                "finetune(experiment) takes no data, tokenizer, reading, method or sections; change the Experiment."
            )
        made = prepared(model)
    else:
        if reading is not None:
            settings["data"] = reading
        made = _from_parts(model, data, tokenizer, method, settings)
    return _history(made, Path(folder) if folder else None, on_record or (lambda record: None))


def _from_parts(model: Any, data: Any, tokenizer: Any, method: Any, settings: dict[str, Any]) -> Job:
    given = dict(settings)
    if method is not None:
        given["method"] = method
    if isinstance(data, str | Path):
        given["data"] = {"name": str(data), **given.get("data", {})}
    elif data is not None:
        given["data"] = {"name": type(data).__name__, **given.get("data", {})}
    module = model if isinstance(model, nn.Module) else None
    if isinstance(model, str | Path):
        given["model"] = {"name": str(model)}
    elif isinstance(model, Mapping):
        given["model"] = model
    elif model is not None and module is None:
        raise ValueError(f"model is a {type(model).__name__}; give a name, a section, a module or an Experiment.")
    if (module is None) != (tokenizer is None):
        raise ValueError(
            "a model given as a module needs its tokenizer, and a tokenizer its module. Give both or a name."
        )
    corpus = None if data is None or isinstance(data, str | Path) else _corpus(data, parse(given))
    return prepared(parse(given), corpus, module, tokenizer)


def _corpus(data: Any, experiment: Experiment) -> source.Corpus:
    d = experiment.data
    train, test = data if isinstance(data, tuple) else (data, None)
    columns: dict[str, Any] = {"text": d.text, "pair": d.pair, "label": d.label, "group": d.group}
    limits: dict[str, Any] = {"test_share": d.test_share, "train_rows": d.train_rows, "test_rows": d.test_rows}
    needs = tasks.build(experiment.task).needs
    return source.from_datasets(train, test, **columns, **limits, seed=experiment.seed, needs=needs)


def prepared(
    experiment: Experiment, corpus: source.Corpus | None = None, module: nn.Module | None = None, tokenizer: Any = None
) -> Job:
    """An experiment with its data read, its model loaded and its threads set, or with those that are given."""
    models.usable(experiment.device)
    if experiment.threads:
        torch.set_num_threads(experiment.threads)
    corpus = corpus or job.read(experiment)
    if module is None:
        return job.prepare(experiment, corpus, job.load_model(experiment, corpus.labels))
    named: Any = module.config
    task = tasks.build(experiment.task)
    outputs = task.outputs(corpus.labels)
    if outputs and named.num_labels != len(outputs):
        raise ValueError(
            f"the model has {named.num_labels} labels and the task {len(outputs)} "
            f"({', '.join(outputs)}). Load the model with num_labels={len(outputs)}."
        )
    model = models.prepare(
        models.settled(module, tokenizer),
        tokenizer,
        corpus.labels,
        adapters.build(experiment.adapter),
        source=named.name_or_path,
        seed=noise.child_seed(experiment.seed, "model"),
        device=experiment.device,
        task=task,
    )
    return job.prepare(experiment, corpus, model)


def _history(made: Job, folder: Path | None, on_record: Callable[[dict[str, Any]], None]) -> History:
    opened, state, progress = job.begin(made, folder)
    records, final = [], server.served(state)
    with job.cancelling(opened):
        for record, latest in job.run(made, opened, state, progress):
            records.append(record)
            final = server.served(latest)
            on_record(record)
    if not made.plan.method.alone:
        models.carry(made.model, final)
    return History(records, dict(final), made.model, folder)
