"""What two choices of a method together must not be: each rule says what, and what to do. Costs nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spryfl.estimators import DENSE, ESTIMATORS

if TYPE_CHECKING:
    from spryfl.choices import Built, Method
    from spryfl.classes import ClientClass

Choice = Mapping[str, Any]


def is_dense(choice: Choice) -> bool:
    """Whether an estimator draws no direction; one of the user's own may."""
    return choice["kind"] in DENSE if isinstance(choice["kind"], str) else False


def check_together(method: Method, built: Built, all_: Sequence[ClientClass]) -> None:
    """What two choices together must not be: each line says what, and what to do.

    Args:
        method: the record.
        built: its functions.
        all_: who there is, each with all its choices.
    """
    estimators = [one.estimator for one in all_]
    dense = all(is_dense(one) for one in estimators)
    kinds = ", ".join(f'"{one["kind"]}"' for one in estimators)
    everyone = all(one.assignment["kind"] == "everyone" for one in all_)
    for wrong, why in (
        *_of_estimators(method, built, estimators, dense, kinds),
        *_of_classes(method, built, all_, dense, everyone),
        *_of_schedules(method, built, estimators),
        (
            method.aggregate["kind"] == "krum" and not everyone,
            'aggregate = "krum" compares whole answers: it needs assignment "everyone".',
        ),
        (
            built.local is None and method.head_lr != 1,
            'head_lr has no effect with local_optimizer "none": no local step is taken. Remove it.',
        ),
        (
            built.alone and (built.scalars or method.average or method.guide or method.aggregate["kind"] != "mean"),
            'sharing = "alone" leaves nothing to exchange: it takes exchange "weights", aggregate "mean", no average '
            "and no guide.",
        ),
    ):
        if wrong:
            raise ValueError(why)


Rule = tuple[bool, str]  # (what must not be, what to say)


def _of_estimators(
    method: Method, built: Built, estimators: Sequence[Choice], dense: bool, kinds: str
) -> tuple[Rule, ...]:
    """What estimators, exchange, seeds and guide must not be together."""
    seeded = ", ".join(key for key in ESTIMATORS if key not in DENSE)
    guided = ", ".join(key for key, one in ESTIMATORS.items() if "candidates" in inspect.signature(one).parameters)
    linear = built.local is not None and built.local.rate is not None and built.server.rate is not None
    plain = (
        method.aggregate["kind"] == "mean"
        and not built.by_noise
        and method.assignment["kind"] == "everyone"
        and method.head_lr == 1
        and not method.classes
    )
    candidates = max(one.get("candidates", 1) for one in estimators)
    along = any(one.get("guided") for one in estimators)
    return (
        (
            built.scalars and dense,
            f'exchange = "scalars" needs a seeded estimator; {kinds} returns a dense gradient.\n'
            f'    Use exchange = "weights", or one of: {seeded}.',
        ),
        (
            (candidates > 1 or along) != method.guide,
            f"method.guide = {method.guide} and estimator.candidates = {candidates} go "
            f"together: the last pseudo-gradient is sent so that an estimator may choose among candidates, or take it "
            f"for a direction (guided, of forward). Set both, for {guided}; or neither.",
        ),
        (
            built.scalars and along,
            'exchange = "scalars" with estimator.guided: the part along the guide is dense, over the same values as '
            'the scalars. Use exchange = "weights".',
        ),
        (
            bool(built.seeds.pool) and not (built.scalars and linear and plain),
            f'seeds = "pool" sums scalars over the whole run: it needs exchange "scalars", sgd without momentum on '
            f'both sides, aggregate "mean" weighed by examples, assignment "everyone", head_lr = 1 and no classes of '
            f"clients; here {', '.join(_of_pool(method))}.",
        ),
        (
            built.seeds.shared and dense,
            f'seeds = "shared" has no effect with estimator {kinds}: it draws no direction. Remove it.',
        ),
    )


def _of_classes(
    method: Method, built: Built, all_: Sequence[ClientClass], dense: bool, everyone: bool
) -> tuple[Rule, ...]:
    """What classes of clients and the weights of their answers must not be."""
    rated = next((one.name for one in method.classes if one.lr != 1), "")
    idle = next((one for one in all_ if one.assignment["kind"] == "nobody"), None)
    return (
        (
            bool(method.classes) and method.sharing == "pooled",
            'method.classes with sharing = "pooled": all data are in one place, there are no clients. Remove one.',
        ),
        (
            bool(rated) and built.local is None,
            f'method.classes: lr of "{rated}" has no effect with local_optimizer "none": no local step is taken.',
        ),
        (
            bool(method.classes) and idle is not None and built.split_head,
            f'method.classes: "{idle and idle.name}" has assignment "nobody", and head = "split" leaves it nothing to '
            f'train. Use head = "shared".',
        ),
        (
            built.by_noise and (dense or (not method.classes and everyone)),
            'aggregate.weigh = "variance" has no effect where all answers are of equal variance: here '
            + ("every gradient is exact." if dense else "all clients train everything by one estimator.")
            + ' Use weigh = "examples".',
        ),
        (
            built.alone and any(one.absent for one in method.classes),
            'method.classes: absent clients with sharing = "alone" would be scored untrained. Remove absent.',
        ),
        (
            built.by_noise and built.alone,
            'aggregate.weigh = "variance" has no effect with sharing = "alone". Remove one of them.',
        ),
    )


def _of_pool(method: Method) -> list[str]:
    """What a pool of seeds asks of a method, as it is there."""
    choices = {what: vars(method)[what] for what in ("local_optimizer", "server_optimizer", "aggregate", "assignment")}
    said = [
        f'{what} "{one["kind"]}"' + (f" with momentum {one['momentum']:g}" if one.get("momentum") else "")
        for what, one in choices.items()
    ]
    return [f'exchange "{method.exchange}"', *said, f"head_lr = {method.head_lr:g}", f"{len(method.classes)} classes"]


def _of_schedules(method: Method, built: Built, estimators: Sequence[Choice]) -> tuple[Rule, ...]:
    """What rates, growth and shrinking must not be beside."""
    served = method.server_schedule != "constant" or method.server_warmup > 0
    counted = any("directions" in one for one in estimators)
    pool = bool(built.seeds.pool)
    return (
        (
            served and built.local is None,
            'method.server_schedule and server_warmup have no effect with local_optimizer "none": schedule and warmup '
            "are the server's then. Use those.",
        ),
        (
            served and built.follows,
            'method.server_schedule and server_warmup with exchange "scalars" and a server of plain sgd: clients catch '
            'up by replay and do not know the server\'s rate. Use exchange "weights", or schedule and warmup.',
        ),
        (served and built.alone, 'method.server_schedule has no effect with sharing = "alone". Remove it.'),
        (
            method.growth > 1 and (not counted or pool),
            f"method.growth = {method.growth} needs an estimator with directions, and no pool of seeds, whose steps "
            f"have as many scalars all along. Use growth = 1.",
        ),
        (
            method.shrink and (all(is_dense(one) for one in estimators) or pool),
            "method.shrink scales steps by the noise of estimates along directions, and not over a pool of seeds; "
            "here there is nothing to scale. Use shrink = false.",
        ),
        (
            method.guide_decay > 0 and not method.guide,
            f"method.guide_decay = {method.guide_decay} has no effect without guide. Set that, or remove it.",
        ),
        (
            method.average_debiased and not method.average,
            "method.average_debiased has no effect without average. Set that, or remove it.",
        ),
    )
