"""The federated loop: sample a cohort, begin, exchange, finish, evaluate, record, save; and going on after a stop.

All that is random follows from the run's seed and the round, so a run that was killed and resumed ends in the same
bits. Needs torch alone. Cost: the clients' steps, and one pass over the test rows each `eval_every` rounds.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from spryfl import costs, figures, noise, server
from spryfl import journal as disk
from spryfl.choices import Built, Method, build, evenly
from spryfl.figures import Record
from spryfl.journal import Journal, Progress
from spryfl.privacy import Privacy, drawn_key, epsilon
from spryfl.types import Instruction, Params, Passes, ServerState, Unit, Update


class Answers(NamedTuple):
    """What an engine brings back from one round."""

    updates: Sequence[Update]
    failed: dict[int, str]  # clients that did not answer, and why
    bytes_down: int
    bytes_up: int
    lost: frozenset[int] = frozenset()  # no longer hold what the server thought: they are sent the values
    facts: Mapping[str, float] = MappingProxyType({})  # the engine's own counts; those of a round are added up


class Limits(NamedTuple):
    """What a run may spend: it ends with the round that reaches one of them. 0 = no limit."""

    passes: float = 0  # value, tangent and backward passes of all clients, each counted as one
    megabytes: float = 0.0  # up and down, 1e6 bytes
    seconds: float = 0.0  # of rounds and evaluations


class Quorum(NamedTuple):
    """What is done about clients that do not answer."""

    share: float = 0.0  # of a cohort that must answer, or the round is repeated with another one
    tries: int = 1  # cohorts of a round at most
    rest: int = 0  # rounds that a client is left out for once it failed twice running; 0 = never


class Plan(NamedTuple):
    """A run's fixed facts, as the loop needs them."""

    method: Built
    units: tuple[Unit, ...]
    seed: int
    rounds: int
    clients: int
    cohort: int
    eval_every: int
    patience: int  # evaluations without a better one; 0 = never stop early
    limits: Limits = Limits()
    metric: str = "accuracy"  # the name of the number by which models are compared; more is better
    quorum: Quorum = Quorum()
    promised: Privacy | None = None


class Tried(NamedTuple):
    """A cohort's part in a round: what it was told, what came back, the state after it."""

    told: Sequence[Instruction]
    answers: Answers
    state: ServerState
    refused: server.Refused

    @property
    def failed(self) -> dict[int, str]:
        return {**self.answers.failed, **self.refused.failed}


Exchange = Callable[[Sequence[Instruction]], Answers]
Evaluate = Callable[[Params], dict[str, float]]  # values -> numbers by name on the untouched test rows
# (state before, instructions, answers that counted, state after, whether the round is evaluated) -> more of its record
Watch = Callable[[ServerState, Sequence[Instruction], Sequence[Update], ServerState, bool], Record]

# The fields of a record that may differ between two equal runs.
TIMED = ("seconds", "peak_bytes", "class_peak_bytes", "engine", "probe_seconds")


def cohort(plan: Plan, round_: int, attempt: int = 0, resting: Collection[int] = ()) -> list[int]:
    """The clients of a round, drawn without replacement, in the order of their slots.

    Another attempt draws anew. Those that rest are left out, unless nobody else is there.
    """
    there = plan.method.present(plan.clients)
    awake = [i for i in there if i not in resting] or there
    draw = random.Random(noise.child_seed(plan.seed, "cohort", round_, *(("attempt", attempt) if attempt else ())))
    return draw.sample(awake, min(plan.cohort, len(awake)))


def predicted(method: Method, shapes: costs.Shapes, clients: int, cohort_: int, steps: int) -> costs.Costs:
    """What a method costs at given shapes, no client ever failing.

    Args:
        method: its choices. Where it pools the data, one client takes the steps of a cohort.
        shapes: of the network, its trainable values and a batch.
        clients: in all; how many rounds one misses follows from it.
        cohort_: clients of a round.
        steps: local batches of a client in a round.
    """
    if method.sharing == "pooled":
        clients, cohort_, steps = 1, 1, steps * cohort_
    built = build(method := evenly(method))
    settle = 10 * -(-len(built.present(clients)) // cohort_)
    plan = Plan(built, shapes.units, 0, settle, clients, cohort_, eval_every=1, patience=0)
    rounds = [server.deal(shapes.units, cohort(plan, r), built, r) for r in range(1, settle + 1)]
    return costs.predict(method, built, shapes, rounds, steps)


def lost(seed: int, share: float) -> Callable[[int, int], bool]:
    """Simulated dropout: whether a client fails to answer in a round."""
    return lambda round_, client: random.Random(noise.child_seed(seed, "lost", round_, client)).random() < share


def start(plan: Plan, params: Params) -> tuple[ServerState, Progress]:
    """Before the first round."""
    return server.init(params, plan.method, plan.clients, drawn_key(plan.promised)), Progress()


def train(
    plan: Plan,
    state: ServerState,
    progress: Progress,
    exchange: Exchange,
    evaluate: Evaluate,
    journal: Journal | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[Record, ServerState]]:
    """Runs the rounds that are left and yields each one's record, after it and the state are safe on the disk."""
    if not _begun(progress):
        record, progress = _first(plan, state, progress, evaluate)
        _keep(journal, record, state, progress)
        yield record, state
    while unfinished(plan, state, progress):
        record, state, progress = one_round(plan, state, progress, exchange, evaluate, watch)
        _keep(journal, record, state, progress)
        yield record, state


def unfinished(plan: Plan, state: ServerState, progress: Progress) -> bool:
    """Whether there is something left to do: the first record, or rounds before the last, a limit or a plateau."""
    plateau = bool(plan.patience) and progress.waited >= plan.patience
    return not _begun(progress) or (state.round < plan.rounds and not plateau and not spent(plan.limits, progress))


def used(progress: Progress) -> Limits:
    """What a run has spent so far, in the units of its limits."""
    passes = progress.value_passes + progress.tangent_passes + progress.backward_passes
    return Limits(passes, (progress.bytes_up + progress.bytes_down) / 1e6, progress.seconds)


def spent(limits: Limits, progress: Progress) -> bool:
    """Whether one of the limits is reached."""
    return any(limit and now >= limit for limit, now in zip(limits, used(progress), strict=True))


def done(plan: Plan, state: ServerState, progress: Progress) -> float:
    """The share of the run that is behind, in [0, 1), which a schedule runs over: of its rounds, passes or bytes.

    The largest of the three. Seconds are left out: a rate must not hang on the clock, or no run could be repeated.
    """
    now, limits = used(progress), plan.limits
    shares = (now.passes / (limits.passes or math.inf), now.megabytes / (limits.megabytes or math.inf))
    return max(state.round / plan.rounds, *shares)


def _begun(progress: Progress) -> bool:
    """Whether the model has been evaluated once."""
    return progress.best > -math.inf


def _first(plan: Plan, state: ServerState, progress: Progress, evaluate: Evaluate) -> tuple[Record, Progress]:
    """The record of round 0: where the model starts."""
    since = time.perf_counter()
    scores = evaluate(state.params)
    progress = progress._replace(best=scores[plan.metric], seconds=time.perf_counter() - since)
    return {"round": 0, **scores, **_totals(progress)}, progress


def one_round(
    plan: Plan,
    state: ServerState,
    progress: Progress,
    exchange: Exchange,
    evaluate: Evaluate,
    watch: Watch | None = None,
) -> tuple[Record, ServerState, Progress]:
    """One round from cohort to record."""
    since, before = time.perf_counter(), state
    round_ = state.round + 1
    due = round_ % plan.eval_every == 0 or round_ == plan.rounds
    tried = _attempts(plan, state, progress, exchange, due)
    told, answers, state, refused = last = tried[-1]
    kept = [update for update in answers.updates if update.client not in refused.failed]
    shown = [] if plan.promised else kept  # what single answers say is not covered by the promise
    progress = _on(progress, tried, time.perf_counter() - since)
    progress = progress._replace(failing=_failing(plan.quorum, progress, tried, round_))
    due = due or spent(plan.limits, progress)  # the last round is evaluated, whatever ended the run
    since = time.perf_counter()
    scores = evaluate(server.served(state)) if due else {}
    progress = _judged(progress, scores[plan.metric], round_, time.perf_counter() - since) if due else progress
    record = {
        "round": round_,
        "cohort": [one.client for one in told],
        "failed": {str(client): why for client, why in last.failed.items()},
        **_repeated(tried[:-1]),
        **figures.gate(plan.method, kept, refused),
        **_spent(plan, round_),
        **({"note": refused.note} if refused.note else {}),
        "loss": figures.mean([(u.loss, u.examples) for u in shown]),
        **scores,
        **figures.personal(shown),
        **figures.scalars(shown),
        **(watch(before, told, kept, state, due) if watch else {}),
        "peak_bytes": max((u.peak_bytes for u in shown), default=0),
        **_engine(tried),
        **({} if plan.promised else figures.classes(plan.method, told, kept)),
        **_totals(progress),
    }
    return record, state, progress


def _attempts(plan: Plan, state: ServerState, progress: Progress, exchange: Exchange, due: bool) -> list[Tried]:
    """Cohorts of one round, one after the other, until enough of one answer; the last one's state counts."""
    out: list[Tried] = []
    round_, share = state.round + 1, done(plan, state, progress)
    resting = {client for client, (_, until) in progress.failing.items() if until >= round_}
    for attempt in range(plan.quorum.tries):
        who = cohort(plan, round_, attempt, resting)
        out.append(_tried(plan, state, who, share, due, exchange))
        if len(who) - len(out[-1].failed) >= plan.quorum.share * len(who):
            return out
    counts = "; ".join(f"{len(one.told) - len(one.failed)} of {len(one.told)}" for one in out)
    raise ValueError(
        f"round {round_}: too few clients answered, {counts}; train.min_answers = {plan.quorum.share:g} asks for more. "
        f"The finished rounds are safe. See why they failed ({next(iter(out[-1].failed.values()), '')}), then resume."
    )


def _tried(plan: Plan, state: ServerState, who: Sequence[int], share: float, due: bool, exchange: Exchange) -> Tried:
    """One cohort's part in a round, `share` of the run being behind.

    A client whose memory was lost is sent the values and asked once more.
    """
    method = plan.method
    begin = functools.partial(server.begin, units=plan.units, cohort=who, method=method, seed=plan.seed, evaluate=due)
    begin = functools.partial(begin, lr_scale=method.schedule(share), growth=method.growth**share)
    told = begin(state)
    answers = exchange(told)
    if answers.lost:
        state = server.forget(state, answers.lost)
        again = begin(state)
        told = [new if new.client in answers.lost else old for old, new in zip(told, again, strict=True)]
        more = exchange([one for one in told if one.client in answers.lost])
        answers = _joined(told, answers, more)
    scale = method.server_schedule(share) if method.server_schedule else 1.0
    return Tried(told, answers, *server.finish(state, told, answers.updates, method, head(plan), plan.promised, scale))


def _joined(told: Sequence[Instruction], one: Answers, more: Answers) -> Answers:
    """Two exchanges of a round as one, answers in the order of the instructions."""
    by_client = {update.client: update for update in (*one.updates, *more.updates)}
    again = dict.fromkeys(more.lost, "lost its memory twice in a round")
    return Answers(
        [by_client[i.client] for i in told if i.client in by_client],
        {**one.failed, **more.failed, **again},
        one.bytes_down + more.bytes_down,
        one.bytes_up + more.bytes_up,
        facts=_added([one.facts, more.facts]),
    )


def _added(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)


def _spent(plan: Plan, round_: int) -> Record:
    """The epsilon that the run has spent: of the values, for one client's data being others. None = no bound."""
    if plan.promised is None:
        return {}
    there = len(plan.method.present(plan.clients))
    value = epsilon(plan.promised, round_, there, min(plan.cohort, there))
    return {"epsilon": value if math.isfinite(value) else None, "delta": plan.promised.delta}


def _repeated(tried: Sequence[Tried]) -> Record:
    """The cohorts of which too few answered, and why."""
    told = [
        {"cohort": [i.client for i in one.told], "failed": {str(client): why for client, why in one.failed.items()}}
        for one in tried
    ]
    return {"repeated": told} if told else {}


def _engine(tried: Sequence[Tried]) -> Record:
    facts = _added([one.answers.facts for one in tried])
    return {"engine": facts} if facts else {}


def _failing(quorum: Quorum, progress: Progress, tried: Sequence[Tried], round_: int) -> dict[int, tuple[int, int]]:
    """client -> (times it failed running, the round until which it rests) of those that failed when last asked."""
    if not quorum.rest:
        return {}
    failing = dict(progress.failing)
    for one in tried:
        for client in (i.client for i in one.told):
            times = failing.pop(client, (0, 0))[0] + 1
            if client in one.failed:
                failing[client] = (times, round_ + quorum.rest if times > 1 else 0)
    return failing


def _on(progress: Progress, tried: Sequence[Tried], seconds: float) -> Progress:
    """The totals after a round's answers."""
    passes = sum((update.passes for one in tried for update in one.answers.updates), start=Passes())
    return progress._replace(
        bytes_down=progress.bytes_down + sum(one.answers.bytes_down for one in tried),
        bytes_up=progress.bytes_up + sum(one.answers.bytes_up for one in tried),
        value_passes=progress.value_passes + passes.value,
        tangent_passes=progress.tangent_passes + passes.tangent,
        backward_passes=progress.backward_passes + passes.backward,
        seconds=progress.seconds + seconds,
    )


def _judged(progress: Progress, accuracy: float, round_: int, seconds: float) -> Progress:
    """The totals after an evaluation."""
    better = accuracy > progress.best
    return progress._replace(
        best=accuracy if better else progress.best,
        best_round=round_ if better else progress.best_round,
        waited=0 if better else progress.waited + 1,
        seconds=progress.seconds + seconds,
    )


def _totals(progress: Progress) -> Record:
    """The cumulated fields of a record."""
    out = progress._asdict()
    del out["waited"], out["failing"]
    return out


def head(plan: Plan) -> frozenset[str]:
    """Names of the head's values."""
    return frozenset(name for unit in plan.units if unit.head for name in unit.params)


def _keep(journal: Journal | None, record: Record, state: ServerState, progress: Progress) -> None:
    """Record first, state last: what is on the disk can always be gone on from."""
    if journal is None:
        return
    disk.append(journal, record)
    if progress.best_round == state.round:
        disk.save(journal, disk.BEST, state, progress)
    disk.save(journal, disk.NEWEST, state, progress)
