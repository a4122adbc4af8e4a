"""The laws of an estimator as one function, for your own estimators too, and the toy loss on which they are checked.

    from spryfl.testing import check_estimator
    check_estimator(my_builder(directions=4), variance=lambda gradient: ...)

The laws: what comes back is an Estimate of plain numbers and detached tensors; the same seed gives the same result;
neither the values nor PyTorch's generator are moved; every value is covered once, by the dense part or by terms; the
loss is the loss, dropout masks from the seed; coefficients are float32, seeds 63-bit, distributions known; directions
differ between terms and steps; passes are not negative; a batch in pieces gives what the whole one gives, and takes no
more rows at once; the mean over seeds is the gradient, and where a variance is claimed it is that. Needs torch alone.
Cost: two estimates and a gradient for each of 300 seeds, seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from spryfl import noise, tree
from spryfl.estimators.pieces import weighed
from spryfl.types import Batch, Cut, Estimate, Estimator, Features, Params, Piece

HEAD = ("head.weight", "head.bias")


class Toy:
    """A network of two blocks and a head in plain tensors: tanh(x A), tanh(h B), mean cross entropy of a linear map.

    It offers all that `LossFn` asks for. Dropout on the input of each block, masks from the seed and the block.

    Args:
        fixed: values that are not given at each call.
        guide: the last aggregated pseudo-gradient.
        dropout: share of a block's inputs that is zeroed.
        micro_batch: rows at once; 0 for whole batches.

    >>> params, batch = problem()
    >>> cut = Toy().cut(batch, top=1)
    >>> bool(cut.head(params, cut.trunk(params)) == Toy()(params, batch))
    True
    """

    blocks = ("a", "b")
    head = frozenset(HEAD)

    def __init__(
        self, fixed: Params | None = None, guide: Params | None = None, dropout: float = 0.0, micro_batch: int = 0
    ) -> None:
        self.fixed, self.guide, self.dropout, self.micro_batch = fixed or {}, guide or {}, dropout, micro_batch
        self.most = 0  # rows that were asked for at once

    def pieces(self, batch: Batch, seed: int | None = None) -> tuple[Piece, ...]:
        """The parts that a batch is to be taken in."""
        rows = len(batch["labels"])
        step = self.micro_batch or rows
        parts = [{name: value[i : i + step] for name, value in batch.items()} for i in range(0, rows, step)]
        return weighed(parts, [len(part["labels"]) for part in parts], seed)

    def _through(self, params: Params, h: Tensor, blocks: Sequence[str], seed: int | None) -> Tensor:
        for name in blocks:
            h = torch.tanh(self._masked(h, name, seed) @ {**self.fixed, **params}[name])
        return h

    def _masked(self, h: Tensor, block: str, seed: int | None) -> Tensor:
        if seed is None or not self.dropout:
            return h
        normal = noise.direction(noise.child_seed(seed, "mask"), {block: torch.empty(h.shape)})[block]
        kept = normal > torch.special.ndtri(torch.tensor(self.dropout))
        return h * kept / (1 - self.dropout)

    def _answer(self, params: Params, h: Tensor, batch: Batch) -> Tensor:
        p = {**self.fixed, **params}
        return torch.nn.functional.cross_entropy(h @ p["head.weight"].T + p["head.bias"], batch["labels"])

    def __call__(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        """The loss of one batch."""
        self.most = max(self.most, len(batch["labels"]))
        return self._answer(params, self._through(params, batch["x"], self.blocks, seed), batch)

    def cut(self, batch: Batch, seed: int | None = None, top: int = 0, checkpoint: bool = False) -> Cut:
        """The same loss in two parts, the last `top` blocks in the second; -1 for both."""
        if not -1 <= top <= len(self.blocks):
            raise ValueError(f"top = {top}, but the toy has {len(self.blocks)} blocks.")
        self.most = max(self.most, len(batch["labels"]))
        at = 0 if top == -1 else len(self.blocks) - top
        below, above = self.blocks[:at], self.blocks[at:]

        def head(params: Params, given: Features) -> Tensor:
            later = lambda h: self._answer(params, self._through(params, h, above, seed), batch)  # noqa: E731
            return recomputed(later, *given, use_reentrant=False) if checkpoint else later(*given)

        def trunk(params: Params) -> Features:
            return (self._through(params, batch["x"], below, seed),)

        return Cut(trunk, head, frozenset(above) | self.head, len(above) / len(self.blocks))

    def checkpointed(self, params: Params, batch: Batch, seed: int | None = None) -> Tensor:
        """The same loss, its activations computed again on the way back."""
        return recomputed(lambda: self(params, batch, seed), use_reentrant=False)


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and a batch for `Toy`: 12 + 8 values in the blocks and 9 in the head, 5 rows of 3 classes.

    Args:
        seed: of the values.
        dtype: of values and inputs.

    Returns:
        (values by name, batch).
    """
    shapes = {"a": (3, 4), "b": (4, 2), "head.weight": (3, 2), "head.bias": (3,), "x": (5, 3)}
    drawn = noise.direction(seed, {name: torch.empty(shape) for name, shape in shapes.items()})
    params = {name: value.to(dtype) for name, value in drawn.items()}
    return params, {"x": params.pop("x"), "labels": torch.tensor([0, 1, 2, 1, 0])}


def true_gradient(
    params: Params, batch: Batch, loss_fn: Callable[..., Tensor] | None = None, seed: int | None = None
) -> dict[str, Tensor]:
    """The gradient of the whole loss by `torch.autograd`; of the toy's where no loss is given.

    Args:
        params: values by name.
        batch: what the loss takes.
        loss_fn: (params, batch, seed) -> loss.
        seed: of the dropout masks; None for none.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    grads = torch.autograd.grad((loss_fn or Toy())(leaves, batch, seed), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def check_estimator(
    estimator: Estimator,
    *,
    seeds: int = 300,
    unbiased: bool = True,
    variance: Callable[[Params], float] | None = None,
    loss_error: float = 1e-6,
    bias: float = 0.0,
    pieces: bool = True,
) -> None:
    """Holds an estimator against every law on the toy loss: 29 values in 4 tensors, float32, with dropout.

    Args:
        estimator: what a builder returned, not the builder.
        seeds: how many estimates the mean and the variance are taken over; fewer make a coarser test.
        unbiased: the mean over seeds must be the gradient; False for an estimator that does not claim it.
        variance: from the true gradient (by name) to the E|g_hat - g|^2 that is claimed; None for no claim.
        loss_error: how far the reported loss may be from the loss, relative; central differences err by O(mu^2).
        pieces: it takes its batch in the pieces that the loss asks for (train.micro_batch); False for one that cannot,
            which is refused where a run asks for them.
        bias: how far the mean may be from the gradient beside chance, relative; differences err by O(mu^2) or O(mu).

    Raises:
        AssertionError: it says which law is broken, with the numbers.

    >>> from spryfl.estimators import backprop
    >>> check_estimator(backprop(), seeds=10, variance=lambda truth: 0.0)
    """
    params, batch = problem(dtype=torch.float32)
    loss_fn = Toy(dropout=0.2)
    _check_one(estimator, loss_fn, params, batch, loss_error)
    _check_seeds(estimator, loss_fn, params, batch)
    if pieces:
        _check_pieces(estimator, params, batch)
    if unbiased or variance:
        _check_moments(estimator, loss_fn, params, batch, seeds, variance, bias if unbiased else math.inf)


def gradient(estimate: Estimate, params: Params) -> dict[str, Tensor]:
    """The gradient that an estimate stands for: its dense part and its terms.

    Args:
        estimate: what an estimator returned.
        params: the values that it is of.
    """
    return tree.add(estimate.dense, noise.expand(estimate.terms, params))


def _law(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(text)


def _check_one(estimator: Estimator, loss_fn: Any, params: Params, batch: Batch, loss_error: float) -> None:
    """What must hold of a single estimate."""
    kept, before = {name: value.clone() for name, value in params.items()}, torch.get_rng_state()
    one, two = (_asked(estimator, loss_fn, params, batch) for _ in range(2))
    moved = [name for name in params if not torch.equal(params[name], kept[name]) or params[name].requires_grad]
    _law(not moved, f"an estimate must not move the values it is given; it moved {moved}.")
    _law(torch.equal(before, torch.get_rng_state()), "an estimate must not move PyTorch's global generator.")
    same = (one.loss, one.terms) == (two.loss, two.terms)
    same = same and set(one.dense) == set(two.dense)
    same = same and all(torch.equal(one.dense[name], two.dense[name]) for name in one.dense)
    _law(
        same,
        f"the same seed must give the same result; twice seed 5 gave losses {one.loss} and {two.loss}. All that is "
        f"random must follow from the seed: noise.child_seed, noise.stack, loss_fn(params, batch, seed).",
    )
    _check_cover(one, params)
    loss = float(loss_fn(params, batch, 5))
    _law(
        abs(one.loss - loss) <= loss_error * abs(loss),
        f"the reported loss must be the loss at the values, masks by the seed: {one.loss} is not {loss} "
        f"(relative error {abs(one.loss / loss - 1):.1e}, allowed {loss_error:.1e}).",
    )
    _law(min(one.passes) >= 0, f"passes must not be negative: {one.passes}.")
    _law(one.passes.value > 0, f"a value pass must be counted: {one.passes}.")
    graphs = [name for name, value in one.dense.items() if value.requires_grad]
    _law(not graphs, f"what an estimator returns must not need a gradient; {graphs} do.")


def _asked(estimator: Estimator, loss_fn: Any, params: Params, batch: Batch) -> Estimate:
    """One estimate, if it is one."""
    one: Any = estimator(loss_fn, params, batch, 5)
    _law(
        isinstance(one, Estimate),
        f"an estimator returns an Estimate, this one a {type(one).__name__}. Give what the builder returns, "
        f"my_builder(), not the builder.",
    )
    plain = isinstance(one.loss, float) and all(isinstance(term.coefficient, float) for term in one.terms)
    _law(plain, "the loss and the coefficients are plain floats: float(loss), slopes.tolist().")
    return one


def _check_cover(estimate: Estimate, params: Params) -> None:
    """Every value by the dense part or by terms, and what the wire can carry."""
    seeded = {name for term in estimate.terms for name in term.block}
    dense = set(estimate.dense)
    _law(not dense & seeded, f"a value is covered once; these are dense and seeded: {sorted(dense & seeded)}.")
    _law(dense | seeded == set(params), f"every value is covered; wrong: {(dense | seeded) ^ set(params)}.")
    shapes = [name for name, value in estimate.dense.items() if value.shape != params[name].shape]
    _law(not shapes, f"the dense part has the values' shapes; others: {shapes}.")
    wide = [t.coefficient for t in estimate.terms if t.coefficient != float(torch.tensor(t.coefficient).float())]
    _law(
        not wide,
        f"a coefficient must be a float32, which four bytes carry; these are not: {wide[:3]}. Divide first, then "
        f"round: (slopes / K).float().tolist().",
    )
    seeds = [term.seed for term in estimate.terms if not 0 <= term.seed < 1 << 63]
    _law(
        not seeds,
        f"a seed is a whole number from 0 to 2^63 - 1; these are not: {seeds[:3]}. noise.child_seed gives one.",
    )
    unknown = {term.distribution for term in estimate.terms} - set(noise.DISTRIBUTIONS)
    _law(
        not unknown,
        f"directions are made again by the name of their law; not in noise.DISTRIBUTIONS: {sorted(unknown)}.",
    )


def _check_seeds(estimator: Estimator, loss_fn: Any, params: Params, batch: Batch) -> None:
    """No direction comes twice, within an estimate or in another step."""
    used: list[int] = []
    for step in range(3):
        used += [term.seed for term in estimator(loss_fn, params, batch, noise.child_seed(0, "step", step)).terms]
    twice = len(used) - len(set(used))
    _law(not twice, f"no direction may come twice, in one estimate or in two steps; {twice} of {len(used)} did.")


def _check_pieces(estimator: Estimator, params: Params, batch: Batch) -> None:
    """In pieces of 2, 2 and 1 rows the estimate is that of the whole batch, and no more rows are asked for at once.

    In float64, so that what rounding does to a difference of losses stays far below what a wrong weight would do.
    """
    params, batch = (
        {name: v.double() if v.is_floating_point() else v for name, v in x.items()} for x in (params, batch)
    )
    loss_fn = Toy(micro_batch=2)
    whole, parts = (_asked(estimator, fn, params, batch) for fn in (Toy(), loss_fn))
    _law(
        loss_fn.most <= 2,
        f"a batch is taken in the pieces that the loss asks for, so that memory is one piece's: asked for 2 rows at "
        f"once, it took {loss_fn.most}. Sum what is linear in the loss over loss_fn.pieces(batch, seed), by "
        f"spryfl.estimators.pieces.summed; or say pieces=False.",
    )
    one, other = (gradient(estimate, params) for estimate in (whole, parts))
    off = tree.norm(tree.subtract(one, other)) / max(tree.norm(one), 1e-30)
    _law(
        off <= 1e-5 and abs(whole.loss - parts.loss) <= 1e-5 * abs(whole.loss),
        f"a batch in pieces gives what the whole gives: losses {whole.loss} and {parts.loss}, gradients {off:.1e} "
        f"apart. Weigh each piece by piece.weight, and clip, divide by a deviation or refuse after the sum.",
    )
    _law(
        whole.passes == parts.passes,
        f"a piece is its share of a pass, so a batch in pieces takes the whole's: {whole.passes}, not {parts.passes}.",
    )


def _check_moments(
    estimator: Estimator,
    loss_fn: Any,
    params: Params,
    batch: Batch,
    seeds: int,
    variance: Callable[[Params], float] | None,
    bias: float,
) -> None:
    """The mean of g_hat - g over seeds, and of its square, within four standard errors."""
    errors, scales, claims, size = [], [], [], 0.0
    for k in range(seeds):
        seed = noise.child_seed(0, "law", k)
        truth = true_gradient(params, batch, loss_fn, seed)
        errors.append(_flat(tree.subtract(gradient(estimator(loss_fn, params, batch, seed), params), truth)))
        scales.append(float(errors[-1] @ _flat(truth)) / tree.norm(truth) ** 2)
        claims.append(variance(truth) if variance else 0.0)
        size += tree.norm(truth) / seeds
    error, along = torch.stack(errors), torch.tensor(scales, dtype=torch.float64)
    squares = error.square().sum(1)
    measured = float(squares.mean())
    scale, off = float(along.mean()), float(error.mean(0).norm())
    allowed = bias + 4 * float(along.std()) / math.sqrt(seeds) + 1e-4
    _law(
        abs(scale) <= allowed,
        f"the mean over seeds must be the gradient: along it, it is {1 + scale:.4g} times the gradient over {seeds} "
        f"seeds, where {allowed:.4g} more or less is allowed. Is 1/K in the coefficients, once?",
    )
    allowed = bias * size + 3 * math.sqrt(measured / seeds) + 1e-4 * size
    _law(
        off <= allowed,
        f"the mean over seeds must be the gradient: |mean(g_hat) - g| = {off:.4g} over {seeds} seeds, "
        f"at most {allowed:.4g} by chance and the allowed bias; |g| = {size:.4g}.",
    )
    if variance:
        claimed = sum(claims) / seeds
        spread = 4 * float((squares - torch.tensor(claims)).std()) / math.sqrt(seeds)
        slack = spread + (2 * bias if math.isfinite(bias) else 0.1) * claimed + (1e-4 * size) ** 2
        _law(
            abs(measured - claimed) <= slack,
            f"E|g_hat - g|^2 must be what is claimed: measured {measured:.4g}, claimed {claimed:.4g}, "
            f"difference allowed {slack:.4g} over {seeds} seeds.",
        )


def _flat(values: Params) -> Tensor:
    return torch.cat([value.double().flatten() for value in values.values()])
