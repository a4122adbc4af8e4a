"""The server's two moves in a round: `begin` writes the instructions, `finish` turns the answers into the next state.

    begin(state) -> instructions        finish(state, instructions, updates) -> (state, refused)

The server takes names and shapes from its own instruction, never from what a client claims. Cost: some copies of the
trainable values; needs torch alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from spryfl import aggregate, assign, noise, tree
from spryfl.methods import Built
from spryfl.types import Instruction, Params, ServerState, Unit, Update


def init(params: Params, method: Built, clients: int) -> ServerState:
    """The state before the first round. Clients that never share get a copy of the start each."""
    if method.alone:
        params = {_own(client, name): value for client in range(clients) for name, value in params.items()}
    return ServerState(0, dict(params), method.server.init(params))


def begin(
    state: ServerState,
    units: Sequence[Unit],
    cohort: Sequence[int],
    method: Built,
    seed: int,
    lr_scale: float = 1.0,
    evaluate: bool = False,
) -> list[Instruction]:
    """An instruction for each client of the cohort: its units, the head unless it is split, all current values."""
    round_ = state.round + 1
    dealt = deal(units, cohort, method, round_)
    sent = tuple(name for unit in needed(units, method) for name in unit.params)
    return [
        Instruction(
            round=round_,
            client=client,
            seed=noise.child_seed(seed, "round", round_, "client", client),
            names=tuple(name for unit in mine for name in unit.params),
            params=tree.select(personal(state.params, client, method), sent),
            lr_scale=lr_scale,
            evaluate=evaluate,
        )
        for client, mine in dealt.items()
        if mine
    ]


def deal(units: Sequence[Unit], cohort: Sequence[int], method: Built, round_: int) -> dict[int, tuple[Unit, ...]]:
    """Each client's units of this round; a head that is not split goes to all."""
    whole = () if method.split_head else tuple(unit for unit in units if unit.head)
    split = [unit for unit in units if unit not in whole]
    return {client: mine + whole for client, mine in method.assign(split, cohort, round_).items()}


def personal(params: Params, client: int, method: Built) -> Params:
    """The values that `client` works on: everyone's, or its own where nobody shares."""
    if not method.alone:
        return params
    prefix = _own(client, "")
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def finish(
    state: ServerState, told: Sequence[Instruction], updates: Iterable[Update], method: Built
) -> tuple[ServerState, dict[int, str]]:
    """The next state, and why each refused update was refused: one that does not fit its instruction is absent."""
    asked = {one.client: one for one in told}
    answers = list(updates)
    refused = {update.client: why for update in answers if (why := objection(update, asked.get(update.client)))}
    kept = [update for update in answers if update.client not in refused]
    if method.alone:
        kept = [u._replace(params={_own(u.client, name): v for name, v in u.params.items()}) for u in kept]
    grads = aggregate.pseudo_gradient(state.params, kept)
    params, optimizer = method.server.step(state.params, grads, state.optimizer)
    return ServerState(state.round + 1, params, optimizer), refused


def objection(update: Update, told: Instruction | None) -> str:
    """What is wrong with an update, or an empty text."""
    if told is None:
        return "this client was not asked"
    if update.round != told.round:
        return f"answers round {update.round}, asked in round {told.round}"
    if set(update.params) != set(told.names):
        return "returns other names than it was told to train"
    if any(value.shape != told.params[name].shape for name, value in update.params.items()):
        return "returns other shapes than it was sent"
    if update.examples < 1:
        return f"claims {update.examples} examples"
    return "" if tree.is_finite(update.params) else "returns values that are not finite"


def needed(units: Sequence[Unit], method: Built) -> list[Unit]:
    """Units that must travel: all, unless only the head ever moves; the rest then is as the model starts."""
    return [unit for unit in units if unit.head or method.assign is not assign.no_unit]


def _own(client: int, name: str) -> str:
    return f"client {client}/{name}"
