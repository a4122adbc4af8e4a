"""Settings chosen on training rows that are held out for it, the same number of trials for each method: `spryfl tune`.

    for number in 0 .. trials-1:  for label in methods:
        values = TPE(the label's trials so far, seed of (label, number))     in the ranges of [tune.space]
        a run on the other training rows, scored on those held out           an ordinary run folder, OUT/runs/LABEL-007

The test rows are never scored. `tuned.toml` holds the best values of each method as changes of `[compare]`, so that
`spryfl compare --config tuned.toml` goes on from there; `trials.json` every trial, `table.md` the same to be read.
Killed at any moment, the same call goes on: proposals follow from seeds and finished trials, a run that was cut short
is gone on with to the same bits. Optuna (Akiba et al. 2019, arXiv 1907.10902) proposes; TPE is Bergstra et al. 2011.
With `prune` a trial ends that after as many rounds is worse than the median of its method's trials (from the fifth on).
Cost: trials x methods runs; the data once, a model once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tomli_w

from spryfl import compare, config, data, job, journal, noise, options, report, tasks
from spryfl.compare import Common
from spryfl.config import Experiment
from spryfl.job import Job
from spryfl.methods import METHODS

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial as Proposed

FILE, TRIALS, TUNED, TABLE = "tune.toml", "trials.json", "tuned.toml", "table.md"
OBJECTIVES = ("loss", "metric")
_STARTUP = 5  # trials of a method that are drawn evenly, before the model of what is good begins


class Trial(NamedTuple):
    """One finished trial."""

    label: str
    number: int
    values: dict[str, Any]  # key -> what was tried
    score: float | None  # of the objective at the end; None where it is not finite
    metric: float
    rounds: int
    pruned: bool
    seen: dict[int, float]  # round -> score


class Tuning(NamedTuple):
    """What is tried."""

    given: dict[str, Any]  # the TOML that says so
    labels: tuple[str, ...]
    spaces: dict[str, dict[str, dict[str, Any]]]  # label -> key -> {"log": [1e-4, 1e-1]}
    trials: int
    rows: int
    rounds: int  # of a trial; 0 = the experiment's
    seed: int
    objective: str
    prune: bool


def parse(given: Mapping[str, Any], labels: Sequence[str] = (), changes: Mapping[str, Any] | None = None) -> Tuning:
    """A tuning from nested plain values: an experiment with `[tune]`, and `[compare]` where that is there.

    Args:
        given: the TOML.
        labels: in place of those that it names.
        changes: of `[tune]`; "space" is added to.

    Raises:
        ValueError: an unknown key, an empty range, a setting that a method does not have, ...
    """
    section = {**given.get("tune", {}), **{k: v for k, v in (changes or {}).items() if k != "space"}}
    section["space"] = {**section.get("space", {}), **(changes or {}).get("space", {})}
    shape: dict[str, Any] = {"methods": (list[str], []), "trials": (int, 10), "rows": (int, 400), "rounds": (int, 0)}
    shape |= {"seed": (int, 0), "objective": (str, "loss"), "prune": (bool, False)}
    shape |= {"space": (dict[str, Any], {}), "spaces": (dict[str, dict[str, Any]], {})}
    said = options.typed(shape, section, "tune")
    chosen = list(labels or said["methods"] or given.get("compare", {}).get("methods", []))
    _check(said, chosen)
    spaces = {label: said["spaces"].get(label, said["space"]) for label in chosen}
    whole = {**{key: value for key, value in given.items() if key != "tune"}, "tune": {**said, "methods": chosen}}
    made = Tuning(whole, tuple(chosen), spaces, *(said[key] for key in Tuning._fields[3:]))
    for label in chosen:  # the two ends of each range, so that a trial late at night cannot fail on them
        for end in (0, -1):
            experiment(made, label, 0, {key: _ends(key, one)[end] for key, one in spaces[label].items()})
    return made


def _check(said: Mapping[str, Any], labels: Sequence[str]) -> None:
    if not labels:
        raise ValueError('tune.methods is empty: say which methods, for example methods = ["spry", "fedavg"].')
    if said["objective"] not in OBJECTIVES:
        raise ValueError(f'tune.objective = "{said["objective"]}" is unknown. Possible: {", ".join(OBJECTIVES)}.')
    for key, least in (("trials", 1), ("rows", 1), ("rounds", 0), ("seed", 0)):
        if said[key] < least:
            raise ValueError(f"tune.{key} = {said[key]}: it must be {least} or more.")
    if odd := [label for label in said["spaces"] if label not in labels]:
        raise ValueError(f"tune.spaces.{odd[0]}: there is no such method here ({', '.join(labels)}). Remove it.")
    for label in labels:
        space = said["spaces"].get(label, said["space"])
        if not space:
            raise ValueError(
                f"tune, {label}: no ranges. Give [tune.space], for example "
                f'"method.local_optimizer.lr" = {{ log = [1e-4, 1e-1] }}, or [tune.spaces.{label}].'
            )
        for key, one in space.items():
            _ends(key, one)


def _ends(key: str, one: Any) -> list[Any]:
    """The values of a range's two ends, or all choices; a ValueError says what is wrong with it."""
    kinds = ("log", "range", "choices")
    if not isinstance(one, Mapping) or len(one) != 1 or next(iter(one)) not in kinds:
        raise ValueError(
            f"tune.space, {key} = {one!r}: give {{ log = [low, high] }}, {{ range = [low, high] }} or "
            f"{{ choices = [a, b, ...] }}."
        )
    (kind, values), plain = next(iter(one.items())), (int, float)
    if kind == "choices":
        fits = isinstance(values, list | tuple) and len(values) > 0
    else:
        numbers = isinstance(values, list | tuple) and len(values) == 2 and all(type(v) in plain for v in values)
        fits = numbers and values[0] < values[1] and (kind == "range" or values[0] > 0)
    if not fits:
        raise ValueError(
            f"tune.space, {key}: {kind} = {values!r} is no range: two numbers, the lower first; of log > 0."
        )
    return list(values)


def _distributions(space: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """A space as Optuna has it. Choices are numbered, as they may be sections."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    out: dict[str, BaseDistribution] = {}
    for key, one in space.items():
        kind, values = next(iter(one.items()))
        if kind == "choices":
            out[key] = CategoricalDistribution(range(len(values)))
        else:
            make: Any = IntDistribution if all(isinstance(v, int) for v in values) else FloatDistribution
            out[key] = make(*values, log=kind == "log")
    return out


def experiment(tuning: Tuning, label: str, number: int, values: Mapping[str, Any]) -> Experiment:
    """The experiment of one trial."""
    base = {key: value for key, value in tuning.given.items() if key != "tune"}
    if tuning.rounds:
        base["train"] = {**base.get("train", {}), "rounds": tuning.rounds}
    base["compare"] = _changed(tuning, label, values)
    made = compare.parse(base, [label], [tuning.seed]).runs[label, tuning.seed]
    return made.model_copy(update={"name": f"{label}-{number:03d}"})


def _changed(tuning: Tuning, label: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The section `[compare]` with these values among the changes of a label."""
    section = tuning.given.get("compare", {})
    own = section.get("changes", {}).get(label, {})
    for key, value in values.items():
        own = config.merge(own, config.nested(key, value))
    if isinstance(own.get("method"), Mapping) and "name" not in own["method"] and label in METHODS:
        own = {**own, "method": {"name": label, **own["method"]}}
    return {**section, "methods": [label], "changes": {label: own}}


def turns(tuning: Tuning, out: Path) -> Iterator[Trial]:
    """Runs what is left and yields each trial once it is on the disk; those that are done already are not yielded."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    done = _begun(tuning, out)
    left = [(number, label) for number in range(tuning.trials) for label in tuning.labels]
    left = [(number, label) for number, label in left if (label, number) not in {(t.label, t.number) for t in done}]
    if not left:
        finish(tuning, out, done)
        return
    first = experiment(tuning, left[0][1], 0, {k: _ends(k, v)[0] for k, v in tuning.spaces[left[0][1]].items()})
    common = compare.common(first)
    whole = tasks.build(first.task).needs.whole
    corpus, which = data.held_out(common.corpus, tuning.rows, noise.child_seed(tuning.seed, "tune"), whole)
    common = common._replace(corpus=corpus)
    for number, label in left:
        done.append(_tried(tuning, label, number, done, common, out))
        _write(tuning, out, done, which)
        yield done[-1]
    finish(tuning, out, done)


def _begun(tuning: Tuning, out: Path) -> list[Trial]:
    """The finished trials of a folder; a ValueError where it holds another tuning."""
    if not out.exists() or not any(out.iterdir()):
        with journal.writing(out):
            (out / "runs").mkdir(parents=True, exist_ok=True)
        journal.write(out / FILE, tomli_w.dumps(tuning.given).encode())
        return []
    if not (out / FILE).is_file():
        raise ValueError(f"{out} is there already and holds no tuning ({FILE}). Choose another --out.")
    then = parse(config.read(out / FILE))
    if then._replace(given={}, trials=0) != tuning._replace(given={}, trials=0) or _rest(then) != _rest(tuning):
        raise ValueError(f"the tuning in {out} was begun with other settings. Choose another --out.")
    return trials(out)


def _rest(tuning: Tuning) -> dict[str, Any]:
    return {key: value for key, value in tuning.given.items() if key != "tune"}


def trials(out: Path) -> list[Trial]:
    """The finished trials of a folder, in the order in which they ended."""
    if not (out / TRIALS).is_file():
        return []
    kept = json.loads((out / TRIALS).read_text(encoding="utf-8"))["trials"]
    return [Trial(**{**one, "seen": {int(r): v for r, v in one["seen"].items()}}) for one in kept]


def _study(tuning: Tuning, label: str, number: int, done: Sequence[Trial]) -> Any:
    """Optuna's study of a label as it stands before a trial: nothing of it is kept between two."""
    import optuna

    space = _distributions(tuning.spaces[label])
    better = tuning.objective == "metric"
    seed = noise.child_seed(tuning.seed, "trial", label, number) % 2**32
    study = optuna.create_study(
        direction="maximize" if better else "minimize",
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP) if tuning.prune else optuna.pruners.NopPruner(),
    )
    for one in done:
        if one.label == label:
            ended = optuna.trial.TrialState.PRUNED if one.pruned else optuna.trial.TrialState.COMPLETE
            score = one.score if one.score is not None else (-math.inf if better else math.inf)
            study.add_trial(
                optuna.trial.create_trial(
                    state=ended,
                    params=_numbered(tuning.spaces[label], one.values),
                    distributions=space,
                    value=None if one.pruned and one.score is None else score,
                    intermediate_values=one.seen,
                )
            )
    return study


def _numbered(space: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as Optuna has them: a choice by its number."""
    return {k: space[k]["choices"].index(v) if "choices" in space[k] else v for k, v in values.items()}


def _tried(tuning: Tuning, label: str, number: int, done: Sequence[Trial], common: Common, out: Path) -> Trial:
    """One trial: proposed, run or gone on with, scored."""
    space = tuning.spaces[label]
    proposed = _study(tuning, label, number, done).ask(fixed_distributions=_distributions(space))
    values = {k: space[k]["choices"][v] if "choices" in space[k] else v for k, v in proposed.params.items()}
    made = common.job(experiment(tuning, label, number, values))
    if len(common.models) > 2:  # an adapter's settings are tried: one model at a time
        common.models.clear()
    name = tasks.build(made.experiment.task).metric
    sign, key = (1.0, "test_loss") if tuning.objective == "loss" else (-1.0, name)
    seen: dict[int, float] = {}
    last: dict[str, Any] = {}
    pruned = False
    for record in _records(made, out / "runs" / made.experiment.name):
        if name not in record:
            continue
        last = record
        if record["round"] and math.isfinite(record[key]):
            seen[record["round"]] = record[key]
            pruned = _worse(proposed, record["round"], record[key])
        if pruned and record["round"] < made.plan.rounds:
            break
        pruned = False
    score = last[key] if math.isfinite(sign * last[key]) else None
    return Trial(label, number, values, score, last[name], last["round"], pruned, seen)


def _worse(proposed: Proposed, round_: int, score: float) -> bool:
    proposed.report(score, round_)
    return proposed.should_prune()


def _records(made: Job, folder: Path) -> Iterator[dict[str, Any]]:
    """All records of a trial's run: those on the disk, then those that are still to come."""
    if not folder.exists():
        job.rehearse(made)
        job.create(made, folder)
    opened, state, progress = job.resume(made, folder)
    yield from journal.records(opened)
    with job.cancelling(opened):
        for record, _ in job.run(made, opened, state, progress):
            yield record


def best(tuning: Tuning, done: Sequence[Trial]) -> dict[str, Trial]:
    """The best trial of each label that ran to its end; the earlier one of equals."""
    sign = 1.0 if tuning.objective == "loss" else -1.0
    out: dict[str, Trial] = {}
    for one in sorted(done, key=lambda t: t.number):
        known = out.get(one.label)
        if one.score is not None and not one.pruned and (known is None or sign * one.score < sign * (known.score or 0)):
            out[one.label] = one
    return out


def edges(tuning: Tuning, one: Trial) -> list[str]:
    """Keys whose value lies within a twentieth of an end of its range: a wider one may hold a better."""
    out = []
    for key, value in one.values.items():
        kind, ends = next(iter(tuning.spaces[one.label][key].items()))
        if kind != "choices":
            at, low, high = (math.log(v) if kind == "log" else v for v in (value, *ends))
            out += [key] * (not 0.05 <= (at - low) / (high - low) <= 0.95)
    return out


def _write(tuning: Tuning, out: Path, done: Sequence[Trial], which: Sequence[int]) -> None:
    """All trials so far."""
    kept = {
        "schema": 1,
        "objective": tuning.objective,
        "seed": tuning.seed,
        "trials_each": tuning.trials,
        "held_out": {"rows": len(which), "of": "the training rows", "which": list(which)},
        "trials": [{**one._asdict(), "seen": {str(r): v for r, v in one.seen.items()}} for one in done],
    }
    journal.write(out / TRIALS, (json.dumps(kept, indent=1) + "\n").encode())


def finish(tuning: Tuning, out: Path, done: Sequence[Trial]) -> None:
    """Writes what was chosen, and the table."""
    found = best(tuning, done)
    section = tuning.given.get("compare", {})
    changes = dict(section.get("changes", {}))
    for label, one in found.items():
        changes |= _changed(tuning, label, one.values)["changes"]
    whole = {key: value for key, value in tuning.given.items() if key != "tune"}
    whole["compare"] = {**section, "methods": list(tuning.labels), "changes": changes}
    head = (
        f"# Chosen by spryfl tune: {tuning.trials} trials a method, by {tuning.objective} on {tuning.rows} training "
        f"rows held out for it.\n#   spryfl compare --config {TUNED}\n"
    )
    journal.write(out / TUNED, (head + tomli_w.dumps(whole)).encode())
    journal.write(out / TABLE, table(tuning, done).encode())


def table(tuning: Tuning, done: Sequence[Trial]) -> str:
    """Every trial in Markdown, the best of each method in bold."""
    found = best(tuning, done)
    keys = list(dict.fromkeys(key for space in tuning.spaces.values() for key in space))
    rows = []
    for one in sorted(done, key=lambda t: (tuning.labels.index(t.label), t.number)):
        chosen = found.get(one.label) is not None and found[one.label].number == one.number
        said = "pruned" if one.pruned else "taken" if chosen else ""
        said += f", at the edge: {', '.join(edges(tuning, one))}" if chosen and edges(tuning, one) else ""
        score = "not finite" if one.score is None else f"{one.score:.4f}"
        shown = [_short(one.values[key]) if key in one.values else "-" for key in keys]
        cells = (str(one.number), *shown, str(one.rounds), score, f"{one.metric:.4f}", said)
        rows.append((one.label, *(f"**{cell}**" if chosen and cell else cell for cell in cells)))
    head = ("method", "trial", *keys, "rounds", "loss" if tuning.objective == "loss" else "objective", "metric", "")
    return f"{report.markdown(head, rows)}\nOn {tuning.rows} held-out training rows; the test rows were not scored.\n"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
